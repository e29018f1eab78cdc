// The range of a new token's values and which of them are outliers, found by a whole block.
#pragma once
#include "survey.cuh"

constexpr u32 THREADS = WARPS * 32;

// What finding a token's range takes of shared memory: first the least and greatest items of
// threads, then bins, where candidates are too many.
struct Search {
    u32* words;  // 776
    DEVICE u32* items(u32 tail) const {
        return words + tail * THREADS;
    }
    DEVICE u32* candidates(u32 tail) const {
        return words + 2 * THREADS + tail * LISTED;
    }
    DEVICE u32* found() const {
        return words + 768;
    }
};
static_assert(2 * THREADS + 2 * LISTED == 768, "what is found lies behind both uses");

// A token's range and cuts of any values, by bins.
DEVICE u32 range_by_bins(const u16* keys, u32 channels, u32 per_tail, const Search& search,
                         Cuts& cuts) {
    u32 warp = thread_index() / 32, lane = thread_index() % 32;
    u32 *bins = search.words, *shared = search.found();  // least, tie, greatest, tie; then the rest
    sync_block();
    for (u32 i = thread_index(); i < 768; i += THREADS) bins[i] = 0;
    if (thread_index() == 0) shared[4] = 0xffff, shared[5] = 0;
    sync_block();
    for (u32 i = thread_index(); i < channels; i += THREADS)
        add_shared((int*)bins + (keys[i] >> 8), 1);
    sync_block();
    u32 left = per_tail;
    if (warp == 0) shared[0] = rank_bin<false>(bins, lane, left);
    if (warp == 1) shared[2] = rank_bin<true>(bins, lane, left);
    sync_block();
    for (u32 i = thread_index(); i < channels; i += THREADS) {
        u32 key = keys[i];
        if (key >> 8 == shared[0]) add_shared((int*)bins + 256 + (key & 255), 1);
        if (key >> 8 == shared[2]) add_shared((int*)bins + 512 + (key & 255), 1);
    }
    sync_block();
    if (warp == 0) {
        u32 key = shared[0] << 8 | rank_bin<false>(bins + 256, lane, left);
        u32 tie = tie_channel<false>(keys, channels, lane, key, left);
        sync_warp();
        shared[0] = key, shared[1] = tie;
    }
    if (warp == 1) {
        u32 key = shared[2] << 8 | rank_bin<true>(bins + 512, lane, left);
        u32 tie = tie_channel<true>(keys, channels, lane, key, left);
        sync_warp();
        shared[2] = key, shared[3] = tie;
    }
    sync_block();
    cuts = Cuts{item_of(shared[0], shared[1]), item_of(shared[2], shared[3])};
    u32 low = 0xffff, high = 0;
    for (u32 i = thread_index(); i < channels; i += THREADS) {
        u32 key = keys[i];
        if (is_cut(cuts, item_of(key, i))) continue;
        low = smaller(low, key), high = larger(high, key);
    }
    low = least_of_warp(low), high = greatest_of_warp(high);
    if (lane == 0) least_shared(shared + 4, low), greatest_shared(shared + 5, high);
    sync_block();
    return range_of(shared[4], shared[5]);
}

// List the items up to an end of either tail; those of the upper one, and its end, are complemented.
DEVICE void list_candidates(const u16* keys, u32 channels, const Search& search, const u32* ends,
                            u32* listed) {
    KVQ_ROLLED for (u32 first = 8 * thread_index(); first < channels; first += 8 * THREADS) {
        Eight eight = *(const Eight*)(keys + first);
        KVQ_UNROLL for (u32 k = 0; k < 8; k++) {
            u32 item = item_of(eight.of[k / 2] >> k % 2 * 16 & 0xffff, first + k);
            KVQ_UNROLL for (u32 tail = 0; tail < 2; tail++) {
                u32 own = tail ? ~item : item;
                if (own > ends[tail]) continue;
                u32 at = take_shared(listed + tail, 1);
                if (at < LISTED) search.candidates(tail)[at] = own;
            }
        }
    }
}

// A token's range and cuts, found by a whole block from each thread's least and greatest item.
DEVICE u32 find_range(const u16* keys, u32 channels, u32 per_tail, u32 least, u32 greatest,
                      const Search& search, Cuts& cuts) {
    u32 warp = thread_index() / 32, lane = thread_index() % 32, *found = search.found();
    search.items(0)[thread_index()] = least, search.items(1)[thread_index()] = ~greatest;
    if (thread_index() < 2) found[thread_index()] = 0;  // listed
    sync_block();
    if (warp < 2) {
        const u32* items = search.items(warp);
        u32 own = ~0u;
        KVQ_UNROLL for (u32 i = 0; i < THREADS; i += 32) own = smaller(own, items[i + lane]);
        u32 end = per_tail == 0    ? least_of_warp(own)
                  : per_tail <= 32 ? ranked_lane(own, per_tail)
                                   : ~0u;
        if (lane == 0) found[2 + warp] = end;
    }
    sync_block();
    u32 ends[2] = {found[2], found[3]}, listed[2] = {0, 0};
    cuts = NO_CUTS;
    if (per_tail == 0) return range_of(ends[0] >> 16, ~ends[1] >> 16);
    bool few = ends[0] != ~0u && ends[1] != ~0u;
    if (few) {
        list_candidates(keys, channels, search, ends, found);
        sync_block();
        listed[0] = found[0], listed[1] = found[1];
        few = listed[0] <= LISTED && listed[1] <= LISTED;
        few = few && listed[0] > per_tail && listed[1] > per_tail;
    }
    if (few && warp < 2) {
        u32 count = warp ? listed[1] : listed[0], cut, next, *items = search.candidates(warp);
        if (lane < 3 && count + lane < LISTED) items[count + lane] = ~0u;
        sync_warp();
        rank_tail(items, count, per_tail, lane, cut, next);
        if (lane == 0) found[4 + warp] = cut, found[6 + warp] = next;
    }
    sync_block();
    u32 low = found[6], high = ~found[7];
    cuts = Cuts{found[4], ~found[5]};
    few = few && low < cuts.high && high > cuts.low;
    if (!few) return range_by_bins(keys, channels, per_tail, search, cuts);
    return range_of(low >> 16, high >> 16);
}
