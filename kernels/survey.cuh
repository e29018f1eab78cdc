// Which of a token's values are its outliers: candidates first, then the order of these. See
// pack.cu.
#pragma once
#include "pack.cuh"

// The bin in which the `left`-th smallest (or greatest, `above`) element lies, and its rank there.
template <bool above>
DEVICE u32 rank_bin(const u32* bins, u32 lane, u32& left) {
    auto at = [&](u32 i) { return bins[above ? 255 - i : i]; };
    u32 sum = 0, total, bin = 0, rest = left;
    for (u32 i = 0; i < 8; i++) sum += at(8 * lane + i);
    u32 before = lanes_before(sum, lane, total);
    bool mine = before < left && left <= before + sum;
    if (mine) {
        rest = left - before;
        for (bin = 8 * lane; rest > at(bin); bin++) rest -= at(bin);
    }
    u32 owner = lowest_bit(vote(mine));
    left = from_lane(rest, owner);
    bin = from_lane(bin, owner);
    return above ? 255 - bin : bin;
}

// The channel of the `left`-th element that equals `key`, counted from the first or the last
// channel.
template <bool above, typename Key>
DEVICE u32 tie_channel(const Key* keys, u32 channels, u32 lane, u32 key, u32 left) {
    for (u32 base = 0;; base += 32) {
        u32 channel = above ? channels - 1 - base - lane : base + lane;
        u32 mask = vote(keys[channel] == key), count = count_bits(mask);
        if (count >= left) {
            for (; left > 1; left--) mask &= mask - 1;
            u32 bit = lowest_bit(mask);
            return above ? channels - 1 - base - bit : base + bit;
        }
        left -= count;
    }
}

constexpr u32 LISTED = 128;  // candidates for outliers of a tail

// A warp's scratch: a token's values, and either candidates of both tails or bins.
constexpr u32 SCRATCH_WORDS = 2 * LISTED + 8;
struct Scratch {
    u32* words;
    u16* states;
};

// What a token's outliers are: the cuts, and the least and the greatest item between them. `listed`
// are the candidates of each tail in the scratch.
struct Found {
    Cuts cuts, rest;
    u32 listed[2];
};

// The least and the greatest of what a lane has seen, by halves of a word.
struct Extremes {
    u32 least, greatest;
};
constexpr u32 INFINITY2 = BF16 ? 0x7f807f80u : 0x7c007c00u;
constexpr Extremes NO_EXTREMES{INFINITY2, INFINITY2 | 0x80008000u};

DEVICE void widen(Extremes& extremes, const Eight& eight) {
    KVQ_UNROLL for (u32 k = 0; k < 4; k++) {
        extremes.least = h2_least<BF16>(extremes.least, eight.of[k]);
        extremes.greatest = h2_greatest<BF16>(extremes.greatest, eight.of[k]);
    }
}
// The keys of a lane's extremes.
DEVICE u32 least_key(const Extremes& extremes) {
    u32 keys = order_keys(extremes.least);
    return smaller(keys & 0xffff, keys >> 16);
}
DEVICE u32 greatest_key(const Extremes& extremes) {
    u32 keys = order_keys(extremes.greatest);
    return larger(keys & 0xffff, keys >> 16);
}

struct alignas(16) FourItems {
    u32 of[4];
};
// The `rank`-th least of a tail's candidates, which are padded to a multiple of four, and the one
// after it; candidates of the upper tail are complemented. A lane holds some, and counts for each
// how many are less.
template <int held>
DEVICE void rank_items(const u32* items, u32 count, u32 rank, u32 lane, u32& cut, u32& next) {
    u32 mine[held], below[held], at_cut = ~0u, after = ~0u;
    KVQ_UNROLL for (u32 k = 0; k < held; k++) {
        mine[k] = lane + 32 * k < count ? items[lane + 32 * k] : ~0u;
        below[k] = 0;
    }
    KVQ_ROLLED for (u32 i = 0; i < count; i += 4) {
        FourItems others = *(const FourItems*)(items + i);
        KVQ_UNROLL for (u32 j = 0; j < 4; j++) {
            KVQ_UNROLL for (u32 k = 0; k < held; k++) below[k] += others.of[j] < mine[k];
        }
    }
    KVQ_UNROLL for (u32 k = 0; k < held; k++) {
        if (below[k] == rank - 1) at_cut = smaller(at_cut, mine[k]);
        if (below[k] == rank) after = smaller(after, mine[k]);
    }
    cut = least_of_warp(at_cut), next = least_of_warp(after);
}

DEVICE void rank_tail(const u32* items, u32 count, u32 rank, u32 lane, u32& cut, u32& next) {
    if (count <= 64) {
        rank_items<2>(items, count, rank, lane, cut, next);
    } else {
        rank_items<LISTED / 32>(items, count, rank, lane, cut, next);
    }
}

// The `rank`-th least of the lanes' keys, equal ones counted each.
DEVICE u32 ranked_lane(u32 key, u32 rank) {
    u32 below = 0;
    KVQ_ROLLED for (u32 first = 0; first < 32; first += 8) {
        KVQ_UNROLL for (u32 k = 0; k < 8; k++) below += from_lane(key, first + k) < key;
    }
    return greatest_of_warp(below < rank ? key : 0);
}

// A bit for each of 16 words' halves, in the order of `channel_of`, that may be an outlier: those
// not beyond the ends, which are in both halves of a word.
DEVICE u32 candidates(const u16* states, u32 first, u32 channels, const Extremes& ends) {
    u32 between = 0, many = smaller((channels - first + 255) / 256, 4);  // pieces that there are
    Eight eight[4];
    KVQ_UNROLL for (u32 k = 0; k < 4; k++) {
        eight[k] = *(const Eight*)(states + first + (k < many ? 256 * k : 0));
    }
    KVQ_UNROLL for (u32 k = 0; k < 4; k++) {
        KVQ_UNROLL for (u32 j = 0; j < 4; j++) {
            u32 above = h2_minus<BF16>(ends.least, eight[k].of[j]);
            u32 below = h2_minus<BF16>(eight[k].of[j], ends.greatest);
            between = between >> 1 | (above & below & 0x80008000u);
        }
    }
    u32 all = (1u << 4 * many) - 1;
    return ~between & (all << 16 | all);
}
DEVICE u32 channel_of(u32 n, u32 first) {
    return first + n % 16 / 4 * 256 + n % 4 * 2 + n / 16;
}

// Find a token's outliers where few elements can be some: those up to the one after the
// `per_tail`-th of the lanes' least values, and likewise at the other end. False where the ends
// meet, there are too many candidates, or none is left between the cuts.
DEVICE bool few_candidates(const Scratch& scratch, u32 channels, u32 per_tail, u32 lane,
                           const Extremes& extremes, Found& found) {
    if (per_tail > 31) return false;
    u32 low_end = ranked_lane(least_key(extremes), per_tail + 1);
    u32 high_end = 0xffff ^ ranked_lane(0xffff ^ greatest_key(extremes), per_tail + 1);
    if (low_end >= high_end) return false;
    Extremes ends{key_bits(low_end) * 0x10001u, key_bits(high_end) * 0x10001u};
    u32* listed = scratch.words + 2 * LISTED;  // of either tail
    if (lane < 2) listed[lane] = 0;
    sync_warp();
    KVQ_ROLLED for (u32 first = 8 * lane; first < channels; first += 1024) {
        KVQ_ROLLED for (u32 left = candidates(scratch.states, first, channels, ends); left;
                        left &= left - 1) {
            u32 channel = channel_of(lowest_bit(left), first);
            u32 key = order_key(scratch.states[channel]), item = item_of(key, channel);
            u32 tail = key > low_end, at = take_shared(listed + tail, 1);
            if (at < LISTED) scratch.words[tail * LISTED + at] = tail ? ~item : item;
        }
    }
    sync_warp();
    KVQ_UNROLL for (u32 tail = 0; tail < 2; tail++) found.listed[tail] = listed[tail];
    if (found.listed[0] > LISTED || found.listed[1] > LISTED) return false;
    KVQ_UNROLL for (u32 tail = 0; tail < 2; tail++) {
        u32 at = found.listed[tail] + lane;  // pad to whole quads
        if (lane < 3 && at < LISTED) scratch.words[tail * LISTED + at] = ~0u;
    }
    sync_warp();
    u32 low, next_low, high, next_high;
    rank_tail(scratch.words, found.listed[0], per_tail, lane, low, next_low);
    rank_tail(scratch.words + LISTED, found.listed[1], per_tail, lane, high, next_high);
    found.cuts = Cuts{low, ~high}, found.rest = Cuts{next_low, ~next_high};
    return next_low < ~high && ~next_high > low;
}

// How many of a token's elements there are in each of 256 bins. `bin` of a key may be none of them.
template <typename Bin>
DEVICE void fill_bins(const Scratch& scratch, u32 channels, u32 lane, Bin bin) {
    sync_warp();
    for (u32 i = lane; i < 256; i += 32) scratch.words[i] = 0;
    sync_warp();
    for (u32 i = lane; i < channels; i += 32) {
        u32 at = bin(scratch.states[i]);
        if (at < 256) add_shared((int*)scratch.words + at, 1);
    }
    sync_warp();
}

// The cuts of any token, by two histograms a tail: of the upper bytes, then of the lower bytes
// within a bin, and then a count of channels among equals. The states become their keys.
DEVICE Cuts rank_all(const Scratch& scratch, u32 channels, u32 per_tail, u32 lane) {
    u16* keys = scratch.states;
    sync_warp();
    for (u32 i = lane; i < channels; i += 32) keys[i] = (u16)order_key(keys[i]);
    fill_bins(scratch, channels, lane, [](u32 key) { return key >> 8; });
    u32 low_left = per_tail, high_left = per_tail;
    u32 low = rank_bin<false>(scratch.words, lane, low_left);
    u32 high = rank_bin<true>(scratch.words, lane, high_left);
    fill_bins(scratch, channels, lane, [&](u32 key) { return key ^ low << 8; });
    low = low << 8 | rank_bin<false>(scratch.words, lane, low_left);
    fill_bins(scratch, channels, lane, [&](u32 key) { return key ^ high << 8; });
    high = high << 8 | rank_bin<true>(scratch.words, lane, high_left);
    return Cuts{item_of(low, tie_channel<false>(keys, channels, lane, low, low_left)),
                item_of(high, tie_channel<true>(keys, channels, lane, high, high_left))};
}
