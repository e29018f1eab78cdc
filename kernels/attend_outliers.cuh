// Outliers of a slab of attend.cu, by one warp: what they add to scores and to the output.
#pragma once
#include "attend_slab.cuh"

// The query of all heads for a channel and its partner, half2s.
struct alignas(GROUP < 4 ? 4 * GROUP : 16) Queries {
    u32 of[GROUP];
};

// A key's outlier: delta * (rotated query) is added to its token's score.
DEVICE void key_outlier(const Warp& warp, u32 word, u32 first_tile) {
    constexpr u32 half = HEAD_DIM / 2;
    u32 place = place_of(word);
    bool upper = place >= half;
    u32 pair = half & (half - 1) ? place - (upper ? half : 0) : place & (half - 1);
    float delta = h2_high(word) * SPARSE_ONE, u = delta, v = 0.0f;
    if constexpr (ROTATED) {
        u32 phase = ((const u32*)warp.frequencies)[2 * pair + 1] *
                    (token_of(word) + 16 * first_tile - MIDDLE);
        float sine, cosine;
        sine_cosine((float)(int)phase * 2.3283064365386963e-10f, sine, cosine);
        u = delta * (upper ? -sine : cosine);
        v = delta * (upper ? cosine : sine);
    } else if (upper) {
        u = 0.0f, v = delta;
    }
    Queries query = *(const Queries*)(warp.query + query_at(pair));
    int* score = (int*)warp.sparse + token_of(word);
    KVQ_UNROLL for (int h = 0; h < GROUP; h++) {
        u32 pair = query.of[h];
        add_shared(score + h * SPARSE_ROW, round_to_int(u * h2_low(pair) + v * h2_high(pair)));
    }
}

// A list of keys' outliers; a lane takes every 32nd word, three of them at a time.
template <typename Words>
DEVICE void key_outliers(const Warp& warp, const Words& list, u32 count, u32 first_tile) {
    KVQ_ROLLED for (u32 i = warp.lane; i < count; i += 96) {
        u32 words[3];
        KVQ_UNROLL for (u32 k = 0; k < 3; k++) words[k] = i + 32 * k < count ? list(i + 32 * k) : 0;
        KVQ_UNROLL for (u32 k = 0; k < 3; k++) key_outlier(warp, words[k], first_tile);
    }
}

// Nothing is in the sparse scores.
DEVICE void clear_sparse(const Warp& warp) {
    constexpr u32 pieces = SPARSE_ROW * GROUP / 4;
    KVQ_UNROLL for (u32 i = 0; i < pieces; i += 32) {
        if (i + 32 <= pieces || i + warp.lane < pieces)
            ((Quad*)warp.sparse)[i + warp.lane] = Quad{{0, 0, 0, 0}};
    }
}

// Add to a lane's scores what outliers add to them.
DEVICE void sparse_scores(const Warp& warp, float (&score)[MINE][LANE_HEADS]) {
    const int* at =
        (const int*)warp.sparse + warp.head * SPARSE_ROW + 8 * mine_at(warp.column, 0) + warp.row;
    KVQ_UNROLL for (u32 i = 0; i < MINE; i++) {
        KVQ_UNROLL for (int j = 0; j < LANE_HEADS; j++) {
            score[i][j] += (float)at[j * SPARSE_ROW + 8 * i] * (1.0f / SPARSE_ONE);
        }
    }
}

// Floats of the heads that a KV head has, read and written at once.
struct alignas(GROUP < 4 ? 4 * GROUP : 16) Heads {
    float of[GROUP];
};

// Add an outlier of a value to a head's mix: delta times the token's weight.
DEVICE void value_outlier(const Warp& warp, u32 word) {
    float delta = h2_high(word);
    Heads weights = *(const Heads*)(warp.sparse + token_of(word) * GROUP);
    Heads* at = (Heads*)(warp.mix + place_of(word) * GROUP);
    Heads sum = *at;
    KVQ_UNROLL for (int h = 0; h < GROUP; h++) sum.of[h] += weights.of[h] * delta;
    *at = sum;
}

// Outliers of values: a word is a half delta above channel << 8 and token << 2. A list in rounds
// has words of different channels in each round, so that no two lanes write to one place. Lists
// that grew word by word are in no rounds; there atomics keep lanes apart.
template <typename Words>
DEVICE void value_outliers(const Warp& warp, const Words& list, u32 count, bool in_rounds) {
    if (!in_rounds) {
        KVQ_ROLLED for (u32 i = warp.lane; i < count; i += 32) {
            u32 word = list(i);
            const float* weight = warp.sparse + token_of(word) * GROUP;
            float* at = warp.mix + place_of(word) * GROUP;
            KVQ_ROLLED for (int h = 0; h < GROUP; h++)
                add_shared(at + h, weight[h] * h2_high(word));
        }
        return;
    }
    // Words whose channels are equal modulo 8, which share banks, follow each other: eight lanes
    // that are served at once take every `apart`-th word.
    u32 rounds = list(0), size = list(1), longer = list(2);
    u32 apart = smaller(size / 8 + 1, 4);  // a round has at most 32
    u32 place = warp.lane % 8 * apart + warp.lane / 8, begin = HEADER;
    if (warp.lane / 8 >= apart) place = 32;  // no word
    u32 word = list(smaller(begin + place, count - 1));
    KVQ_ROLLED for (u32 round = 0; round < rounds; round++) {
        u32 own = size + (round < longer), now = word;
        begin += own, word = list(smaller(begin + place, count - 1));  // of the next round
        if (place < own) value_outlier(warp, now);
        sync_warp();
    }
}
