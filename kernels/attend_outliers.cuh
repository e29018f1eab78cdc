// Outliers of a slab of attend.cu, by one warp: what they add to scores and to the output.
#pragma once
#include "attend_slab.cuh"

// The query of all heads for a channel and its partner, half2s.
struct alignas(GROUP < 4 ? 4 * GROUP : 16) Queries {
    u32 of[GROUP];
};

// What a key's outlier adds to its token's scores: delta * (rotated query), as integers.
DEVICE void key_outlier(const Warp& warp, u32 word, u32 first_tile, int (&shares)[GROUP]) {
    constexpr u32 half = HEAD_DIM / 2;
    u32 place = place_of(word);
    bool upper = place >= half;
    u32 pair = half & (half - 1) ? place - (upper ? half : 0) : place & (half - 1);
    float delta = h2_high(word) * SPARSE_ONE, u = delta, v = 0.0f;
    if constexpr (ROTATED) {
        u32 step = *(const u32*)((const u8*)warp.frequencies + 8 * pair + 4);
        float sine, cosine;
        sine_cosine((int)(step * (token_of(word) + 16 * first_tile - MIDDLE)), sine, cosine);
        u = delta * (upper ? -sine : cosine);
        v = delta * (upper ? cosine : sine);
    } else if (upper) {
        u = 0.0f, v = delta;
    }
    Queries query = *(const Queries*)(warp.query + query_at(pair));
    KVQ_UNROLL for (int h = 0; h < GROUP; h++) {
        shares[h] = round_to_int(u * h2_low(query.of[h]) + v * h2_high(query.of[h]));
    }
}

// A list of keys' outliers; a lane takes every 32nd word, some of them at a time: what they read
// is asked for before the first one is added. Lanes without a word add nothing, for they would
// all wait for one place.
template <typename Words>
DEVICE void key_outliers(const Warp& warp, const Words& list, u32 count, u32 first_tile) {
    constexpr u32 at_once = GROUP == 8 ? 1 : 3;
    KVQ_ROLLED for (u32 i = warp.lane; i < count; i += 32 * at_once) {
        u32 words[at_once];
        int shares[at_once][GROUP];
        KVQ_UNROLL for (u32 k = 0; k < at_once; k++) {
            words[k] = list(smaller(i + 32 * k, count - 1));
        }
        KVQ_UNROLL for (u32 k = 0; k < at_once; k++) {
            key_outlier(warp, words[k], first_tile, shares[k]);
        }
        KVQ_UNROLL for (u32 k = 0; k < at_once; k++) {
            if (i + 32 * k >= count) break;
            int* score = (int*)warp.sparse + token_of(words[k]);
            KVQ_UNROLL for (int h = 0; h < GROUP; h++) {
                add_shared(score + h * SPARSE_ROW, shares[k][h]);
            }
        }
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

// The heads' weights of an outlier's token.
DEVICE Heads weights_of(const Warp& warp, u32 word) {
    return *(const Heads*)(warp.sparse + token_of(word) * GROUP);
}

// Add an outlier of a value to the heads' mix: delta times the token's weight. Lanes without one
// go along and write nothing.
DEVICE void value_outlier(const Warp& warp, u32 word, const Heads& weights, bool has_word) {
    float delta = h2_high(word);
    Heads* at = (Heads*)(warp.mix + place_of(word) * GROUP);
    Heads sum;
    if (has_word) sum = *at;
    KVQ_UNROLL for (int h = 0; h < GROUP; h++) sum.of[h] += weights.of[h] * delta;
    if (has_word) *at = sum;
}

// Add outliers of values: a word is a half delta above channel << 8 and token << 2. A list in
// rounds has words of different channels in each round, so that no two lanes write to one place.
// Words are read two rounds early, their weights one.
template <typename Words>
DEVICE void value_outliers(const Warp& warp, const Words& list) {
    // The first `longer` rounds have size + 1 words, the others size. Words whose channels are
    // equal modulo 8, which share banks, follow each other: eight lanes that are served at once
    // take every `apart`-th word.
    u32 rounds = list(0), size = list(1), longer = list(2);
    u32 apart = smaller(size / 8 + 1, 4);  // a round has at most 32
    u32 place = warp.lane / 8 < apart ? warp.lane % 8 * apart + warp.lane / 8 : 32;
    u32 mine = place < size ? rounds : place == size ? longer : 0;  // rounds with a word for it
    u32 at = HEADER + place;
    // Lanes without a word all look at token 0, for other places would be in the way of the others.
    auto read = [&](u32 round) { return round < mine ? list(at) : 0; };
    auto go_on = [&](u32 round) { at += size + (round < longer); };
    u32 word = read(0);
    go_on(0);
    u32 next = read(1);
    go_on(1);
    Heads weights = weights_of(warp, word);
    KVQ_ROLLED for (u32 round = 0; round < rounds; round++) {
        u32 after = read(round + 2);
        go_on(round + 2);
        Heads next_weights = weights_of(warp, next);
        value_outlier(warp, word, weights, round < mine);
        word = next, next = after, weights = next_weights;
        sync_warp();
    }
}

// Add a list that grew word by word: atomics keep lanes apart.
template <typename Words>
DEVICE void loose_value_outliers(const Warp& warp, const Words& list, u32 count) {
    KVQ_ROLLED for (u32 i = warp.lane; i < count; i += 32) {
        u32 word = list(i);
        const float* weight = warp.sparse + token_of(word) * GROUP;
        float* at = warp.mix + place_of(word) * GROUP;
        KVQ_ROLLED for (int h = 0; h < GROUP; h++) add_shared(at + h, weight[h] * h2_high(word));
    }
}
