// How the work of attend.cu is cut into parts for blocks.
#pragma once
#include "attend_layout.cuh"

// a / b, of a below 2^31 and a quotient below 2^20.
DEVICE u32 divide(u32 a, u32 b) {
    u32 quotient = (u32)((float)a * inverse_fast((float)b));
    int rest = (int)(a - quotient * b);
    return rest < 0 ? quotient - 1 : quotient + (rest >= (int)b);
}

// A sequence's row of `state`, zeros past the last one.
struct Lengths {
    u32 packed, sinks, window, first_seen;
};
DEVICE Lengths lengths_of(const Cache& cache, u32 sequence) {
    if (sequence >= cache.batch) return Lengths{0, 0, 0, 0};
    const int* state = cache.state + 8 * sequence;
    return Lengths{(u32)state[0], (u32)state[1], (u32)state[2], (u32)state[4]};
}

// What there is of each KV head of a sequence.
struct Sizes {
    u32 first_slab, slabs, sink_units, units;
    u32 parts;  // into which the units are cut, where every block has units of one segment
};
DEVICE Sizes sizes_of(const Lengths& lengths) {
    Sizes sizes;
    sizes.first_slab = lengths.first_seen / 64;
    sizes.slabs = (lengths.packed + 63) / 64 - sizes.first_slab;
    sizes.sink_units = (lengths.sinks + 63) / 64;
    sizes.units = sizes.slabs + sizes.sink_units + (lengths.window + 63) / 64;
    sizes.parts = 0;
    return sizes;
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
    return units ? larger(divide(units, share), 1) : 0;
}

// Plan the cut for at most `blocks` blocks, a lane a sequence; `own` is what the lane's one of the
// first 32 has. Returns how many blocks have work.
DEVICE u32 plan(const Cache& cache, Sizes& own, u32 blocks, u32 lane, Cut& cut) {
    u32 many = segments_of(cache), total = sum_of_warp(own.units), used = 0;
    KVQ_ROLLED for (u32 first = 32; first < cache.batch; first += 32) total +=
        sum_of_warp(sizes_of(lengths_of(cache, first + lane)).units);
    total *= many;
    cut.share = larger(divide(total + blocks - 1, blocks), 1), cut.longer = 0;
    own.parts = parts_of(own.units, cut.share);
    Sizes sizes = own;
    bool uneven = false;
    KVQ_ROLLED for (u32 first = 0;;) {
        used += sum_of_warp(sizes.parts);
        uneven |= sizes.units > sizes.parts * (cut.share + WARPS);
        if ((first += 32) >= cache.batch) break;
        sizes = sizes_of(lengths_of(cache, first + lane));
        sizes.parts = parts_of(sizes.units, cut.share);
    }
    used *= many;
    cut.whole = used <= blocks && !any_lane(uneven);
    if (cut.whole) return used;
    blocks = smaller(blocks, total);
    cut.share = divide(total, blocks), cut.longer = total - blocks * cut.share;
    return blocks;
}

// The first unit of a block, and the block that has a unit, where blocks have units of all
// segments.
DEVICE u32 unit_of(const Cut& cut, u32 block) {
    return block * cut.share + smaller(block, cut.longer);
}
DEVICE u32 block_of(const Cut& cut, u32 unit) {
    u32 by_longer = divide(unit, cut.share + 1);
    return by_longer < cut.longer ? by_longer : divide(unit - cut.longer, cut.share);
}

// The segment to which a unit belongs, or where every block has but one, to which a block belongs.
// `own` is what the lane's one of the first 32 sequences has.
DEVICE Segment find_segment(const Cache& cache, const Cut& cut, Sizes own, u32 at, u32 lane) {
    Segment segment;
    u32 many = segments_of(cache), passed = 0, first = 0, size, owner;
    for (;;) {  // a lane a sequence
        size = cut.whole ? own.parts : own.units;
        u32 until = size * many;
        KVQ_ROLLED for (u32 d = 1; d < smaller(cache.batch, 32); d *= 2) {
            u32 below = sum_below(until, d);
            if (lane >= d) until += below;
        }
        u32 found = vote(at - passed < until);
        if (found || first + 32 >= cache.batch) {
            owner = found ? lowest_bit(found) : 0;
            passed += from_lane(until, owner) - from_lane(size, owner) * many;
            break;
        }
        passed += from_lane(until, 31), first += 32;
        own = sizes_of(lengths_of(cache, first + lane));
        own.parts = parts_of(own.units, cut.share);
    }
    segment.sequence = first + owner;
    segment.units = from_lane(own.units, owner);
    segment.slabs = from_lane(own.slabs, owner);
    segment.first_slab = from_lane(own.first_slab, owner);
    segment.sink_units = from_lane(own.sink_units, owner);
    size = larger(from_lane(size, owner), 1);
    u32 within = divide(at - passed, size), groups = segments_of_head(cache), group = 0;
    segment.kv_head = within;
    if (groups > 1)
        segment.kv_head = divide(within, groups), group = within - segment.kv_head * groups;
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
    return Range{divide(segment.units * part, segment.blocks),
                 divide(segment.units * (part + 1), segment.blocks)};
}
