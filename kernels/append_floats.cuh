// A new token's rotated values: their range and outliers, found by a whole block. See append.cu.
#pragma once
#include "floats.cuh"
#include "survey.cuh"

constexpr u32 BINS = 2048;                         // of four bytes, two tails each
constexpr u32 BLOCK = HEAD_DIM & (~HEAD_DIM + 1);  // channels that a rotation mixes
constexpr float BLOCK_SCALE = BLOCK == 32    ? 0.17677669529663687f
                              : BLOCK == 64  ? 0.125f
                              : BLOCK == 128 ? 0.08838834764831845f
                                             : 0.0625f;

// Rotate all heads' values (hadamard.rotate_heads), keep those of `head` and put all in order.
template <u32 threads>
DEVICE void order_floats(const u16* all, u32 channels, u32 head, float* own, u32* keys) {
    float* states = (float*)keys;
    for (u32 i = thread_index(); i < channels; i += threads) states[i] = state_value(all[i]);
    KVQ_ROLLED for (u32 half = 1; half < BLOCK; half *= 2) {
        sync_block();
        for (u32 i = thread_index(); i < channels / 2; i += threads) {
            u32 at = i / half * 2 * half + i % half;
            float left = states[at], right = states[at + half];
            states[at] = add_exact(left, right), states[at + half] = add_exact(left, -right);
        }
    }
    sync_block();
    for (u32 i = thread_index(); i < channels; i += threads) {
        float turned = mul_exact(states[i], BLOCK_SCALE);
        if (i / HEAD_DIM == head) own[i % HEAD_DIM] = turned;
        keys[i] = float_key(turned);
    }
}

// A token's range and cuts, a byte of keys at a time. `bins` are zeros.
template <u32 threads>
DEVICE u32 find_float_range(const u32* keys, u32 channels, u32 per_tail, u32* bins,
                            FloatCuts& cuts) {
    u32 warp = thread_index() / 32, lane = thread_index() % 32;
    u32* shared = bins + BINS;  // of either tail: bytes found, rank, tie; lowest and highest rest
    if (thread_index() == 0) {
        shared[0] = shared[3] = 0, shared[1] = shared[4] = per_tail;
        shared[6] = ~0u, shared[7] = 0;
    }
    KVQ_ROLLED for (u32 level = 0; level < (per_tail ? 4u : 0u); level++) {
        sync_block();
        u32 shift = 24 - 8 * level, low = shared[0], high = shared[3], *counts = bins + 512 * level;
        for (u32 i = thread_index(); i < channels; i += threads) {
            u32 key = keys[i], above = level ? key >> (shift + 8) : 0, byte = key >> shift & 255;
            if (above == low) add_shared((int*)counts + byte, 1);
            if (above == high) add_shared((int*)counts + 256 + byte, 1);
        }
        sync_block();
        if (warp < 2) {
            u32 left = shared[3 * warp + 1], *mine = counts + 256 * warp;
            u32 bin = warp ? rank_bin<true>(mine, lane, left) : rank_bin<false>(mine, lane, left);
            u32 key = (warp ? high : low) << 8 | bin, tie = warp ? 0 : ~0u;
            if (level == 3 && mine[bin] != left) {
                tie = warp ? tie_channel<true>(keys, channels, lane, key, left)
                           : tie_channel<false>(keys, channels, lane, key, left);
            }
            sync_warp();
            shared[3 * warp] = key, shared[3 * warp + 1] = left, shared[3 * warp + 2] = tie;
        }
    }
    sync_block();
    cuts = per_tail ? FloatCuts{shared[0], shared[2], shared[3], shared[5]} : NO_FLOAT_CUTS;
    u32 low = ~0u, high = 0;
    for (u32 i = thread_index(); i < channels; i += threads) {
        u32 key = keys[i];
        if (!is_cut(cuts, key, i)) low = smaller(low, key), high = larger(high, key);
    }
    low = least_of_warp(low), high = greatest_of_warp(high);
    if (lane == 0) least_shared(shared + 6, low), greatest_shared(shared + 7, high);
    sync_block();
    return range_of_floats(shared[6], shared[7]);
}
