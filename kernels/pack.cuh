// One element's code: the arithmetic of codec.py, and who is an outlier. See pack.cu.
#pragma once
#include "unpack.cuh"

static_assert(KEY_BITS <= 8 && VALUE_BITS <= 8, "16-bit pages hold states, not codes");
constexpr u32 ROW = HEAD_DIM + 8;  // halves of a staged row, padded against bank conflicts
constexpr u32 LEVELS = 1u << KEY_BITS;
// Middles between levels in shared memory: those of keys, then those of values.
constexpr u32 VALUE_MIDDLES = KEY_BITS == 8 ? 256 : 16,
              MIDDLES = VALUE_MIDDLES + (VALUE_BITS == 8 ? 256 : 16);

// Where a block's 64 tokens lie.
struct Place {
    u32 sequence, head, slab, page;
    u32 tokens;  // of the slab that exist
};

DEVICE Place place_at(u32 sequence, u32 head, u32 slab, u32 tokens, const int* page_table,
                      u32 max_pages) {
    u32 page = page_table[sequence * max_pages + slab / 2];
    return Place{sequence, head, slab, page, smaller(tokens - slab * 64, 64)};
}
DEVICE Place find_place(u32 block, u32 num_kv_heads, u32 slabs, u32 tokens, const int* page_table,
                        u32 max_pages) {
    return place_at(block / slabs / num_kv_heads, block / slabs % num_kv_heads, block % slabs,
                    tokens, page_table, max_pages);
}

struct alignas(16) Eight {
    u32 of[4];
};

// What sends for the slabs of a stretch one after another: where a thread's pieces of 16 bytes lie.
struct Stager {
    const u16* from;
    u16* to;
    u32 token;
    u64 stride;  // from a slab to the next one
};
constexpr u32 PIECES = HEAD_DIM / 8;          // of a token
constexpr u32 AT_ONCE = STEPS * 32 / PIECES;  // tokens

DEVICE Stager stager_at(const u16* states, const Place& place, u32 num_kv_heads, u32 tokens,
                        u64 stride, u16* to) {
    u32 token = thread_index() / PIECES, piece = thread_index() % PIECES;
    u64 row = ((u64)place.sequence * num_kv_heads + place.head) * tokens + place.slab * 64 + token;
    return Stager{states + row * HEAD_DIM + piece * 8, to + token * ROW + piece * 8, token, stride};
}

// Send for the next 64 tokens, of which some exist; the others become zeros. `side` is 0 or 1.
DEVICE void stage(Stager& stager, u32 side, u32 tokens) {
    u16* to = stager.to + side * 64 * ROW;
    if (tokens >= 64) {
        KVQ_UNROLL for (u32 k = 0; k < 64; k += AT_ONCE) {
            copy16(to + k * ROW, stager.from + k * HEAD_DIM);
        }
    } else {
        KVQ_ROLLED for (u32 k = 0; k < 64; k += AT_ONCE) {
            if (stager.token + k < tokens) {
                copy16(to + k * ROW, stager.from + k * HEAD_DIM);
            } else {
                *(Eight*)(to + k * ROW) = Eight{{0, 0, 0, 0}};
            }
        }
    }
    stager.from += stager.stride;
}

// How keys are encoded, by channel of the layer: threshold and affine, and the middles between
// levels.
struct KeyCode {
    const float *lower, *upper, *offset, *inverse, *middles;
    const u16* order;
    const float* turns;
};

// The index of the nearest level: how many middles lie below u.
template <int bits>
DEVICE u32 nearest(float u, const float* middles) {
    u32 at = 0;  // in bytes
    KVQ_UNROLL for (u32 step = 2u << bits; step >= 4; step /= 2) {
        if (*(const float*)((const u8*)middles + step - 4 + at) < u) at += step;
    }
    return at / 4;
}

struct Element {
    float state;
    u32 code;
    bool is_outlier;
};

// Code n = 8 tile + 2 register + half of a lane: which token and which place of the head.
DEVICE void key_place(u32 n, u32 step, u32 lane, u32& token, u32& place) {
    token = n / 8 * 16 + n / 2 % 2 * 8 + lane / 4;
    place = 8 * step + lane % 4 * 2 + n % 2 + n / 4 % 2 * (HEAD_DIM / 2);
}
DEVICE void value_place(u32 n, u32 step, u32 lane, u32& token, u32& place) {
    token = n / 8 * 16 + n / 4 % 2 * 8 + lane % 4 * 2 + n % 2;
    place = 16 * step + n / 2 % 2 * 8 + lane / 4;
}

// What encoding one channel's keys takes.
struct KeyChannel {
    u32 channel;  // of the head
    float lower, upper, offset, inverse;
    const float* middles;
};

DEVICE KeyChannel key_channel(const KeyCode& code, u32 head, u32 place) {
    KeyChannel found;
    found.channel = code.order[place];
    u32 c = head * HEAD_DIM + found.channel;
    found.lower = code.lower[c], found.upper = code.upper[c];
    found.offset = code.offset[c], found.inverse = code.inverse[c];
    found.middles = code.middles + (CHANNEL_LEVELS ? c * (LEVELS - 1) : 0);
    return found;
}

DEVICE float key_scaled(const KeyChannel& channel, float x) {
    return mul_exact(add_exact(x, -channel.offset), channel.inverse);
}
DEVICE bool is_beyond(const KeyChannel& channel, float x) {
    return OUTLIERS && (x < channel.lower || x > channel.upper);
}
DEVICE Element key_element(const KeyChannel& channel, float x) {
    float u = key_scaled(channel, x);
    return Element{x, nearest<KEY_BITS>(u, channel.middles), is_beyond(channel, x)};
}

// a / b from 1 / b that is rounded as IEEE division is, rounded likewise (Markstein).
DEVICE float divide(float a, float b, float inverse) {
    float quotient = mul_exact(a, inverse);
    return fma_exact(fma_exact(-b, quotient, a), inverse, quotient);
}

struct alignas(8) Turn {
    float cosine, sine;
};
struct alignas(16) Turns {
    Turn of[2];
};

// How a token's keys turn at a place; or at two places from an even one on.
DEVICE Turn turn_at(const KeyCode& code, u32 token, u32 place) {
    return ROTATED ? ((const Turn*)code.turns)[(u64)token * (HEAD_DIM / 2) + place] : Turn{1, 0};
}
DEVICE Turns turns_at(const KeyCode& code, u32 token, u32 place) {
    if constexpr (!ROTATED) return Turns{Turn{1, 0}, Turn{1, 0}};
    return ((const Turns*)code.turns)[((u64)token * (HEAD_DIM / 2) + place) / 2];
}

// A turn, and what undoing it divides by: the same for all heads.
struct Return {
    Turn turn;
    float norm, inverse;
};
DEVICE Return return_of(const Turn& turn) {
    if constexpr (!ROTATED) return Return{turn, 1.0f, 1.0f};
    float norm = add_exact(mul_exact(turn.cosine, turn.cosine), mul_exact(turn.sine, turn.sine));
    return Return{turn, norm, reciprocal_exact(norm)};
}

// A token's keys x at a place and y at its partner before RoPE, undone by the exact inverse of the
// model's own cosine and sine.
DEVICE void turn_back(float x, float y, const Return& by, float (&states)[2]) {
    states[0] = x, states[1] = y;
    if constexpr (ROTATED) {
        float low = add_exact(mul_exact(x, by.turn.cosine), mul_exact(y, by.turn.sine));
        float high = add_exact(mul_exact(y, by.turn.cosine), -mul_exact(x, by.turn.sine));
        states[0] = divide(low, by.norm, by.inverse), states[1] = divide(high, by.norm, by.inverse);
    }
}
DEVICE void key_states(const KeyChannel (&channels)[2], const u16* row, const Turn& turn,
                       float (&states)[2]) {
    float x = state_value(row[channels[0].channel]), y = state_value(row[channels[1].channel]);
    turn_back(x, y, return_of(turn), states);
}

// The same, and their codes.
DEVICE void key_pair(const KeyChannel (&channels)[2], const u16* row, const Turn& turn,
                     Element (&found)[2]) {
    float states[2];
    key_states(channels, row, turn, states);
    found[0] = key_element(channels[0], states[0]), found[1] = key_element(channels[1], states[1]);
}

// The channels of a lane's two places of a step and of their partners.
DEVICE void lane_channels(const KeyCode& code, u32 head, u32 step, u32 lane,
                          KeyChannel (&channels)[2][2]) {
    KVQ_UNROLL for (u32 e = 0; e < 2; e++) {
        KVQ_UNROLL for (u32 partner = 0; partner < 2; partner++) {
            u32 place = 8 * step + lane % 4 * 2 + e + partner * (HEAD_DIM / 2);
            channels[e][partner] = key_channel(code, head, place);
        }
    }
}

// A 16-bit float as an integer of the same order; both zeros are one.
DEVICE u32 order_key(u16 bits) {
    return bits == 0x8000 ? 0x8000 : bits & 0x8000 ? 0xffffu ^ bits : bits | 0x8000u;
}
// The keys of two.
DEVICE u32 order_keys(u32 pair) {
    u32 plus = no_negative_zero<BF16>(pair);
    return plus ^ ((plus >> 15 & 0x00010001u) * 0xffffu | 0x80008000u);
}
DEVICE u16 key_bits(u32 key) {
    return (u16)(key & 0x8000 ? key ^ 0x8000 : 0xffff ^ key);
}

// A value in the order of outliers: by size, then by channel. The `per_tail` least items and the
// greatest are outliers.
DEVICE u32 item_of(u32 key, u32 channel) {
    return key << 16 | channel;
}

// The greatest of the least items that are outliers, and the least of the greatest.
struct alignas(8) Cuts {
    u32 low, high;
};
constexpr Cuts NO_CUTS{0, ~0u};  // finite values lie between

DEVICE bool is_cut(const Cuts& cuts, u32 item) {
    return item <= cuts.low || item >= cuts.high;
}

DEVICE float inverse_scale(u32 range) {
    float scale = h2_low(range);
    return scale > 0.0f ? div_exact(1.0f, scale) : 0.0f;
}

// What encoding a token's values takes.
struct alignas(16) ValueRow {
    u32 range;
    float inverse;
    Cuts cuts;
};

DEVICE float value_scaled(u16 bits, const ValueRow& row) {
    return mul_exact(add_exact(state_value(bits), -h2_high(row.range)), row.inverse);
}
// Whether a value is an outlier; `channel` of the layer.
DEVICE bool is_cut_off(u16 bits, const ValueRow& row, u32 channel) {
    return OUTLIERS && is_cut(row.cuts, item_of(order_key(bits), channel));
}
DEVICE Element value_element(const float* middles, u16 bits, const ValueRow& row, u32 channel) {
    return Element{state_value(bits), nearest<VALUE_BITS>(value_scaled(bits, row), middles),
                   is_cut_off(bits, row, channel)};
}

// Within what a half can say.
DEVICE float clamp_half(float x) {
    return x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x;
}

// A token's range, scale and offset as halves, from the least and greatest keys of what is packed.
DEVICE u32 range_of(u32 low, u32 high) {
    float bottom = low > high ? 0.0f : mul_exact(state_value(key_bits(low)), 0.5f);
    float top = low > high ? 0.0f : mul_exact(state_value(key_bits(high)), 0.5f);
    u32 scale = float_to_half(clamp_half(add_exact(top, -bottom)));
    return scale | (u32)float_to_half(clamp_half(add_exact(top, bottom))) << 16;
}

// A half of what an outlier adds to what its code decodes to.
DEVICE u32 delta_word(float state, float dense, u32 where) {
    float stored = half_to_float(float_to_half(clamp_half(state)));
    return (u32)float_to_half(add_exact(stored, -dense)) << 16 | where;
}

// Write a lane's 32 codes, given as a number per tile with code 2a + e in that nibble, or byte.
template <int bits, bool is_key>
DEVICE void store_codes(u8* step, u32 lane, const Tile<bits> (&tiles)[4]) {
    u32* words = (u32*)step;
    if constexpr (bits == 8) {
        KVQ_UNROLL for (int i = 0; i < 2; i++) {
            const u64* two = tiles + 2 * i;
            *(Eight*)(words + word_of<bits>(lane, 4 * i)) =
                Eight{{(u32)two[0], (u32)(two[0] >> 32), (u32)two[1], (u32)(two[1] >> 32)}};
        }
    } else if constexpr (bits == 4) {
        *(Eight*)(words + 4 * lane) = Eight{{tiles[0], tiles[1], tiles[2], tiles[3]}};
    } else if constexpr (bits == 3) {
        KVQ_UNROLL for (int k = 0; k < 3; k++) {
            words[32 * k + lane] = tiles[k] | (tiles[3] >> k & 0x11111111u) << 3;
        }
    } else if constexpr (is_key) {
        *(Pair*)(words + 2 * lane) = Pair{{tiles[0] | tiles[1] << 2, tiles[2] | tiles[3] << 2}};
    } else {
        u32 near[4];  // a tile's odd registers beside the even ones
        KVQ_UNROLL for (int t = 0; t < 4; t++) near[t] = tiles[t] | tiles[t] >> 6;
        *(Pair*)(words + 2 * lane) =
            Pair{{pick_bytes(near[0], near[1], 0x6420), pick_bytes(near[2], near[3], 0x6420)}};
    }
}

// The sum over the lanes before this one that have the same channel of values.
DEVICE u32 channel_rank(u32 value, u32 lane) {
    u32 before = 0;
    KVQ_UNROLL for (u32 d = 1; d < 4; d++) {
        u32 below = sum_below(value, d);
        if (lane % 4 >= d) before += below;
    }
    return before;
}

// How values are encoded, and what levels decode to: (2, LEVEL_ROW) half; keys per channel have
// their own.
struct Decode {
    const u16 *levels, *key_levels;
    const u32* key_affine;  // as in attend.cu, unless CHANNEL_LEVELS
};

// What the kernels decode a key's code to, as attend_slab.cuh does.
DEVICE float key_dense(const Decode& decode, u32 head, u32 place, u32 code) {
    if constexpr (CHANNEL_LEVELS) {
        return half_to_float(decode.key_levels[(head * HEAD_DIM + place) * LEVELS + code]);
    }
    u32 half = place / (HEAD_DIM / 2), step = place % (HEAD_DIM / 2) / 8, column = place % 8 / 2;
    const u32* affine = decode.key_affine + ((head * STEPS + step) * 4 + column) * 4 + 2 * half;
    u32 shift = place % 2 * 16;
    return h2_low(
        h2_fma(decode.levels[code], affine[0] >> shift & 0xffff, affine[1] >> shift & 0xffff));
}

DEVICE float value_dense(const Decode& decode, u32 range, u32 code) {
    float level = half_to_float(decode.levels[LEVEL_ROW + code]);
    return add_exact(mul_exact(level, h2_low(range)), h2_high(range));
}
