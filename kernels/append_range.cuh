// The range of a new token's values and which of them are outliers, found by a whole block.
#pragma once
#include "survey.cuh"

constexpr u32 THREADS = WARPS * 32;

// What finding a token's range takes of shared memory: candidates of both tails, or bins, where these
// are too many; then what is found.
struct Search {
    u32* words;  // 776
    DEVICE u32* candidates(u32 tail) const {
        return words + tail * LISTED;
    }
    DEVICE u32* found() const {  // of either tail: candidates, whether they do, the cut, the next one
        return words + 768;
    }
};

// A token's range and cuts of any values, by bins. The states become their keys.
DEVICE u32 range_by_bins(u16* keys, u32 channels, u32 per_tail, const Search& search,
                         Cuts& cuts) {
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

// One tail's last outlier and the item after it, found by a warp; those of the upper tail are
// complemented. Without outliers only the least item's key is. Says whether there were few candidates.
DEVICE bool find_tail(const u16* states, u32 channels, u32 per_tail, u32 tail, const Search& search) {
    u32 lane = thread_index() % 32, *found = search.found() + tail, *items = search.candidates(tail);
    u32 flip = tail ? 0x80008000u : 0, least = INFINITY2;
    KVQ_UNROLL_4 for (u32 first = 8 * lane; first < channels; first += 256) {
        Eight eight = *(const Eight*)(states + first);
        KVQ_UNROLL for (u32 k = 0; k < 4; k++) least = h2_least<BF16>(least, eight.of[k] ^ flip);
    }
    u32 pair = order_keys(least ^ flip) ^ (tail ? ~0u : 0), key = smaller(pair & 0xffff, pair >> 16);
    if (per_tail == 0) {
        found[6] = least_of_warp(key) << 16;
        return true;
    }
    if (per_tail > 31) return false;
    u32 end = ranked_lane(key, per_tail + 1), whole = key_bits(end ^ (tail ? 0xffff : 0)) * 0x10001u ^ flip;
    found[0] = 0;
    sync_warp();
    KVQ_ROLLED for (u32 first = 8 * lane; first < channels; first += 1024) {
        KVQ_ROLLED for (u32 left = candidates(states, first, channels, whole, flip); left;
                        left &= left - 1) {
            u32 channel = channel_of(lowest_bit(left), first), at = take_shared(found, 1);
            u32 item = item_of(order_key(states[channel]), channel);
            if (at < LISTED) items[at] = tail ? ~item : item;
        }
    }
    sync_warp();
    u32 count = found[0];
    if (count > LISTED) return false;
    if (lane < 3 && count + lane < LISTED) items[count + lane] = ~0u;
    sync_warp();
    u32 cut, next;
    rank_tail(items, count, per_tail, lane, cut, next);
    found[4] = cut, found[6] = next;
    return true;
}

// A token's range and cuts, from what `find_tail` found of both tails.
DEVICE u32 find_range(u16* states, u32 channels, u32 per_tail, const Search& search, Cuts& cuts) {
    const u32* found = search.found();
    u32 low = found[6], high = ~found[7];
    cuts = NO_CUTS;
    if (per_tail == 0) return range_of(low >> 16, high >> 16);
    cuts = Cuts{found[4], ~found[5]};
    bool few = found[2] && found[3] && low < cuts.high && high > cuts.low;
    if (!few) return range_by_bins(states, channels, per_tail, search, cuts);
    return range_of(low >> 16, high >> 16);
}
