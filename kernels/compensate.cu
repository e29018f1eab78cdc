// Compensated rounding of a prompt (compensation.round_in_order): codes of one side, the same bits.
//
// A head's channels are rounded one after another, in the order `turn`; each pays what the ones
// before it owe. A thread is a token; what channel j is owed is summed in that order, eight
// channels at a time, from the errors of all before, each step one IEEE operation.
//
// Grid: (sequence, KV head, slab), 64 threads.
//
// `feedback` (num_kv_heads, HEAD_DIM, HEAD_DIM) float by turn: what j pays for c, above the
// diagonal `reads`    levels that are read back: (L), or (num_kv_heads * HEAD_DIM, L) `coded`
// (batch, num_kv_heads, tokens, HEAD_DIM) bytes: the code, with FLAG for an outlier `moved`
// likewise halves: where an outlier, what is stored of it The rest as in pack.cu. Macros: those of
// pack.cu.
#include "floats.cuh"

constexpr u32 COLUMN = 65;              // tokens of a channel's errors, padded
constexpr u32 CODE_ROW = HEAD_DIM + 4;  // bytes of a token's codes, padded
constexpr u8 FLAG = 0x80;

struct alignas(16) Four {
    float at[4];
};

struct Rounding {
    const float *middles, *reads, *feedback;
    const u16* turn;
    u8* coded;
    u16* moved;
};

// A block's shared memory: before a channel's turn `errors` holds its u, from then on its error.
struct Bench {
    float* errors;
    u8* codes;
    u16* turn_of;
};

DEVICE Bench lay_out() {
    Bench bench;
    bench.errors = (float*)shared_memory();
    bench.codes = (u8*)(bench.errors + HEAD_DIM * COLUMN);
    bench.turn_of = (u16*)(bench.codes + 64 * CODE_ROW);
    return bench;
}

// Round a slab whose u and flags lie on the bench. `move` tells what is stored of an outlier:
// (channel, what it is owed) -> float.
template <int bits, bool by_channel, typename Move>
DEVICE void round_slab(const Bench& bench, const Rounding& rounding, const Place& place,
                       u32 num_kv_heads, u32 tokens, Move move) {
    constexpr u32 levels = 1u << bits;
    u32 token = thread_index(), head_channel = place.head * HEAD_DIM;
    const float* feedback = rounding.feedback + (u64)head_channel * HEAD_DIM;
    const u16* turn = rounding.turn + head_channel;
    float* mine = bench.errors + token;
    u64 first =
        (((u64)place.sequence * num_kv_heads + place.head) * tokens + place.slab * 64) * HEAD_DIM;
    KVQ_ROLLED for (u32 j = 0; j < HEAD_DIM; j += 8) {
        float owed[8] = {};
        KVQ_UNROLL_4 for (u32 c = 0; c < j; c++) {
            float error = mine[c * COLUMN];
            const Four* row = (const Four*)(feedback + c * HEAD_DIM + j);
            Four low = row[0], high = row[1];
            KVQ_UNROLL for (u32 k = 0; k < 4; k++) {
                owed[k] = add_exact(owed[k], mul_exact(low.at[k], error));
                owed[4 + k] = add_exact(owed[4 + k], mul_exact(high.at[k], error));
            }
        }
        KVQ_UNROLL for (u32 k = 0; k < 8; k++) {
            u32 channel = turn[j + k], c = head_channel + channel;
            float wanted = add_exact(mine[(j + k) * COLUMN], -owed[k]);
            u32 code =
                nearest<bits>(wanted, rounding.middles + (by_channel ? c * (levels - 1) : 0));
            u8* to = bench.codes + token * CODE_ROW + channel;
            bool is_outlier = *to == FLAG;
            float read = rounding.reads[(by_channel ? c * levels : 0) + code];
            float error = is_outlier ? 0.0f : add_exact(wanted, -read);
            mine[(j + k) * COLUMN] = error;
            const float* row = feedback + (j + k) * HEAD_DIM + j;
            KVQ_UNROLL for (u32 later = k + 1; later < 8; later++) {
                owed[later] = add_exact(owed[later], mul_exact(row[later], error));
            }
            *to |= (u8)code;
            if (is_outlier) {
                rounding.moved[first + token * HEAD_DIM + channel] =
                    float_to_half(clamp_half(move(channel, owed[k])));
            }
        }
    }
    sync_block();
    u32* coded = (u32*)(rounding.coded + first);
    for (u32 i = thread_index(); i < place.tokens * (HEAD_DIM / 4); i += 64) {
        u32 row = i / (HEAD_DIM / 4), word = i % (HEAD_DIM / 4);
        coded[i] = *(u32*)(bench.codes + row * CODE_ROW + 4 * word);
    }
}

// Put an element where its turn will come.
DEVICE void put(const Bench& bench, u32 token, u32 channel, float u, bool is_outlier) {
    bench.errors[bench.turn_of[channel] * COLUMN + token] = u;
    bench.codes[token * CODE_ROW + channel] = is_outlier ? FLAG : 0;
}

DEVICE void find_turns(const Bench& bench, const u16* turn) {
    for (u32 i = thread_index(); i < HEAD_DIM; i += 64) bench.turn_of[turn[i]] = (u16)i;
}

KERNEL(64)
compensate_keys(const u16* key, const int* page_table, const float* lower, const float* upper,
                const float* offset, const float* inverse, const float* middles, const u16* order,
                const float* turns, const float* reads, const float* feedback, const u16* turn,
                u8* coded, u16* moved, u32 num_kv_heads, u32 tokens, u32 max_pages) {
    constexpr u32 half = HEAD_DIM / 2;
    Bench bench = lay_out();
    u16* place_of = bench.turn_of + HEAD_DIM;
    u32 slabs = (tokens + 63) / 64;
    Place place = find_place(block_index(), num_kv_heads, slabs, tokens, page_table, max_pages);
    KeyCode code{lower,
                 upper,
                 offset,
                 inverse,
                 middles,
                 order,
                 turns + (u64)place.sequence * tokens * HEAD_DIM};
    const u16* rows =
        key +
        (((u64)place.sequence * num_kv_heads + place.head) * tokens + place.slab * 64) * HEAD_DIM;
    find_turns(bench, turn + place.head * HEAD_DIM);
    for (u32 i = thread_index(); i < HEAD_DIM; i += 64) place_of[order[i]] = (u16)i;
    sync_block();
    KVQ_ROLLED for (u32 i = thread_index(); i < 64 * half; i += 64) {
        u32 token = i / half, at = i % half;
        KeyChannel pair[2] = {key_channel(code, place.head, at),
                              key_channel(code, place.head, at + half)};
        float state[2] = {0.0f, 0.0f};
        bool exists = token < place.tokens;
        if (exists) {
            key_states(pair, rows + token * HEAD_DIM, turn_at(code, place.slab * 64 + token, at),
                       state);
        }
        KVQ_UNROLL for (u32 k = 0; k < 2; k++) {
            put(bench, token, pair[k].channel, key_scaled(pair[k], state[k]),
                exists && is_beyond(pair[k], state[k]));
        }
    }
    sync_block();
    auto move = [&](u32 channel, float owed) {
        u32 at = place_of[channel], token = thread_index();
        KeyChannel pair[2] = {key_channel(code, place.head, at % half),
                              key_channel(code, place.head, at % half + half)};
        float state[2];
        Turn turn_of = turn_at(code, place.slab * 64 + token, at % half);
        key_states(pair, rows + token * HEAD_DIM, turn_of, state);
        bool is_upper = at >= half;
        float low = is_upper ? pair[1].lower : pair[0].lower;
        float high = is_upper ? pair[1].upper : pair[0].upper;
        float scale = mul_exact(add_exact(high, -low), 0.5f);
        return add_exact(is_upper ? state[1] : state[0], -mul_exact(owed, scale));
    };
    Rounding rounding{middles, reads, feedback, turn, coded, moved};
    round_slab<KEY_BITS, CHANNEL_LEVELS>(bench, rounding, place, num_kv_heads, tokens, move);
}

KERNEL(64)
compensate_values(const ValueState* value, const int* page_table, const u32* ranges,
                  const ValueCuts* cuts, const float* middles, const float* reads,
                  const float* feedback, const u16* turn, u8* coded, u16* moved, u32 num_kv_heads,
                  u32 tokens, u32 max_pages) {
    Bench bench = lay_out();
    RowOfValues* tokens_of = (RowOfValues*)(bench.turn_of + HEAD_DIM);
    u32 slabs = (tokens + 63) / 64, token = thread_index();
    Place place = find_place(block_index(), num_kv_heads, slabs, tokens, page_table, max_pages);
    const ValueState* rows =
        value +
        (((u64)place.sequence * num_kv_heads + place.head) * tokens + place.slab * 64) * HEAD_DIM;
    find_turns(bench, turn + place.head * HEAD_DIM);
    RowOfValues mine{};
    if (token < place.tokens) {
        u32 range = ranges[place.page * 128 + place.slab % 2 * 64 + token];
        mine = RowOfValues{range, inverse_scale(range),
                           cuts[(u64)place.sequence * tokens + place.slab * 64 + token]};
    }
    tokens_of[token] = mine;
    sync_block();
    KVQ_ROLLED for (u32 i = thread_index(); i < 64 * HEAD_DIM; i += 64) {
        u32 row = i / HEAD_DIM, channel = i % HEAD_DIM;
        bool exists = row < place.tokens;
        ValueState state = exists ? rows[i] : (ValueState)0;
        put(bench, row, channel, value_scaled(state, tokens_of[row]),
            exists && is_cut_off(state, tokens_of[row], place.head * HEAD_DIM + channel));
    }
    sync_block();
    auto move = [&](u32 channel, float owed) {
        float state = number_of(rows[token * HEAD_DIM + channel]);
        return add_exact(state, -mul_exact(owed, h2_low(mine.range)));
    };
    Rounding rounding{middles, reads, feedback, turn, coded, moved};
    round_slab<VALUE_BITS, false>(bench, rounding, place, num_kv_heads, tokens, move);
}
