// Scores of channels that turn little within a page: keys are not turned at all.
//
// A pair of channels that turns by the angle f a token adds (k, q) cos(f d) + (k, Jq) sin(f d) to
// the score of the token d places behind the middle of its page, where q is the query turned back
// to that place and J a quarter turn. Over a page, d = 64 t, both are sums of a few Chebyshev
// polynomials T_m(t) whose coefficients depend on f alone (Jacobi and Anger). So the tensor cores
// multiply the keys as they lie with TERMS queries in place of one, in columns that would say the
// same otherwise, and a token's score is the sum of its TERMS products times T_m at its place.
// Scales of channels go into these queries, offsets into one constant each.
//
// Steps from TURNED on are such channels, as far as the host found that TERMS polynomials suffice
// (kvqtool/turning.py); keys of the steps before are turned token by token.
#pragma once
#include "unpack.cuh"

constexpr u32 THREADS = WARPS * 32;
constexpr u32 TERMS = 8 / GROUP;  // columns of a head
constexpr bool HAS_TERMS = TURNED < STEPS;
static_assert(KEY_BITS != 16 || !HAS_TERMS,
              "states of 16 bits lie turned, or are turned one by one");
constexpr bool HAS_AFFINE = KEY_BITS != 16 && !CHANNEL_LEVELS;
constexpr u32 TERM_STEP = 256;                    // bytes: eight columns of four lanes' channels
constexpr u32 SHARE = GROUP < 4 ? 4 / GROUP : 1;  // lanes of a row that a head has
constexpr u32 MINE = 8 / SHARE;  // of a row's eight tokens, those that a lane softens
constexpr int LANE_HEADS = GROUP == 8 ? 2 : 1;  // heads of a lane
constexpr bool HAS_PLACES = HAS_TERMS && TERMS > 2;
constexpr u32 PLACE_BYTES = HAS_PLACES ? 128 * 8 * 4 : 0;

// Columns of the score fragments: eight heads have one each; fewer have TERMS each, a pair of terms
// to a lane.
DEVICE u32 column_head(u32 column) {
    return GROUP == 8 ? column : column / 2 % GROUP;
}
DEVICE u32 column_term(u32 column) {
    return GROUP == 8 ? 0 : column % 2 + column / (2 * GROUP) * 2;
}
DEVICE u32 column_of(u32 head, u32 term) {
    return GROUP == 8 ? head : 2 * head + term % 2 + term / 2 * (2 * GROUP);
}

// Where a step's query lies for a lane: columns change places from step to step, so that neither
// the lanes that write, some a step, nor those that read a step meet in a bank.
DEVICE u32 term_at(u32 step, u32 column, u32 lane_column) {
    return (step - TURNED) * TERM_STEP + (column ^ step % 8) * 32 + lane_column * 8;
}

// The middle of a page, from which its places are counted.
constexpr int MIDDLE = 64;

struct alignas(16) Quad {
    u32 of[4];
};
struct alignas(16) Floats {
    float of[4];
};
struct alignas(8) Couple {
    float first, second;
};

// T_0 to T_7 at each of a page's places.
DEVICE void fill_places(u8* to) {
    if constexpr (!HAS_PLACES) return;
    KVQ_ROLLED for (u32 i = thread_index(); i < 128; i += THREADS) {
        float t = ((float)i - MIDDLE) * (1.0f / 64), of[8] = {1.0f, t};
        KVQ_UNROLL for (int m = 2; m < 8; m++) of[m] = 2.0f * t * of[m - 1] - of[m - 2];
        ((Floats*)to)[2 * i] = Floats{{of[0], of[1], of[2], of[3]}};
        ((Floats*)to)[2 * i + 1] = Floats{{of[4], of[5], of[6], of[7]}};
    }
}

// Scales and offsets of a KV head's channels in the form that terms need: an offset as a multiple
// of its scale, which is not let be so small that the multiple overflows.
DEVICE void fold_offsets(u8* head_table) {
    if constexpr (!HAS_TERMS || !HAS_AFFINE) return;
    KVQ_ROLLED for (u32 i = 8 * TURNED + thread_index(); i < 8 * STEPS; i += THREADS) {
        u32* at = (u32*)head_table + 2 * i;
        float scale[2] = {h2_low(at[0]), h2_high(at[0])};
        float offset[2] = {h2_low(at[1]), h2_high(at[1])}, ratio[2];
        KVQ_UNROLL for (int e = 0; e < 2; e++) {
            float least = greater(size_of(offset[e]) * (1.0f / 32768), 5.9604645e-8f);
            scale[e] = half_to_float(float_to_half(greater(scale[e], least)));
            ratio[e] = offset[e] * inverse_fast(scale[e]);
        }
        at[0] = h2_from(scale[0], scale[1]), at[1] = h2_from(ratio[0], ratio[1]);
    }
}

// The sum of a value over the lanes of a row that have parts of it, each lane ending with those of
// its own tokens.
DEVICE void share_tokens(u32 column, const float (&part)[8], float (&mine)[MINE]) {
    if constexpr (SHARE == 1) {
        KVQ_UNROLL for (u32 i = 0; i < MINE; i++) mine[i] = part[i];
    } else {
        float half[4];
        bool upper = column & 2;
        KVQ_UNROLL for (int i = 0; i < 4; i++) {
            half[i] = (upper ? part[i + 4] : part[i]) + exchange(upper ? part[i] : part[i + 4], 2);
        }
        if constexpr (SHARE == 2) {
            KVQ_UNROLL for (u32 i = 0; i < MINE; i++) mine[i] = half[i];
        } else {
            upper = column & 1;
            KVQ_UNROLL for (int i = 0; i < 2; i++) {
                mine[i] =
                    (upper ? half[i + 2] : half[i]) + exchange(upper ? half[i] : half[i + 2], 1);
            }
        }
    }
}

// Which of the eight tokens of a lane's row its i-th one is: token 8 i + row of a slab.
DEVICE u32 mine_at(u32 column, u32 i) {
    return column / GROUP % SHARE * MINE + i;
}

// Scores of the tokens that a lane softens, from the products of a slab that lies in half `half` of
// its page; `offset` is what offsets add to each product.
DEVICE void gather_scores(u32 row, u32 column, const float* places, const float (&score)[4][4],
                          Couple offset, u32 half, float (&mine)[MINE][LANE_HEADS]) {
    if constexpr (GROUP == 8) {
        KVQ_UNROLL for (u32 i = 0; i < 8; i++) {
            KVQ_UNROLL for (int j = 0; j < LANE_HEADS; j++) mine[i % MINE][j] =
                score[i / 2][2 * (i & 1) + j] + (j ? offset.second : offset.first);
        }
        return;
    }
    float part[8], sum[MINE], start = ((float)(64 * half + row) - MIDDLE) * (1.0f / 64);
    KVQ_UNROLL for (u32 i = 0; i < 8; i++) {
        float first = score[i / 2][2 * (i & 1)], second = score[i / 2][2 * (i & 1) + 1];
        if constexpr (!HAS_TERMS) {
            part[i] = first;
        } else if constexpr (TERMS == 2) {
            part[i] = first + offset.first + (second + offset.second) * (start + 0.125f * i);
        } else {
            Couple at =
                *(const Couple*)(places + (64 * half + 8 * i + row) * 8 + column / GROUP * 2);
            part[i] = (first + offset.first) * at.first + (second + offset.second) * at.second;
        }
    }
    share_tokens(column, part, sum);
    KVQ_UNROLL for (u32 i = 0; i < MINE; i++) mine[i][0] = sum[i];
}
