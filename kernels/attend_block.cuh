// What a block does around its slabs: fill tables, split segments among warps, join the results.
#pragma once

struct Tables {
    const u16 *key_table, *levels;
    const u32* angles;
};

// Send for `bytes` from global memory, some 16 bytes a thread from thread `first` on.
template <u32 bytes>
DEVICE void send_bytes(u8* to, const void* from, u32 first) {
    static_assert(bytes % 16 == 0, "whole pieces are copied");
    KVQ_UNROLL_4 for (u32 i = (thread_index() + THREADS - first) % THREADS; i < bytes / 16; i += THREADS)
        copy16(to + 16 * i, (const u8*)from + 16 * i);
}

// Send for what is only copied: angles of a page's places, frequencies and the order of channels.
DEVICE void send_tables(const Tables& tables, const Cache& cache, u8* shared) {
    if constexpr (DERIVED) {  // the two rows of a lane to the two halves of the table
        KVQ_UNROLL_4 for (u32 i = thread_index(); i < ANGLE_BYTES / 8; i += THREADS)
            copy8(shared + LUT_BYTES + i / 2 * 8 + i % 2 * (ANGLE_BYTES / 2), tables.angles + 2 * i);
    } else {
        send_bytes<ANGLE_BYTES>(shared + LUT_BYTES, tables.angles, 0);
    }
    send_bytes<HEAD_DIM * 4>(shared + FREQUENCIES_AT, cache.frequencies, 0);
    send_bytes<HEAD_DIM * 2>(shared + ORDER_AT, cache.order, 128 % THREADS);
}

// Send for a segment's query and, where it is only copied, the table of its keys.
DEVICE void send_segment(const Tables& tables, const Cache& cache, const Segment& segment,
                         const u16* query, u8* shared) {
    u32 heads = cache.group_heads * cache.num_kv_heads;
    const u16* from = query + ((u64)segment.sequence * heads + segment.first_head) * HEAD_DIM;
    KVQ_ROLLED for (u32 i = thread_index(); i < segment.heads * HEAD_DIM / 8; i += THREADS)
        copy16(shared + RAW_AT + 16 * i, from + 8 * i);
    if constexpr (KEY_BITS != 16 && !CHANNEL_LEVELS) {
        send_bytes<HEAD_TABLE>(shared + HEAD_AT, tables.key_table + segment.kv_head * HEAD_TABLE / 2,
                               64 % THREADS);
    }
    copies_sent();
}

// The tables of pairs of 4-bit codes and of four 2-bit ones, a copy for each lane. Lanes hold the
// levels: of keys, then of values.
DEVICE void fill_tables(u32 level, u8* shared) {
    constexpr u32 row = LUT_STRIDE / 16;
    static_assert(PAIR_BYTES / 16 % 32 == 0, "warps have whole turns");
    KVQ_UNROLL_4 for (u32 i = thread_index(); i < PAIR_BYTES / 16; i += THREADS) {
        u32 code = i / row, side = LUT_STRIDE == 128 || i % row >= row / 2 ? 16 : 0;
        u32 pair = from_lane(level, side + (code & 15)) | from_lane(level, side + (code >> 4)) << 16;
        *(Zeros*)(shared + 16 * i) = Zeros{{pair, pair, pair, pair}};
    }
    if constexpr (VALUE_QUADS) {
        KVQ_UNROLL_4 for (u32 i = thread_index(); i < 65536 / 16; i += THREADS) {
            u32 code = i / 16;  // two lanes' copies at once
            u32 first = from_lane(level, 16 + (code & 3)) | from_lane(level, 16 + (code >> 4 & 3)) << 16;
            u32 second = from_lane(level, 16 + (code >> 2 & 3)) | from_lane(level, 16 + (code >> 6)) << 16;
            *(Zeros*)(shared + PAIR_BYTES + 16 * i) = Zeros{{first, second, first, second}};
        }
    }
}

// A KV head's channels' levels in the form `key_levels` reads.
DEVICE void fill_head_table(const u16* table, u32 head, u8* at) {
    if constexpr (KEY_BITS == 16 || !CHANNEL_LEVELS) return;
    constexpr u32 count = 1u << (KEY_BITS == 16 ? 0 : KEY_BITS);
    const u16* levels = table + head * HEAD_DIM * count;
    if constexpr (KEY_BITS == 2) {
        KVQ_ROLLED for (u32 i = thread_index(); i < HEAD_DIM / 2; i += THREADS) {
            u32 half = i & 1, column = i >> 1 & 3, step = i >> 3;
            const u16* even = levels + (8 * step + 2 * column + half * (HEAD_DIM / 2)) * count;
            u32* to = (u32*)(at + (step * 4 + column) * 32) + 4 * half;
            ByteTable<2> a, b;
            a.load(even), b.load(even + count);
            to[0] = a.low[0], to[1] = b.low[0], to[2] = a.high[0], to[3] = b.high[0];
        }
        return;
    }
    KVQ_UNROLL_4 for (u32 i = thread_index(); i < HEAD_TABLE / 16; i += THREADS) {
        u32 row = i / 16, half = i / 8 % 2, code = row % count, odd = row / count % 2;
        u32 channel = 8 * (row / count / 2) + odd + half * (HEAD_DIM / 2);
        KVQ_UNROLL for (u32 column = 0; column < 4; column++) {
            u32 level = levels[(channel + 2 * column) * count + code];
            ((u32*)(at + 16 * i))[column] = odd ? level << 16 : level;
        }
    }
}

// The query in the order of packed keys, scaled; zeros for heads that are not there.
DEVICE void arrange_query(const Segment& segment, u8* shared, float scale) {
    const u16 *raw = (const u16*)(shared + RAW_AT), *order = (const u16*)(shared + ORDER_AT);
    float* to = (float*)(shared + QUERY_AT);
    KVQ_UNROLL_4 for (u32 i = thread_index(); i < GROUP * HEAD_DIM; i += THREADS) {
        u32 head = i / HEAD_DIM;
        to[i] = head < segment.heads ? state_value(raw[head * HEAD_DIM + order[i % HEAD_DIM]]) * scale
                                     : 0.0f;
    }
}

// Units [first, last) of a segment, by one warp, whose stream has begun.
DEVICE void attend_units(Warp& warp, const Cache& cache, const Segment& segment, Stream& stream,
                         const float* query, u32 first, u32 last, float cap) {
    const int* state = cache.state + 8 * segment.sequence;
    if (first < segment.slabs) {
        u32 turned_page = ~0u, seen = (u32)state[4], packed = (u32)state[0];
        KVQ_ROLLED for (;;) {
            u32 number = stream.number, before = number * 64;
            if (number / 2 != turned_page && (ROTATED || turned_page == ~0u)) {
                turned_page = number / 2;
                turn_query(warp, query, state[3] + (int)turned_page * 128);
            }
            packed_slab(warp, cache, stream, seen > before ? seen - before : 0,
                        smaller(packed - before, 64), cap);
            stream.parity ^= 1;
            if (stream.number++ == stream.last) break;
            turn_to(cache, segment, stream);
        }
    }
    if (last <= segment.slabs) return;
    turn_query(warp, query, 0);
    for (u32 unit = first > segment.slabs ? first : segment.slabs; unit < last; unit++) {
        u32 number = unit - segment.slabs;
        bool is_sink = number < segment.sink_units;
        if (!is_sink) number -= segment.sink_units;
        u32 tokens = smaller((u32)state[is_sink ? 1 : 2] - number * 64, 64);
        exact_unit(warp, cache, segment, is_sink ? cache.sinks : cache.window, number * 64, tokens,
                   cap);
    }
}

// Leave a warp's result in its corner (`mix`) and among `join`: (WARPS, GROUP, 3) reference, sum,
// offset.
DEVICE void leave_result(Warp& warp, float* join) {
    sync_warp();
    KVQ_UNROLL for (int j = 0; j < LANE_HEADS; j++) {
        KVQ_UNROLL for (u32 mask = 4; mask < 32; mask *= 2) {
            warp.sum[j] += exchange(warp.sum[j], mask);
            warp.offset[j] += exchange(warp.offset[j], mask);
        }
        u32 head = warp.head + j;
        if (!has_heads(warp)) continue;
        if (warp.row == 0) {
            join[head * 3] = warp.greatest[j];
            join[head * 3 + 1] = warp.sum[j];
            join[head * 3 + 2] = warp.offset[j];
        }
        KVQ_UNROLL for (u32 m = 0; m < STEPS; m++) {
            warp.mix[(16 * m + warp.row) * GROUP + head] += warp.out[m][j];
            warp.mix[(16 * m + 8 + warp.row) * GROUP + head] += warp.out[m][j + 2];
        }
    }
}

// One (head, channel) of the result of a block whose first `warps` warps have one: sum of weighted
// values, reference, sum of weights.
DEVICE void join_warps(const float* join, const u8* corners, u32 warps, u32 head, u32 channel,
                       float (&result)[3]) {
    float highest = FAR_BELOW, total = 0.0f, sum = 0.0f;
    KVQ_UNROLL_4 for (u32 w = 0; w < warps; w++) highest =
        greater(highest, join[(w * GROUP + head) * 3]);
    KVQ_UNROLL_4 for (u32 w = 0; w < warps; w++) {
        const float* part = join + (w * GROUP + head) * 3;
        const float* mix = (const float*)(corners + w * CORNER + CORNER_MIX);
        float factor = exp2_fast(part[0] - highest);
        total += factor * (mix[channel * GROUP + head] + part[2]);
        sum += factor * part[1];
    }
    result[0] = total, result[1] = highest, result[2] = sum;
}

// The log of the sum of exp(score), from a reference in powers of 2 and the sum over it.
DEVICE float log_of_sum(float reference, float sum) {
    return (reference + log2_fast(sum)) * 0.6931471805599453f;
}

// Of a segment's partial results, the factor of each part of a head, over the sum of weights: to
// `factors` (parts, GROUP); and the log of that sum to `log_sums` (heads), if it is there.
DEVICE void weigh_parts(const float* partials, u32 parts, u32 heads, float* factors,
                        float* log_sums) {
    u32 head = thread_index() / 32, lane = thread_index() % 32;
    KVQ_ROLLED for (; head < GROUP; head += WARPS) {
        const float* part = partials + head * PARTIAL + HEAD_DIM;
        float highest = FAR_BELOW, sum = 0.0f;
        KVQ_ROLLED for (u32 i = lane; i < parts; i += 32)
            highest = greater(highest, load_fresh(part + (u64)i * GROUP * PARTIAL));
        KVQ_UNROLL for (u32 mask = 1; mask < 32; mask *= 2)
            highest = greater(highest, exchange(highest, mask));
        KVQ_ROLLED for (u32 i = lane; i < parts; i += 32) {
            const float* own = part + (u64)i * GROUP * PARTIAL;
            float factor = exp2_fast(load_fresh(own) - highest);
            factors[i * GROUP + head] = factor;
            sum += factor * load_fresh(own + 1);
        }
        KVQ_UNROLL for (u32 mask = 1; mask < 32; mask *= 2) sum += exchange(sum, mask);
        if (log_sums && lane == 0 && head < heads) log_sums[head] = log_of_sum(highest, sum);
        float inverse = 1.0f / sum;
        KVQ_ROLLED for (u32 i = lane; i < parts; i += 32) factors[i * GROUP + head] *= inverse;
    }
}

// One (head, channel) of a segment from its parts, whose first `many` values are at hand.
template <u32 many>
DEVICE float join_parts(const float* partials, u32 parts, const float* factors, u32 head,
                        u32 channel, const float (&first)[many]) {
    float total = 0.0f;
    KVQ_UNROLL for (u32 k = 0; k < many; k++) {
        if (k < parts) total += first[k] * factors[k * GROUP + head];
    }
    KVQ_UNROLL_4 for (u32 k = many; k < parts; k++) {
        const float* part = partials + ((u64)k * GROUP + head) * PARTIAL;
        total += load_fresh(part + channel) * factors[k * GROUP + head];
    }
    return total;
}

// The result of a segment from the partial results of its blocks, by the last of them.
DEVICE void join_blocks(const float* partials, u32 parts, u32 heads, float* factors, u16* out,
                        float* log_sums) {
    constexpr u32 many = 16, mine = (GROUP * HEAD_DIM + THREADS - 1) / THREADS;
    float first[many];
    auto load = [&](u32 i) {
        KVQ_UNROLL for (u32 k = 0; k < many; k++) {
            const float* part = partials + ((u64)smaller(k, parts - 1) * GROUP + i / HEAD_DIM) * PARTIAL;
            first[k] = load_fresh(part + i % HEAD_DIM);
        }
    };
    u32 i = smaller(thread_index(), heads * HEAD_DIM - 1);
    load(i);
    weigh_parts(partials, parts, heads, factors, log_sums);
    sync_block();
    KVQ_ROLLED for (u32 k = 0; k < mine; k++) {
        i = thread_index() + k * THREADS;
        if (i >= heads * HEAD_DIM) break;
        if (k) load(i);
        out[i] = state_bits(
            join_parts<many>(partials, parts, factors, i / HEAD_DIM, i % HEAD_DIM, first));
    }
}

KERNEL(THREADS)
attend(const u16* query, u16* output, const u8* slabs, const u32* ranges, const u32* outlier_index,
       const u32* outlier_words, const int* page_table, const int* state, const u16* key_table,
       const u16* levels, const u32* angles, const u64* frequencies, const u16* order,
       const u16* sink_key, const u16* sink_value, const u16* window_key, const u16* window_value,
       float* partials, u32* counters, float* log_sums, u32 batch, u32 group_heads,
       u32 num_kv_heads, u32 max_pages, u32 sink_capacity, u32 window_capacity, float scale,
       float cap) {
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
                order,
                Exact{sink_key, sink_value, sink_capacity},
                Exact{window_key, window_value, window_capacity}};
    u32 number = thread_index() / 32, lane = thread_index() % 32;
    Tables tables{key_table, levels, angles};
    u32 level = levels[lane];
    send_tables(tables, cache, shared);
    Cut cut;
    if (block_index() >= plan(cache, block_count(), lane, cut)) {  // more blocks than units
        await_copies<0>();
        return;
    }

    u8* corner = shared + CORNER_AT + number * CORNER;
    const float* shared_query = (const float*)(shared + QUERY_AT);
    float* join = (float*)(shared + JOIN_AT);
    Warp warp;
    warp.lane = lane, warp.row = warp.lane / 4, warp.column = warp.lane % 4;
    warp.head = LANE_HEADS == 1 ? warp.column % GROUP : 2 * warp.column;
    warp.lut = shared, warp.angles = shared + LUT_BYTES, warp.head_table = shared + HEAD_AT;
    warp.frequencies = (const u64*)(shared + FREQUENCIES_AT);
    warp.order = (const u16*)(shared + ORDER_AT);
    warp.query = corner + CORNER_QUERY;
    warp.sparse = (float*)(corner + CORNER_SPARSE), warp.mix = (float*)(corner + CORNER_MIX);
    if constexpr (KEY_BITS < 4 && !CHANNEL_LEVELS && !KEY_PAIRS) warp.key_levels.load(levels);
    if constexpr (VALUE_BITS < 4 && !VALUE_PAIRS && !VALUE_QUADS)
        warp.value_levels.load(levels + 16);

    Stream stream;
    stream.corner = corner, stream.lane = warp.lane, stream.parity = 0;
    bool ready = false;

    u32 unit = cut.whole ? 0 : unit_of(cut, block_index());
    u32 end = cut.whole ? 1 : unit_of(cut, block_index() + 1);
    while (unit < end) {
        Segment segment = find_segment(cache, cut, cut.whole ? block_index() : unit, lane);
        send_segment(tables, cache, segment, query, shared);
        u32 from = unit - segment.start, until = smaller(end - segment.start, segment.units);
        if (cut.whole) {
            u32 part = block_index() - segment.first_block;
            from = segment.units * part / segment.blocks;
            until = segment.units * (part + 1) / segment.blocks;
        }
        u32 count = until - from, warps = smaller(count, WARPS);
        u32 begins = from + (count < WARPS ? smaller(number, count) : count * number / WARPS);
        u32 ends = from + (count < WARPS ? smaller(number + 1, count) : count * (number + 1) / WARPS);
        begin(cache, segment, stream, begins, smaller(ends, segment.slabs));
        fill_head_table(key_table, segment.kv_head, shared + HEAD_AT);
        if (!ready) fill_tables(level, shared);
        ready = true;
        KVQ_ROLLED for (u32 i = warp.lane; i < HEAD_DIM * GROUP; i += 32) warp.mix[i] = 0.0f;
        KVQ_UNROLL for (int j = 0; j < LANE_HEADS; j++) {
            warp.greatest[j] = FAR_BELOW, warp.sum[j] = warp.offset[j] = 0.0f;
        }
        KVQ_UNROLL for (u32 i = 0; i < 4 * STEPS; i++) warp.out[i / 4][i % 4] = 0.0f;
        await_copies<DEPTH - 1>();  // what was sent for before the slabs
        sync_block();
        arrange_query(segment, shared, scale);
        sync_block();
        if (begins < ends) {
            attend_units(warp, cache, segment, stream, shared_query, begins, ends, cap);
            leave_result(warp, join + number * GROUP * 3);
        }
        sync_block();

        u32 first_row = segment.sequence * num_kv_heads * group_heads + segment.first_head;
        u16* out = output + (u64)first_row * HEAD_DIM;
        float* part = partials + (u64)(block_index() + segment.index) * GROUP * PARTIAL;
        KVQ_ROLLED for (u32 i = thread_index(); i < GROUP * HEAD_DIM; i += THREADS) {
            u32 head = i % GROUP, channel = i / GROUP;
            float result[3];
            join_warps(join, shared + CORNER_AT, warps, head, channel, result);
            if (segment.blocks == 1) {
                if (head >= segment.heads) continue;
                out[head * HEAD_DIM + channel] = state_bits(result[0] / result[2]);
                if (log_sums && channel == 0)
                    log_sums[first_row + head] = log_of_sum(result[1], result[2]);
                continue;
            }
            part[head * PARTIAL + channel] = result[0];
            if (channel < 2) part[head * PARTIAL + HEAD_DIM + channel] = result[1 + channel];
        }
        if (segment.blocks > 1) {
            u32 last = segment.blocks - 1;
            sync_block();
            if (thread_index() == 0) join[0] = arrive(counters + segment.index, last) == last;
            sync_block();
            if (join[0] != 0.0f) {
                u64 first = segment.first_block + segment.index;
                join_blocks(partials + first * GROUP * PARTIAL, segment.blocks, segment.heads,
                            (float*)(shared + CORNER_AT), out,
                            log_sums ? log_sums + first_row : nullptr);
            }
        }
        unit += cut.whole ? 1 : count;
        if (unit < end) sync_block();  // all have read what the next segment overwrites
    }
}
