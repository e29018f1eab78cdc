// What a warp of attend.cu does with its part: slab after slab, then tokens that are stored
// exactly.
#pragma once
#include "attend_stream.cuh"

// The list of a slab's outliers: in shared memory, or the first LISTED there and the rest where
// they are.
struct Near {
    const u32* near;
    DEVICE u32 operator()(u32 i) const { return near[i]; }
};
struct Far {
    const u32 *near, *all;
    DEVICE u32 operator()(u32 i) const { return i < LISTED ? near[i] : all[i]; }
};

// Write the terms of the heads' query for two neighbouring channels, in half2s, and for their
// partners.
DEVICE void write_terms(const Warp& warp, u32 step, u32 column, const u32 (&low)[GROUP],
                        const u32 (&high)[GROUP]) {
    Quad scale{{0x3c003c00, 0, 0x3c003c00, 0}};
    if constexpr (HAS_AFFINE) scale = *(const Quad*)(warp.head_table + (step * 4 + column) * 16);
    u8* to = warp.terms + (step - TURNED) * TERM_STEP + column * 8;
    KVQ_UNROLL for (u32 m = 0; m < TERMS; m++) {
        u32 factor = m == 0 ? 0x3c003c00 : 0;  // 1, and nothing else where nothing turns
        if constexpr (ROTATED) factor = warp.coefficients[((step - TURNED) * 4 + column) * 8 + m];
        u32 first = h2_mul(factor, scale.of[0]), second = h2_mul(factor, scale.of[2]);
        KVQ_UNROLL for (u32 h = 0; h < GROUP; h++) {
            // Odd terms are a quarter turn further.
            Pair term{{h2_mul(m % 2 ? high[h] : low[h], first),
                       h2_mul(m % 2 ? h2_neg(low[h]) : high[h], second)}};
            *(Pair*)(to + (column_of(h, m) ^ step % 8) * 32) = term;
        }
    }
}

// Write the query as fragments, turned back by `position` tokens, so that keys need turning by
// their place in the page only; with `terms` also what steps that are not turned are multiplied
// with.
template <bool terms>
DEVICE void turn_query(const Warp& warp, const float* query, int position) {
    sync_warp();
    KVQ_UNROLL for (u32 k = 0; k < HEAD_DIM / 2; k += 64) {
        u32 i = 2 * warp.lane + k, step = i / 8, column = i % 8 / 2;
        if (HEAD_DIM % 128 && i >= HEAD_DIM / 2) break;
        float sine[2] = {0.0f, 0.0f}, cosine[2] = {1.0f, 1.0f};
        if (ROTATED && position) {
            KVQ_UNROLL for (int e = 0; e < 2; e++) {
                u64 phase = warp.frequencies[i + e] * (u64)(long long)position;
                sine_cosine((int)(u32)(phase >> 32), sine[e], cosine[e]);
            }
        }
        u32 low[GROUP], high[GROUP];
        KVQ_UNROLL for (int h = 0; h < GROUP; h++) {
            Couple x = *(const Couple*)(query + h * HEAD_DIM + i);
            Couple y = *(const Couple*)(query + h * HEAD_DIM + i + HEAD_DIM / 2);
            low[h] = h2_from(x.first * cosine[0] + y.first * sine[0],
                             x.second * cosine[1] + y.second * sine[1]);
            high[h] = h2_from(y.first * cosine[0] - x.first * sine[0],
                              y.second * cosine[1] - x.second * sine[1]);
        }
        KVQ_UNROLL for (u32 odd = 0; odd < 2; odd++) {
            Queries own;
            KVQ_UNROLL for (int h = 0; h < GROUP; h++) own.of[h] =
                pick_bytes(low[h], high[h], odd ? 0x7632 : 0x5410);
            *(Queries*)(warp.query + query_at(i + odd)) = own;
        }
        if constexpr (HAS_TERMS && terms) {
            if (step >= TURNED) write_terms(warp, step, column, low, high);
        }
    }
    sync_warp();
}

DEVICE void cap_scores(float (&score)[MINE][LANE_HEADS], float cap) {
    if constexpr (SOFTCAP) {
        KVQ_UNROLL for (u32 i = 0; i < MINE; i++) {
            KVQ_UNROLL for (int j = 0; j < LANE_HEADS; j++) {
                float& s = score[i][j];  // cap tanh(s / cap), in base-2 units throughout
                s = cap * (1.0f - 2.0f * inverse_fast(1.0f + exp2_fast(s * 2.8853901f / cap)));
            }
        }
    }
}

DEVICE void packed_slab(Warp& warp, const Cache& cache, Stream& stream, u32 first, u32 last,
                        float cap) {
    const Slab& slab = stream.slab;
    u32 number = stream.number;
    const u8* side = side_of(stream, stream.parity);
    float product[4][4] = {}, score[MINE][LANE_HEADS];
    if constexpr (AHEAD) {
        await_copies<0>();
        sync_warp();
        if (stream.next_words) fetch_slab(stream.next_words, stream.lane);
    } else {
        stream.chunk = take(cache, stream, 0);
    }
    const u32* listed = (const u32*)(side + 256);
    if constexpr (OUTLIERS) {
        clear_sparse(warp);
        sync_warp();
        u32 count = outlier_words(slab, 0);
        if (count <= LISTED) {
            key_outliers(warp, Near{listed}, count, number % 2 * 4);
        } else {
            key_outliers(warp, Far{listed, outliers_at(cache, slab, 0)}, count, number % 2 * 4);
        }
    }
    KVQ_UNROLL for (u32 step = 0; step < STEPS; step++) {
        u32 words[KEY_BITS];
        take_keys(cache, stream, step, words);
        key_step(warp, words, step, number % 2 * 4, product);
    }
    gather_scores(warp.row, warp.column, warp.places, product, offset_of(warp), number % 2, score);
    if constexpr (OUTLIERS) {
        sync_warp();
        sparse_scores(warp, score);
        sync_warp();  // scores are read, weights take their place
    }
    cap_scores(score, cap);
    u32 weights[4][2];
    soften(warp, score, VALUE_BITS == 16 ? nullptr : (const u32*)side, first, last, weights);
    if constexpr (OUTLIERS) {
        sync_warp();
        u32 count = outlier_words(slab, 1);
        Near near{listed + LISTED};
        Far far{listed + LISTED, outliers_at(cache, slab, 1)};
        if (!(slab.quads & IN_ROUNDS)) {
            loose_value_outliers(warp, far, count);
            sync_warp();
        } else if (count <= LISTED) {
            value_outliers(warp, near);
        } else {
            value_outliers(warp, far);
        }
    }
    if constexpr (AHEAD) {
        sync_warp();  // what went with this slab is used up
        if (stream.next_words)
            send_side(cache, stream.lane, known_slab(stream, number + 1), side_of(stream, 0));
        copies_sent();
    }
    KVQ_UNROLL for (u32 m = 0; m < STEPS; m++) {
        u32 words[VALUE_BITS];
        take_values(cache, stream, m, words);
        value_step(warp, words, weights, warp.out[m]);
    }
}

// Up to 64 tokens that are stored exactly: fragments gathered from rows.
DEVICE void exact_unit(Warp& warp, const Cache& cache, const Segment& segment, const Exact& exact,
                       u32 first, u32 tokens, float cap) {
    u64 base =
        ((u64)segment.sequence * cache.num_kv_heads + segment.kv_head) * exact.capacity + first;
    const u16 *key = exact.key + base * HEAD_DIM, *value = exact.value + base * HEAD_DIM;
    auto load = [&](const u16* states, u32 token, u32 channel) {
        return token < tokens ? state_value(states[(u64)token * HEAD_DIM + channel]) : 0.0f;
    };
    // Register arrays are turned by one tile a round, so that the loops over tiles stay short code.
    float product[4][4] = {}, score[MINE][LANE_HEADS];
    KVQ_ROLLED for (u32 t = 0; t < 4; t++) {
        float tile[4] = {};
        if (16 * t < tokens) {
            KVQ_UNROLL_4 for (u32 step = 0; step < STEPS; step++) {
                u32 b0, b1, k[4];
                query_fragment(warp, step, b0, b1);
                KVQ_UNROLL for (u32 a = 0; a < 4; a++) {
                    const u16* channel =
                        warp.order + 8 * step + 2 * warp.column + a / 2 * (HEAD_DIM / 2);
                    u32 token = 16 * t + a % 2 * 8 + warp.row;
                    k[a] = h2_from(load(key, token, channel[0]), load(key, token, channel[1]));
                }
                mma(tile, k, b0, b1);
            }
        }
        KVQ_UNROLL for (int i = 0; i < 16; i++) {
            product[i / 4][i % 4] = i < 12 ? product[(i + 4) / 4 % 4][i % 4] : tile[i % 4];
        }
    }
    gather_scores(warp.row, warp.column, warp.places, product, Couple{0.0f, 0.0f}, 0, score);
    cap_scores(score, cap);
    u32 weights[4][2];
    soften(warp, score, nullptr, 0, tokens, weights);
    KVQ_ROLLED for (u32 t = 0; 16 * t < tokens; t++) {
        KVQ_UNROLL for (u32 m = 0; m < STEPS; m++) {
            u32 v[4];
            KVQ_UNROLL for (u32 a = 0; a < 4; a++) {
                u32 token = 16 * t + a / 2 * 8 + 2 * warp.column,
                    channel = 16 * m + a % 2 * 8 + warp.row;
                v[a] = h2_from(load(value, token, channel), load(value, token + 1, channel));
            }
            mma(warp.out[m], v, weights[0][0], weights[0][1]);
        }
        KVQ_UNROLL for (int i = 0; i < 6; i++) weights[i / 2][i % 2] = weights[i / 2 + 1][i % 2];
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
                turn_query<true>(warp, query, state[3] + (int)turned_page * 128 + MIDDLE);
                write_offsets(warp);
            }
            packed_slab(warp, cache, stream, seen > before ? seen - before : 0,
                        smaller(packed - before, 64), cap);
            stream.parity ^= 1;
            if (stream.number++ == stream.last) break;
            turn_to(cache, segment, stream);
        }
    }
    if (last <= segment.slabs) return;
    turn_query<false>(warp, query, 0);
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
        KVQ_UNROLL for (u32 mask = GROUP < 4 ? GROUP : 4; mask < 32; mask *= 2) {
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

// Tell a warp who it is and where its corner and the tables lie.
DEVICE void set_up(Warp& warp, const u16* levels, const Cache& cache, u8* shared, u32 number,
                   u32 lane) {
    u8* corner = shared + CORNER_AT + number * CORNER;
    warp.lane = lane, warp.row = lane / 4, warp.column = lane % 4;
    warp.head = LANE_HEADS == 1 ? warp.column % GROUP : 2 * warp.column;
    warp.rows = address_of(shared) + 4 * lane,
    warp.levels = address_of(shared + HEAD_AT) + 4 * lane;
    warp.quads = address_of(shared + ROW_BYTES) + 8 * lane;
    warp.angles = shared + LUT_BYTES, warp.head_table = shared + HEAD_AT;
    warp.frequencies = (const u64*)(shared + FREQUENCIES_AT);
    warp.order = (const u16*)(shared + ORDER_AT);
    warp.query = corner + CORNER_QUERY, warp.terms = corner + CORNER_TERMS;
    warp.offsets = (float*)(corner + CORNER_OFFSETS);
    warp.weights = corner + CORNER_WEIGHTS, warp.places = (const float*)(shared + PLACES_AT);
    warp.coefficients = (const u32*)(shared + TERMS_AT);
    warp.sparse = (float*)(corner + CORNER_SPARSE), warp.mix = (float*)(corner + CORNER_MIX);
    // 0, but the compiler does not know: what all lanes know alike it would keep once and fetch for
    // every use.
    u32 apart = lane * (cache.max_pages >> 31);
    if constexpr (KEY_BITS < 4 && !CHANNEL_LEVELS && !KEY_PAIRS) {
        warp.key_levels.load(levels + apart);
    }
    if constexpr (VALUE_BITS < 4 && !VALUE_PAIRS && !VALUE_QUADS) {
        warp.value_levels.load(levels + LEVEL_ROW + apart);
    }
}

// Nothing is accumulated.
DEVICE void clear_results(Warp& warp) {
    static_assert(CORNER_MIX % 16 == 0 && HEAD_DIM % 4 == 0, "cleared in pieces");
    KVQ_ROLLED for (u32 i = warp.lane; i < HEAD_DIM * GROUP / 4; i += 32) {
        ((Quad*)warp.mix)[i] = Quad{{0, 0, 0, 0}};
    }
    KVQ_UNROLL for (int j = 0; j < LANE_HEADS; j++) {
        warp.greatest[j] = NOTHING, warp.sum[j] = warp.offset[j] = 0.0f;
    }
    KVQ_UNROLL for (u32 i = 0; i < 4 * STEPS; i++) warp.out[i / 4][i % 4] = 0.0f;
}
