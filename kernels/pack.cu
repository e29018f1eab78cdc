// From the states a model computed to pages: codes, ranges and outliers, the same bits as codec.py.
//
// Four kernels, so that lists of outliers get exactly the room they need: `survey_values` finds
// each token's range and marks which elements are outliers, `pack_keys` and `pack_values` write
// codes, the former says which keys are outliers, and, once lists are laid out, `write_lists` fills
// them. Each float operation is one IEEE operation in the order of codec.py; nothing is contracted.
//
// `states`  (batch, num_kv_heads, tokens, HEAD_DIM) half, or bfloat16 with BF16; keys after RoPE
// `turns`   (batch, tokens, HEAD_DIM / 2) float cosine and sine a pair by place, with ROTATED
// `ranges`  (pages, 128) half2: scale and offset
// `cuts`    (batch, tokens) Cuts, where values are encoded ahead
// `index`   (pages, num_kv_heads, 2) x {first quad, quads} of keys, then of values; lists of values
//           IN_ROUNDS begin with HEADER words (kvqtool/pages.py)
// `spilled` (2, room) of keys and of values, how many in `spills` (2): outliers that adding delta
// and
//           code does not give back, (token * batch + sequence) * channels + channel above the half
// `key_coded`, `key_moved` and those of values: from compensate.cu, with KEY_COMP and VALUE_COMP
// Macros: HEAD_DIM, KEY_BITS, VALUE_BITS, CHANNEL_LEVELS, ROTATED, OUTLIERS, BF16, WARPS, STRETCH,
// and KEY_COMP and VALUE_COMP: codes are there already. survey.cu and layout.cu know none of the
// last two.
#include "cells.cuh"
#include "pack_given.cuh"

// Some neighbouring slabs of one sequence and head: a block's.
struct Stretch {
    u32 sequence, head, first, last;
};

DEVICE Stretch find_stretch(u32 block, u32 num_kv_heads, u32 tokens) {
    u32 slabs = (tokens + 63) / 64, many = (slabs + STRETCH - 1) / STRETCH,
        first = block % many * STRETCH;
    u32 row = block / many;
    return Stretch{row / num_kv_heads, row % num_kv_heads, first, smaller(first + STRETCH, slabs)};
}

// Of a lane's codes, those of tokens that exist: masks of nibbles of a tile's word.
DEVICE u32 key_mask(u32 lane, u32 tile, u32 tokens) {
    u32 token = 16 * tile + lane / 4;
    return (token < tokens ? 0x00ff00ffu : 0) | (token + 8 < tokens ? 0xff00ff00u : 0);
}
DEVICE u32 value_mask(u32 lane, u32 tile, u32 tokens) {
    u32 token = 16 * tile + lane % 4 * 2, mask = 0;
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

// A lane's codes, a number a tile, and who is an outlier, a bit each.
template <int bits>
struct Coding {
    Tile<bits> tiles[4];
    u32 flags;
};

// Add the code of u as the n-th to two numbers that are summed up later.
template <bool by_cells, int bits>
DEVICE void add_code(Tile<bits> (&words)[2], u32 n, float u, const Cells& cells,
                     const float* middles) {
    if constexpr (by_cells) {
        cells.add_nearest(words, n, u);
    } else {
        words[0] += (Tile<bits>)nearest<bits>(u, middles) << room_of(bits) * n;
    }
}

// A channel's keys: thresholds and affine.
struct alignas(16) Limits {
    float lower, upper, offset, inverse;
};
// A lane's turns of a step, by token and place.
typedef Return Returns[8][2];

// A tile's states, a half of tokens and a partner in a word each.
DEVICE void key_halves(const KeyChannel (&channels)[2][2], bool straight, u32 tile, u32 step,
                       u32 lane, const u16* staged, u32 (&pairs)[4]) {
    staged += tile * 16 * ROW;
    if (straight) {
        return load_matrices(staged + lane % 16 * ROW + lane / 16 * (HEAD_DIM / 2) + 8 * step,
                             pairs);
    }
    KVQ_UNROLL for (u32 m = 0; m < 4; m++) {
        const u16* row = staged + (m % 2 * 8 + lane / 4) * ROW;
        pairs[m] = row[channels[0][m / 2].channel] | (u32)row[channels[1][m / 2].channel] << 16;
    }
}

// A lane's codes of a step's keys.
template <bool by_cells>
DEVICE Coding<KEY_BITS> key_codes(const Returns& returns, const KeyChannel (&channels)[2][2],
                                  bool straight, const Cells& cells, u32 tokens, u32 step, u32 lane,
                                  const u16* staged, const Given& given) {
    Coding<KEY_BITS> coding{{0, 0, 0, 0}, 0};
    KVQ_UNROLL for (u32 t = 0; t < 4; t++) {
        Tile<KEY_BITS> words[2] = {0, 0};
        u32 pairs[4];
        if constexpr (!KEY_COMP) key_halves(channels, straight, t, step, lane, staged, pairs);
        KVQ_UNROLL for (u32 half = 0; half < 2; half++) {
            u32 token = t * 16 + half * 8 + lane / 4;
            KVQ_UNROLL for (u32 e = 0; e < 2; e++) {
                float states[2];
                if constexpr (!KEY_COMP) {
                    float x = state_value((u16)(pairs[half] >> 16 * e));
                    float y = state_value((u16)(pairs[half + 2] >> 16 * e));
                    turn_back(x, y, returns[2 * t + half][e], states);
                }
                KVQ_UNROLL for (u32 partner = 0; partner < 2; partner++) {
                    const KeyChannel& channel = channels[e][partner];
                    u32 n = half * 2 + e + 4 * partner;
                    bool is_outlier;
                    if constexpr (KEY_COMP) {
                        Element found =
                            given_element(given, smaller(token, tokens - 1), channel.channel);
                        words[0] |= (Tile<KEY_BITS>)found.code << room_of(KEY_BITS) * n,
                            is_outlier = found.is_outlier;
                    } else {
                        float u = key_scaled(channel, states[partner]);
                        add_code<by_cells, KEY_BITS>(words, n, u, cells, channel.middles);
                        is_outlier = is_beyond(channel, states[partner]);
                    }
                    if (is_outlier) coding.flags |= 1u << (8 * t + n);
                }
            }
        }
        coding.tiles[t] = words[0] + words[1];
    }
    if (tokens < 64) {
        KVQ_UNROLL for (u32 t = 0; t < 4; t++) {
            u32 mask = key_mask(lane, t, tokens);
            coding.tiles[t] &= mask_of<KEY_BITS>(mask);
            coding.flags &= nibble_bits(mask) << 8 * t | ~(255u << 8 * t);
        }
    }
    return coding;
}

// Grid: (sequence, slab, STRETCH KV heads), for which a token's turns are the same. A warp writes
// one step of the keys, who is an outlier to `flags` (lists, STEPS * 32), and how many to `counts`
// (lists, 2).
KERNEL_OF(STEPS * 32, 128)
pack_keys(const u16* key, const int* page_table, const float* lower, const float* upper,
          const float* offset, const float* inverse, const float* key_middles, const u16* order,
          const float* turns, const u8* coded, const u16* moved, u32* counts, u32* flags, u8* slabs,
          u32 num_kv_heads, u32 tokens, u32 max_pages) {
    constexpr bool has_middles = !CHANNEL_LEVELS && !KEY_COMP,
                   has_cells = has_middles && KEY_BITS < 8;
    u16* staged = (u16*)shared_memory();                // this head's and the next one's
    Limits* limits = (Limits*)(staged + 2 * 64 * ROW);  // of all heads, by place
    u8* memory = (u8*)(limits + STRETCH * HEAD_DIM);
    u32 lane = thread_index() % 32, step = thread_index() / 32, many = (tokens + 63) / 64;
    u32 groups = (num_kv_heads + STRETCH - 1) / STRETCH, row = block_index() / groups;
    u32 first = block_index() % groups * STRETCH, last = smaller(first + STRETCH, num_kv_heads);
    Place place = place_at(row / many, first, row % many, tokens, page_table, max_pages);
    Stager stager = stager_at(key, place, num_kv_heads, tokens, (u64)tokens * HEAD_DIM, staged);
    if constexpr (!KEY_COMP) stage(stager, 0, place.tokens);
    copies_sent();
    for (u32 i = thread_index(); i < (last - first) * HEAD_DIM; i += STEPS * 32) {
        u32 c = (first + i / HEAD_DIM) * HEAD_DIM + order[i % HEAD_DIM];
        limits[i] = Limits{lower[c], upper[c], offset[c], inverse[c]};
    }
    Cells cells{};
    if constexpr (has_middles) cells = make_cells<KEY_BITS, STEPS * 32>(memory, key_middles);
    bool by_cells = has_cells && !*cells.crowded, straight = true;
    KeyCode code{lower,
                 upper,
                 offset,
                 inverse,
                 key_middles,
                 order,
                 turns + (u64)place.sequence * tokens * HEAD_DIM};
    KeyChannel channels[2][2];
    KVQ_UNROLL for (u32 i = 0; i < 4; i++) {
        u32 at = 8 * step + lane % 4 * 2 + i % 2 + i / 2 * (HEAD_DIM / 2);
        channels[i % 2][i / 2].channel = order[at];
        straight = straight && order[at] == at;
    }
    straight = !any_lane(!straight);
    Returns returns;
    if constexpr (!KEY_COMP) {
        KVQ_UNROLL for (u32 i = 0; i < 8; i++) {
            u32 token = place.slab * 64 + smaller(8 * i + lane / 4, place.tokens - 1);
            Turns both = turns_at(code, token, 8 * step + lane % 4 * 2);
            KVQ_UNROLL for (u32 e = 0; e < 2; e++) returns[i][e] = return_of(both.of[e]);
        }
    }
    KVQ_ROLLED for (u32 head = first; head < last; head++) {
        u32 side = (head - first) % 2;
        if (!KEY_COMP && head + 1 < last) stage(stager, side ^ 1, place.tokens);
        copies_sent();
        await_copies<1>();
        sync_block();
        KVQ_UNROLL for (u32 i = 0; i < 4; i++) {
            KeyChannel& channel = channels[i % 2][i / 2];
            u32 at = 8 * step + lane % 4 * 2 + i % 2 + i / 2 * (HEAD_DIM / 2);
            Limits own = limits[(head - first) * HEAD_DIM + at];
            channel.lower = own.lower, channel.upper = own.upper;
            channel.offset = own.offset, channel.inverse = own.inverse;
            channel.middles = has_middles ? cells.middles : key_middles;
            if constexpr (CHANNEL_LEVELS)
                channel.middles += (head * HEAD_DIM + channel.channel) * (LEVELS - 1);
        }
        u64 rows =
            (((u64)place.sequence * num_kv_heads + head) * tokens + place.slab * 64) * HEAD_DIM;
        Given given{coded + rows, moved + rows};
        const u16* own = staged + side * 64 * ROW;
        Coding<KEY_BITS> coding = by_cells
                                      ? key_codes<has_cells>(returns, channels, straight, cells,
                                                             place.tokens, step, lane, own, given)
                                      : key_codes<false>(returns, channels, straight, cells,
                                                         place.tokens, step, lane, own, given);
        u64 list = ((u64)place.page * num_kv_heads + head) * 2 + place.slab % 2;
        u8* to = slabs + list * STEPS * (step_bytes(KEY_BITS) + step_bytes(VALUE_BITS));
        store_codes<KEY_BITS, true>(to + step * step_bytes(KEY_BITS), lane, coding.tiles);
        if constexpr (OUTLIERS) {
            *flags_of(flags, list, thread_index()) = coding.flags;
            u32 total = sum_of_warp(count_bits(coding.flags));
            if (lane == 0 && total) add_global(counts + 2 * list, total);
        }
        sync_block();
    }
}

// What encoding a token's values takes.
struct alignas(8) Affine {
    float offset, inverse;
};

// A lane's codes of a step's values; flags say who is an outlier where codes are there already.
template <bool by_cells>
DEVICE Coding<VALUE_BITS> value_codes(const Cells& cells, u32 tokens, u32 step, u32 lane,
                                      const u16* staged, const Affine* rows, const Given& given) {
    Coding<VALUE_BITS> coding{{0, 0, 0, 0}, 0};
    const u16* from = staged + (lane / 16 * 8 + lane % 8) * ROW + 16 * step + lane / 8 % 2 * 8;
    KVQ_UNROLL for (u32 t = 0; t < 4; t++) {
        Tile<VALUE_BITS> words[2] = {0, 0};
        u32 pairs[4];
        if constexpr (!VALUE_COMP) load_transposed(from + t * 16 * ROW, pairs);
        KVQ_UNROLL for (u32 n = 0; n < 8; n++) {
            u32 token = t * 16 + n / 4 * 8 + lane % 4 * 2 + n % 2;
            if constexpr (VALUE_COMP) {
                u32 channel = 16 * step + lane / 4 + n / 2 % 2 * 8;
                Element found = given_element(given, smaller(token, tokens - 1), channel);
                words[0] |= (Tile<VALUE_BITS>)found.code << room_of(VALUE_BITS) * n;
                if (found.is_outlier) coding.flags |= 1u << (8 * t + n);
            } else {
                Affine row = rows[token];
                float x = state_value((u16)(pairs[n / 2] >> n % 2 * 16));
                float u = mul_exact(add_exact(x, -row.offset), row.inverse);
                add_code<by_cells, VALUE_BITS>(words, n, u, cells, cells.middles);
            }
        }
        coding.tiles[t] = words[0] + words[1];
    }
    if (tokens < 64) {
        KVQ_UNROLL for (u32 t = 0; t < 4; t++) {
            u32 mask = value_mask(lane, t, tokens);
            coding.tiles[t] &= mask_of<VALUE_BITS>(mask);
            coding.flags &= nibble_bits(mask) << 8 * t | ~(255u << 8 * t);
        }
    }
    return coding;
}

// Grid: (sequence, KV head, STRETCH slabs). A warp writes one step of the values, and who is an
// outlier where codes are there already; `flags` have the others.
KERNEL_OF(STEPS * 32, 64)
pack_values(const u16* value, const int* page_table, const float* value_middles, const u32* ranges,
            const u8* coded, const u16* moved, u32* flags, u8* slabs, u32 num_kv_heads, u32 tokens,
            u32 max_pages) {
    constexpr bool has_cells = !VALUE_COMP && VALUE_BITS > 2 && VALUE_BITS < 8;
    u16* staged = (u16*)shared_memory();              // this slab's and the next one's
    Affine* rows = (Affine*)(staged + 2 * 64 * ROW);  // likewise
    u32 lane = thread_index() % 32, step = thread_index() / 32;
    Stretch stretch = find_stretch(block_index(), num_kv_heads, tokens);
    u32 sequence = stretch.sequence, head = stretch.head;
    Place place = place_at(sequence, head, stretch.first, tokens, page_table, max_pages);
    Stager stager = stager_at(value, place, num_kv_heads, tokens, 64 * HEAD_DIM, staged);
    if constexpr (!VALUE_COMP) stage(stager, 0, place.tokens);
    copies_sent();
    Cells cells = make_cells<VALUE_BITS, STEPS * 32>((u8*)(rows + 2 * 64), value_middles);
    bool by_cells = has_cells && !*cells.crowded;
    KVQ_ROLLED for (u32 slab = stretch.first; slab < stretch.last; slab++) {
        u32 side = (slab - stretch.first) % 2;
        place = place_at(sequence, head, slab, tokens, page_table, max_pages);
        if constexpr (!VALUE_COMP) {
            if (slab + 1 < stretch.last) {
                stage(stager, side ^ 1, smaller(tokens - slab * 64 - 64, 64));
            }
            if (thread_index() < 64) {
                u32 at = smaller(thread_index(), place.tokens - 1);
                u32 range = ranges[place.page * 128 + slab % 2 * 64 + at];
                rows[side * 64 + thread_index()] = Affine{h2_high(range), inverse_scale(range)};
            }
        }
        copies_sent();
        await_copies<1>();
        sync_block();
        u64 row = (((u64)sequence * num_kv_heads + head) * tokens + slab * 64) * HEAD_DIM;
        Given given{coded + row, moved + row};
        const u16* own = staged + side * 64 * ROW;
        const Affine* own_rows = rows + side * 64;
        Coding<VALUE_BITS> coding =
            by_cells ? value_codes<has_cells>(cells, place.tokens, step, lane, own, own_rows, given)
                     : value_codes<false>(cells, place.tokens, step, lane, own, own_rows, given);
        u64 list = ((u64)place.page * num_kv_heads + head) * 2 + slab % 2;
        u8* to = slabs + list * STEPS * (step_bytes(KEY_BITS) + step_bytes(VALUE_BITS)) +
                 STEPS * step_bytes(KEY_BITS) + step * step_bytes(VALUE_BITS);
        store_codes<VALUE_BITS, false>(to, lane, coding.tiles);
        if constexpr (OUTLIERS && VALUE_COMP) *flags_of(flags, list, thread_index()) = coding.flags;
        sync_block();
    }
}
