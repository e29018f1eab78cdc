// One new token of every sequence into pages that have room for it: codes, range and outliers, in
// place, the same bits as pack.cu. Nothing is allocated and nothing depends on the host, so a graph
// can hold it; `state` says where the token goes and is left as it is.
//
// Grid: (sequence, KV head, side). Every block of values finds the token's range over all KV heads for
// itself, and writes its own head; a block of keys knows nothing of it. An element is a thread's.
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

// Put some codes of a tile, where `mask` says, into a lane's words of a step, which were read.
template <int bits, bool is_key>
DEVICE void replace_codes(u8* step, u32 lane, const u32 (&words)[bits], u32 tile, Tile<bits> codes,
                          Tile<bits> mask) {
    Tile<bits> tiles[4];
    selectors<bits, is_key>(words, tiles);
    KVQ_UNROLL for (u32 t = 0; t < 4; t++) {
        if (t == tile) tiles[t] = (tiles[t] & ~mask) | codes;
    }
    store_codes<bits, is_key>(step, lane, tiles);
}

// The bits that any of some neighbouring lanes has.
template <u32 lanes, typename Bits>
DEVICE Bits any_of(Bits bits) {
    KVQ_UNROLL for (u32 d = 1; d < lanes; d *= 2) {
        if constexpr (sizeof(Bits) == 8) {
            bits |= (Bits)exchange((u32)(bits >> 32), d) << 32 | exchange((u32)bits, d);
        } else {
            bits |= exchange(bits, d);
        }
    }
    return bits;
}

// A slab's list of one side, with room for so many words.
struct List {
    u32 *count, *entry, *words, *dropped;
    u32 room;
};

// Take a place in the list, and fill it.
DEVICE u32 take_place(const List& list) {
    return add_global(list.count, 1);
}
DEVICE void put_outlier(const List& list, u32 at, u32 word) {
    if (at < list.room) {
        list.words[(u64)list.entry[0] * 4 + at] = word;
        greatest_global(list.entry + 1, at / 4 + 1);
    } else {
        add_global(list.dropped, 1);
    }
}

// Where the token goes: its place in the slab, the slab's number among all, and its words.
struct Target {
    u32 head, in_slab;
    u64 list;
    u8* words;
};

// What compensated rounding of one side works on.
struct Workshop {
    Bench bench;
    const float* feedback;
    const u16* turn_of;
};

// Lay it out in shared memory and begin to fill it.
DEVICE Workshop open_workshop(u8* memory, u32 head, const float* feedback, const u16* turn) {
    Workshop shop;
    shop.bench = bench_at(memory);
    u16* turn_of = (u16*)(memory + BENCH_BYTES);
    float* staged = (float*)(memory + BENCH_BYTES + 2 * HEAD_DIM);
    const float* own = feedback + (u64)head * HEAD_DIM * HEAD_DIM;
    shop.feedback = STAGED ? staged : own;
    if constexpr (STAGED) stage_feedback<THREADS>(own, staged);
    for (u32 i = thread_index(); i < HEAD_DIM; i += THREADS) {
        turn_of[turn[head * HEAD_DIM + i]] = (u16)i;
    }
    shop.turn_of = turn_of;
    return shop;
}

// What rounding one side takes: compensated, but for the middles.
struct Side {
    const float *middles, *reads, *feedback;
    const u16* turn;
};

// A token's keys of one head, by a whole block: an element is a thread's, four neighbours' codes lie in
// the words of one lane.
DEVICE void append_keys(const KeyCode& code, const Decode& decode, const List& list, const Target& target,
                        const u16* key, const Side& side, u8* memory) {
    u32 x = thread_index(), e = x % 2, partner = x / 2 % 2, step = x / 16, half = HEAD_DIM / 2;
    u32 low = 8 * step + x / 4 % 4 * 2 + e, place = low + partner * half, in_slab = target.in_slab;
    u32 lane = in_slab % 8 * 4 + x / 4 % 4, words[KEY_BITS];
    bool has_key = x < HEAD_DIM;
    u8* to = target.words + step * step_bytes(KEY_BITS);
    float* middles = (float*)memory;
    u16* levels = (u16*)(middles + VALUE_MIDDLES);
    u16* staged = levels + VALUE_MIDDLES;
    KeyChannel channel;
    u32 other;
    Turn turn;
    if (has_key) {  // all that is read of global memory is asked for at once
        channel = key_channel(code, target.head, place);
        other = code.order[place ^ half];
        turn = turn_at(code, 0, low);
        read_words<KEY_BITS>(to, lane, words);
        staged[x] = key[x];
    }
    for (u32 i = x; i < LEVELS && !CHANNEL_LEVELS; i += THREADS) {
        levels[i] = decode.levels[i];
        if (i < LEVELS - 1) middles[i] = code.middles[i];
    }
    Workshop shop;
    if constexpr (KEY_COMP) {
        shop = open_workshop((u8*)(staged + HEAD_DIM), target.head, side.feedback, side.turn);
    }
    sync_block();
    Element found{0.0f, 0, false};
    if (!CHANNEL_LEVELS) channel.middles = middles;
    if (has_key) {
        float own = state_value(staged[channel.channel]), beside = state_value(staged[other]);
        if constexpr (ROTATED) {  // as `turn_back`
            Return by = return_of(turn);
            float crossed = mul_exact(partner ? -beside : beside, by.turn.sine);
            own = divide(add_exact(mul_exact(own, by.turn.cosine), crossed), by.norm, by.inverse);
        }
        found = KEY_COMP ? Element{own, 0, is_beyond(channel, own)} : key_element(channel, own);
    }
    if constexpr (KEY_COMP) {
        if (has_key) {
            shop.bench.u[shop.turn_of[channel.channel]] = key_scaled(channel, found.state);
            shop.bench.coded[channel.channel] = found.is_outlier ? FLAG : 0;
        }
        await_copies<0>();
        sync_block();
        if (x / 32 == 0) {
            u32 first = target.head * HEAD_DIM, own = CHANNEL_LEVELS ? first : 0;
            const float* own_middles = CHANNEL_LEVELS ? code.middles + own * (LEVELS - 1) : middles;
            Rounding rounding{own_middles, side.reads + own * LEVELS, shop.feedback, side.turn + first};
            round_token<KEY_BITS, CHANNEL_LEVELS>(rounding, shop.bench);
        }
        sync_block();
        if (has_key) {
            float scale = mul_exact(add_exact(channel.upper, -channel.lower), 0.5f);
            found.state = add_exact(found.state, -mul_exact(shop.bench.owed[channel.channel], scale));
            found.code = shop.bench.coded[channel.channel] & 0x7fu;
        }
    }
    if (!has_key) return;
    if (found.is_outlier) {
        u32 at = take_place(list);
        Decode own = decode;
        own.levels = levels;
        float dense = key_dense(own, target.head, place, found.code);
        put_outlier(list, at, delta_word(found.state, dense, outlier_at(in_slab, place)));
    }
    constexpr u32 room = room_of(KEY_BITS);
    u32 shift = room * (in_slab / 8 % 2 * 2 + 4 * partner + e);
    Tile<KEY_BITS> all = any_of<4>((Tile<KEY_BITS>)found.code << shift);
    Tile<KEY_BITS> one = (1u << room) - 1, two = one | one << room;
    Tile<KEY_BITS> mask = (two | two << 4 * room) << room * (in_slab / 8 % 2 * 2);
    if (x % 4 == 0) replace_codes<KEY_BITS, true>(to, lane, words, in_slab / 16, all, mask);
}

// A token's values of one head, likewise; two neighbours' codes lie in the words of one lane.
DEVICE void append_values(const Decode& decode, const List& list, const Target& target, const u16* all,
                          u32 channels, u32 per_tail, const Side& side, u32* ranges, u8* memory) {
    u32 x = thread_index(), step = x / 16, i = x % 2, place = 16 * step + i * 8 + x / 2 % 8;
    u32 in_slab = target.in_slab, lane = x / 2 % 8 * 4 + in_slab % 8 / 2, words[VALUE_BITS];
    bool has_value = x < HEAD_DIM;
    u8* to = target.words + STEPS * step_bytes(KEY_BITS) + step * step_bytes(VALUE_BITS);
    Search search{(u32*)memory};
    float* middles = (float*)(search.words + (VALUE_FLOAT ? BINS + 8 : 776));
    u16* levels = (u16*)(middles + MIDDLES - VALUE_MIDDLES);
    ValueState* own_values = (ValueState*)(levels + MIDDLES - VALUE_MIDDLES);
    OrderKey* keys = (OrderKey*)(own_values + HEAD_DIM);
#if !VALUE_FLOAT
    Extremes extremes = NO_EXTREMES;  // of this thread
    for (u32 first = 8 * x; first < channels; first += 16 * THREADS) {
        u32 second = first + 8 * THREADS < channels ? first + 8 * THREADS : first;
        Eight two[2] = {*(const Eight*)(all + first), *(const Eight*)(all + second)};
        widen(extremes, two[0]), widen(extremes, two[1]);
        *(Eight*)(keys + first) = two[0];  // states, until they are ordered
        *(Eight*)(keys + second) = two[1];
    }
#endif
    if (has_value) {
        read_words<VALUE_BITS>(to, lane, words);
        if constexpr (!VALUE_FLOAT) own_values[x] = all[target.head * HEAD_DIM + x];
    }
    for (u32 n = x; n < 1u << VALUE_BITS; n += THREADS) {
        levels[n] = decode.levels[LEVEL_ROW + n];
        if (n < (1u << VALUE_BITS) - 1) middles[n] = side.middles[n];
    }
    Workshop shop;
    if constexpr (VALUE_COMP) {
        shop = open_workshop((u8*)(keys + channels), target.head, side.feedback, side.turn);
    }
#if VALUE_FLOAT
    for (u32 n = x; n < BINS; n += THREADS) search.words[n] = 0;
    order_floats<THREADS>(all, channels, target.head, own_values, keys);
#else
    begin_search(search, extremes);
#endif
    sync_block();
    ValueCuts cuts;
#if VALUE_FLOAT
    u32 range = find_float_range<THREADS>(keys, channels, per_tail, search.words, cuts);
#else
    u32 range = find_range(keys, channels, per_tail, search, cuts);
#endif
    if (target.head == 0 && x == 0) *ranges = range;
    RowOfValues row{range, inverse_scale(range), cuts};
    if constexpr (VALUE_COMP) {
        if (has_value) {
            shop.bench.u[shop.turn_of[x]] = value_scaled(own_values[x], row);
            shop.bench.coded[x] = is_cut_off(own_values[x], row, target.head * HEAD_DIM + x) ? FLAG : 0;
        }
        await_copies<0>();
        sync_block();
        if (x / 32 == 0) {
            Rounding rounding{middles, side.reads, shop.feedback, side.turn + target.head * HEAD_DIM};
            round_token<VALUE_BITS, false>(rounding, shop.bench);
        }
        sync_block();
    }
    if (!has_value) return;
    Element found;
    if constexpr (VALUE_COMP) {
        float moved = add_exact(number_of(own_values[place]), -mul_exact(shop.bench.owed[place], h2_low(range)));
        found = Element{moved, shop.bench.coded[place] & 0x7fu, (shop.bench.coded[place] & FLAG) != 0};
    } else {
        found = value_element(middles, own_values[place], row, target.head * HEAD_DIM + place);
    }
    if (found.is_outlier) {
        u32 at = take_place(list);
        float level = half_to_float(levels[found.code]);  // as `value_dense`
        float dense = add_exact(mul_exact(level, h2_low(range)), h2_high(range));
        put_outlier(list, at, delta_word(found.state, dense, outlier_at(in_slab, place)));
    }
    constexpr u32 room = room_of(VALUE_BITS);
    u32 first = in_slab / 8 % 2 * 4 + in_slab % 2;
    Tile<VALUE_BITS> both = any_of<2>((Tile<VALUE_BITS>)found.code << room * (first + 2 * i));
    Tile<VALUE_BITS> one = (1u << room) - 1, mask = (one | one << 2 * room) << room * first;
    if (i == 0) replace_codes<VALUE_BITS, false>(to, lane, words, in_slab / 16, both, mask);
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
    u32 is_value = block_index() % 2, number = block_index() / 2;
    u32 sequence = number / num_kv_heads, head = number % num_kv_heads;
    u32 token = (u32)state[8 * sequence];
    u32 page = page_table[sequence * max_pages + token / 128];
    u64 slab = ((u64)page * num_kv_heads + head) * 2 + token / 64 % 2;
    Target target{head, token % 64, slab,
                  slabs + slab * STEPS * (step_bytes(KEY_BITS) + step_bytes(VALUE_BITS))};
    Decode decode{levels, key_levels, (const u32*)key_levels};
    List list{counts + 2 * slab + is_value, index + 4 * slab + 2 * is_value, outlier_words, dropped,
              is_value ? value_room : key_room};
    if (is_value) {
        Side side{value_middles, value_reads, value_feedback, value_turn};
        append_values(decode, list, target, value + (u64)sequence * num_kv_heads * HEAD_DIM,
                      num_kv_heads * HEAD_DIM, per_tail, side, ranges + page * 128 + token % 128,
                      shared_memory());
    } else {
        KeyCode code{lower, upper, offset, inverse, key_middles, order, turns + sequence * HEAD_DIM};
        Side side{key_middles, key_reads, key_feedback, key_turn};
        append_keys(code, decode, list, target, key + ((u64)sequence * num_kv_heads + head) * HEAD_DIM, side,
                    shared_memory());
    }
}
