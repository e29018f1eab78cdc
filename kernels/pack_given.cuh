// What the kernels that write codes and lists share: flags of outliers, and elements whose rounding
// was compensated. See pack.cu.
#pragma once
#include "pack.cuh"

// A slab's rows of one side as compensate.cu left them.
struct Given {
    const u8* coded;
    const u16* moved;
};

DEVICE Element given_element(const Given& given, u32 token, u32 channel) {
    u8 coded = given.coded[token * HEAD_DIM + channel];
    bool is_outlier = coded & 0x80;
    float state = is_outlier ? half_to_float(given.moved[token * HEAD_DIM + channel]) : 0.0f;
    return Element{state, coded & 0x7fu, is_outlier};
}

// Where a thread's word of a slab's flags of one side lies: a bit an element, a word a lane of each
// step.
DEVICE u32* flags_of(u32* flags, u64 list, u32 thread) {
    return flags + list * STEPS * 32 + thread;
}
