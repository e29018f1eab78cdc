// Where lists of outliers go, from how many each has: what pages.list_sizes and a sum say. See
// pack.cu.
#include "unpack.cuh"

constexpr u32 THREADS = 1024;
constexpr u32 EACH = 8;  // slabs of a thread at a time, 32 apart

// The lists of a slab as `index` says: where they begin, and their quads.
struct alignas(16) Entry {
    u32 key_first, key_quads, value_first, value_quads;
};
struct alignas(8) Count {
    u32 key, value;
};

DEVICE u32 key_quads(const Count& count) {
    return (count.key + 3) / 4;
}
DEVICE u32 value_quads(const Count& count) {
    return count.value ? (count.value + HEADER + 3) / 4 : 0;
}

// The sum over all warps before this one, and over all. `sums` are of warps.
DEVICE u32 warps_before(u32 value, u32* sums, u32& total) {
    u32 lane = thread_index() % 32, warp = thread_index() / 32;
    if (lane == 0) sums[warp] = value;
    sync_block();
    u32 before = from_lane(lanes_before(sums[lane], lane, total), warp);
    sync_block();
    return before;
}

// Grid: one block. `total` are the quads of all lists.
KERNEL(THREADS)
lay_out(const Count* counts, Entry* index, u32* total, u32 slabs) {
    u32* sums = (u32*)shared_memory();
    u32 lane = thread_index() % 32, own_first = thread_index() / 32 * (32 * EACH) + lane, first = 0;
    KVQ_ROLLED for (u32 base = 0; base < slabs; base += THREADS * EACH) {
        u32 at = base + own_first, own = 0, all, before[EACH];  // a warp's slabs follow each other
        Count mine[EACH];
        KVQ_UNROLL for (u32 k = 0; k < EACH; k++) {
            mine[k] = at + 32 * k < slabs ? counts[at + 32 * k] : Count{0, 0};
        }
        KVQ_UNROLL for (u32 k = 0; k < EACH; k++) {
            u32 sum, quads = key_quads(mine[k]) + value_quads(mine[k]);
            before[k] = own + lanes_before(quads, lane, sum);
            own += sum;
        }
        u32 begin = first + warps_before(own, sums, all);
        KVQ_UNROLL for (u32 k = 0; k < EACH; k++) {
            u32 keys = key_quads(mine[k]), values = value_quads(mine[k]), start = begin + before[k];
            if (at + 32 * k < slabs) {
                index[at + 32 * k] =
                    Entry{start, keys, start + keys, values | (values ? IN_ROUNDS : 0)};
            }
        }
        first += all;
    }
    if (thread_index() == 0) *total = first;
}
