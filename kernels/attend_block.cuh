// What a block of attend.cu does around its slabs: fill tables, join the results.
#pragma once
#include "attend_cut.cuh"
#include "attend_warp.cuh"

struct Tables {
    const u16 *key_table, *levels;
    const u32* angles;
};

// Bring what all blocks ask for later to the second cache, every block some lines of it, by one
// warp.
DEVICE void fetch_early(const Tables& tables, const Cache& cache, const u16* query, u32 lane) {
    u32 at = (block_index() * 32 + lane) * 128;
    auto fetch = [&](const void* from, u32 bytes) {
        if (at < bytes) fetch_line((const u8*)from + at);
    };
    fetch(cache.page_table, cache.batch * cache.max_pages * 4);
    fetch(query, cache.batch * cache.group_heads * cache.num_kv_heads * HEAD_DIM * 2);
    if constexpr (KEY_BITS != 16) {
        constexpr u32 bytes = CHANNEL_LEVELS ? HEAD_DIM * (2u << KEY_BITS) : HEAD_TABLE;
        fetch(tables.key_table, cache.num_kv_heads * bytes);
    }
    if constexpr (HAS_TERMS && ROTATED) fetch(cache.coefficients, HEAD_DIM * 8);
    if constexpr (ANGLE_BYTES > 0) fetch(tables.angles, 8 * STEPS * 512);
}

// Send for what is only copied: angles of a page's places, of the steps that are turned;
// coefficients of the others; frequencies and the order of channels, which lie one behind the
// other.
DEVICE void send_tables(const Tables& tables, const Cache& cache, u8* shared) {
    if constexpr (ANGLE_BYTES > 0) {
        constexpr u32 tile = TURNED ? TURNED * 32 : 1;  // pieces of a tile
        KVQ_ROLLED for (u32 i = thread_index(); i < 8 * tile; i += THREADS) copy16(
            shared + LUT_BYTES + 16 * i, tables.angles + (i / tile * (STEPS * 32) + i % tile) * 4);
    }
    const u8* coefficients = (const u8*)cache.coefficients + TURNED * 128;
    KVQ_ROLLED for (u32 i = thread_index(); i < TERM_BYTES / 16; i += THREADS)
        copy16(shared + TERMS_AT + 16 * i, coefficients + 16 * i);
    constexpr u32 turns = HEAD_DIM / 4, all = turns + HEAD_DIM / 8;
    static_assert(ORDER_AT == FREQUENCIES_AT + 16 * turns, "the order follows the frequencies");
    KVQ_ROLLED for (u32 i = THREADS - 1 - thread_index(); i < all; i += THREADS) {
        const u8 *from = (const u8*)cache.frequencies, *order = (const u8*)cache.order;
        copy16(shared + FREQUENCIES_AT + 16 * i,
               i < turns ? from + 16 * i : order + 16 * (i - turns));
    }
}

// Send for a segment's query and, where it is only copied, the table of its keys.
DEVICE void send_segment(const Tables& tables, const Cache& cache, const Segment& segment,
                         const u16* query, u8* shared) {
    u32 heads = cache.group_heads * cache.num_kv_heads;
    const u16* from = query + ((u64)segment.sequence * heads + segment.first_head) * HEAD_DIM;
    KVQ_ROLLED for (u32 i = thread_index(); i < segment.heads * HEAD_DIM / 8; i += THREADS)
        copy16(shared + RAW_AT + 16 * i, from + 8 * i);
    if constexpr (KEY_BITS != 16 && !CHANNEL_LEVELS) {
        const u8* table = (const u8*)tables.key_table + segment.kv_head * HEAD_TABLE;
        KVQ_ROLLED for (u32 i = THREADS - 1 - thread_index(); i < HEAD_TABLE / 16; i += THREADS)
            copy16(shared + HEAD_AT + 16 * i, table + 16 * i);
    }
    copies_sent();
}

// The level that a lane holds for `fill_tables`: of keys, then of values.
DEVICE u32 lane_level(const u16* levels, u32 lane) {
    return levels[lane / 16 * LEVEL_ROW + lane % 16];
}

// The tables of pairs of codes, of single ones of 8 bits and of four 2-bit ones, a copy for each
// lane. Lanes hold the levels of up to 4 bits. A warp has the rows whose lower nibble is its own.
DEVICE void fill_tables(u32 level, const u16* levels, u8* shared) {
    u32 lane = thread_index() % 32, number = thread_index() / 32;
    constexpr u32 pieces = LUT_STRIDE / 16, at_once = 32 / pieces, many = ROWS / 16 / at_once;
    u32 piece = lane % pieces, side = LUT_STRIDE == 128 || piece >= pieces / 2 ? 16 : 0;
    if constexpr (KEY_SINGLES || VALUE_SINGLES) {
        KVQ_ROLLED for (u32 code = thread_index() / pieces; code < ROWS; code += WARPS * at_once) {
            u32 pair = from_lane(level, side + (code & 15)) | from_lane(level, side + (code >> 4))
                                                                  << 16;
            if (side ? VALUE_SINGLES : KEY_SINGLES)
                pair = levels[(side ? LEVEL_ROW : 0) + code] * 0x10001u;
            *(Quad*)(shared + code * LUT_STRIDE + 16 * piece) = Quad{{pair, pair, pair, pair}};
        }
    } else if constexpr (HAS_ROWS) {
        u32 upper[many], first = lane / pieces;
        KVQ_UNROLL for (u32 i = 0; i < many; i++) {
            upper[i] = from_lane(level, side + first + i * at_once) << 16;
        }
        KVQ_ROLLED for (u32 lower = number; lower < 16; lower += WARPS) {
            u32 low = from_lane(level, side + lower);
            u8* at = shared + (16 * first + lower) * LUT_STRIDE + 16 * piece;
            KVQ_UNROLL for (u32 i = 0; i < many; i++) {
                u32 pair = low | upper[i];
                *(Quad*)(at + i * at_once * 16 * LUT_STRIDE) = Quad{{pair, pair, pair, pair}};
            }
        }
    }
    if constexpr (VALUE_QUADS) {  // 16 bytes are two lanes' copies
        u32 upper[8][2];
        KVQ_UNROLL for (u32 i = 0; i < 8; i++) {
            u32 nibble = 2 * i + lane / 16;
            upper[i][0] = from_lane(level, 16 + (nibble & 3)) << 16;
            upper[i][1] = from_lane(level, 16 + (nibble >> 2)) << 16;
        }
        KVQ_ROLLED for (u32 lower = number; lower < 16; lower += WARPS) {
            u32 low[2] = {from_lane(level, 16 + (lower & 3)), from_lane(level, 16 + (lower >> 2))};
            u8* at = shared + ROW_BYTES + (lane / 16 * 16 + lower) * 256 + lane % 16 * 16;
            KVQ_UNROLL for (u32 i = 0; i < 8; i++) {
                u32 first = low[0] | upper[i][0], second = low[1] | upper[i][1];
                *(Quad*)(at + i * 8192) = Quad{{first, second, first, second}};
            }
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
    KVQ_ROLLED for (u32 i = thread_index(); i < GROUP * HEAD_DIM; i += THREADS) {
        u32 head = i / HEAD_DIM;
        to[i] = head < segment.heads
                    ? state_value(raw[head * HEAD_DIM + order[i % HEAD_DIM]]) * scale
                    : 0.0f;
    }
}

// A head's channel, or all of a head, from warps or blocks: the sum of weighted values, relative to
// 2^reference, and the sum of weights.
struct Joined {
    float total, reference, sum;
};

// One (head, channel) of the result of a block whose first `warps` warps have one. Four are looked
// at at a time: past the last one it is that one again, with no weight.
DEVICE Joined join_warps(const float* join, const u8* corners, u32 warps, u32 head, u32 channel) {
    Joined all{0.0f, FAR_BELOW, 0.0f};
    KVQ_ROLLED for (u32 first = 0; first < warps; first += 4) {
        KVQ_UNROLL for (u32 k = 0; k < 4; k++) {
            u32 w = smaller(first + k, warps - 1);
            all.reference = greater(all.reference, join[(w * GROUP + head) * 3]);
        }
    }
    KVQ_ROLLED for (u32 first = 0; first < warps; first += 4) {
        KVQ_UNROLL for (u32 k = 0; k < 4; k++) {
            u32 w = smaller(first + k, warps - 1);
            const float* part = join + (w * GROUP + head) * 3;
            const float* mix = (const float*)(corners + w * CORNER + CORNER_MIX);
            float factor = first + k < warps ? exp2_fast(part[0] - all.reference) : 0.0f;
            all.total += factor * (mix[channel * GROUP + head] + part[2]);
            all.sum += factor * part[1];
        }
    }
    return all;
}

// The log of the sum of exp(score), from a reference in powers of 2 and the sum over it.
DEVICE float log_of_sum(float reference, float sum) {
    return (reference + log2_fast(sum)) * 0.6931471805599453f;
}

// The result of a segment from the partial results of its blocks, by the last of them. A warp has
// 64 channels of a head and takes 16 parts at a time: lane k, and lane 16 + k likewise, knows the
// reference and the sum of the k-th one, and every lane two channels of all. Lanes past the last
// channels repeat those.
DEVICE void join_blocks(const float* partials, u32 parts, u32 heads, u16* out, float* log_sums) {
    constexpr u32 many = 16, pieces = (HEAD_DIM + 63) / 64;
    u32 lane = thread_index() % 32;
    KVQ_ROLLED for (u32 piece = thread_index() / 32; piece < heads * pieces; piece += WARPS) {
        u32 head = piece / pieces, channel = smaller(piece % pieces * 64 + 2 * lane, HEAD_DIM - 2);
        const float *own_at = partials + head * PARTIAL + HEAD_DIM,
                    *at = partials + head * PARTIAL + channel;
        float highest = FAR_BELOW, sum = 0.0f, total[2] = {0.0f, 0.0f};
        KVQ_ROLLED for (u32 first = 0; first < parts; first += many) {
            auto offset = [&](u32 k) {
                return (u64)smaller(first + k, parts - 1) * GROUP * PARTIAL;
            };
            float own[2], of[many][2];
            load_fresh(own_at + offset(lane % many), own);
            KVQ_UNROLL for (u32 k = 0; k < many; k++) load_fresh(at + offset(k), of[k]);
            float next = greater(highest, own[0]);
            KVQ_UNROLL for (u32 mask = 1; mask < many; mask *= 2) next =
                greater(next, exchange(next, mask));
            float before = exp2_fast(highest - next), factor = exp2_fast(own[0] - next);
            if (first + lane % many >= parts) factor = 0.0f;
            highest = next, sum = sum * before + factor * own[1];
            KVQ_UNROLL for (int e = 0; e < 2; e++) total[e] *= before;
            KVQ_UNROLL for (u32 k = 0; k < many; k++) {
                float weight = from_lane(factor, k);
                KVQ_UNROLL for (int e = 0; e < 2; e++) total[e] += of[k][e] * weight;
            }
        }
        KVQ_UNROLL for (u32 mask = 1; mask < many; mask *= 2) sum += exchange(sum, mask);
        float inverse = inverse_fast(sum);
        *(u32*)(out + head * HEAD_DIM + channel) =
            state_bits(total[0] * inverse) | (u32)state_bits(total[1] * inverse) << 16;
        if (log_sums && channel == 0) log_sums[head] = log_of_sum(highest, sum);
    }
}

// What attend.cu writes.
struct Results {
    u16* output;
    float *partials, *log_sums;
    u32* counters;
};

// Write the result of a block's part of a segment; the last block of a segment writes all of it.
DEVICE void give_result(const Results& results, const Kept& kept, const float* join,
                        const u8* corners) {
    u16* out = results.output + (u64)kept.first_row * HEAD_DIM;
    float* logs = results.log_sums ? results.log_sums + kept.first_row : nullptr;
    float* part = results.partials + (u64)(block_index() + kept.index) * GROUP * PARTIAL;
    // In terms of the loop's numbers, for else the loop would be compiled for either answer.
    u32 whole = kept.blocks == 1 ? GROUP * HEAD_DIM : 0, logged = logs ? 0 : HEAD_DIM;
    KVQ_ROLLED for (u32 i = thread_index(); i < GROUP * HEAD_DIM; i += THREADS) {
        u32 head = i % GROUP, channel = i / GROUP;
        Joined all = join_warps(join, corners, kept.warps, head, channel);
        if (i < whole) {
            if (head >= kept.heads) continue;
            out[head * HEAD_DIM + channel] = state_bits(all.total * inverse_fast(all.sum));
            if (channel == logged) logs[head] = log_of_sum(all.reference, all.sum);
            continue;
        }
        part[head * PARTIAL + channel] = all.total;
        if (channel == 0) part[head * PARTIAL + HEAD_DIM] = all.reference;
        if (channel == 1) part[head * PARTIAL + HEAD_DIM + 1] = all.sum;
    }
    if (kept.blocks == 1) return;
    sync_block();
    u32 last = kept.blocks - 1;
    bool is_last = thread_index() == 0 && arrive(results.counters + kept.index, last) == last;
    if (any_thread(is_last)) {
        u64 first = kept.first_block + kept.index;
        join_blocks(results.partials + first * GROUP * PARTIAL, kept.blocks, kept.heads, out, logs);
    }
}
