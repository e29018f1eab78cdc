// One new token of every sequence into pages that have room for it: codes, range and outliers, in
// place, the same bits as pack.cu. Nothing is allocated and nothing depends on the host, so a graph
// can hold it; `state` says where the token goes and is left as it is.
//
// Grid: (sequence, KV head). Every block finds the token's range over all KV heads for itself, and
// writes its own head.
//
// `states`  (batch, num_kv_heads, HEAD_DIM) half, or bfloat16 with BF16; keys after RoPE
// `turns`   (batch, HEAD_DIM / 2) float cosine and sine a pair by place, with ROTATED
// `counts`  (pages, num_kv_heads, 2, 2) words of each list; lists have room for `key_room` and
//           `value_room` words, zero where unused; what does not fit is counted in `dropped`
// `key_reads`, `key_feedback`, `key_turn` and those of values: as in compensate.cu, with KEY_COMP
//           and VALUE_COMP
// Macros: those of pack.cu; WARPS is the block's. The rest as in attend.cu and pack.cu.
#include "append_floats.cuh"
#include "append_range.cuh"
#include "compensate_token.cuh"

#if VALUE_FLOAT
typedef u32 OrderKey;
#else
typedef u16 OrderKey;
#endif

// Put codes n, of a lane's 32 in a step, into their words, which were read.
template <int bits, bool is_key>
DEVICE void replace_codes(u8* step, u32 lane, const u32 (&words)[bits], const u32* n,
                          const u32* codes, u32 count) {
    constexpr u32 room = room_of(bits);
    Tile<bits> tiles[4];
    selectors<bits, is_key>(words, tiles);
    for (u32 i = 0; i < count; i++) {
        u32 shift = room * (n[i] % 8);
        Tile<bits> code = (Tile<bits>)codes[i] << shift, mask = (Tile<bits>)((1u << room) - 1) << shift;
        KVQ_UNROLL for (u32 t = 0; t < 4; t++) {
            if (n[i] / 8 == t) tiles[t] = (tiles[t] & ~mask) | code;
        }
    }
    store_codes<bits, is_key>(step, lane, tiles);
}

struct Lists {
    u32 *counts, *index, *words, *dropped;
    u32 room[2];
};

DEVICE void add_outlier(const Lists& lists, u64 list, u32 side, u32 word) {
    u32 at = add_global(lists.counts + 2 * list + side, 1);
    u32* entry = lists.index + 4 * list + 2 * side;
    if (at < lists.room[side]) {
        lists.words[(u64)entry[0] * 4 + at] = word;
        greatest_global(entry + 1, at / 4 + 1);
    } else {
        add_global(lists.dropped, 1);
    }
}

// Where the token goes: its place in the slab, the slab's number among all, and its words.
struct Target {
    u32 head, in_slab;
    u64 list;
    u8* words;
};

// A token's keys at a place and its partner, as they are stored.
DEVICE void find_keys(const KeyChannel (&channels)[2], const u16* staged, const Bench& bench,
                      const Turn& turn, Element (&found)[2]) {
    if constexpr (!KEY_COMP) return key_pair(channels, staged, turn, found);
    float states[2];
    key_states(channels, staged, turn, states);
    KVQ_UNROLL for (u32 k = 0; k < 2; k++) {
        const KeyChannel& channel = channels[k];
        u8 coded = bench.coded[channel.channel];
        float scale = mul_exact(add_exact(channel.upper, -channel.lower), 0.5f);
        float moved = add_exact(states[k], -mul_exact(bench.owed[channel.channel], scale));
        found[k] = Element{moved, coded & 0x7fu, (coded & FLAG) != 0};
    }
}

// A token's value of one channel, as it is stored.
DEVICE Element find_value(const float* middles, ValueState state, const RowOfValues& row,
                          const Bench& bench, u32 head, u32 at) {
    if constexpr (!VALUE_COMP) return value_element(middles, state, row, head * HEAD_DIM + at);
    float moved = add_exact(number_of(state), -mul_exact(bench.owed[at], h2_low(row.range)));
    return Element{moved, bench.coded[at] & 0x7fu, (bench.coded[at] & FLAG) != 0};
}

// Put a token's keys on the bench; a whole block does.
DEVICE void lay_keys(const KeyCode& code, u32 head, const u16* staged, const u16* turn_of,
                     const Bench& bench) {
    for (u32 at = thread_index(); at < HEAD_DIM / 2; at += THREADS) {
        KeyChannel pair[2] = {key_channel(code, head, at),
                              key_channel(code, head, at + HEAD_DIM / 2)};
        float states[2];
        key_states(pair, staged, turn_at(code, 0, at), states);
        KVQ_UNROLL for (u32 k = 0; k < 2; k++) {
            bench.u[turn_of[pair[k].channel]] = key_scaled(pair[k], states[k]);
            bench.coded[pair[k].channel] = is_beyond(pair[k], states[k]) ? FLAG : 0;
        }
    }
}

DEVICE void lay_values(const RowOfValues& row, u32 head, const ValueState* staged,
                       const u16* turn_of, const Bench& bench) {
    for (u32 i = thread_index(); i < HEAD_DIM; i += THREADS) {
        bench.u[turn_of[i]] = value_scaled(staged[i], row);
        bench.coded[i] = is_cut_off(staged[i], row, head * HEAD_DIM + i) ? FLAG : 0;
    }
}

// One lane of a step of a token's keys, what encodes them, and its words as they were.
struct KeyTask {
    u32 step, lane, words[KEY_BITS];
    u8* to;
    KeyChannel channels[2][2];
    Turns turns;
};

DEVICE KeyTask read_keys(const KeyCode& code, const Target& target, u32 number) {
    KeyTask task;
    task.step = number / 4, task.lane = target.in_slab % 8 * 4 + number % 4;
    task.to = target.words + task.step * step_bytes(KEY_BITS);
    lane_channels(code, target.head, task.step, task.lane, task.channels);
    task.turns = turns_at(code, 0, 8 * task.step + number % 4 * 2);
    read_words<KEY_BITS>(task.to, task.lane, task.words);
    return task;
}

// The four codes of a token's keys that a task has.
DEVICE void append_keys(const Decode& decode, const Lists& lists, const Target& target,
                        const u16* staged, const Bench& bench, const KeyTask& task) {
    u32 in_slab = target.in_slab, n[4], codes[4];
    KVQ_UNROLL for (u32 e = 0; e < 2; e++) {
        Element found[2];
        find_keys(task.channels[e], staged, bench, task.turns.of[e], found);
        KVQ_UNROLL for (u32 partner = 0; partner < 2; partner++) {
            u32 row, at, i = 2 * partner + e;
            n[i] = in_slab / 16 * 8 + in_slab / 8 % 2 * 2 + 4 * partner + e;
            key_place(n[i], task.step, task.lane, row, at);
            codes[i] = found[partner].code;
            if (!found[partner].is_outlier) continue;
            float dense = key_dense(decode, target.head, at, codes[i]);
            add_outlier(lists, target.list, 0,
                        delta_word(found[partner].state, dense, key_word(row, at)));
        }
    }
    replace_codes<KEY_BITS, true>(task.to, task.lane, task.words, n, codes, 4);
}

// One lane of a step of a token's values, and its words as they were.
struct ValueTask {
    u32 step, lane, words[VALUE_BITS];
    u8* to;
};

DEVICE ValueTask read_values(const Target& target, u32 number) {
    ValueTask task;
    task.step = number / 8, task.lane = number % 8 * 4 + target.in_slab % 8 / 2;
    task.to = target.words + STEPS * step_bytes(KEY_BITS) + task.step * step_bytes(VALUE_BITS);
    read_words<VALUE_BITS>(task.to, task.lane, task.words);
    return task;
}

// The two codes of a token's values that a task has.
DEVICE void append_values(const float* middles, const Decode& decode, const Lists& lists,
                          const Target& target, const ValueState* staged, const RowOfValues& value,
                          const Bench& bench, const ValueTask& task) {
    u32 in_slab = target.in_slab, n[2], codes[2];
    KVQ_UNROLL for (u32 i = 0; i < 2; i++) {
        u32 row, at;
        n[i] = in_slab / 16 * 8 + in_slab / 8 % 2 * 4 + i * 2 + in_slab % 2;
        value_place(n[i], task.step, task.lane, row, at);
        Element found = find_value(middles, staged[at], value, bench, target.head, at);
        codes[i] = found.code;
        if (!found.is_outlier) continue;
        float dense = value_dense(decode, value.range, found.code);
        add_outlier(lists, target.list, 1, delta_word(found.state, dense, at << 8 | row << 2));
    }
    replace_codes<VALUE_BITS, false>(task.to, task.lane, task.words, n, codes, 2);
}

// What compensated rounding of keys and of values works on.
struct Workshop {
    Bench bench[2];
    const float* feedback[2];
    const u16* turn_of[2];
};

// Lay it out in shared memory and begin to fill it.
DEVICE Workshop open_workshop(u8* memory, u32 head, const float* key_feedback,
                              const float* value_feedback, const u16* key_turn,
                              const u16* value_turn) {
    Workshop shop;
    u8* at = memory;
    const float* feedback[2] = {key_feedback, value_feedback};
    const u16* turn[2] = {key_turn, value_turn};
    KVQ_UNROLL for (u32 side = 0; side < 2; side++) {
        shop.bench[side] = bench_at(at);
        if (!(side ? VALUE_COMP : KEY_COMP)) continue;
        u16* turn_of = (u16*)(at + BENCH_BYTES);
        at += BENCH_BYTES + 2 * HEAD_DIM;
        const float* own = feedback[side] + (u64)head * HEAD_DIM * HEAD_DIM;
        shop.feedback[side] = STAGED ? (const float*)at : own;
        if constexpr (STAGED) {
            stage_feedback<THREADS>(own, (float*)at);
            at += 4 * HEAD_DIM * HEAD_DIM;
        }
        for (u32 i = thread_index(); i < HEAD_DIM; i += THREADS) {
            turn_of[turn[side][head * HEAD_DIM + i]] = (u16)i;
        }
        shop.turn_of[side] = turn_of;
    }
    return shop;
}

KERNEL(THREADS)
append(const u16* key, const u16* value, const int* page_table, const int* state,
       const float* lower, const float* upper, const float* offset, const float* inverse,
       const float* key_middles, const float* value_middles, const u16* order, const float* turns,
       const u16* levels, const u16* key_levels, u32* ranges, u32* counts, u32* index, u8* slabs,
       u32* outlier_words, u32* dropped, const float* key_reads, const float* key_feedback,
       const u16* key_turn, const float* value_reads, const float* value_feedback,
       const u16* value_turn, u32 num_kv_heads, u32 max_pages, u32 per_tail, u32 key_room,
       u32 value_room) {
    u32 sequence = block_index() / num_kv_heads, head = block_index() % num_kv_heads;
    u32 token = (u32)state[8 * sequence], channels = num_kv_heads * HEAD_DIM;
    u32 page = page_table[sequence * max_pages + token / 128], in_slab = token % 64;
    Search search{(u32*)shared_memory()};
    float* middles = (float*)(search.words + (VALUE_FLOAT ? BINS + 8 : 776));  // of keys, of values
    u16* staged = (u16*)(middles + MIDDLES);
    ValueState* own_values = (ValueState*)(staged + HEAD_DIM);
    OrderKey* keys = (OrderKey*)(own_values + HEAD_DIM);
    Workshop shop = open_workshop((u8*)(keys + channels), head, key_feedback, value_feedback,
                                  key_turn, value_turn);
    const u16* own = key + ((u64)sequence * num_kv_heads + head) * HEAD_DIM;
    const u16* all = value + (u64)sequence * channels;
    for (u32 i = thread_index(); i < HEAD_DIM; i += THREADS) {
        staged[i] = own[i];
        if constexpr (!VALUE_FLOAT) own_values[i] = all[head * HEAD_DIM + i];
    }
    for (u32 i = thread_index(); i < larger(LEVELS, 1u << VALUE_BITS) - 1; i += THREADS) {
        if (!CHANNEL_LEVELS && i < LEVELS - 1) middles[i] = key_middles[i];
        if (i < (1u << VALUE_BITS) - 1) middles[VALUE_MIDDLES + i] = value_middles[i];
    }
#if VALUE_FLOAT
    for (u32 i = thread_index(); i < BINS; i += THREADS) search.words[i] = 0;
    order_floats<THREADS>(all, channels, head, own_values, keys);
#else
    Extremes extremes = NO_EXTREMES;  // of this thread
    for (u32 first = 8 * thread_index(); first < channels; first += 8 * THREADS) {
        Eight eight = *(const Eight*)(all + first);
        widen(extremes, eight);
        *(Eight*)(keys + first) = eight;  // states, until they are ordered
    }
    begin_search(search, extremes);
#endif
    sync_block();
    KeyCode code{lower,
                 upper,
                 offset,
                 inverse,
                 CHANNEL_LEVELS ? key_middles : middles,
                 order,
                 turns + sequence * HEAD_DIM};
    Decode decode{levels, key_levels, (const u32*)key_levels};
    Lists lists{counts, index, outlier_words, dropped, {key_room, value_room}};
    u64 list = ((u64)page * num_kv_heads + head) * 2 + token / 64 % 2;
    Target target{head, in_slab, list,
                  slabs + list * STEPS * (step_bytes(KEY_BITS) + step_bytes(VALUE_BITS))};
    u32 key_number = thread_index() - 64, value_number = thread_index() - 128;
    bool has_keys = key_number < STEPS * 4, has_values = value_number < STEPS * 8;
    KeyTask key_task;  // read before the range is looked for
    ValueTask value_task;
    if (has_keys) key_task = read_keys(code, target, key_number);
    if (has_values) value_task = read_values(target, value_number);
    ValueCuts cuts;
#if VALUE_FLOAT
    u32 range = find_float_range<THREADS>(keys, channels, per_tail, search.words, cuts);
#else
    u32 range = find_range(keys, channels, per_tail, search, cuts);
#endif
    if (!KEY_COMP && has_keys) {  // while other warps have the values
        append_keys(decode, lists, target, staged, shop.bench[0], key_task);
    }
    if (head == 0 && thread_index() == 0) ranges[page * 128 + token % 128] = range;
    RowOfValues row{range, inverse_scale(range), cuts};
    if constexpr (KEY_COMP || VALUE_COMP) {
        if constexpr (KEY_COMP) lay_keys(code, head, staged, shop.turn_of[0], shop.bench[0]);
        if constexpr (VALUE_COMP) {
            lay_values(row, head, own_values, shop.turn_of[1], shop.bench[1]);
        }
        await_copies<0>();
        sync_block();
        u32 warp = thread_index() / 32, first = head * HEAD_DIM;
        if (KEY_COMP && warp == 0) {
            u32 own = CHANNEL_LEVELS ? first : 0;
            Rounding rounding{code.middles + own * (LEVELS - 1), key_reads + own * LEVELS,
                              shop.feedback[0], key_turn + first};
            round_token<KEY_BITS, CHANNEL_LEVELS>(rounding, shop.bench[0]);
        }
        if (VALUE_COMP && warp == 1) {
            Rounding rounding{middles + VALUE_MIDDLES, value_reads, shop.feedback[1], value_turn + first};
            round_token<VALUE_BITS, false>(rounding, shop.bench[1]);
        }
        sync_block();
        if (KEY_COMP && has_keys) {
            append_keys(decode, lists, target, staged, shop.bench[0], key_task);
        }
    }
    if (has_values) {
        append_values(middles + VALUE_MIDDLES, decode, lists, target, own_values, row, shop.bench[1],
                      value_task);
    }
}
