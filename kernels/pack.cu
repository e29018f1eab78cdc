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
// `index`   (pages, num_kv_heads, 2) x {first quad, quads} of keys, then of values; SORTED lists of
//           values begin with 32 bytes, where each reading lane's words are
// Macros: HEAD_DIM, KEY_BITS, VALUE_BITS, CHANNEL_LEVELS, ROTATED, OUTLIERS, BF16, WARPS.
#include "pack.cuh"

// Grid: (sequence, KV head, slab). Leaves the number of key outliers in `counts` (lists, 2).
KERNEL(STEPS * 32)
survey_keys(const u16* key, const int* page_table, const float* lower, const float* upper,
            const float* offset, const float* inverse, const float* middles, const u16* order,
            const float* turns, u32* counts, u32 num_kv_heads, u32 tokens, u32 max_pages) {
    u16* staged = (u16*)shared_memory();
    u32 slabs = (tokens + 63) / 64, lane = thread_index() % 32, step = thread_index() / 32;
    Place place = find_place(block_index(), num_kv_heads, slabs, tokens, page_table, max_pages);
    KeyCode code{lower, upper, offset, inverse, middles, order, turns};
    stage(key, place, num_kv_heads, tokens, staged);
    sync_block();
    KeyChannel channels[2][2];
    lane_channels(code, place.head, step, lane, channels);
    u32 found = 0, total;
    KVQ_UNROLL_4 for (u32 n = 0; n < 16; n++) {
        u32 token = n / 2 * 8 + lane / 4, e = n % 2;
        if (token >= place.tokens) continue;
        Element pair[2];
        key_pair(code, channels[e], staged + token * ROW, place.slab * 64 + token,
                 8 * step + lane % 4 * 2 + e, pair);
        found += pair[0].is_outlier + pair[1].is_outlier;
    }
    lanes_before(found, lane, total);
    u32 list = (place.page * num_kv_heads + place.head) * 2 + place.slab % 2;
    if (lane == 0 && total) add_global(counts + 2 * list, total);
}

// Grid: tokens of all sequences, a warp each. The `per_tail` least and greatest elements of a token
// over all KV heads are outliers, lower channels first among equals; the range is that of the rest.
// Two histograms find the cuts: of the upper bytes, then of the lower bytes within a bin.
KERNEL(WARPS * 32)
survey_values(const u16* value, const int* page_table, u32* ranges, u16* cuts, u32* counts,
              u32 batch, u32 num_kv_heads, u32 tokens, u32 max_pages, u32 per_tail) {
    u32 lane = thread_index() % 32, warp = thread_index() / 32, channels = num_kv_heads * HEAD_DIM;
    u32 number = block_index() * WARPS + warp, sequence = number / tokens, token = number % tokens;
    if (number >= batch * tokens) return;
    u32* bins = (u32*)(shared_memory() + warp * (channels * 2 + 4096));
    u16* keys = (u16*)(bins + 1024);
    KVQ_UNROLL_4 for (u32 i = lane; i < 1024; i += 32) bins[i] = 0;
    u32 lane_least = 0xffff, lane_greatest = 0;
    KVQ_UNROLL_4 for (u32 i = lane; i < channels / 2; i += 32) {
        u32 head = 2 * i / HEAD_DIM, at = 2 * i % HEAD_DIM;
        u64 row = ((u64)sequence * num_kv_heads + head) * tokens + token;
        u32 pair = *(const u32*)(value + row * HEAD_DIM + at);
        u32 low = order_key((u16)pair), high = order_key((u16)(pair >> 16));
        ((u32*)keys)[i] = low | high << 16;
        lane_least = smaller(lane_least, smaller(low, high));
        lane_greatest = larger(lane_greatest, larger(low, high));
    }
    sync_warp();
    u32 least = 0, greatest = 0xffff, least_tie = 0, greatest_tie = ~0u;  // of the exact elements
    bool has_exact = per_tail != 0;
    if (has_exact) {
        // 32 elements, the least of each lane, lie at or below the greatest of them: few elements
        // can be among the `per_tail` least, and likewise at the other end.
        KVQ_UNROLL for (u32 mask = 1; mask < 32; mask *= 2) {
            lane_least = larger(lane_least, exchange(lane_least, mask));
            lane_greatest = smaller(lane_greatest, exchange(lane_greatest, mask));
        }
        u32 ceiling = per_tail > 32 ? 0xffff : lane_least,
            floor = per_tail > 32 ? 0 : lane_greatest;
        KVQ_UNROLL_4 for (u32 i = lane; i < channels; i += 32) {
            u32 key = keys[i];
            if (key <= ceiling) add_shared((int*)bins + (key >> 8), 1);
            if (key >= floor) add_shared((int*)bins + 256 + (key >> 8), 1);
        }
        sync_warp();
        u32 low_left = per_tail, high_left = per_tail;
        u32 low_bin = rank_bin<false>(bins, lane, low_left);
        u32 high_bin = rank_bin<true>(bins + 256, lane, high_left);
        KVQ_UNROLL_4 for (u32 i = lane; i < channels; i += 32) {
            u32 key = keys[i];
            if (key >> 8 == low_bin) add_shared((int*)bins + 512 + (key & 255), 1);
            if (key >> 8 == high_bin) add_shared((int*)bins + 768 + (key & 255), 1);
        }
        sync_warp();
        u32 low = rank_bin<false>(bins + 512, lane, low_left);
        u32 high = rank_bin<true>(bins + 768, lane, high_left);
        least = low_bin << 8 | low, greatest = high_bin << 8 | high;
        least_tie = bins[512 + low] == low_left
                        ? 0xffff
                        : tie_channel<false>(keys, channels, lane, least, low_left);
        greatest_tie = bins[768 + high] == high_left
                           ? 0
                           : tie_channel<true>(keys, channels, lane, greatest, high_left);
    }
    u16 cut[4] = {(u16)least, (u16)least_tie, (u16)greatest, (u16)greatest_tie};
    u32 low = 0xffff, high = 0;
    KVQ_UNROLL_4 for (u32 i = lane; i < channels; i += 32) {
        u32 key = keys[i];
        if (has_exact && is_cut(cut, key, i)) {
            u32 slab = token / 64, page = page_table[sequence * max_pages + slab / 2];
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
    u32 page = page_table[sequence * max_pages + token / 128];
    ranges[page * 128 + token % 128] = range_of(low, high);
    for (u32 i = 0; i < 4; i++) cuts[(u64)number * 4 + i] = cut[i];
}

// Grid: (sequence, KV head, slab). A warp writes one step of the keys and one of the values.
KERNEL(STEPS * 32)
pack_slabs(const u16* key, const u16* value, const int* page_table, const float* lower,
           const float* upper, const float* offset, const float* inverse, const float* key_middles,
           const float* value_middles, const u16* order, const float* turns, const u16* levels,
           const u16* key_levels, const u32* ranges, const u16* cuts, const u32* index, u8* slabs,
           u32* outlier_words, u32 num_kv_heads, u32 tokens, u32 max_pages) {
    u16* staged = (u16*)shared_memory();
    u16* staged_value = staged + 64 * ROW;
    float* middles = (float*)(staged_value + 64 * ROW);  // of keys, of values
    u32* counts = (u32*)(middles + 32);
    u32* cursors = counts + STEPS;  // where each lane's outliers of values go
    for (u32 i = thread_index(); i < 32; i += STEPS * 32) {
        if (!CHANNEL_LEVELS && i < LEVELS - 1) middles[i] = key_middles[i];
        if (i >= 16 && i < 15 + (1u << VALUE_BITS)) middles[i] = value_middles[i - 16];
        cursors[i] = 0;
    }
    u32 many = (tokens + 63) / 64, lane = thread_index() % 32, step = thread_index() / 32;
    Place place = find_place(block_index(), num_kv_heads, many, tokens, page_table, max_pages);
    KeyCode code{lower, upper, offset, inverse, CHANNEL_LEVELS ? key_middles : middles,
                 order, turns};
    Decode decode{levels, key_levels, (const u32*)key_levels};
    stage(key, place, num_kv_heads, tokens, staged);
    stage(value, place, num_kv_heads, tokens, staged_value);
    sync_block();
    u32 parity = place.slab % 2;
    u64 list = ((u64)place.page * num_kv_heads + place.head) * 2 + parity;
    const u32* range = ranges + place.page * 128 + parity * 64;
    const u16* cut = cuts + ((u64)place.sequence * tokens + place.slab * 64) * 4;
    u8* to = slabs + list * STEPS * (step_bytes(KEY_BITS) + step_bytes(VALUE_BITS));
    u32 key_flags = 0, value_flags = 0, tiles[4] = {0, 0, 0, 0};
    KeyChannel channels[2][2];
    lane_channels(code, place.head, step, lane, channels);
    KVQ_ROLLED for (u32 t = 0; t < 4; t++) {
        u32 word = 0;
        KVQ_UNROLL for (u32 n = 0; n < 4; n++) {
            u32 e = n % 2, i = n / 2 * 2 + e, token = t * 16 + n / 2 * 8 + lane / 4;
            if (token >= place.tokens) continue;
            Element found[2];
            key_pair(code, channels[e], staged + token * ROW, place.slab * 64 + token,
                     8 * step + lane % 4 * 2 + e, found);
            word |= found[0].code << 4 * i | found[1].code << 4 * (i + 4);
            key_flags |= (u32)found[0].is_outlier << (8 * t + i);
            key_flags |= (u32)found[1].is_outlier << (8 * t + i + 4);
        }
        KVQ_UNROLL for (int k = 0; k < 3; k++) tiles[k] = tiles[k + 1];
        tiles[3] = word;
    }
    store_codes<KEY_BITS>(to + step * step_bytes(KEY_BITS), lane, tiles);
    u32 head_channel = place.head * HEAD_DIM;
    KVQ_ROLLED for (u32 t = 0; t < 4; t++) {
        u32 word = 0;
        KVQ_UNROLL for (u32 n = 0; n < 4; n++) {
            u32 e = n % 2, i = n / 2 * 4 + e, token = t * 16 + n / 2 * 8 + lane % 4 * 2 + e;
            if (token >= place.tokens) continue;
            float inverse = inverse_scale(range[token]);
            KVQ_UNROLL for (u32 upper = 0; upper < 2; upper++) {
                u32 at = 16 * step + 8 * upper + lane / 4;
                Element found =
                    value_element(middles + 16, staged_value[token * ROW + at], range[token],
                                  inverse, cut + 4 * token, head_channel + at);
                word |= found.code << 4 * (i + 2 * upper);
                value_flags |= (u32)found.is_outlier << (8 * t + i + 2 * upper);
            }
        }
        KVQ_UNROLL for (int k = 0; k < 3; k++) tiles[k] = tiles[k + 1];
        tiles[3] = word;
    }
    store_codes<VALUE_BITS>(to + STEPS * step_bytes(KEY_BITS) + step * step_bytes(VALUE_BITS), lane,
                            tiles);
    if constexpr (!OUTLIERS) return;

    const u32* where = index + 4 * list;
    u32* words = outlier_words + (u64)where[0] * 4;
    u32 total, before = lanes_before(count_bits(key_flags), lane, total);
    if (lane == 0) counts[step] = total;
    // A lane of the reader takes channels that are equal modulo 32.
    u32 owner = step % 2 * 16 + lane / 4;
    add_shared((int*)cursors + owner, count_bits(value_flags & 0x33333333u));
    add_shared((int*)cursors + owner + 8, count_bits(value_flags & 0xccccccccu));
    sync_block();
    for (u32 s = 0; s < step; s++) before += counts[s];
    KVQ_ROLLED for (u32 left = key_flags; left; left &= left - 1, before++) {
        u32 token, at, n = lowest_bit(left);
        key_place(n, step, lane, token, at);
        Element found[2];
        u32 e = n % 2, partner = n / 4 % 2;
        KeyChannel pair[2] = {e ? channels[1][0] : channels[0][0],
                              e ? channels[1][1] : channels[0][1]};
        key_pair(code, pair, staged + token * ROW, place.slab * 64 + token,
                 8 * step + lane % 4 * 2 + e, found);
        float state = partner ? found[1].state : found[0].state;
        float dense = key_dense(decode, place.head, at, partner ? found[1].code : found[0].code);
        words[before] = delta_word(state, dense, key_word(token, at));
    }
    if (step == STEPS - 1 && lane == 31) {
        for (; before < where[1] * 4; before++) words[before] = 0;
    }
    bool sorted = where[3] & SORTED;
    u32 room = (where[3] & ~SORTED) * 4;
    words = outlier_words + (u64)where[2] * 4;
    if (step == 0) {
        u32 start = lanes_before(cursors[lane], lane, total) + (sorted ? STARTS : 0);
        sync_warp();
        cursors[lane] = start;
        sync_warp();
        if (sorted && lane < STARTS) {
            u32 word = 0;
            KVQ_UNROLL for (u32 k = 0; k < 4; k++) word |= cursors[4 * lane + k] << 8 * k;
            words[lane] = word;
        }
        u32 end = total + (sorted ? STARTS : 0);
        if (lane < room - end && room) words[end + lane] = 0;
    }
    sync_block();
    KVQ_ROLLED for (u32 left = value_flags; left; left &= left - 1) {
        u32 token, at, n = lowest_bit(left);
        value_place(n, step, lane, token, at);
        Element found =
            value_element(middles + 16, staged_value[token * ROW + at], range[token],
                          inverse_scale(range[token]), cut + 4 * token, head_channel + at);
        u32 slot = take_shared(cursors + at % 32, 1);
        words[slot] = delta_word(found.state, value_dense(decode, range[token], found.code),
                                 at << 8 | token << 2);
    }
}
