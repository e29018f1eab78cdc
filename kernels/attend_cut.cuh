// How the work of attend.cu is cut into parts for blocks.
#pragma once
#include "attend_layout.cuh"

// Units of a KV head of a sequence; none past the last sequence.
DEVICE u32 segment_sizes(const Cache& cache, u32 sequence, Segment& segment) {
    if (sequence >= cache.batch) return 0;
    const int* state = cache.state + 8 * sequence;
    segment.first_slab = (u32)state[4] / 64;
    segment.slabs = ((u32)state[0] + 63) / 64 - segment.first_slab;
    segment.sink_units = ((u32)state[1] + 63) / 64;
    return segment.slabs + segment.sink_units + ((u32)state[2] + 63) / 64;
}

// Segments of a KV head, and of a sequence, which follow each other.
DEVICE u32 segments_of_head(const Cache& cache) {
    return (cache.group_heads + GROUP - 1) / GROUP;
}
DEVICE u32 segments_of(const Cache& cache) {
    return cache.num_kv_heads * segments_of_head(cache);
}

// How the work is cut: whether every block has units of one segment only, or `share` units of all
// there are, the first `longer` blocks one more.
struct Cut {
    bool whole;
    u32 share, longer;
};

DEVICE u32 parts_of(u32 units, u32 share) {
    return units ? larger(units / share, 1) : 0;
}

// Plan the cut for at most `blocks` blocks, a lane a sequence; returns how many have work.
DEVICE u32 plan(const Cache& cache, u32 blocks, u32 lane, Cut& cut) {
    u32 many = segments_of(cache), total = 0, used = 0, longest = 0;
    Segment segment;
    KVQ_ROLLED for (u32 first = 0; first < cache.batch; first += 32) total +=
        sum_of_warp(segment_sizes(cache, first + lane, segment));
    total *= many;
    cut.share = larger((total + blocks - 1) / blocks, 1), cut.longer = 0;
    KVQ_ROLLED for (u32 first = 0; first < cache.batch; first += 32) {
        u32 units = segment_sizes(cache, first + lane, segment), parts = parts_of(units, cut.share);
        used += sum_of_warp(parts);
        longest = larger(longest, parts ? (units + parts - 1) / parts : 0);
    }
    used *= many, longest = greatest_of_warp(longest);
    cut.whole = used <= blocks && longest <= cut.share + WARPS;
    if (cut.whole) return used;
    blocks = smaller(blocks, total);
    cut.share = total / blocks, cut.longer = total % blocks;
    return blocks;
}

// The first unit of a block, and the block that has a unit, where blocks have units of all
// segments.
DEVICE u32 unit_of(const Cut& cut, u32 block) {
    return block * cut.share + smaller(block, cut.longer);
}
DEVICE u32 block_of(const Cut& cut, u32 unit) {
    u32 by_longer = unit / (cut.share + 1);
    return by_longer < cut.longer ? by_longer : (unit - cut.longer) / cut.share;
}

// The segment to which a unit belongs, or where every block has but one, to which a block belongs.
DEVICE Segment find_segment(const Cache& cache, const Cut& cut, u32 at, u32 lane) {
    Segment segment;
    u32 many = segments_of(cache), passed = 0, first = 0, size, owner;
    for (;; first += 32) {  // a lane a sequence
        segment.units = segment_sizes(cache, first + lane, segment);
        size = cut.whole ? parts_of(segment.units, cut.share) : segment.units;
        u32 until = size * many;
        KVQ_UNROLL for (u32 d = 1; d < 32; d *= 2) {
            u32 below = sum_below(until, d);
            if (lane >= d) until += below;
        }
        u32 found = vote(at - passed < until);
        if (found || first + 32 >= cache.batch) {
            owner = found ? lowest_bit(found) : 0;
            passed += from_lane(until, owner) - from_lane(size, owner) * many;
            break;
        }
        passed += from_lane(until, 31);
    }
    segment.sequence = first + owner;
    segment.units = from_lane(segment.units, owner);
    segment.slabs = from_lane(segment.slabs, owner);
    segment.first_slab = from_lane(segment.first_slab, owner);
    segment.sink_units = from_lane(segment.sink_units, owner);
    size = larger(from_lane(size, owner), 1);
    u32 within = (at - passed) / size, groups = segments_of_head(cache), group = 0;
    segment.kv_head = within;
    if (groups > 1) segment.kv_head = within / groups, group = within % groups;
    segment.first_head = segment.kv_head * cache.group_heads + group * GROUP;
    segment.heads = smaller(GROUP, cache.group_heads - group * GROUP);
    segment.index = segment.sequence * many + within;
    segment.start = passed + within * size;
    if (cut.whole) {
        segment.first_block = segment.start, segment.blocks = size;
    } else {
        segment.first_block = block_of(cut, segment.start);
        segment.blocks = block_of(cut, segment.start + segment.units - 1) + 1 - segment.first_block;
    }
    return segment;
}

// A block's units of a segment, of those the block has from `unit` to `end`.
struct Range {
    u32 from, until;
};
DEVICE Range range_of_block(const Cut& cut, const Segment& segment, u32 unit, u32 end) {
    if (!cut.whole) return Range{unit - segment.start, smaller(end - segment.start, segment.units)};
    u32 part = block_index() - segment.first_block;
    return Range{segment.units * part / segment.blocks,
                 segment.units * (part + 1) / segment.blocks};
}
