// From pages back to states: keys after RoPE and values, outliers in place.
//
// Grid: (sequence, KV head, slab). A block decodes a slab's side into shared memory, adds the
// deltas of its outliers, turns keys by their position and writes rows.
//
// `key`, `value`  (batch, num_kv_heads, tokens, HEAD_DIM) half, or bfloat16 with BF16: the result
// The rest as in attend.cu. Macros: those of pack.cu.
#include "pack.cuh"

constexpr u32 TILE_ROW = HEAD_DIM + 4;

struct Source {
    const u8* words;  // of the slab
    const u32 *ranges, *index, *outlier_words;
    Decode decode;
    u32 head;
};

// Codes of one side to float rows by place.
template <bool is_key>
DEVICE void decode_side(const Source& from, float* tile) {
    constexpr u32 bits = is_key ? KEY_BITS : VALUE_BITS;
    u32 lane = thread_index() % 32, step = thread_index() / 32, words[bits];
    Tile<bits> tiles[4];
    read_words<bits>(from.words + step * step_bytes(bits), lane, words);
    selectors<bits, is_key>(words, tiles);
    KVQ_UNROLL for (u32 n = 0; n < 32; n++) {
        u32 token, at, code = (u32)(tiles[n / 8] >> room_of(bits) * (n % 8)) & ((1u << bits) - 1);
        if constexpr (is_key) {
            key_place(n, step, lane, token, at);
            tile[token * TILE_ROW + at] = key_dense(from.decode, from.head, at, code);
        } else {
            value_place(n, step, lane, token, at);
            tile[token * TILE_ROW + at] = value_dense(from.decode, from.ranges[token], code);
        }
    }
}

// Add the deltas of a side's list; no two words mean one place.
template <bool is_key>
DEVICE void add_outliers(const Source& from, float* tile) {
    const u32* list = from.index + (is_key ? 0 : 2);
    const u32* words = from.outlier_words + (u64)list[0] * 4;
    u32 first = list[1] & IN_ROUNDS ? HEADER : 0, last = (list[1] & ~IN_ROUNDS) * 4;
    for (u32 i = first + thread_index(); i < last; i += STEPS * 32) {
        u32 word = words[i];
        if (word) tile[token_of(word) * TILE_ROW + place_of(word)] += h2_high(word);
    }
}

KERNEL(STEPS * 32)
dequantize(const u8* slabs, const u32* ranges, const u32* index, const u32* outlier_words,
           const int* page_table, const int* state, const u16* key_levels, const u16* levels,
           const u64* frequencies, const u16* order, u16* key, u16* value, u32 num_kv_heads,
           u32 max_pages, u32 tokens) {
    float* tile = (float*)shared_memory();
    u32 many = (tokens + 63) / 64, number = block_index() % many;
    u32 head = block_index() / many % num_kv_heads, sequence = block_index() / many / num_kv_heads;
    u32 packed = (u32)state[8 * sequence];
    if (number * 64 >= packed) return;
    u32 page = page_table[sequence * max_pages + number / 2], count = packed - number * 64;
    u64 slab = ((u64)page * num_kv_heads + head) * 2 + number % 2;
    Source from{slabs + slab * STEPS * (step_bytes(KEY_BITS) + step_bytes(VALUE_BITS)),
                ranges + page * 128 + number % 2 * 64,
                index + 4 * slab,
                outlier_words,
                Decode{levels, key_levels, (const u32*)key_levels},
                head};
    u64 row = ((u64)sequence * num_kv_heads + head) * tokens + number * 64;
    constexpr u32 half = HEAD_DIM / 2;
    decode_side<true>(from, tile);
    sync_block();
    if constexpr (OUTLIERS) add_outliers<true>(from, tile);
    sync_block();
    for (u32 i = thread_index(); i < smaller(count, 64) * half; i += STEPS * 32) {
        u32 token = i / half, place = i % half;
        float low = tile[token * TILE_ROW + place], high = tile[token * TILE_ROW + place + half];
        u16* to = key + (row + token) * HEAD_DIM;
        float sine = 0.0f, cosine = 1.0f;
        if constexpr (ROTATED) {
            int position = state[8 * sequence + 3] + (int)(number * 64 + token);
            u64 phase = frequencies[place] * (u64)(long long)position;
            sine_cosine((int)(u32)(phase >> 32), sine, cosine);
        }
        to[order[place]] = state_bits(low * cosine - high * sine);
        to[order[place + half]] = state_bits(high * cosine + low * sine);
    }
    sync_block();
    from.words += STEPS * step_bytes(KEY_BITS);
    decode_side<false>(from, tile);
    sync_block();
    if constexpr (OUTLIERS) add_outliers<false>(from, tile);
    sync_block();
    for (u32 i = thread_index(); i < smaller(count, 64) * HEAD_DIM; i += STEPS * 32) {
        u32 token = i / HEAD_DIM, channel = i % HEAD_DIM;
        value[(row + token) * HEAD_DIM + channel] = state_bits(tile[token * TILE_ROW + channel]);
    }
}
