// One slab of packed keys and values through the tensor cores, by one warp.
//
// Macros: HEAD_DIM, KEY_BITS, VALUE_BITS (2, 3, 4, 8; 16 stands for fp16 states), CHANNEL_LEVELS (a
// codebook per key channel), VALUE_TABLE (2- and 3-bit values are looked up in shared memory),
// ROTATED (keys were stored before RoPE), TURNED (steps whose keys are turned token by token),
// OUTLIERS, GROUP (query heads of a KV head, 1 2 4 8), SOFTCAP.
//
// Tokens are rows of the score fragments: lane 4r + c holds tokens r and r + 8 of each tile for
// columns 2c and 2c + 1. Columns are query heads, and of up to four heads the terms of each
// (attend_terms.cuh); turned keys add to a head's first term. Up to four heads have one to a lane
// to soften, and lanes that have the same one share its tokens. Scores are base-2 logarithms. A
// value token's scale goes into its weight, so weights are kept relative to the greatest score +
// log2(scale).
#pragma once
#include "attend_terms.cuh"

constexpr u32 KEY_SLAB = STEPS * step_bytes(KEY_BITS), VALUE_SLAB = STEPS * step_bytes(VALUE_BITS);
// Which codes are looked up in shared memory: pairs, or single ones of 8 bits, in the halves of a
// row of LUT_STRIDE bytes (keys first), 2-bit values four at once. The others are picked from
// registers.
static_assert(!CHANNEL_LEVELS || KEY_BITS != 8, "levels of 8 bits are a table of all keys");
constexpr bool KEY_PAIRS = !CHANNEL_LEVELS && KEY_BITS == 4, KEY_SINGLES = KEY_BITS == 8;
constexpr bool VALUE_PAIRS = VALUE_BITS == 4 || (VALUE_BITS == 3 && VALUE_TABLE);
constexpr bool VALUE_SINGLES = VALUE_BITS == 8;
constexpr bool VALUE_QUADS = VALUE_BITS == 2 && VALUE_TABLE;
constexpr int LUT_STRIDE = CHANNEL_LEVELS && KEY_BITS == 4 ? 128 : 256;
constexpr int VALUE_HALF = LUT_STRIDE == 256 ? 128 : 0;
constexpr bool HAS_ROWS = KEY_PAIRS || KEY_SINGLES || VALUE_PAIRS || VALUE_SINGLES;
constexpr u32 ROWS = KEY_BITS == 4 || VALUE_BITS == 4 || LEVEL_ROW == 256 ? 256 : 128;
constexpr u32 ROW_BYTES = HAS_ROWS ? ROWS * LUT_STRIDE : 0;
constexpr u32 LUT_BYTES = ROW_BYTES + (VALUE_QUADS ? 65536 : 0);
constexpr u32 ANGLE_BYTES = ROTATED ? 8 * TURNED * 512 : 0;
// What a KV head's keys need beside their codes: scales and offsets, or levels, in fragment order.
constexpr u32 HEAD_TABLE = KEY_BITS == 16    ? 0
                           : !CHANNEL_LEVELS ? STEPS * 64
                           : KEY_BITS == 4   ? HEAD_DIM * 512
                           : KEY_BITS == 3   ? HEAD_DIM * 256
                                             : STEPS * 128;
constexpr u32 LISTED = 128;          // outliers of a slab and side that are copied ahead
constexpr float FAR_BELOW = -1e30f;  // the score of a token that is not seen
constexpr float NOTHING = -2e30f;    // the greatest score where there was no token yet
constexpr float LAZY = 4.0f;         // weights may reach 2^LAZY before everything is rescaled
// Sparse scores of a head, padded so that lanes of different heads do not meet in a bank.
constexpr u32 SPARSE_ROW = GROUP == 1 ? 64 : GROUP == 8 ? 68 : 72;
constexpr float SPARSE_ONE = 65536.0f;  // sparse scores are summed as integers, in any order

// Floats of the heads that a KV head has, read and written at once.
struct alignas(GROUP < 4 ? 4 * GROUP : 16) Heads {
    float of[GROUP];
};

// A warp's corner of shared memory, and what it has accumulated.
struct Warp {
    u32 lane, row, column;  // lane = 4 row + column
    u32 head;               // the first of the lane's heads
    // Addresses of a lane's copy of the tables: pairs and single codes, four 2-bit ones, and those
    // of channels.
    u32 rows, quads, levels;
    const u8 *angles, *head_table;
    const u64* frequencies;
    const u16* order;
    u8* query;  // (HEAD_DIM / 2, GROUP) half2: a channel and its partner
    u8* terms;  // of each step from TURNED on (8 columns, 4) x 8 bytes: i, i + 1 and their partners
    float* offsets;  // what a column's products have added, two for each lane of a row
    u8* weights;     // of up to two heads the tokens' weights as half, in the order of fragments
    const float* places;
    const u32* coefficients;  // of the steps from TURNED on
    float* sparse;  // outliers' share of the scores, then the tokens' weights, (64, GROUP)
    float* mix;     // (HEAD_DIM, GROUP): outliers' share of the output
    ByteTable<KEY_BITS == 3 ? 3 : 2> key_levels;
    ByteTable<VALUE_BITS == 3 ? 3 : 2> value_levels;
    float out[STEPS][4];
    float greatest[LANE_HEADS], sum[LANE_HEADS], offset[LANE_HEADS];
};

// Whether a lane is the first of those that have its heads.
DEVICE bool has_heads(const Warp& warp) {
    return GROUP >= 4 || warp.column < GROUP;
}

// Where the heads' query for a pair of channels lies.
DEVICE u32 query_at(u32 pair) {
    return pair * GROUP * 4;
}

DEVICE void query_fragment(const Warp& warp, u32 step, u32& b0, u32& b1) {
    const u32* at =
        (const u32*)(warp.query + query_at(8 * step + 2 * warp.column)) + column_head(warp.row);
    u32 first = at[0], second = at[GROUP];
    bool is_first = column_term(warp.row) == 0;
    b0 = is_first ? pick_bytes(first, second, 0x5410) : 0;
    b1 = is_first ? pick_bytes(first, second, 0x7632) : 0;
}

// A term's query for a lane's column of a step that is not turned.
DEVICE void term_fragment(const Warp& warp, u32 step, u32& b0, u32& b1) {
    const u32* at = (const u32*)(warp.terms + term_at(step, warp.row, warp.column));
    b0 = at[0], b1 = at[1];
}

// Levels of one tile's codes from a table a channel, a copy for each lane: those of even channels
// in the low halves of words, of odd ones in the high halves.
DEVICE void channel_levels(const Warp& warp, u32 step, u32 tile, u32 (&even)[4], u32 (&odd)[4]) {
    constexpr u32 odd_at = 256 << KEY_BITS, partner_at = 128;
    u32 low = tile & 0x0f0f0f0f, high = tile & 0xf0f0f0f0;
    KVQ_UNROLL for (u32 a = 0; a < 4; a++) {
        const u8* x = shared_at(add_byte(low, a, 256, warp.levels)) + step * 2 * odd_at;
        const u8* y = shared_at(add_byte(high, a, 16, warp.levels)) + step * 2 * odd_at;
        even[a] = *(const u32*)(x + a / 2 * partner_at);
        odd[a] = *(const u32*)(y + a / 2 * partner_at + odd_at);
    }
}

// Levels of one tile's codes: channels 8 step + 2 column + {0, 1} of tokens r and r + 8, then their
// partners HEAD_DIM / 2 further.
DEVICE void key_levels(const Warp& warp, u32 step, Tile<KEY_BITS> tile, u32 (&k)[4]) {
    if constexpr (KEY_BITS == 16) {
    } else if constexpr (KEY_SINGLES) {
        look_up_singles<LUT_STRIDE>(warp.rows, 0, tile, k);
    } else if constexpr (!CHANNEL_LEVELS) {
        if constexpr (KEY_PAIRS) {
            look_up_pairs<LUT_STRIDE>(warp.rows, 0, tile, k);
        } else {
            look_up_bytes<KEY_BITS == 3 ? 3 : 2>(warp.key_levels, tile, k);
        }
    } else if constexpr (KEY_BITS > 2) {
        u32 even[4], odd[4];
        channel_levels(warp, step, tile, even, odd);
        KVQ_UNROLL for (u32 a = 0; a < 4; a++) k[a] = even[a] | odd[a];
    } else {
        const u32* table = (const u32*)(warp.head_table + (step * 4 + warp.column) * 32);
        u32 low[4] = {table[0], table[1], table[2], table[3]};
        u32 high[4] = {table[4], table[5], table[6], table[7]};
        look_up_channel_bytes(low, tile, k[0], k[1]);
        look_up_channel_bytes(high, tile >> 16, k[2], k[3]);
    }
}

// Scales and offsets of a lane's channels, in half2s: scales, offsets, then those of the partners.
DEVICE Quad affine_at(const Warp& warp, u32 step) {
    return *(const Quad*)(warp.head_table + (step * 4 + warp.column) * 16);
}

// Write what the offsets of channels that are not turned add to the two products of a lane's
// column, of any token of the page.
DEVICE void write_offsets(const Warp& warp) {
    if constexpr (!HAS_AFFINE || !HAS_TERMS) return;
    float sum[4] = {};
    KVQ_UNROLL for (u32 step = TURNED; step < STEPS; step++) {
        u32 b0, b1;
        term_fragment(warp, step, b0, b1);
        Quad affine = affine_at(warp, step);
        u32 ratio[4] = {affine.of[1], affine.of[1], affine.of[3], affine.of[3]};
        mma(sum, ratio, b0, b1);
    }
    if (warp.row == 0) ((Couple*)warp.offsets)[warp.column] = Couple{sum[0], sum[1]};
    sync_warp();
}

DEVICE Couple offset_of(const Warp& warp) {
    if constexpr (!HAS_AFFINE || !HAS_TERMS) return Couple{0.0f, 0.0f};
    return ((const Couple*)warp.offsets)[warp.column];
}

// Scores of a step's 16 channels, added to those of the steps before.
DEVICE void key_step(const Warp& warp, const u32 (&words)[KEY_BITS], u32 step, u32 first_tile,
                     float (&score)[4][4]) {
    Tile<KEY_BITS> tiles[4];
    u32 b0, b1;
    if constexpr (KEY_BITS != 16) selectors<KEY_BITS, true>(words, tiles);
    if (HAS_TERMS && step >= TURNED) {
        term_fragment(warp, step, b0, b1);
        KVQ_UNROLL for (int t = 0; t < 4; t++) {
            u32 k[4];
            if constexpr (CHANNEL_LEVELS && KEY_BITS > 2) {
                u32 odd[4];  // one more product takes less than putting both together
                channel_levels(warp, step, tiles[t], k, odd);
                mma(score[t], odd, b0, b1);
            } else {
                key_levels(warp, step, tiles[t], k);
            }
            mma(score[t], k, b0, b1);
        }
        return;
    }
    query_fragment(warp, step, b0, b1);
    Quad affine{};
    if constexpr (HAS_AFFINE) affine = affine_at(warp, step);
    KVQ_UNROLL for (int t = 0; t < 4; t++) {
        u32 k[4];
        if constexpr (KEY_BITS == 16) {
            KVQ_UNROLL for (int i = 0; i < 4; i++) k[i] = words[(4 * t + i) % KEY_BITS];
        } else {
            key_levels(warp, step, tiles[t], k);
            if constexpr (HAS_AFFINE) {
                KVQ_UNROLL for (int a = 0; a < 4; a++) {
                    k[a] = h2_fma(k[a], affine.of[a & 2], affine.of[(a & 2) + 1]);
                }
            }
        }
        if constexpr (ROTATED) {
            const u32* turn =
                (const u32*)(warp.angles +
                             (((first_tile + t) * TURNED + step) * 32 + warp.lane) * 16);
            u32 cosine[2] = {turn[0], turn[2]}, sine[2] = {turn[1], turn[3]};
            KVQ_UNROLL for (int i = 0; i < 2; i++) {
                u32 first = h2_fma(k[i], cosine[i], h2_neg(h2_mul(k[i + 2], sine[i])));
                k[i + 2] = h2_fma(k[i + 2], cosine[i], h2_mul(k[i], sine[i]));
                k[i] = first;
            }
        }
        mma(score[t], k, b0, b1);
    }
}

// Add p V of 16 channels for the slab's 64 tokens; `weights` are the tokens' fragments.
DEVICE void value_step(const Warp& warp, const u32 (&words)[VALUE_BITS], const u32 (&weights)[4][2],
                       float (&out)[4]) {
    if constexpr (VALUE_QUADS) {
        KVQ_UNROLL for (int i = 0; i < 2; i++) {
            u32 word = words[i], first[4], second[4];
            KVQ_UNROLL for (int a = 0; a < 4; a++) {
                Pair found = *(const Pair*)shared_at(add_byte(word, a, 256, warp.quads));
                u32* tile = a < 2 ? first : second;
                tile[a % 2 * 2] = found.of[0], tile[a % 2 * 2 + 1] = found.of[1];
            }
            mma(out, first, weights[2 * i][0], weights[2 * i][1]);
            mma(out, second, weights[2 * i + 1][0], weights[2 * i + 1][1]);
        }
        return;
    }
    Tile<VALUE_BITS> tiles[4];
    if constexpr (VALUE_BITS != 16) selectors<VALUE_BITS, false>(words, tiles);
    KVQ_UNROLL for (int t = 0; t < 4; t++) {
        u32 v[4];
        if constexpr (VALUE_BITS == 16) {
            KVQ_UNROLL for (int i = 0; i < 4; i++) v[i] = words[(4 * t + i) % VALUE_BITS];
        } else if constexpr (VALUE_SINGLES) {
            look_up_singles<LUT_STRIDE>(warp.rows, VALUE_HALF, tiles[t], v);
        } else if constexpr (VALUE_PAIRS) {
            look_up_pairs<LUT_STRIDE>(warp.rows, VALUE_HALF, tiles[t], v);
        } else {
            look_up_bytes<VALUE_BITS == 3 ? 3 : 2>(warp.value_levels, tiles[t], v);
        }
        mma(out, v, weights[t][0], weights[t][1]);
    }
}

// Bring everything accumulated to a new reference; the factor of head h lies in lanes of column
// h / LANE_HEADS. Outliers have added nothing where `has_mix` is false.
DEVICE void rescale(Warp& warp, const float (&factor)[LANE_HEADS], bool has_mix) {
    KVQ_UNROLL for (int j = 0; j < LANE_HEADS; j++) {
        warp.sum[j] *= factor[j];
        warp.offset[j] *= factor[j];
        KVQ_UNROLL for (int m = 0; m < (int)STEPS; m++) {
            warp.out[m][j] *= factor[j];
            warp.out[m][j + 2] *= factor[j];
        }
    }
    if (OUTLIERS && has_mix) {
        Heads factors;
        KVQ_UNROLL for (int h = 0; h < GROUP; h++) factors.of[h] =
            from_lane(factor[h % LANE_HEADS], h / LANE_HEADS);
        sync_warp();
        KVQ_ROLLED for (u32 d = warp.lane; d < HEAD_DIM; d += 32) {
            Heads sum = ((Heads*)warp.mix)[d];
            KVQ_UNROLL for (int h = 0; h < GROUP; h++) sum.of[h] *= factors.of[h];
            ((Heads*)warp.mix)[d] = sum;
        }
        sync_warp();
    }
}

// From scores to the weights of the 64 tokens as fragments for `value_step`; keeps the softmax's
// running sums. `ranges` are the tokens' (scale, offset) as half2, or null for exact values. Tokens
// outside [first, last) weigh nothing.
DEVICE void soften(Warp& warp, float (&score)[MINE][LANE_HEADS], const u32* ranges, u32 first,
                   u32 last, u32 (&weights)[4][2]) {
    constexpr u32 lanes_apart = GROUP < 4 ? GROUP : 4;  // least between lanes with one head
    const u32 begin = 8 * mine_at(warp.column, 0) + warp.row;
    if (first != 0 || last != 64) {
        KVQ_UNROLL for (u32 i = 0; i < MINE; i++) {
            KVQ_UNROLL for (int j = 0; j < LANE_HEADS; j++) {
                u32 token = begin + 8 * i;
                if (token < first || token >= last) score[i][j] = FAR_BELOW;
            }
        }
    }
    float highest[LANE_HEADS];
    u32 range[MINE];
    auto scale_of = [](u32 range) { return greater(h2_low(range), 5.9604645e-8f); };
    KVQ_UNROLL for (int j = 0; j < LANE_HEADS; j++) highest[j] = FAR_BELOW;
    KVQ_UNROLL for (u32 i = 0; i < MINE; i++) {
        range[i] = ranges ? undivided(ranges[begin + 8 * i]) : 0;
        float shift = ranges ? log2_fast(scale_of(range[i])) : 0.0f;
        KVQ_UNROLL for (int j = 0; j < LANE_HEADS; j++) {
            score[i][j] += shift;
            highest[j] = greater(highest[j], score[i][j]);
        }
    }
    float factor[LANE_HEADS];
    bool grew = false, has_mix = false;
    KVQ_UNROLL for (int j = 0; j < LANE_HEADS; j++) {
        KVQ_UNROLL for (u32 mask = lanes_apart; mask < 32; mask *= 2) {
            highest[j] = greater(highest[j], exchange(highest[j], mask));
        }
        grew |= highest[j] > warp.greatest[j] + LAZY;
    }
    if (any_lane(grew)) {
        KVQ_UNROLL for (int j = 0; j < LANE_HEADS; j++) {
            has_mix |= warp.greatest[j] > NOTHING;
            float next = greater(warp.greatest[j], highest[j]);
            factor[j] = exp2_fast(warp.greatest[j] - next);
            warp.greatest[j] = next;
        }
        rescale(warp, factor, any_lane(has_mix));
    }
    KVQ_UNROLL for (u32 i = 0; i < MINE; i++) {
        u32 token = begin + 8 * i;
        float inverse = ranges ? inverse_fast(scale_of(range[i])) : 1.0f;
        float zero = ranges ? h2_high(range[i]) : 0.0f, weight[LANE_HEADS], p[LANE_HEADS];
        KVQ_UNROLL for (int j = 0; j < LANE_HEADS; j++) {
            weight[j] = exp2_fast(score[i][j] - warp.greatest[j]);
            p[j] = weight[j] * inverse;
            warp.sum[j] += p[j];
            warp.offset[j] += p[j] * zero;
        }
        if constexpr (OUTLIERS) {
            float* at = warp.sparse + token * GROUP + warp.head;
            KVQ_UNROLL for (int j = 0; j < LANE_HEADS; j++) at[j] = p[j];
        }
        if constexpr (GROUP >= 4) {
            weights[i / 2][i & 1] = transpose8(h2_from(weight[0], weight[LANE_HEADS - 1]));
        } else {
            u16* at = (u16*)(warp.weights + warp.head * 128) + warp.row / 2 * 16 + warp.row % 2;
            at[2 * mine_at(warp.column, i)] = float_to_half(weight[0]);
        }
    }
    if constexpr (GROUP < 4) {
        sync_warp();
        const u32* at = (const u32*)(warp.weights + column_head(warp.row) * 128 + warp.column * 32);
        KVQ_UNROLL for (int i = 0; i < 8; i++) weights[i / 2][i & 1] = at[i];
    }
}
