// The first of the kernels that pack a prompt: ranges and outliers of values. What the arguments are,
// pack.cu says.
#include "survey.cuh"

// Grid: tokens of all sequences, a warp each. The `per_tail` least and greatest elements of a token
// over all KV heads are outliers, lower channels first among the least that are equal, higher ones
// among the greatest; the range is that of the rest.
KERNEL(WARPS * 32)
survey_values(const u16* value, const int* page_table, u32* ranges, Cuts* cuts, u32* counts,
              u32 batch, u32 num_kv_heads, u32 tokens, u32 max_pages, u32 per_tail) {
    u32 lane = thread_index() % 32, warp = thread_index() / 32, channels = num_kv_heads * HEAD_DIM;
    u32 number = block_index() * WARPS + warp, sequence = number / tokens, token = number % tokens;
    if (number >= batch * tokens) return;
    u32* words = (u32*)(shared_memory() + warp * (channels * 2 + SCRATCH_WORDS * 4));
    Scratch scratch{words, (u16*)(words + SCRATCH_WORDS)};
    Extremes extremes = NO_EXTREMES;  // of this lane
    const u16* row = value + ((u64)sequence * num_kv_heads * tokens + token) * HEAD_DIM;
    const u64 stride = (u64)tokens * HEAD_DIM;  // from a head to the next
    const u16* from = row + 8 * lane / HEAD_DIM * stride + 8 * lane % HEAD_DIM;
    KVQ_UNROLL_4 for (u32 channel = 8 * lane; channel < channels; channel += 256) {
        if (256 % HEAD_DIM) from = row + channel / HEAD_DIM * stride + channel % HEAD_DIM;
        Eight states = *(const Eight*)from;
        from += 256 / HEAD_DIM * stride;
        *(Eight*)(scratch.states + channel) = states;
        widen(extremes, states);
    }
    sync_warp();
    u32 page = page_table[sequence * max_pages + token / 128];
    u32* count = counts + ((u64)page * num_kv_heads * 2 + token / 64 % 2) * 2 + 1;
    Found found{NO_CUTS, {}, {0, 0}};
    bool few = per_tail && few_candidates(scratch, channels, per_tail, lane, extremes, found);
    if (few) {
        KVQ_UNROLL for (u32 tail = 0; tail < 2; tail++) {
            for (u32 i = lane; i < found.listed[tail]; i += 32) {
                u32 item = scratch.words[tail * LISTED + i];
                if (item <= (tail ? ~found.cuts.high : found.cuts.low))
                    add_global(count + ((tail ? ~item : item) & 0xffff) / HEAD_DIM * 4, 1);
            }
        }
    } else if (per_tail) {
        found.cuts = rank_all(scratch, channels, per_tail, lane);
        u32 low = ~0u, high = 0;
        for (u32 i = lane; i < channels; i += 32) {
            u32 item = item_of(scratch.states[i], i);
            if (is_cut(found.cuts, item)) {
                add_global(count + i / HEAD_DIM * 4, 1);
            } else {
                low = smaller(low, item), high = larger(high, item);
            }
        }
        found.rest = Cuts{least_of_warp(low), greatest_of_warp(high)};
    } else {
        u32 low = least_of_warp(least_key(extremes)), high = greatest_of_warp(greatest_key(extremes));
        found.rest = Cuts{item_of(low, 0), item_of(high, 0)};
    }
    if (lane != 0) return;
    ranges[page * 128 + token % 128] = range_of(found.rest.low >> 16, found.rest.high >> 16);
    cuts[number] = found.cuts;
}
