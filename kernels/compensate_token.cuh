// Compensated rounding of one token of one head by a warp: what compensate.cu does for a slab.
//
// A lane owns HEAD_DIM / 32 channels that follow each other in their turn. It rounds these alone,
// then tells all lanes its errors, so that those after it add up what their channels are owed.
#pragma once
#include "pack.cuh"

constexpr u8 FLAG = 0x80;                 // of an outlier's code
constexpr bool STAGED = HEAD_DIM <= 128;  // feedback has room in shared memory

struct alignas(16) Four {
    float at[4];
};

// What rounding one head of one side takes; middles and levels are the head's own or shared.
struct Rounding {
    const float *middles, *reads, *feedback;
    const u16* turn;
};

// One side's token in shared memory: u by turn; what was owed and codes with FLAG, by channel.
struct Bench {
    float *u, *owed;
    u8* coded;
};

constexpr u32 BENCH_BYTES = 9 * HEAD_DIM;

DEVICE Bench bench_at(u8* memory) {
    return Bench{(float*)memory, (float*)memory + HEAD_DIM, memory + 8 * HEAD_DIM};
}

// Bring what lies above the diagonal of a head's feedback to shared memory; a whole block does.
template <u32 threads>
DEVICE void stage_feedback(const float* from, float* to) {
    for (u32 i = thread_index(); i < HEAD_DIM * HEAD_DIM / 4; i += threads) {
        if (i % (HEAD_DIM / 4) * 4 + 3 > i / (HEAD_DIM / 4)) copy16(to + 4 * i, from + 4 * i);
    }
    copies_sent();
}

// Round the token on the bench; one warp does.
template <int bits, bool by_channel>
DEVICE void round_token(const Rounding& rounding, const Bench& bench) {
    constexpr u32 own = HEAD_DIM / 32, levels = 1u << bits, tables = by_channel ? own : 1;
    u32 lane = thread_index() % 32, channel[own], codes[own];
    float owed[own], u[own], middle[tables][levels], read[tables][levels];
    KVQ_UNROLL for (u32 k = 0; k < own; k++) {
        channel[k] = rounding.turn[lane * own + k];
        owed[k] = 0.0f, u[k] = bench.u[lane * own + k], codes[k] = bench.coded[channel[k]];
    }
    KVQ_UNROLL for (u32 k = 0; k < tables; k++) {
        u32 first = by_channel ? channel[k] : 0;
        KVQ_UNROLL for (u32 i = 0; i < levels; i++) {
            middle[k][i] = i < levels - 1 ? rounding.middles[first * (levels - 1) + i] : 0.0f;
            read[k][i] = rounding.reads[first * levels + i];
        }
    }
    KVQ_ROLLED for (u32 owner = 0; owner < 32; owner++) {
        float errors[own] = {};
        const float* rows = rounding.feedback + owner * own * HEAD_DIM + lane * own;
        if (lane == owner) {
            KVQ_UNROLL for (u32 k = 0; k < own; k++) {
                float wanted = add_exact(u[k], -owed[k]), level = read[by_channel ? k : 0][0];
                u32 code = 0;
                KVQ_UNROLL for (u32 i = 0; i < levels - 1; i++) {
                    bool above = middle[by_channel ? k : 0][i] < wanted;
                    code += above;
                    level = above ? read[by_channel ? k : 0][i + 1] : level;
                }
                errors[k] = codes[k] == FLAG ? 0.0f : add_exact(wanted, -level);
                codes[k] |= code;
                KVQ_UNROLL for (u32 later = k + 1; later < own; later++) {
                    owed[later] =
                        add_exact(owed[later], mul_exact(rows[k * HEAD_DIM + later], errors[k]));
                }
            }
        }
        KVQ_UNROLL for (u32 k = 0; k < own; k++) {
            float error = from_lane(errors[k], owner);
            if (lane <= owner) continue;
            if constexpr (own % 4 == 0) {
                KVQ_UNROLL for (u32 q = 0; q < own / 4; q++) {
                    Four row = *(const Four*)(rows + k * HEAD_DIM + 4 * q);
                    KVQ_UNROLL for (u32 i = 0; i < 4; i++) {
                        owed[4 * q + i] = add_exact(owed[4 * q + i], mul_exact(row.at[i], error));
                    }
                }
            } else {
                KVQ_UNROLL for (u32 i = 0; i < own; i++) {
                    owed[i] = add_exact(owed[i], mul_exact(rows[k * HEAD_DIM + i], error));
                }
            }
        }
    }
    KVQ_UNROLL for (u32 k = 0; k < own; k++) {
        bench.owed[channel[k]] = owed[k], bench.coded[channel[k]] = (u8)codes[k];
    }
}
