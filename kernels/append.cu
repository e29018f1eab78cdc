// One new token of every sequence into pages that have room for it: codes, range and outliers, in
// place, the same bits as pack.cu. Nothing is allocated and nothing depends on the host, so a graph
// can hold it; `state` says where the token goes and is left as it is.
//
// Grid: (sequence, KV head, side). Every block of values finds the token's range over all KV heads
// for itself, and writes its own head; a block of keys knows nothing of it. An element is a
// thread's.
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

static_assert(THREADS >= HEAD_DIM && THREADS >= 256, "a thread each for elements and for levels");

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

// What a block's token is put into, and which token: where the host says that things lie.
struct Pages {
    const int *page_table, *state;
    u32 *ranges, *counts, *index, *words, *dropped;
    u8* slabs;
    u32 num_kv_heads, max_pages, sequence, head, side, room;  // of a list of the side
};

// Where the token goes: its range, its place in the slab, the words of the slab's side, its list.
struct Target {
    u32 in_slab, *range, *count, *entry;
    u8* words;
};
DEVICE Target target_of(const Pages& pages, u32 token) {
    u32 page = pages.page_table[pages.sequence * pages.max_pages + token / 128];
    u64 slab = ((u64)page * pages.num_kv_heads + pages.head) * 2 + token / 64 % 2;
    u8* words = pages.slabs + slab * STEPS * (step_bytes(KEY_BITS) + step_bytes(VALUE_BITS));
    return Target{token % 64, pages.ranges + page * 128 + token % 128,
                  pages.counts + 2 * slab + pages.side, pages.index + 4 * slab + 2 * pages.side,
                  words + (pages.side ? STEPS * step_bytes(KEY_BITS) : 0)};
}

// Take a place in the token's list, and fill it.
DEVICE u32 take_place(const Target& target) {
    return add_global(target.count, 1);
}
DEVICE void put_outlier(const Pages& pages, const Target& target, u32 at, u32 word) {
    if (at < pages.room) {
        pages.words[(u64)target.entry[0] * 4 + at] = word;
        greatest_global(target.entry + 1, at / 4 + 1);
    } else {
        add_global(pages.dropped, 1);
    }
}

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

// A token's keys of one head, by a whole block: an element is a thread's, four neighbours' codes
// lie in the words of one lane.
DEVICE void append_keys(const KeyCode& code, const Decode& decode, const Pages& pages,
                        const u16* key, const Side& side, u8* memory) {
    u32 x = thread_index(), e = x % 2, partner = x / 2 % 2, step = x / 16, half = HEAD_DIM / 2;
    u32 low = 8 * step + x / 4 % 4 * 2 + e, place = low + partner * half, words[KEY_BITS];
    u32 token =
        (u32)pages.state[8 * pages.sequence];  // its page is asked for once others' loads are
    bool has_key = x < HEAD_DIM;
    float* middles = (float*)memory;
    u16* levels = (u16*)(middles + VALUE_MIDDLES);
    u16* staged = levels + VALUE_MIDDLES;
    KeyChannel channel;
    u32 other, level = 0;
    float middle = 0.0f;
    Turn turn;
    if (!CHANNEL_LEVELS && x < LEVELS) {
        level = decode.levels[x], middle = x < LEVELS - 1 ? code.middles[x] : 0.0f;
    }
    if (has_key) {
        u16 state = key[x];
        other = code.order[partner ? low : low + half];
        turn = turn_at(code, 0, low);
        channel = key_channel(code, pages.head, place);
        staged[x] = state;
    }
    Target target = target_of(pages, token);
    u32 in_slab = target.in_slab, lane = in_slab % 8 * 4 + x / 4 % 4;
    u8* to = target.words + step * step_bytes(KEY_BITS);
    if (has_key) read_words<KEY_BITS>(to, lane, words);
    if (!CHANNEL_LEVELS && x < LEVELS) levels[x] = (u16)level, middles[x] = middle;
    Workshop shop;
    if constexpr (KEY_COMP) {
        shop = open_workshop((u8*)(staged + HEAD_DIM), pages.head, side.feedback, side.turn);
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
            u32 first = pages.head * HEAD_DIM, own = CHANNEL_LEVELS ? first : 0;
            const float* own_middles = CHANNEL_LEVELS ? code.middles + own * (LEVELS - 1) : middles;
            Rounding rounding{own_middles, side.reads + own * LEVELS, shop.feedback,
                              side.turn + first};
            round_token<KEY_BITS, CHANNEL_LEVELS>(rounding, shop.bench);
        }
        sync_block();
        if (has_key) {
            float scale = mul_exact(add_exact(channel.upper, -channel.lower), 0.5f);
            found.state =
                add_exact(found.state, -mul_exact(shop.bench.owed[channel.channel], scale));
            found.code = shop.bench.coded[channel.channel] & 0x7fu;
        }
    }
    if (!has_key) return;
    if (found.is_outlier) {
        u32 at = take_place(target);
        Decode own = decode;
        own.levels = levels;
        float dense = key_dense(own, pages.head, place, found.code);
        put_outlier(pages, target, at, delta_word(found.state, dense, outlier_at(in_slab, place)));
    }
    constexpr u32 room = room_of(KEY_BITS);
    u32 shift = room * (in_slab / 8 % 2 * 2 + 4 * partner + e);
    Tile<KEY_BITS> all = any_of<4>((Tile<KEY_BITS>)found.code << shift);
    Tile<KEY_BITS> one = (1u << room) - 1, two = one | one << room;
    Tile<KEY_BITS> mask = (two | two << 4 * room) << room * (in_slab / 8 % 2 * 2);
    if (x % 4 == 0) replace_codes<KEY_BITS, true>(to, lane, words, in_slab / 16, all, mask);
}

// A token's values of one head, likewise; two neighbours' codes lie in the words of one lane.
DEVICE void append_values(const Decode& decode, const Pages& pages, const u16* all, u32 per_tail,
                          const Side& side, u8* memory) {
    u32 x = thread_index(), step = x / 16, i = x % 2, place = 16 * step + i * 8 + x / 2 % 8;
    u32 token = (u32)pages.state[8 * pages.sequence], words[VALUE_BITS];
    u32 channels = pages.num_kv_heads * HEAD_DIM, first_channel = pages.head * HEAD_DIM;
    bool has_value = x < HEAD_DIM;
    Search search{(u32*)memory};
    float* middles = (float*)(search.words + (VALUE_FLOAT ? BINS + 8 : 776));
    u16* levels = (u16*)(middles + MIDDLES - VALUE_MIDDLES);
    ValueState* own_values = (ValueState*)(levels + MIDDLES - VALUE_MIDDLES);
    OrderKey* keys = (OrderKey*)(own_values + HEAD_DIM);
#if !VALUE_FLOAT
    // Threads that have none left take the last ones once more.
    u32 ends[2] = {smaller(8 * x, channels - 8), smaller(8 * x + 8 * THREADS, channels - 8)};
    Eight two[2] = {*(const Eight*)(all + ends[0]), *(const Eight*)(all + ends[1])};
    u16 own_state = has_value ? all[first_channel + x] : (u16)0;
#endif
    u32 level = 0;
    float middle = 0.0f;
    if (x < 1u << VALUE_BITS) {
        level = decode.levels[LEVEL_ROW + x],
        middle = x < (1u << VALUE_BITS) - 1 ? side.middles[x] : 0.0f;
    }
    Target target = target_of(pages, token);
    u32 in_slab = target.in_slab, lane = x / 2 % 8 * 4 + in_slab % 8 / 2;
    u8* to = target.words + step * step_bytes(VALUE_BITS);
    if (has_value) read_words<VALUE_BITS>(to, lane, words);
    if (x < 1u << VALUE_BITS) levels[x] = (u16)level, middles[x] = middle;
    Workshop shop;
    if constexpr (VALUE_COMP) {
        shop = open_workshop((u8*)(keys + channels), pages.head, side.feedback, side.turn);
    }
#if VALUE_FLOAT
    for (u32 n = x; n < BINS; n += THREADS) search.words[n] = 0;
    order_floats<THREADS>(all, channels, pages.head, own_values, keys);
#else
    Extremes extremes = NO_EXTREMES;  // of this thread
    KVQ_UNROLL for (u32 k = 0; k < 2; k++) {
        *(Eight*)(keys + ends[k]) = two[k];  // states, until they are ordered
        widen(extremes, two[k]);
    }
    if (has_value) own_values[x] = own_state;
    KVQ_ROLLED for (u32 first = 8 * x + 16 * THREADS; first < channels; first += 8 * THREADS) {
        Eight eight = *(const Eight*)(all + first);
        *(Eight*)(keys + first) = eight;
        widen(extremes, eight);
    }
    begin_search(search, extremes);
#endif
    sync_block();
    ValueCuts cuts;
#if VALUE_FLOAT
    u32 range = find_float_range<THREADS>(keys, channels, per_tail, search.words, cuts);
#else
    u32 range = find_range(keys, channels, per_tail, search, cuts);
#endif
    if (pages.head == 0 && x == 0) *target.range = range;
    RowOfValues row{range, inverse_scale(range), cuts};
    if constexpr (VALUE_COMP) {
        if (has_value) {
            shop.bench.u[shop.turn_of[x]] = value_scaled(own_values[x], row);
            shop.bench.coded[x] = is_cut_off(own_values[x], row, first_channel + x) ? FLAG : 0;
        }
        await_copies<0>();
        sync_block();
        if (x / 32 == 0) {
            Rounding rounding{middles, side.reads, shop.feedback, side.turn + first_channel};
            round_token<VALUE_BITS, false>(rounding, shop.bench);
        }
        sync_block();
    }
    if (!has_value) return;
    Element found;
    if constexpr (VALUE_COMP) {
        float moved = add_exact(number_of(own_values[place]),
                                -mul_exact(shop.bench.owed[place], h2_low(range)));
        found =
            Element{moved, shop.bench.coded[place] & 0x7fu, (shop.bench.coded[place] & FLAG) != 0};
    } else {
        found = value_element(middles, own_values[place], row, first_channel + place);
    }
    if (found.is_outlier) {
        u32 at = take_place(target);
        float read = half_to_float(levels[found.code]);  // as `value_dense`
        float dense = add_exact(mul_exact(read, h2_low(range)), h2_high(range));
        put_outlier(pages, target, at, delta_word(found.state, dense, outlier_at(in_slab, place)));
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
    Decode decode{levels, key_levels, (const u32*)key_levels};
    Pages pages{page_table,   state,
                ranges,       counts,
                index,        outlier_words,
                dropped,      slabs,
                num_kv_heads, max_pages,
                sequence,     head,
                is_value,     is_value ? value_room : key_room};
    if (is_value) {
        Side side{value_middles, value_reads, value_feedback, value_turn};
        append_values(decode, pages, value + (u64)sequence * num_kv_heads * HEAD_DIM, per_tail,
                      side, shared_memory());
    } else {
        KeyCode code{
            lower, upper, offset, inverse, key_middles, order, turns + sequence * HEAD_DIM};
        Side side{key_middles, key_reads, key_feedback, key_turn};
        append_keys(code, decode, pages, key + ((u64)sequence * num_kv_heads + head) * HEAD_DIM,
                    side, shared_memory());
    }
}
