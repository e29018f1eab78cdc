// Attention of one query token straight from the packed cache.
//
// Grid: any number of blocks of WARPS warps. The slabs of a (sequence, KV head) and its exact
// tokens in units of 64 are a segment. Each segment is cut into equal parts, one a block, where
// that leaves no block much more than its share; else all segments are laid end to end and cut into
// equal ranges. Within a block each warp takes an equal part of the range, keeps DEPTH - 1 chunks
// of codes under way and ends with its own softmax; the block joins its warps, and the last block
// to arrive joins the blocks of a segment. Nothing depends on the host: lengths lie on the device,
// counters return to 0.
//
// `query`, `output`  (batch, num_heads, HEAD_DIM) half, or bfloat16 with BF16
// `slabs`            pages of 128 tokens, in each KV heads, two slabs each: keys, then values
// `ranges`           (pages, 128) half2: scale and offset of a value token
// `outlier_index`    (pages, num_kv_heads, 2) x {first quad of words, quads} of keys, then values
// `outlier_words`    what the index points to
// `page_table`       (batch, max_pages) page of each 128 tokens
// `state`            (batch, 8): packed tokens, sinks, window tokens, position of the first packed
//                    token, first packed token that is seen; the rest is spare
// `key_table`        scales and offsets (num_kv_heads, STEPS, 4) x 4 half2, or with CHANNEL_LEVELS
//                    levels (num_kv_heads, HEAD_DIM, 2^bits)
// `levels`           (2, LEVEL_ROW) half: levels of keys, of values
// `angles`           half2 cosines and sines of a page's places, from its middle, in fragment order
// `frequencies`      (HEAD_DIM / 2) turns per token, times 2^64
// `coefficients`     (HEAD_DIM / 4, 8) half2: of each two pairs of channels, T_m of
// attend_terms.cuh `order`            (HEAD_DIM) channel of a head that stands at each place of a
// packed key exact tokens       (batch, num_kv_heads, capacity, HEAD_DIM) keys after RoPE, and
// values `partials`         (blocks + segments, GROUP, HEAD_DIM + 2) float; `counters` one a
// segment, zero `log_sums`         (batch, num_heads) float, written: log of the sum of exp(score);
// or null
#include "attend_block.cuh"

KERNEL(THREADS)
attend(const u16* query, u16* output, const u8* slabs, const u32* ranges, const u32* outlier_index,
       const u32* outlier_words, const int* page_table, const int* state, const u16* key_table,
       const u16* levels, const u32* angles, const u64* frequencies, const u32* coefficients,
       const u16* order, const u16* sink_key, const u16* sink_value, const u16* window_key,
       const u16* window_value, float* partials, u32* counters, float* log_sums, u32 batch,
       u32 group_heads, u32 num_kv_heads, u32 max_pages, u32 sink_capacity, u32 window_capacity,
       float scale, float cap) {
    u8* shared = shared_memory();
    Cache cache{slabs,
                ranges,
                outlier_index,
                outlier_words,
                page_table,
                state,
                batch,
                group_heads,
                num_kv_heads,
                max_pages,
                frequencies,
                coefficients,
                order,
                Exact{sink_key, sink_value, sink_capacity},
                Exact{window_key, window_value, window_capacity}};
    u32 number = thread_index() / 32, lane = thread_index() % 32;
    Tables tables{key_table, levels, angles};
    if (number == WARPS - 1) fetch_early(tables, cache, query, lane);
    Lengths lengths = lengths_of(cache, lane);  // everything waits for them
    Results results{output, partials, log_sums, counters};
    u32 level = lane_level(levels, lane);
    Sizes own = sizes_of(lengths);
    Cut cut;
    if (block_index() >= plan(cache, own, block_count(), lane, cut)) return;  // more than units

    u8* corner = shared + CORNER_AT + number * CORNER;
    const float* shared_query = (const float*)(shared + QUERY_AT);
    float* join = (float*)(shared + JOIN_AT);
    Kept* kept = (Kept*)(shared + KEPT_AT);
    Warp warp;
    set_up(warp, levels, cache, shared, number, lane);

    Stream stream;
    stream.corner = corner, stream.lane = warp.lane, stream.parity = 0;
    bool ready = false;

    u32 unit = cut.whole ? 0 : unit_of(cut, block_index());
    u32 end = cut.whole ? 1 : unit_of(cut, block_index() + 1);
    KVQ_ROLLED for (;;) {
        Segment segment = find_segment(cache, cut, own, cut.whole ? block_index() : unit, lane);
        Range range = range_of_block(cut, segment, unit, end);
        u32 from = range.from, count = range.until - from;
        u32 begins = from + (count < WARPS ? smaller(number, count) : count * number / WARPS);
        u32 ends =
            from + (count < WARPS ? smaller(number + 1, count) : count * (number + 1) / WARPS);
        u32 stop = smaller(ends, segment.slabs);  // its slabs end there
        stream.number = segment.first_slab + begins, stream.last = segment.first_slab + stop - 1;
        if (begins < stop) look_ahead(cache, segment, stream);
        // While the loads are under way:
        if (!ready) send_tables(tables, cache, shared);
        send_segment(tables, cache, segment, query, shared);
        if (thread_index() == 0) {
            u32 row = segment.sequence * num_kv_heads * group_heads + segment.first_head;
            u32 next = unit + (cut.whole ? 1 : count);
            *kept = Kept{row,
                         segment.heads,
                         segment.index,
                         segment.first_block,
                         segment.blocks,
                         smaller(count, WARPS),
                         cut.share,
                         cut.longer,
                         cut.whole,
                         next,
                         end};
        }
        fill_head_table(key_table, segment.kv_head, shared + HEAD_AT);
        if (!ready) fill_tables(level, levels, shared);
        if (!ready) fill_places(shared + PLACES_AT);
        clear_results(warp);
        if (begins < stop) {
            begin(cache, stream);
        } else {
            await_copies<0>();  // nothing of its own is under way
        }
        await_copies<DEPTH - 1>();  // what was sent for before the slabs
        sync_block();
        arrange_query(segment, shared, scale);
        fold_offsets(shared + HEAD_AT);
        sync_block();
        if (begins < ends) {
            attend_units(warp, cache, segment, stream, shared_query, begins, ends, cap);
            leave_result(warp, join + number * GROUP * 3);
        }
        sync_block();

        give_result(results, *kept, join, shared + CORNER_AT);
        unit = kept->next, end = kept->end;
        if (unit >= end) return;
        cut = Cut{kept->whole != 0, kept->share, kept->longer};
        own = sizes_of(lengths_of(cache, lane)), level = 0, ready = true;
        sync_block();  // all have read what the next segment overwrites
    }
}
