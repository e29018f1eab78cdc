// The first of the kernels that pack a prompt: ranges and outliers of values. What the arguments
// are, pack.cu says.
#include "survey.cuh"

// Where a token's outliers are counted and marked: its slab of the first head.
struct Slate {
    u32 *counts, *flags, token;  // of the slab
    bool marks;

    DEVICE void add(u32 channel) const {
        u32 head = channel / HEAD_DIM, at = channel % HEAD_DIM;
        add_global(counts + head * 4, 1);
        if (!marks) return;
        u32* word = flags + (head * 2 * STEPS + at / 16) * 32 + at % 8 * 4;
        mark_global(word, 1u << (token / 16 * 8 + token / 8 % 2 * 4 + at / 8 % 2 * 2 + token % 2));
    }
};

// Grid: tokens of all sequences, a warp each. The `per_tail` least and greatest elements of a token
// over all KV heads are outliers, lower channels first among the least that are equal, higher ones
// among the greatest; the range is that of the rest. Outliers are counted, and marked in `flags` of
// values if `marks` says so; if not, `cuts` are written.
KERNEL(WARPS * 32)
survey_values(const u16* value, u32* ranges, Cuts* cuts, u32* counts, u32* flags, u32 batch,
              u32 num_kv_heads, u32 tokens, u32 per_tail, u32 marks) {
    u32 lane = thread_index() % 32, warp = thread_index() / 32, channels = num_kv_heads * HEAD_DIM;
    u32 number = block_index() * WARPS + warp, sequence = number / tokens, token = number % tokens;
    if (number >= batch * tokens) return;
    u32* words = (u32*)(shared_memory() + warp * (channels * 2 + SCRATCH_WORDS * 4));
    Scratch scratch{words, (u16*)(words + SCRATCH_WORDS)};
    const u16* row = value + ((u64)sequence * num_kv_heads * tokens + token) * HEAD_DIM;
    const u64 stride = (u64)tokens * HEAD_DIM;  // from a head to the next
    const u16* from = row + 8 * lane / HEAD_DIM * stride + 8 * lane % HEAD_DIM;
    KVQ_ROLLED for (u32 channel = 8 * lane; channel < channels;
                    channel += 256) {  // all under way at once
        if (256 % HEAD_DIM) from = row + channel / HEAD_DIM * stride + channel % HEAD_DIM;
        copy16(scratch.states + channel, from);
        from += 256 / HEAD_DIM * stride;
    }
    copies_sent();
    await_copies<0>();
    sync_warp();
    Extremes extremes = NO_EXTREMES;  // of this lane
    KVQ_ROLLED for (u32 first = 8 * lane; first < channels; first += 1024) {
        Eight states[4];
        KVQ_UNROLL for (u32 k = 0; k < 4; k++) {
            states[k] = *(const Eight*)(scratch.states +
                                        (first + 256 * k < channels ? first + 256 * k : first));
        }
        KVQ_UNROLL for (u32 k = 0; k < 4; k++) widen(extremes, states[k]);
    }
    u32 page = token / 128 * batch + sequence, in_slab = token % 64;
    u64 list = (u64)page * num_kv_heads * 2 + token / 64 % 2;
    Slate slate{counts + 2 * list + 1, flags + list * STEPS * 32 + in_slab % 8 / 2, in_slab,
                marks != 0};
    Found found{NO_CUTS, {}, {0, 0}};
    bool few = per_tail && few_candidates(scratch, channels, per_tail, lane, extremes, found);
    if (few) {
        KVQ_UNROLL for (u32 tail = 0; tail < 2; tail++) {
            for (u32 i = lane; i < found.listed[tail]; i += 32) {
                u32 item = scratch.words[tail * LISTED + i];
                if (item <= (tail ? ~found.cuts.high : found.cuts.low))
                    slate.add((tail ? ~item : item) & 0xffff);
            }
        }
    } else if (per_tail) {
        found.cuts = rank_all(scratch, channels, per_tail, lane);
        u32 low = ~0u, high = 0;
        for (u32 i = lane; i < channels; i += 32) {
            u32 item = item_of(scratch.states[i], i);
            if (is_cut(found.cuts, item)) {
                slate.add(i);
            } else {
                low = smaller(low, item), high = larger(high, item);
            }
        }
        found.rest = Cuts{least_of_warp(low), greatest_of_warp(high)};
    } else {
        u32 low = least_of_warp(least_key(extremes)),
            high = greatest_of_warp(greatest_key(extremes));
        found.rest = Cuts{item_of(low, 0), item_of(high, 0)};
    }
    if (lane != 0) return;
    ranges[page * 128 + token % 128] = range_of(found.rest.low >> 16, found.rest.high >> 16);
    if (!marks) cuts[number] = found.cuts;
}
