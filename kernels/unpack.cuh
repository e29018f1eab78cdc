// From a lane's words of a slab to tensor-core fragments.
//
// A slab is 64 tokens of one KV head. It is cut into HEAD_DIM / 16 steps of 64 x 16 elements; in a
// step a lane holds 4 tiles (16 tokens each) of one A fragment: 4 half2, a code for each half.
// `selectors` turns the lane's words into one number per tile with code (fragment register a, half
// e) in nibble 2a + e, or of 8 bits in that byte; `look_up` turns that into the fragment.
#pragma once
#include "device.cuh"

constexpr u32 STEPS = HEAD_DIM / 16;
constexpr u32 LEVEL_ROW =
    KEY_BITS == 8 || VALUE_BITS == 8 ? 256 : 16;  // levels of keys, then of values
constexpr u32 IN_ROUNDS = 0x80000000u;            // beside the quads of values' lists
constexpr u32 HEADER = 4;  // words before the first outlier of a list in rounds

// Two words, read and written at once.
struct alignas(8) Pair {
    u32 of[2];
};

// The sum over all lanes before this one, and over all lanes.
DEVICE u32 lanes_before(u32 value, u32 lane, u32& total) {
    u32 sum = value;
    KVQ_UNROLL for (u32 d = 1; d < 32; d *= 2) {
        u32 below = sum_below(sum, d);
        if (lane >= d) sum += below;
    }
    total = from_lane(sum, 31);
    return sum - value;
}

// A model's states: half, or bfloat16 with BF16.
DEVICE float state_value(u16 bits) {
    return BF16 ? bits_to_float((u32)bits << 16) : half_to_float(bits);
}
DEVICE u16 state_bits(float value) {
    if constexpr (!BF16) return float_to_half(value);
    u32 bits = float_to_bits(value);
    return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Where an outlier lies: beside its half delta, the upper half of its word.
DEVICE u32 outlier_at(u32 token, u32 place) {
    return place << 8 | token << 2;
}
DEVICE u32 token_of(u32 word) {
    return word >> 2 & 63;
}
DEVICE u32 place_of(u32 word) {
    return word >> 8 & 255;
}

// Bytes of one step: 32 lanes, 32 codes each; 16 bits stand for states stored as they are.
DEVICE constexpr u32 step_bytes(u32 bits) {
    return 128 * bits;
}

// A tile's eight codes, and the bits that each has there.
template <int bits>
struct TileOf {
    typedef u32 Type;
};
template <>
struct TileOf<8> {
    typedef u64 Type;
};
template <int bits>
using Tile = typename TileOf<bits>::Type;
DEVICE constexpr u32 room_of(u32 bits) {
    return bits == 8 ? 8 : 4;
}

// 8 bits: two words per tile. 4 bits: a word per tile. 3 bits: a word for each of the first three
// tiles, the fourth tile's codes spread over their nibbles' top bits. 2 bits: two tiles in a word;
// the second tile of keys two bits higher, of values in the upper half, where codes of odd
// registers lie two bits higher than those of the register before, so that a byte has two
// registers.
template <int bits, bool is_key>
DEVICE void selectors(const u32 (&words)[bits], Tile<bits> (&tiles)[4]) {
    if constexpr (bits == 8) {
        KVQ_UNROLL for (int t = 0; t < 4; t++) tiles[t] = words[2 * t] | (u64)words[2 * t + 1]
                                                                             << 32;
    } else if constexpr (bits == 4) {
        KVQ_UNROLL for (int t = 0; t < 4; t++) tiles[t] = words[t];
    } else if constexpr (bits == 3) {
        KVQ_UNROLL for (int t = 0; t < 3; t++) tiles[t] = words[t] & 0x77777777u;
        tiles[3] = (words[0] >> 3 & 0x11111111u) | (words[1] >> 2 & 0x22222222u) |
                   (words[2] >> 1 & 0x44444444u);
    } else if constexpr (is_key) {
        KVQ_UNROLL for (int t = 0; t < 2; t++) {
            tiles[2 * t] = words[t] & 0x33333333u;
            tiles[2 * t + 1] = words[t] >> 2 & 0x33333333u;
        }
    } else {
        KVQ_UNROLL for (int t = 0; t < 4; t++) {
            u32 apart = pick_bytes(words[t / 2], 0, t % 2 ? 0x4342 : 0x4140);
            tiles[t] = (apart & 0x00330033u) | (apart << 6 & 0x33003300u);
        }
    }
}

// Which of a step's words are a lane's.
template <int bits>
DEVICE u32 word_of(u32 lane, u32 i) {
    return bits == 3   ? 32 * i + lane
           : bits >= 8 ? (32 * (i / 4) + lane) * 4 + i % 4
                       : bits * lane + i;
}
template <int bits>
DEVICE void read_words(const u8* step, u32 lane, u32 (&words)[bits]) {
    KVQ_UNROLL for (int i = 0; i < bits; i++) words[i] = ((const u32*)step)[word_of<bits>(lane, i)];
}

// Levels of 2- and 3-bit codes as bytes in registers: low bytes, then high bytes, of 4 levels each.
template <int bits>
struct ByteTable {
    u32 low[bits == 3 ? 2 : 1], high[bits == 3 ? 2 : 1];

    DEVICE void load(const u16* levels) {
        KVQ_UNROLL for (int i = 0; i < (bits == 3 ? 2 : 1); i++) {
            low[i] = high[i] = 0;
            KVQ_UNROLL for (int j = 0; j < 4; j++) {
                low[i] |= (u32)(levels[4 * i + j] & 255) << 8 * j;
                high[i] |= (u32)(levels[4 * i + j] >> 8) << 8 * j;
            }
        }
    }
};

// Four fp16 levels from their low and high bytes: registers 2i and 2i + 1 of a fragment.
DEVICE void weave(u32 low, u32 high, u32& first, u32& second) {
    first = pick_bytes(low, high, 0x5140);
    second = pick_bytes(low, high, 0x7362);
}

template <int bits>
DEVICE void look_up_bytes(const ByteTable<bits>& table, u32 tile, u32 (&fragment)[4]) {
    constexpr int last = bits == 3 ? 1 : 0;
    KVQ_UNROLL for (int i = 0; i < 2; i++) {
        u32 four = i ? tile >> 16 : tile;
        weave(pick_bytes(table.low[0], table.low[last], four),
              pick_bytes(table.high[0], table.high[last], four), fragment[2 * i],
              fragment[2 * i + 1]);
    }
}

// 2-bit levels per channel: `channels` holds the low bytes of the even and the odd channel, then
// the high bytes; odd channels' codes pick from the second four bytes.
DEVICE void look_up_channel_bytes(const u32 (&channels)[4], u32 tile, u32& first, u32& second) {
    u32 four = tile | 0x40404040u;
    weave(pick_bytes(channels[0], channels[1], four), pick_bytes(channels[2], channels[3], four),
          first, second);
}

// 4-bit levels: a table of all pairs of codes, a copy for each lane so that no two lanes meet in a
// bank. `table` is where the lane's copy of the first row lies; one instruction makes an address.
template <u32 stride>
DEVICE void look_up_pairs(u32 table, u32 offset, u32 tile, u32 (&fragment)[4]) {
    KVQ_UNROLL for (u32 a = 0; a < 4; a++) {
        fragment[a] = *(const u32*)(shared_at(add_byte(tile, a, stride, table)) + offset);
    }
}

// 8-bit levels: a table of all codes, a copy for each lane, each level in both halves of a word.
template <u32 stride>
DEVICE void look_up_singles(u32 table, u32 offset, u64 tile, u32 (&fragment)[4]) {
    KVQ_UNROLL for (u32 a = 0; a < 4; a++) {
        u32 word = a < 2 ? (u32)tile : (u32)(tile >> 32), found[2];
        KVQ_UNROLL for (u32 e = 0; e < 2; e++) {
            u32 at = add_byte(word, a % 2 * 2 + e, stride, table);
            found[e] = *(const u32*)(shared_at(at) + offset);
        }
        fragment[a] = pick_bytes(found[0], found[1], 0x7610);
    }
}
