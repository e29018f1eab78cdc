// From the states a model computed to pages: codes, ranges and outliers, the same bits as codec.py.
//
// Three kernels, so that lists of outliers get exactly the room they need: `survey_values` finds
// each token's range and which elements are outliers, `pack_slabs` writes codes and says who is an
// outlier, and, once the host has laid out the lists, `write_lists` fills them. Each float operation
// is one IEEE operation in the order of codec.py; nothing is contracted.
//
// `states`  (batch, num_kv_heads, tokens, HEAD_DIM) half, or bfloat16 with BF16; keys after RoPE
// `turns`   (batch, tokens, HEAD_DIM / 2) float cosine and sine a pair by place, with ROTATED
// `ranges`  (pages, 128) half2: scale and offset
// `cuts`    (batch, tokens) Cuts
// `index`   (pages, num_kv_heads, 2) x {first quad, quads} of keys, then of values; lists of values
//           IN_ROUNDS begin with HEADER words (kvqtool/pages.py)
// `spilled` (2, room) of keys and of values, how many in `spills` (2): outliers that adding delta and
//           code does not give back, (token * batch + sequence) * channels + channel above the half
// `key_coded`, `key_moved` and those of values: from compensate.cu, with KEY_COMP and VALUE_COMP
// Macros: HEAD_DIM, KEY_BITS, VALUE_BITS, CHANNEL_LEVELS, ROTATED, OUTLIERS, BF16, WARPS; beside
// `survey_values` also KEY_COMP and VALUE_COMP: codes are there already.
#include "pack_given.cuh"
#include "survey.cuh"

// Grid: tokens of all sequences, a warp each. The `per_tail` least and greatest elements of a token
// over all KV heads are outliers, lower channels first among the least that are equal, higher ones
// among the greatest; the range is that of the rest.
KERNEL(WARPS * 32)
survey_values(const u16* value, const int* page_table, u32* ranges, Cuts* cuts, u32* counts,
              u32 batch, u32 num_kv_heads, u32 tokens, u32 max_pages, u32 per_tail) {
    u32 lane = thread_index() % 32, warp = thread_index() / 32, channels = num_kv_heads * HEAD_DIM;
    u32 number = block_index() * WARPS + warp, sequence = number / tokens, token = number % tokens;
    if (number >= batch * tokens) return;
    u32* words = (u32*)(shared_memory() + warp * (channels * 2 + 4096));
    Scratch scratch{words, (u16*)(words + 1024)};
    Extremes extremes = NO_EXTREMES;  // of this lane
    const u16* row = value + ((u64)sequence * num_kv_heads * tokens + token) * HEAD_DIM;
    KVQ_UNROLL_4 for (u32 channel = 8 * lane; channel < channels; channel += 256) {
        u32 head = channel / HEAD_DIM, at = channel % HEAD_DIM;
        Eight states = *(const Eight*)(row + (u64)head * tokens * HEAD_DIM + at);
        *(Eight*)(scratch.states + channel) = states;
        widen(extremes, states);
    }
    sync_warp();
    u32 page = page_table[sequence * max_pages + token / 128];
    u32* count = counts + ((u64)page * num_kv_heads * 2 + token / 64 % 2) * 2 + 1;
    Found found{NO_CUTS, {}, {0, 0}};
    bool few = per_tail && few_candidates(scratch, channels, per_tail, lane, extremes, found);
    if (few) {
        KVQ_UNROLL for (u32 tail = 0; tail < 2; tail++) {
            for (u32 i = lane; i < found.listed[tail]; i += 32) {
                u32 item = scratch.words[tail * LISTED + i];
                if (item <= (tail ? ~found.cuts.high : found.cuts.low))
                    add_global(count + ((tail ? ~item : item) & 0xffff) / HEAD_DIM * 4, 1);
            }
        }
    } else if (per_tail) {
        found.cuts = rank_all(scratch, channels, per_tail, lane);
        u32 low = ~0u, high = 0;
        for (u32 i = lane; i < channels; i += 32) {
            u32 item = item_of(scratch.states[i], i);
            if (is_cut(found.cuts, item)) {
                add_global(count + i / HEAD_DIM * 4, 1);
            } else {
                low = smaller(low, item), high = larger(high, item);
            }
        }
        found.rest = Cuts{least_of_warp(low), greatest_of_warp(high)};
    } else {
        u32 low = least_of_warp(least_key(extremes)), high = greatest_of_warp(greatest_key(extremes));
        found.rest = Cuts{item_of(low, 0), item_of(high, 0)};
    }
    if (lane != 0) return;
    ranges[page * 128 + token % 128] = range_of(found.rest.low >> 16, found.rest.high >> 16);
    cuts[number] = found.cuts;
}

// What codes and outliers of a slab are written from.
struct Source {
    Place place;
    KeyCode code;
    u32 lane, step;
};

// Of a lane's codes, those of tokens that exist: masks of nibbles of a tile's word.
DEVICE u32 key_mask(const Source& from, u32 tile) {
    u32 token = 16 * tile + from.lane / 4, tokens = from.place.tokens;
    return (token < tokens ? 0x00ff00ffu : 0) | (token + 8 < tokens ? 0xff00ff00u : 0);
}
DEVICE u32 value_mask(const Source& from, u32 tile) {
    u32 token = 16 * tile + from.lane % 4 * 2, tokens = from.place.tokens, mask = 0;
    KVQ_UNROLL for (u32 k = 0; k < 4; k++) {
        if (token + k / 2 * 8 + k % 2 < tokens) mask |= 0x0f0fu << (k / 2 * 16 + k % 2 * 4);
    }
    return mask;
}
// A bit for each nibble that is not zero in a mask of whole nibbles.
DEVICE u32 nibble_bits(u32 mask) {
    u32 bits = 0;
    KVQ_UNROLL for (u32 i = 0; i < 8; i++) bits |= (mask >> 4 * i & 1) << i;
    return bits;
}

// The same mask where codes have bytes.
template <int bits>
DEVICE Tile<bits> mask_of(u32 nibbles) {
    if constexpr (bits == 8) {
        u64 mask = 0;
        KVQ_UNROLL for (u32 i = 0; i < 8; i++) mask |= (u64)(nibbles >> 4 * i & 1) * 255 << 8 * i;
        return mask;
    } else {
        return nibbles;
    }
}

// A lane's codes of a step's keys, a number a tile; returns who is an outlier.
DEVICE u32 key_codes(const Source& from, const u16* staged, const Given& given,
                     Tile<KEY_BITS> (&tiles)[4]) {
    constexpr u32 room = room_of(KEY_BITS);
    u32 flags = 0, place = 8 * from.step + from.lane % 4 * 2;
    KeyChannel channels[2][2];
    lane_channels(from.code, from.place.head, from.step, from.lane, channels);
    KVQ_ROLLED for (u32 t = 0; t < 4; t++) {
        Tile<KEY_BITS> word = 0;
        u32 found_flags = 0;
        KVQ_UNROLL for (u32 half = 0; half < 2; half++) {
            u32 token = t * 16 + half * 8 + from.lane / 4;
            u32 exists = smaller(token, from.place.tokens - 1);
            Turns turns = turns_at(from.code, from.place.slab * 64 + exists, place);
            KVQ_UNROLL for (u32 e = 0; e < 2; e++) {
                Element found[2];
                if constexpr (KEY_COMP) {
                    found[0] = given_element(given, exists, channels[e][0].channel);
                    found[1] = given_element(given, exists, channels[e][1].channel);
                } else {
                    key_pair(channels[e], staged + token * ROW, turns.of[e], found);
                }
                u32 i = half * 2 + e;
                word |= (Tile<KEY_BITS>)found[0].code << room * i;
                word |= (Tile<KEY_BITS>)found[1].code << room * (i + 4);
                if (found[0].is_outlier) found_flags |= 1u << i;
                if (found[1].is_outlier) found_flags |= 16u << i;
            }
        }
        if (from.place.tokens < 64) {
            u32 mask = key_mask(from, t);
            word &= mask_of<KEY_BITS>(mask), found_flags &= nibble_bits(mask);
        }
        flags |= found_flags << 8 * t;
        KVQ_UNROLL for (int k = 0; k < 3; k++) tiles[k] = tiles[k + 1];
        tiles[3] = word;
    }
    return flags;
}

// A lane's codes of a step's values; returns who may be an outlier, as far as its size says.
DEVICE u32 value_codes(const Source& from, const u16* staged, const Given& given,
                       const Coded* rows, const float* middles, Tile<VALUE_BITS> (&tiles)[4]) {
    constexpr u32 room = room_of(VALUE_BITS);
    u32 flags = 0;
    u32 channel = 16 * from.step + from.lane / 4;
    KVQ_ROLLED for (u32 t = 0; t < 4; t++) {
        Tile<VALUE_BITS> word = 0;
        u32 found_flags = 0;
        KVQ_UNROLL for (u32 n = 0; n < 4; n++) {
            u32 token = t * 16 + n / 2 * 8 + from.lane % 4 * 2 + n % 2;
            Coded row = rows[token];
            KVQ_UNROLL for (u32 upper = 0; upper < 2; upper++) {
                u32 i = n / 2 * 4 + n % 2 + 2 * upper, at = channel + 8 * upper;
                if constexpr (VALUE_COMP) {
                    Element found = given_element(given, smaller(token, from.place.tokens - 1), at);
                    word |= (Tile<VALUE_BITS>)found.code << room * i;
                    if (found.is_outlier) found_flags |= 1u << i;
                } else {
                    float x = state_value(staged[token * ROW + at]);
                    float u = mul_exact(add_exact(x, -row.offset), row.inverse);
                    word |= (Tile<VALUE_BITS>)nearest<VALUE_BITS>(u, middles) << room * i;
                    if (OUTLIERS && (x <= row.low || x >= row.high)) found_flags |= 1u << i;
                }
            }
        }
        if (from.place.tokens < 64) {
            u32 mask = value_mask(from, t);
            word &= mask_of<VALUE_BITS>(mask), found_flags &= nibble_bits(mask);
        }
        flags |= found_flags << 8 * t;
        KVQ_UNROLL for (int k = 0; k < 3; k++) tiles[k] = tiles[k + 1];
        tiles[3] = word;
    }
    return flags;
}

// Grid: (sequence, KV head, slab). A warp writes one step of the keys and one of the values, who is an
// outlier to `flags` (lists, 2, STEPS * 32), and the number of the keys' to `counts` (lists, 2).
KERNEL(STEPS * 32)
pack_slabs(const u16* key, const u16* value, const int* page_table, const float* lower,
           const float* upper, const float* offset, const float* inverse, const float* key_middles,
           const float* value_middles, const u16* order, const float* turns, const u32* ranges,
           const u8* key_coded, const u16* key_moved, const u8* value_coded,
           const u16* value_moved, const Cuts* cuts, u32* counts, u32* flags, u8* slabs,
           u32 num_kv_heads, u32 tokens, u32 max_pages) {
    u16* staged = (u16*)shared_memory();
    u16* staged_value = staged + 64 * ROW;
    Coded* rows = (Coded*)(staged_value + 64 * ROW);
    float* middles = (float*)(rows + 64);  // of keys, of values
    u32 many = (tokens + 63) / 64, thread = thread_index();
    Source from;
    from.lane = thread % 32, from.step = thread / 32;
    from.place = find_place(block_index(), num_kv_heads, many, tokens, page_table, max_pages);
    const Place& place = from.place;
    from.code = KeyCode{lower, upper, offset, inverse, CHANNEL_LEVELS ? key_middles : middles,
                        order, turns + (u64)place.sequence * tokens * HEAD_DIM};
    u64 row = ((u64)place.sequence * num_kv_heads + place.head) * tokens + place.slab * 64;
    Given given[2] = {{key_coded + row * HEAD_DIM, key_moved + row * HEAD_DIM},
                      {value_coded + row * HEAD_DIM, value_moved + row * HEAD_DIM}};
    if constexpr (!KEY_COMP) stage(key, place, num_kv_heads, tokens, staged);
    copies_sent();
    if constexpr (!VALUE_COMP) stage(value, place, num_kv_heads, tokens, staged_value);
    copies_sent();
    for (u32 i = thread; i < larger(LEVELS, 1u << VALUE_BITS) - 1; i += STEPS * 32) {
        if (!CHANNEL_LEVELS && i < LEVELS - 1) middles[i] = key_middles[i];
        if (i < (1u << VALUE_BITS) - 1) middles[VALUE_MIDDLES + i] = value_middles[i];
    }
    const Cuts* own = cuts + (u64)place.sequence * tokens + place.slab * 64;
    for (u32 i = thread; i < 64; i += STEPS * 32) {
        u32 at = smaller(i, place.tokens - 1);
        rows[i] = coded_row(ranges[place.page * 128 + place.slab % 2 * 64 + at], own[at]);
    }
    u64 list = ((u64)place.page * num_kv_heads + place.head) * 2 + place.slab % 2;
    u8* to = slabs + list * STEPS * (step_bytes(KEY_BITS) + step_bytes(VALUE_BITS));
    Tile<KEY_BITS> key_tiles[4] = {0, 0, 0, 0};
    await_copies<1>();
    sync_block();
    u32 found = key_codes(from, staged, given[0], key_tiles);
    store_codes<KEY_BITS>(to + from.step * step_bytes(KEY_BITS), from.lane, key_tiles);
    if constexpr (OUTLIERS) {
        *flags_of(flags, list, 0, thread) = found;
        u32 total = sum_of_warp(count_bits(found));
        if (from.lane == 0 && total) add_global(counts + 2 * list, total);
    }
    await_copies<0>();
    sync_block();
    Tile<VALUE_BITS> tiles[4] = {0, 0, 0, 0};
    found = value_codes(from, staged_value, given[1], rows, middles + VALUE_MIDDLES, tiles);
    to += STEPS * step_bytes(KEY_BITS) + from.step * step_bytes(VALUE_BITS);
    store_codes<VALUE_BITS>(to, from.lane, tiles);
    if constexpr (!OUTLIERS) return;
    KVQ_ROLLED for (u32 left = VALUE_COMP ? 0 : found; left; left &= left - 1) {  // among equals
        u32 token, at, n = lowest_bit(left);
        value_place(n, from.step, from.lane, token, at);
        u32 item = item_of(order_key(staged_value[token * ROW + at]), place.head * HEAD_DIM + at);
        if (!is_cut(own[token], item)) found &= ~(1u << n);
    }
    *flags_of(flags, list, 1, thread) = found;
}
