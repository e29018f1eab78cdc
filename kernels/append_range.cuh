// The range of a new token's values and which of them are outliers, found by a whole block.
#pragma once
#include "survey.cuh"

constexpr u32 THREADS = WARPS * 32;

// What finding a token's range takes of shared memory: the threads' least and greatest keys, then
// candidates, or bins, where these are too many; then what is found. Those of the upper tail are
// complemented.
struct Search {
    u32* words;  // 776
    DEVICE u32* keys(u32 tail) const { return words + tail * THREADS; }
    DEVICE u32* candidates(u32 tail) const { return words + 2 * THREADS + tail * LISTED; }
    DEVICE u32* found() const {  // of either tail: candidates, the end, the cut, the next item
        return words + 768;
    }
};
static_assert(2 * THREADS + 2 * LISTED == 768, "what is found lies behind both uses");

// A token's range and cuts of any values, by bins. The states become their keys.
DEVICE u32 range_by_bins(u16* keys, u32 channels, u32 per_tail, const Search& search, Cuts& cuts) {
    u32 warp = thread_index() / 32, lane = thread_index() % 32;
    u32 *bins = search.words, *shared = search.found();  // least, tie, greatest, tie; then the rest
    sync_block();
    for (u32 i = thread_index(); i < channels; i += THREADS) keys[i] = (u16)order_key(keys[i]);
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

// Put down what a thread has seen; the block meets before `find_range`.
DEVICE void begin_search(const Search& search, const Extremes& extremes) {
    search.keys(0)[thread_index()] = least_key(extremes);
    search.keys(1)[thread_index()] = 0xffff ^ greatest_key(extremes);
    if (thread_index() < 2) search.found()[thread_index()] = 0;
}

// List a thread's own elements that are not between the ends, of keys.
DEVICE void list_candidates(const u16* states, u32 channels, const Search& search,
                            const u32* ends) {
    Extremes of{key_bits(ends[0]) * 0x10001u, key_bits(0xffff ^ ends[1]) * 0x10001u};
    KVQ_ROLLED for (u32 first = 8 * thread_index(); first < channels; first += 8 * THREADS) {
        Eight eight = *(const Eight*)(states + first);
        u32 between = 0;  // of element 2j + e in bit j + 16 e
        KVQ_UNROLL for (u32 j = 0; j < 4; j++) {
            u32 above = h2_minus<BF16>(of.least, eight.of[j]);
            between |= (above & h2_minus<BF16>(eight.of[j], of.greatest) & 0x80008000u) >> (15 - j);
        }
        KVQ_ROLLED for (u32 left = ~between & 0x000f000fu; left; left &= left - 1) {
            u32 n = lowest_bit(left), channel = first + n % 16 * 2 + n / 16;
            u32 key = order_key(states[channel]), tail = key > ends[0];
            u32 at = take_shared(search.found() + tail, 1), item = item_of(key, channel);
            if (at < LISTED) search.candidates(tail)[at] = tail ? ~item : item;
        }
    }
}

// A token's range and cuts, found by a whole block.
DEVICE u32 find_range(u16* states, u32 channels, u32 per_tail, const Search& search, Cuts& cuts) {
    u32 warp = thread_index() / 32, lane = thread_index() % 32, *found = search.found();
    if (warp < 2) {
        const u32* keys = search.keys(warp);
        u32 own = ~0u;
        KVQ_UNROLL for (u32 i = 0; i < THREADS; i += 32) own = smaller(own, keys[i + lane]);
        u32 end = per_tail == 0    ? least_of_warp(own)
                  : per_tail <= 31 ? ranked_lane(own, per_tail + 1)
                                   : 0xffff;
        found[2 + warp] = end;
    }
    sync_block();
    u32 ends[2] = {found[2], found[3]};
    cuts = NO_CUTS;
    if (per_tail == 0) return range_of(ends[0], 0xffff ^ ends[1]);
    bool few = ends[0] < (0xffff ^ ends[1]);
    if (few) {
        list_candidates(states, channels, search, ends);
        sync_block();
        few = found[0] <= LISTED && found[1] <= LISTED;
    }
    if (few && warp < 2) {
        u32 count = found[warp], cut, next, *items = search.candidates(warp);
        if (lane < 3 && count + lane < LISTED) items[count + lane] = ~0u;
        sync_warp();
        rank_tail(items, count, per_tail, lane, cut, next);
        found[4 + warp] = cut, found[6 + warp] = next;
    }
    sync_block();
    u32 low = found[6], high = ~found[7];
    cuts = Cuts{found[4], ~found[5]};
    few = few && low < cuts.high && high > cuts.low;
    if (!few) return range_by_bins(states, channels, per_tail, search, cuts);
    return range_of(low >> 16, high >> 16);
}
