// Products with packed keys or values alone, from codes (DENSE), outliers (SPARSE) or both: what
// attention consists of, to be timed apart. Arguments as in attend.cu; blocks and warps share slabs
// as there, and every slab is read where it lies.
//
// `scores`   (batch, heads, capacity) float: query times each packed token's rotated key
// `weights`  likewise; `sums` (batch, heads, HEAD_DIM) float, zeros: weighted values are added, in
//            any order
// Macros: those of attend.cu; DENSE, SPARSE.
#include "attend_block.cuh"

// A list of outliers where it lies.
struct There {
    const u32* words;
    DEVICE u32 operator()(u32 i) const { return words[i]; }
};

// What a warp knows of the slab it reads.
struct Reading {
    const u8* words;
    u32 ranges, lists[4];
};

DEVICE Reading find_slab(const Cache& cache, const Segment& segment, u32 number) {
    Reading found;
    u32 page = cache.page_table[segment.sequence * cache.max_pages + number / 2];
    u32 index = (page * cache.num_kv_heads + segment.kv_head) * 2 + number % 2;
    found.words = cache.slabs + (u64)index * SLAB;
    found.ranges = page * 2 + number % 2;
    KVQ_UNROLL for (int i = 0; i < 4; i++) found.lists[i] =
        SPARSE ? cache.outlier_index[4 * (u64)index + i] : 0;
    return found;
}

// A block's part: its segment and which of the segment's slabs are a warp's.
struct Part {
    Segment segment;
    u32 first, last;
};

// Fill what a block shares and call `read(warp, part)` for each of its segments.
template <typename Read>
DEVICE void for_each_part(const Cache& cache, const Tables& tables, const u16* query, bool is_key,
                          const Read& read) {
    u8* shared = shared_memory();
    u32 number = thread_index() / 32, lane = thread_index() % 32,
        level = lane_level(tables.levels, lane);
    send_tables(tables, cache, shared);
    Sizes own = sizes_of(lengths_of(cache, lane));
    Cut cut;
    if (block_index() >= plan(cache, own, block_count(), lane, cut)) {
        await_copies<0>();
        return;
    }
    Warp warp;
    set_up(warp, tables.levels, cache, shared, number, lane);
    fill_tables(level, tables.levels, shared);
    fill_places(shared + PLACES_AT);
    u32 unit = cut.whole ? 0 : unit_of(cut, block_index());
    u32 end = cut.whole ? 1 : unit_of(cut, block_index() + 1);
    while (unit < end) {
        Part part{find_segment(cache, cut, own, cut.whole ? block_index() : unit, lane), 0, 0};
        const Segment& segment = part.segment;
        if (is_key) {
            send_segment(tables, cache, segment, query, shared);
        } else {
            copies_sent();
        }
        Range range = range_of_block(cut, segment, unit, end);
        u32 count = range.until - range.from;
        part.first =
            segment.first_slab + smaller(range.from + count * number / WARPS, segment.slabs);
        part.last =
            segment.first_slab + smaller(range.from + count * (number + 1) / WARPS, segment.slabs);
        if (is_key) fill_head_table(tables.key_table, segment.kv_head, shared + HEAD_AT);
        await_copies<0>();
        sync_block();
        if (is_key) arrange_query(segment, shared, 1.0f);
        if (is_key) fold_offsets(shared + HEAD_AT);
        sync_block();
        read(warp, part);
        unit += cut.whole ? 1 : count;
        if (unit < end) sync_block();
    }
}

#define CACHE_PARAMETERS                                                                      \
    const u8 *slabs, const u32 *ranges, const u32 *outlier_index, const u32 *outlier_words,   \
        const int *page_table, const int *state, const u16 *key_table, const u16 *levels,     \
        const u32 *angles, const u64 *frequencies, const u32 *coefficients, const u16 *order, \
        u32 batch, u32 group_heads, u32 num_kv_heads, u32 max_pages
#define CACHE                                                                                      \
    Cache {                                                                                        \
        slabs, ranges, outlier_index, outlier_words, page_table, state, batch, group_heads,        \
            num_kv_heads, max_pages, frequencies, coefficients, order, Exact{nullptr, nullptr, 0}, \
            Exact{nullptr, nullptr, 0}                                                             \
    }

KERNEL(THREADS)
score_keys(const u16* query, float* scores, CACHE_PARAMETERS) {
    Cache cache = CACHE;
    const float* shared_query = (const float*)(shared_memory() + QUERY_AT);
    u32 capacity = max_pages * 128;
    auto read = [&](Warp& warp, const Part& part) {
        const Segment& segment = part.segment;
        const int* own = state + 8 * segment.sequence;
        KVQ_ROLLED for (u32 number = part.first; number < part.last; number++) {
            Reading slab = find_slab(cache, segment, number);
            u32 words[STEPS][KEY_BITS];
            KVQ_UNROLL for (u32 step = 0; step < STEPS && DENSE; step++) load_words<KEY_BITS>(
                slab.words + step * step_bytes(KEY_BITS), warp.lane, words[step]);
            turn_query<true>(warp, shared_query, own[3] + (int)(number / 2 * 128) + MIDDLE);
            float product[4][4] = {}, score[MINE][LANE_HEADS];
            if constexpr (DENSE) write_offsets(warp);
            if constexpr (SPARSE) {
                clear_sparse(warp);
                sync_warp();
                There list{outlier_words + (u64)slab.lists[0] * 4};
                key_outliers(warp, list, slab.lists[1] * 4, number % 2 * 4);
            }
            KVQ_UNROLL for (u32 step = 0; step < STEPS && DENSE; step++)
                key_step(warp, words[step], step, number % 2 * 4, product);
            gather_scores(warp.row, warp.column, warp.places, product,
                          DENSE ? offset_of(warp) : Couple{0.0f, 0.0f}, number % 2, score);
            if constexpr (SPARSE) {
                sync_warp();
                sparse_scores(warp, score);
            }
            float* out =
                scores + ((u64)segment.sequence * group_heads * num_kv_heads + segment.first_head) *
                             capacity;
            KVQ_UNROLL for (u32 i = 0; i < MINE; i++) {
                KVQ_UNROLL for (u32 j = 0; j < LANE_HEADS; j++) {
                    u32 token = number * 64 + 8 * mine_at(warp.column, i) + warp.row,
                        head = warp.head + j;
                    bool is_there = token >= (u32)own[4] && token < (u32)own[0];
                    if (is_there && head < segment.heads)
                        out[(u64)head * capacity + token] = score[i][j];
                }
            }
        }
    };
    for_each_part(cache, Tables{key_table, levels, angles}, query, true, read);
}

// A slab's weights: fragments relative to the greatest, as float to `sparse`; what offsets add to
// `offset`. Returns the greatest of weight times scale.
DEVICE float slab_weights(Warp& warp, const float (&weight)[8][LANE_HEADS], const u32* ranges,
                          u32 (&fragments)[4][2]) {
    float highest = 0.0f;
    KVQ_UNROLL for (u32 i = 0; i < 8; i++) {
        float scale = h2_low(ranges[8 * i + warp.row]);
        KVQ_UNROLL for (u32 j = 0; j < LANE_HEADS; j++) highest =
            greater(highest, greater(weight[i][j] * scale, -weight[i][j] * scale));
    }
    KVQ_UNROLL for (u32 mask = 1; mask < 32; mask *= 2) highest =
        greater(highest, exchange(highest, mask));
    float inverse = highest > 0.0f ? 1.0f / highest : 0.0f;
    KVQ_UNROLL for (u32 i = 0; i < 8; i++) {
        u32 token = 8 * i + warp.row, range = ranges[token];
        float relative[LANE_HEADS];
        KVQ_UNROLL for (u32 j = 0; j < LANE_HEADS; j++) {
            relative[j] = weight[i][j] * h2_low(range) * inverse;
            warp.offset[j] += weight[i][j] * h2_high(range);
            if (SPARSE && has_heads(warp))
                warp.sparse[token * GROUP + warp.head + j] = weight[i][j];
        }
        fragments[i / 2][i % 2] = transpose8(h2_from(relative[0], relative[LANE_HEADS - 1]));
    }
    return highest;
}

KERNEL(THREADS)
mix_values(const float* weights, float* sums, CACHE_PARAMETERS) {
    Cache cache = CACHE;
    u32 capacity = max_pages * 128;
    auto read = [&](Warp& warp, const Part& part) {
        const Segment& segment = part.segment;
        const int* own = state + 8 * segment.sequence;
        u64 first_head = (u64)segment.sequence * group_heads * num_kv_heads + segment.first_head;
        clear_results(warp);
        KVQ_ROLLED for (u32 number = part.first; number < part.last; number++) {
            Reading slab = find_slab(cache, segment, number);
            u32 words[STEPS][VALUE_BITS], fragments[4][2];
            KVQ_UNROLL for (u32 step = 0; step < STEPS && DENSE; step++) load_words<VALUE_BITS>(
                slab.words + KEY_SLAB + step * step_bytes(VALUE_BITS), warp.lane, words[step]);
            float weight[8][LANE_HEADS];
            KVQ_UNROLL for (u32 i = 0; i < 8; i++) {
                KVQ_UNROLL for (u32 j = 0; j < LANE_HEADS; j++) {
                    u32 token = number * 64 + 8 * i + warp.row, head = warp.head + j;
                    bool is_there =
                        token >= (u32)own[4] && token < (u32)own[0] && head < segment.heads;
                    weight[i][j] =
                        is_there ? weights[(first_head + head) * capacity + token] : 0.0f;
                }
            }
            sync_warp();  // the slab before is used up
            float unit = slab_weights(warp, weight, ranges + (u64)slab.ranges * 64, fragments);
            sync_warp();
            if constexpr (SPARSE) {
                There list{outlier_words + (u64)slab.lists[2] * 4};
                u32 count = (slab.lists[3] & ~IN_ROUNDS) * 4;
                if (slab.lists[3] & IN_ROUNDS) {
                    value_outliers(warp, list);
                } else {
                    loose_value_outliers(warp, list, count);
                }
            }
            KVQ_UNROLL for (u32 m = 0; m < STEPS && DENSE; m++) {
                float sum[4] = {};
                value_step(warp, words[m], fragments, sum);
                KVQ_UNROLL for (u32 k = 0; k < 4; k++) warp.out[m][k] += sum[k] * unit;
            }
        }
        sync_warp();
        KVQ_UNROLL for (u32 j = 0; j < LANE_HEADS; j++) {
            KVQ_UNROLL for (u32 mask = 4; mask < 32; mask *= 2) warp.offset[j] +=
                exchange(warp.offset[j], mask);
            if (!has_heads(warp) || warp.head + j >= segment.heads) continue;
            float offset = DENSE ? warp.offset[j] : 0.0f;
            KVQ_UNROLL for (u32 i = 0; i < 2 * STEPS; i++) {
                u32 channel = 8 * i + warp.row, head = warp.head + j;
                float sum =
                    warp.mix[channel * GROUP + head] + warp.out[i / 2][j + i % 2 * 2] + offset;
                add_global(sums + (first_head + head) * HEAD_DIM + channel, sum);
            }
        }
    };
    for_each_part(cache, Tables{key_table, levels, angles}, nullptr, false, read);
}
