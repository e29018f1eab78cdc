// Ranges, outliers and codes of values that are floats (`-vrot`); `pack_values` takes the codes as
// those of compensate.cu. Each float operation is one IEEE operation in the order of codec.py.
//
// `values` (batch, num_kv_heads, tokens, HEAD_DIM) float. The rest as in pack.cu and compensate.cu.
#include "floats.cuh"

// An element in the order of outliers: by size, then by channel.
struct Ranked {
    u32 key, channel;
};

// The least element of all lanes after `last`, or with `above` the greatest before it.
template <bool above>
DEVICE Ranked next_ranked(const u32* keys, u32 channels, u32 lane, Ranked last) {
    Ranked best{above ? 0 : ~0u, above ? 0 : ~0u};
    KVQ_UNROLL_4 for (u32 i = lane; i < channels; i += 32) {
        u32 key = keys[i];
        bool further = above ? key < last.key || (key == last.key && i < last.channel)
                             : key > last.key || (key == last.key && i > last.channel);
        bool better = above ? key > best.key || (key == best.key && i >= best.channel)
                            : key < best.key || (key == best.key && i <= best.channel);
        if (further && better) best = Ranked{key, i};
    }
    u32 key = above ? greatest_of_warp(best.key) : least_of_warp(best.key);
    u32 mine = best.key == key ? best.channel : above ? 0 : ~0u;
    return Ranked{key, above ? greatest_of_warp(mine) : least_of_warp(mine)};
}

// Grid: tokens of all sequences, a warp each; as `survey_values`.
KERNEL(WARPS * 32)
survey_floats(const float* value, u32* ranges, FloatCuts* cuts, u32* counts, u32 batch,
              u32 num_kv_heads, u32 tokens, u32 per_tail) {
    u32 lane = thread_index() % 32, warp = thread_index() / 32, channels = num_kv_heads * HEAD_DIM;
    u32 number = block_index() * WARPS + warp, sequence = number / tokens, token = number % tokens;
    if (number >= batch * tokens) return;
    u32* keys = (u32*)shared_memory() + warp * channels;
    const float* row = value + ((u64)sequence * num_kv_heads * tokens + token) * HEAD_DIM;
    for (u32 i = lane; i < channels; i += 32) {
        keys[i] = float_key(row[(u64)(i / HEAD_DIM) * tokens * HEAD_DIM + i % HEAD_DIM]);
    }
    sync_warp();
    u32 page = token / 128 * batch + sequence;
    u32* count = counts + ((u64)page * num_kv_heads * 2 + token / 64 % 2) * 2 + 1;
    Ranked low{0, 0}, high{~0u, ~0u};
    KVQ_ROLLED for (u32 n = 0; n < per_tail; n++) {
        low = next_ranked<false>(keys, channels, lane, low);
        high = next_ranked<true>(keys, channels, lane, high);
        if (lane == 0) {
            add_global(count + low.channel / HEAD_DIM * 4, 1);
            add_global(count + high.channel / HEAD_DIM * 4, 1);
        }
    }
    FloatCuts found{low.key, low.channel, high.key, high.channel};
    Ranked least = next_ranked<false>(keys, channels, lane, low);
    Ranked most = next_ranked<true>(keys, channels, lane, high);
    if (lane != 0) return;
    ranges[page * 128 + token % 128] = range_of_floats(least.key, most.key);
    cuts[number] = per_tail ? found : NO_FLOAT_CUTS;
}

// Grid: (sequence, KV head, slab), 64 threads.
KERNEL(64)
code_floats(const float* value, const int* page_table, const u32* ranges, const FloatCuts* cuts,
            const float* middles, u8* coded, u16* moved, u32 num_kv_heads, u32 tokens,
            u32 max_pages) {
    FloatRow* rows = (FloatRow*)shared_memory();
    u32 slabs = (tokens + 63) / 64, token = thread_index();
    Place place = find_place(block_index(), num_kv_heads, slabs, tokens, page_table, max_pages);
    u64 first = ((u64)place.sequence * num_kv_heads + place.head) * tokens + place.slab * 64;
    if (token < place.tokens) {
        u32 range = ranges[place.page * 128 + place.slab % 2 * 64 + token];
        rows[token] = FloatRow{range, inverse_scale(range),
                               cuts[(u64)place.sequence * tokens + place.slab * 64 + token]};
    }
    sync_block();
    for (u32 i = thread_index(); i < place.tokens * HEAD_DIM; i += 64) {
        u32 channel = place.head * HEAD_DIM + i % HEAD_DIM;
        float x = value[first * HEAD_DIM + i];
        Element found = value_element(middles, x, rows[i / HEAD_DIM], channel);
        coded[first * HEAD_DIM + i] = (u8)(found.code | (found.is_outlier ? 0x80 : 0));
        if (found.is_outlier) moved[first * HEAD_DIM + i] = float_to_half(clamp_half(x));
    }
}
