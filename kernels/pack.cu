// From the states a model computed to pages: codes, ranges and outliers, the same bits as codec.py.
//
// Three kernels, so that lists of outliers get exactly the room they need: `survey_values` finds
// each token's range and which elements are outliers, `survey_keys` counts them, and, once the host
// has laid out the lists, `pack_slabs` writes everything. Each float operation is one IEEE
// operation in the order of codec.py; nothing is contracted.
//
// `states`  (batch, num_kv_heads, tokens, HEAD_DIM) half, or bfloat16 with BF16; keys after RoPE
// `turns`   (tokens, HEAD_DIM / 2) float cosine and sine a pair by place, with ROTATED
// `ranges`  (pages, 128) half2: scale and offset
// `cuts`    (batch, tokens) x {least exact key, tie channel, greatest exact key, tie channel} u16
// `index`   (pages, num_kv_heads, 2) x {first quad, quads} of keys, then of values
// Macros: HEAD_DIM, KEY_BITS, VALUE_BITS, CHANNEL_LEVELS, ROTATED, OUTLIERS, BF16, WARPS.
#include "pack.cuh"

// Grid: (sequence, KV head, slab). Leaves the number of key outliers in `counts` (lists, 2).
KERNEL(STEPS * 32)
survey_keys(const u16* key, const int* page_table, const float* lower, const float* upper,
            const float* offset, const float* inverse, const float* middles, const u16* order,
            const float* turns, u32* counts, u32 num_kv_heads, u32 tokens, u32 first_slab,
            u32 max_pages) {
    u16* staged = (u16*)shared_memory();
    u32 slabs = (tokens + 63) / 64, lane = thread_index() % 32, step = thread_index() / 32;
    Place place =
        find_place(block_index(), num_kv_heads, slabs, tokens, first_slab, page_table, max_pages);
    KeyCode code{lower, upper, offset, inverse, middles, order, turns};
    stage(key, place, num_kv_heads, tokens, staged);
    sync_block();
    u32 found = 0, total;
    KVQ_ROLLED for (u32 n = 0; n < 32; n++) {
        u32 token, at;
        key_place(n, step, lane, token, at);
        if (token < place.tokens) found += key_element(code, staged, place, token, at).is_outlier;
    }
    lanes_before(found, lane, total);
    u32 list = (place.page * num_kv_heads + place.head) * 2 + (first_slab + place.slab) % 2;
    if (lane == 0 && total) add_global(counts + 2 * list, total);
}

// Grid: tokens of all sequences, a warp each. The `per_tail` least and greatest elements of a token
// over all KV heads are outliers, lower channels first among equals; the range is that of the rest.
// Two histograms find the cuts: of the upper bytes, then of the lower bytes within a bin.
KERNEL(WARPS * 32)
survey_values(const u16* value, const int* page_table, u32* ranges, u16* cuts, u32* counts,
              u32 batch, u32 num_kv_heads, u32 tokens, u32 first_slab, u32 max_pages,
              u32 per_tail) {
    u32 lane = thread_index() % 32, warp = thread_index() / 32, channels = num_kv_heads * HEAD_DIM;
    u32 number = block_index() * WARPS + warp, sequence = number / tokens, token = number % tokens;
    if (number >= batch * tokens) return;
    u16* keys = (u16*)(shared_memory() + warp * (channels * 2 + 3072));
    u32* bins = (u32*)(keys + channels);
    for (u32 i = lane; i < 768; i += 32) bins[i] = 0;
    sync_warp();
    for (u32 i = lane; i < channels / 2; i += 32) {
        u32 head = 2 * i / HEAD_DIM, at = 2 * i % HEAD_DIM;
        u32 pair =
            *(const u32*)(value +
                          (((u64)sequence * num_kv_heads + head) * tokens + token) * HEAD_DIM + at);
        u32 low = order_key((u16)pair), high = order_key((u16)(pair >> 16));
        ((u32*)keys)[i] = low | high << 16;
        if (per_tail)
            add_shared((int*)bins + (low >> 8), 1), add_shared((int*)bins + (high >> 8), 1);
    }
    sync_warp();
    u32 least = 0, greatest = 0xffff, least_tie = 0, greatest_tie = ~0u;  // of the exact elements
    bool has_exact = per_tail != 0;
    if (has_exact) {
        u32 low_left = per_tail, high_left = per_tail;
        u32 low_bin = rank_bin<false>(bins, lane, low_left),
            high_bin = rank_bin<true>(bins, lane, high_left);
        for (u32 i = lane; i < channels; i += 32) {
            if (keys[i] >> 8 == (int)low_bin) add_shared((int*)bins + 256 + (keys[i] & 255), 1);
            if (keys[i] >> 8 == (int)high_bin) add_shared((int*)bins + 512 + (keys[i] & 255), 1);
        }
        sync_warp();
        least = low_bin << 8 | rank_bin<false>(bins + 256, lane, low_left);
        greatest = high_bin << 8 | rank_bin<true>(bins + 512, lane, high_left);
        least_tie = tie_channel<false>(keys, channels, lane, least, low_left);
        greatest_tie = tie_channel<true>(keys, channels, lane, greatest, high_left);
    }
    u16 cut[4] = {(u16)least, (u16)least_tie, (u16)greatest, (u16)greatest_tie};
    u32 low = 0xffff, high = 0;
    for (u32 i = lane; i < channels; i += 32) {
        u32 key = keys[i];
        if (has_exact && is_cut(cut, key, i)) {
            u32 slab = first_slab + token / 64, page = page_table[sequence * max_pages + slab / 2];
            add_global(counts + ((page * num_kv_heads + i / HEAD_DIM) * 2 + slab % 2) * 2 + 1, 1);
        } else {
            low = smaller(low, key), high = larger(high, key);
        }
    }
    KVQ_UNROLL for (u32 mask = 1; mask < 32; mask *= 2) {
        low = smaller(low, exchange(low, mask));
        high = larger(high, exchange(high, mask));
    }
    if (lane != 0) return;
    u32 at = first_slab * 64 + token, page = page_table[sequence * max_pages + at / 128];
    ranges[page * 128 + at % 128] = range_of(low, high);
    for (u32 i = 0; i < 4; i++) cuts[(u64)number * 4 + i] = cut[i];
}

// Grid: (sequence, KV head, slab). A warp writes one step of the keys and one of the values.
KERNEL(STEPS * 32)
pack_slabs(const u16* key, const u16* value, const int* page_table, const float* lower,
           const float* upper, const float* offset, const float* inverse, const float* key_middles,
           const float* value_middles, const u16* order, const float* turns, const u16* levels,
           const u16* key_levels, const u32* ranges, const u16* cuts, const u32* index, u8* slabs,
           u32* outlier_words, u32 num_kv_heads, u32 tokens, u32 first_slab, u32 max_pages) {
    u16* staged = (u16*)shared_memory();
    u16* staged_value = staged + 64 * ROW;
    u32* counts = (u32*)(staged_value + 64 * ROW);
    u32 many = (tokens + 63) / 64, lane = thread_index() % 32, step = thread_index() / 32;
    Place place =
        find_place(block_index(), num_kv_heads, many, tokens, first_slab, page_table, max_pages);
    KeyCode code{lower, upper, offset, inverse, key_middles, order, turns};
    Decode decode{levels, key_levels, (const u32*)key_levels};
    stage(key, place, num_kv_heads, tokens, staged);
    stage(value, place, num_kv_heads, tokens, staged_value);
    sync_block();
    u32 parity = (first_slab + place.slab) % 2;
    u64 list = ((u64)place.page * num_kv_heads + place.head) * 2 + parity;
    const u32* range = ranges + place.page * 128 + parity * 64;
    const u16* cut = cuts + ((u64)place.sequence * tokens + place.slab * 64) * 4;
    u32 flags[2] = {0, 0};
    KVQ_UNROLL for (int side = 0; side < 2; side++) {
        u32 tiles[4] = {0, 0, 0, 0};
        KVQ_ROLLED for (u32 t = 0; t < 4; t++) {
            u32 word = 0;
            KVQ_UNROLL for (u32 i = 0; i < 8; i++) {
                u32 token, at;
                if (side)
                    value_place(8 * t + i, step, lane, token, at);
                else
                    key_place(8 * t + i, step, lane, token, at);
                if (token >= place.tokens) continue;
                Element found = side ? value_element(value_middles, staged_value, range[token],
                                                     cut + 4 * token, place.head, token, at)
                                     : key_element(code, staged, place, token, at);
                word |= found.code << 4 * i;
                flags[side] |= (u32)found.is_outlier << (8 * t + i);
            }
            KVQ_UNROLL for (int k = 0; k < 3; k++) tiles[k] = tiles[k + 1];
            tiles[3] = word;
        }
        u8* to = slabs + list * STEPS * (step_bytes(KEY_BITS) + step_bytes(VALUE_BITS));
        if (side)
            store_codes<VALUE_BITS>(
                to + STEPS * step_bytes(KEY_BITS) + step * step_bytes(VALUE_BITS), lane, tiles);
        else
            store_codes<KEY_BITS>(to + step * step_bytes(KEY_BITS), lane, tiles);
    }
    if constexpr (!OUTLIERS) return;
    KVQ_UNROLL for (int side = 0; side < 2; side++) {
        u32 total, before = lanes_before(count_bits(flags[side]), lane, total);
        if (lane == 0) counts[side * STEPS + step] = total;
        sync_block();
        for (u32 s = 0; s < step; s++) before += counts[side * STEPS + s];
        const u32* where = index + 4 * list + 2 * side;
        u32* to = outlier_words + (u64)where[0] * 4;
        KVQ_ROLLED for (u32 left = flags[side]; left; left &= left - 1, before++) {
            u32 token, at, n = lowest_bit(left);
            if (side) {
                value_place(n, step, lane, token, at);
                Element found = value_element(value_middles, staged_value, range[token],
                                              cut + 4 * token, place.head, token, at);
                float dense = value_dense(decode, range[token], found.code);
                to[before] = delta_word(found.state, dense, at << 8 | token << 2);
            } else {
                key_place(n, step, lane, token, at);
                Element found = key_element(code, staged, place, token, at);
                to[before] = delta_word(found.state, key_dense(decode, place.head, at, found.code),
                                        key_where(token, at));
            }
        }
        if (step == STEPS - 1 && lane == 31) {
            for (; before < where[1] * 4; before++) to[before] = 0;
        }
    }
}
