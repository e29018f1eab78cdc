// Warp operations, tensor-core steps and packed half arithmetic, each a line of PTX.
//
// Everything that is not plain C++ in the other sources goes through this file, so that the same
// sources also compile for a CPU: with KVQ_HOST defined, tests/shim/device_host.hpp takes its
// place. No CUDA header is needed; NVRTC wheels ship none. A half2 is a `u32`, the first half in
// its low 16 bits.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifdef KVQ_HOST
#include "device_host.hpp"
#else

#define DEVICE          __device__ __forceinline__
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads, 1)
// A thread of this one has so many registers at most.
#define KERNEL_OF(threads, registers) \
    extern "C" __global__ void __launch_bounds__(threads, 65536 / (registers) / (threads))
#define KVQ_UNROLL   _Pragma("unroll")
#define KVQ_ROLLED   _Pragma("unroll 1")
#define KVQ_UNROLL_4 _Pragma("unroll 4")

DEVICE u32 thread_index() {
    return threadIdx.x;
}
DEVICE u32 block_index() {
    return blockIdx.x;
}
DEVICE u32 block_count() {
    return gridDim.x;
}

// The block's dynamic shared memory.
DEVICE u8* shared_memory() {
    extern __shared__ __align__(16) u8 kvq_shared[];
    return kvq_shared;
}

// Where something lies in shared memory, a number, and what lies there.
DEVICE u32 address_of(const u8* shared) {
    return (u32)__cvta_generic_to_shared(shared);
}
DEVICE const u8* shared_at(u32 address) {
    return (const u8*)__cvta_shared_to_generic(address);
}

DEVICE void sync_block() {
    __syncthreads();
}
// Meet, and say to all whether any thread said so.
DEVICE bool any_thread(bool value) {
    return __syncthreads_or(value);
}
DEVICE void sync_warp() {
    __syncwarp();
}
DEVICE bool any_lane(bool value) {
    return __any_sync(0xffffffffu, value);
}
DEVICE float exchange(float value, u32 mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}
DEVICE float from_lane(float value, u32 lane) {
    return __shfl_sync(0xffffffffu, value, lane);
}
DEVICE u32 exchange(u32 value, u32 mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}
DEVICE u32 from_lane(u32 value, u32 lane) {
    return __shfl_sync(0xffffffffu, value, lane);
}
DEVICE u32 sum_below(u32 value, u32 distance) {
    return __shfl_up_sync(0xffffffffu, value, distance);
}
DEVICE u32 vote(bool value) {
    return __ballot_sync(0xffffffffu, value);
}
DEVICE u32 least_of_warp(u32 value) {
    return __reduce_min_sync(0xffffffffu, value);
}
DEVICE u32 greatest_of_warp(u32 value) {
    return __reduce_max_sync(0xffffffffu, value);
}
DEVICE u32 sum_of_warp(u32 value) {
    return __reduce_add_sync(0xffffffffu, value);
}
DEVICE u32 count_bits(u32 value) {
    return __popc(value);
}
DEVICE u32 lowest_bit(u32 value) {
    return __ffs(value) - 1;
}

// A word that is read at once: the compiler would read each half where it is used.
DEVICE u32 undivided(u32 word) {
    asm("" : "+r"(word));
    return word;
}

// Bytes of (low, high) picked by the nibbles of `selector`, whose top bits must be clear.
DEVICE u32 pick_bytes(u32 low, u32 high, u32 selector) {
    u32 result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
    return result;
}

// A byte of a word times a factor of 16 bits, added to a sum. Which one is known when compiling.
DEVICE u32 add_byte(u32 word, u32 byte, u32 factor, u32 sum) {
    u32 factors = byte % 2 ? factor << 16 : factor, out;
    if (byte < 2) {
        asm("dp2a.lo.u32.u32 %0, %1, %2, %3;" : "=r"(out) : "r"(factors), "r"(word), "r"(sum));
    } else {
        asm("dp2a.hi.u32.u32 %0, %1, %2, %3;" : "=r"(out) : "r"(factors), "r"(word), "r"(sum));
    }
    return out;
}
DEVICE u32 h2_fma(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
DEVICE u32 h2_mul(u32 a, u32 b) {
    u32 d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
// Two halves, or bfloat16s, with +0 where they are -0.
template <bool bfloat>
DEVICE u32 no_negative_zero(u32 a) {
    u32 d;
    if constexpr (bfloat) {
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(0x3f803f80), "r"(0));
    } else {
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(0x3c003c00), "r"(0));
    }
    return d;
}
// The least and the greatest of two halves, or bfloat16s; and their distance, whose sign is exact.
template <bool bfloat>
DEVICE u32 h2_least(u32 a, u32 b) {
    u32 d;
    if constexpr (bfloat) {
        asm("min.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    } else {
        asm("min.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    }
    return d;
}
template <bool bfloat>
DEVICE u32 h2_greatest(u32 a, u32 b) {
    u32 d;
    if constexpr (bfloat) {
        asm("max.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    } else {
        asm("max.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    }
    return d;
}
template <bool bfloat>
DEVICE u32 h2_minus(u32 a, u32 b) {
    u32 d;
    if constexpr (bfloat) {
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(b), "r"(0xbf80bf80), "r"(a));
    } else {
        asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    }
    return d;
}
DEVICE u32 h2_neg(u32 a) {
    u32 d;
    asm("neg.f16x2 %0, %1;" : "=r"(d) : "r"(a));
    return d;
}
DEVICE u32 h2_from(float low, float high) {
    u32 d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}
DEVICE float half_to_float(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
DEVICE u16 float_to_half(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
DEVICE float h2_low(u32 pair) {
    return half_to_float((u16)pair);
}
DEVICE float h2_high(u32 pair) {
    return half_to_float((u16)(pair >> 16));
}
DEVICE float bits_to_float(u32 bits) {
    return __uint_as_float(bits);
}
DEVICE u32 float_to_bits(float value) {
    return __float_as_uint(value);
}

// 2^x, log2 x, 1/x, and the sine and cosine of `turns` full turns, |turns| <= 1/2.
DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float inverse_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// Of a phase in 2^32nds of a turn.
DEVICE void sine_cosine(int phase, float& sine, float& cosine) {
    float angle = (float)phase * 1.4629180792671596e-9f;
    asm("sin.approx.f32 %0, %1;" : "=f"(sine) : "f"(angle));
    asm("cos.approx.f32 %0, %1;" : "=f"(cosine) : "f"(angle));
}
DEVICE int round_to_int(float x) {
    return __float2int_rn(x);
}
DEVICE float greater(float a, float b) {
    return fmaxf(a, b);
}
DEVICE float size_of(float a) {
    return fabsf(a);
}

// One IEEE operation each, never contracted.
DEVICE float mul_exact(float a, float b) {
    return __fmul_rn(a, b);
}
DEVICE float add_exact(float a, float b) {
    return __fadd_rn(a, b);
}
DEVICE float div_exact(float a, float b) {
    return __fdiv_rn(a, b);
}
DEVICE float fma_exact(float a, float b, float c) {
    return __fmaf_rn(a, b, c);
}
// 1 / a, rounded as IEEE division is, of a from 2^-100 to 2^100.
DEVICE float reciprocal_exact(float a) {
    float near;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(near) : "f"(a));
    return __fmaf_rn(near, __fmaf_rn(-a, near, 1.0f), near);
}

// (a + 1) / 2 within 0 and 1; rises with a.
DEVICE float half_way(float a) {
    float d;
    asm("fma.rn.sat.f32 %0, %1, 0f3F000000, 0f3F000000;" : "=f"(d) : "f"(a));
    return d;
}

// c += a b for a 16x16 and b 16x8 in the fragment layout of mma.m16n8k16.
DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The transpose of the 8x8 matrix of halves whose row i lies in lanes 4i to 4i + 3.
DEVICE u32 transpose8(u32 pair) {
    u32 result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
    return result;
}

// Transposes of four 8x8 matrices of halves in shared memory; lane 8m + r says where row r of
// matrix m lies. Element m of lane 4c + d is then column c, rows 2d and 2d + 1.
DEVICE void load_transposed(const u16* row, u32 (&pairs)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3])
                 : "r"((u32)__cvta_generic_to_shared(row))
                 : "memory");
}

// Four 8x8 matrices of halves as they lie: element m of lane 4r + d is row r, columns 2d and 2d
// + 1.
DEVICE void load_matrices(const u16* row, u32 (&pairs)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3])
                 : "r"((u32)__cvta_generic_to_shared(row))
                 : "memory");
}

// Copy 16 bytes to shared memory behind the thread's back; `copies_sent` closes a group, and
// `await_copies<n>` returns once at most n groups are under way.
DEVICE void copy16(void* shared, const void* global) {
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(shared)),
        "l"(global)
        : "memory");
}
DEVICE void copies_sent() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int pending>
DEVICE void await_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Words of global memory that nobody reads again, and a line of it to be had soon.
template <int count>
DEVICE void load_once(const u32* from, u32 (&to)[count]) {
    if constexpr (count == 4) {
        asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "l"(from));
    } else if constexpr (count == 2) {
        asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];"
                     : "=r"(to[0]), "=r"(to[1])
                     : "l"(from));
    } else {
        asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(to[0]) : "l"(from));
    }
}
DEVICE void fetch_line(const void* global) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

DEVICE void add_shared(float* at, float value) {
    atomicAdd(at, value);
}
DEVICE void add_shared(int* at, int value) {
    atomicAdd(at, value);
}
DEVICE u32 take_shared(u32* at, u32 value) {
    return atomicAdd(at, value);
}
DEVICE void least_shared(u32* at, u32 value) {
    atomicMin(at, value);
}
DEVICE void greatest_shared(u32* at, u32 value) {
    atomicMax(at, value);
}

DEVICE void greatest_global(u32* at, u32 value) {
    atomicMax(at, value);
}
DEVICE void mark_global(u32* at, u32 bits) {
    atomicOr(at, bits);
}
DEVICE void add_global(float* at, float value) {
    atomicAdd(at, value);
}
// Add and return what was there.
DEVICE u32 add_global(u32* at, u32 value) {
    return atomicAdd(at, value);
}

// Count arrivals from 0 to last and back to 0; returns the count before. What the block wrote
// before it met is seen by those that arrive later, once they meet, through `load_fresh`.
DEVICE u32 arrive(u32* counter, u32 last) {
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(counter), "r"(last)
                 : "memory");
    return before;
}
// Read two neighbours that another block wrote.
DEVICE void load_fresh(const float* at, float (&to)[2]) {
    asm volatile("ld.global.cg.v2.f32 {%0,%1}, [%2];" : "=f"(to[0]), "=f"(to[1]) : "l"(at));
}
#endif

DEVICE u32 smaller(u32 a, u32 b) {
    return a < b ? a : b;
}
DEVICE u32 larger(u32 a, u32 b) {
    return a > b ? a : b;
}
