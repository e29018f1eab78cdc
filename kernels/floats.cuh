// Values that are floats, as rotating a head makes them: their order takes 32 bits, so that
// channels, which tell equal ones apart, stand beside. VALUE_FLOAT says that values are such.
#pragma once
#include "pack.cuh"

#ifndef VALUE_FLOAT
#define VALUE_FLOAT 0
#endif

// A float as an integer of the same order; both zeros are one.
DEVICE u32 float_key(float x) {
    u32 bits = float_to_bits(x);
    return bits << 1 == 0 ? 0x80000000u : bits >> 31 ? ~bits : bits | 0x80000000u;
}
DEVICE float key_float(u32 key) {
    return bits_to_float(key >> 31 ? key ^ 0x80000000u : ~key);
}

// The greatest of the least that are outliers, and the least of the greatest.
struct alignas(16) FloatCuts {
    u32 low, low_channel, high, high_channel;
};
constexpr FloatCuts NO_FLOAT_CUTS{0, 0, ~0u, 0};  // no number has these keys

struct alignas(16) FloatRow {
    u32 range;
    float inverse;
    FloatCuts cuts;
};

DEVICE bool is_cut(const FloatCuts& cuts, u32 key, u32 channel) {
    return key < cuts.low || (key == cuts.low && channel <= cuts.low_channel) || key > cuts.high ||
           (key == cuts.high && channel >= cuts.high_channel);
}
DEVICE float value_scaled(float x, const FloatRow& row) {
    return mul_exact(add_exact(x, -h2_high(row.range)), row.inverse);
}
DEVICE bool is_cut_off(float x, const FloatRow& row, u32 channel) {
    return OUTLIERS && is_cut(row.cuts, float_key(x), channel);
}
DEVICE Element value_element(const float* middles, float x, const FloatRow& row, u32 channel) {
    return Element{x, nearest<VALUE_BITS>(value_scaled(x, row), middles),
                   is_cut_off(x, row, channel)};
}

// As `range_of`, from keys of floats.
DEVICE u32 range_of_floats(u32 low, u32 high) {
    float bottom = low > high ? 0.0f : mul_exact(key_float(low), 0.5f);
    float top = low > high ? 0.0f : mul_exact(key_float(high), 0.5f);
    u32 scale = float_to_half(clamp_half(add_exact(top, -bottom)));
    return scale | (u32)float_to_half(clamp_half(add_exact(top, bottom))) << 16;
}

#if VALUE_FLOAT
typedef float ValueState;
typedef FloatCuts ValueCuts;
typedef FloatRow RowOfValues;
DEVICE float number_of(float x) {
    return x;
}
#else
typedef u16 ValueState;
typedef Cuts ValueCuts;
typedef ValueRow RowOfValues;
DEVICE float number_of(u16 bits) {
    return state_value(bits);
}
#endif
