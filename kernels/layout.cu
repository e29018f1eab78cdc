// Where lists of outliers go, from how many each has: what pages.list_sizes and a sum say. See pack.cu.
#include "unpack.cuh"

constexpr u32 THREADS = 1024;
constexpr u32 EACH = 8;  // slabs of a thread at a time

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

// The sum over all threads before this one, and over all. `sums` are of warps.
DEVICE u32 threads_before(u32 value, u32* sums, u32& total) {
    u32 lane = thread_index() % 32, warp = thread_index() / 32, all;
    u32 within = lanes_before(value, lane, all);
    if (lane == 0) sums[warp] = all;
    sync_block();
    u32 before = from_lane(lanes_before(sums[lane], lane, total), warp);
    sync_block();
    return before + within;
}

// Grid: one block. `total` are the quads of all lists.
KERNEL(THREADS)
lay_out(const Count* counts, Entry* index, u32* total, u32 slabs) {
    u32* sums = (u32*)shared_memory();
    u32 first = 0;
    KVQ_ROLLED for (u32 base = 0; base < slabs; base += THREADS * EACH) {
        u32 at = base + thread_index() * EACH, own = 0, all;
        Count mine[EACH];
        KVQ_UNROLL for (u32 k = 0; k < EACH; k++) {
            mine[k] = at + k < slabs ? counts[at + k] : Count{0, 0};
            own += key_quads(mine[k]) + value_quads(mine[k]);
        }
        u32 begin = first + threads_before(own, sums, all);
        KVQ_UNROLL for (u32 k = 0; k < EACH; k++) {
            u32 keys = key_quads(mine[k]), values = value_quads(mine[k]);
            if (at + k < slabs) {
                index[at + k] = Entry{begin, keys, begin + keys, values | (values ? IN_ROUNDS : 0)};
            }
            begin += keys + values;
        }
        first += all;
    }
    if (thread_index() == 0) *total = first;
}
