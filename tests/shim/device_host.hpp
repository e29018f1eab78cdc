// The CPU's side of kernels/device.cuh: a block is a set of fibres, one a thread, that take turns
// and meet at every collective operation. One block runs at a time. Atomics are plain additions,
// asynchronous copies happen at once; a collective that not every lane reaches is reported.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define DEVICE          inline
#define KERNEL(threads) extern "C" void
#define KERNEL_OF(threads, registers) extern "C" void
#define KVQ_UNROLL
#define KVQ_ROLLED
#define KVQ_UNROLL_4

namespace shim {
struct Fibre {
    ucontext_t context;
    std::vector<char> stack;
    bool done = false;
    int block_meets = 0, warp_meets = 0;
};
struct State {
    ucontext_t main;
    std::vector<Fibre> fibres;
    std::vector<u8> shared;
    u32 thread = 0, block = 0, blocks = 1;
    std::vector<u64> slots;  // what each thread hands to a collective
    std::vector<u64> slots2;
    std::function<void()> body;
};
inline State state;

inline void yield() {
    u32 self = state.thread;
    swapcontext(&state.fibres[self].context, &state.main);
    state.thread = self;
}
// Wait until every living thread in [first, last) has come as often as this one.
inline void meet(u32 first, u32 last, int Fibre::*count) {
    Fibre& self = state.fibres[state.thread];
    self.*count += 1;
    for (;;) {
        bool ready = true;
        for (u32 t = first; t < last; t++) {
            Fibre& other = state.fibres[t];
            if (other.*count < self.*count) {
                if (other.done) {
                    std::fprintf(stderr, "thread %u left before a collective\n", t);
                    std::abort();
                }
                ready = false;
            }
        }
        if (ready) return;
        yield();
    }
}
inline u32 lane() {
    return state.thread & 31;
}
inline u32 warp_first() {
    return state.thread & ~31u;
}
inline void meet_warp() {
    meet(warp_first(), warp_first() + 32, &Fibre::warp_meets);
}
template <typename T>
T* gather(T value) {  // every lane's value; valid until the next collective
    static_assert(sizeof(T) <= 8);
    meet_warp();
    std::memcpy(&state.slots[state.thread], &value, sizeof(T));
    meet_warp();
    thread_local T all[32];
    for (u32 i = 0; i < 32; i++) std::memcpy(&all[i], &state.slots[warp_first() + i], sizeof(T));
    return all;
}
inline void entry() {
    state.body();
    state.fibres[state.thread].done = true;
    for (;;) yield();
}
inline void run(u32 blocks, u32 threads, u32 shared_bytes, std::function<void()> body) {
    state.body = std::move(body);
    state.blocks = blocks;
    for (u32 b = 0; b < blocks; b++) {
        state.block = b;
        state.shared.assign(shared_bytes + 16, 0xee);
        state.slots.assign(threads, 0);
        state.fibres.assign(threads, Fibre());
        for (Fibre& fibre : state.fibres) {
            fibre.stack.resize(128 * 1024);
            getcontext(&fibre.context);
            fibre.context.uc_stack.ss_sp = fibre.stack.data();
            fibre.context.uc_stack.ss_size = fibre.stack.size();
            makecontext(&fibre.context, entry, 0);
        }
        for (bool living = true; living;) {
            living = false;
            for (u32 t = 0; t < threads; t++) {
                if (state.fibres[t].done) continue;
                living = true;
                state.thread = t;
                swapcontext(&state.main, &state.fibres[t].context);
            }
        }
    }
}
inline float half_value(u16 bits) {
    _Float16 h;
    std::memcpy(&h, &bits, 2);
    return (float)h;
}
inline u16 half_bits(double value) {
    _Float16 h = (_Float16)value;
    u16 bits;
    std::memcpy(&bits, &h, 2);
    return bits;
}
}  // namespace shim

inline u32 thread_index() {
    return shim::state.thread;
}
inline u32 block_index() {
    return shim::state.block;
}
inline u32 block_count() {
    return shim::state.blocks;
}
inline u8* shared_memory() {
    return (u8*)(((u64)shim::state.shared.data() + 15) & ~15ull);
}
inline u32 address_of(const u8* shared) {
    return (u32)(shared - shared_memory());
}
inline const u8* shared_at(u32 address) {
    return shared_memory() + address;
}
inline u32 add_byte(u32 word, u32 byte, u32 factor, u32 sum) {
    return (word >> 8 * byte & 255) * factor + sum;
}
inline void sync_block() {
    shim::meet(0, shim::state.fibres.size(), &shim::Fibre::block_meets);
}
inline bool any_thread(bool value) {
    shim::state.slots[thread_index()] = value;
    sync_block();
    bool any = false;
    for (u64 slot : shim::state.slots) any |= slot != 0;
    sync_block();  // nobody overwrites what others still read
    return any;
}
inline void sync_warp() {
    shim::meet_warp();
}
inline u32 vote(bool value) {
    bool* all = shim::gather(value);
    u32 mask = 0;
    for (u32 i = 0; i < 32; i++) mask |= (u32)all[i] << i;
    return mask;
}
inline bool any_lane(bool value) {
    return vote(value) != 0;
}
inline float exchange(float value, u32 mask) {
    return shim::gather(value)[shim::lane() ^ mask];
}
inline float from_lane(float value, u32 lane) {
    return shim::gather(value)[lane & 31];
}
inline u32 exchange(u32 value, u32 mask) {
    return shim::gather(value)[shim::lane() ^ mask];
}
inline u32 from_lane(u32 value, u32 lane) {
    return shim::gather(value)[lane & 31];
}
inline u32 sum_below(u32 value, u32 distance) {
    u32* all = shim::gather(value);
    return shim::lane() < distance ? value : all[shim::lane() - distance];
}
inline u32 least_of_warp(u32 value) {
    u32 *all = shim::gather(value), least = all[0];
    for (u32 i = 1; i < 32; i++) least = all[i] < least ? all[i] : least;
    return least;
}
inline u32 greatest_of_warp(u32 value) {
    return ~least_of_warp(~value);
}
inline u32 sum_of_warp(u32 value) {
    u32 *all = shim::gather(value), sum = 0;
    for (u32 i = 0; i < 32; i++) sum += all[i];
    return sum;
}
inline u32 count_bits(u32 value) {
    return __builtin_popcount(value);
}
inline u32 lowest_bit(u32 value) {
    return __builtin_ctz(value);
}
inline float mul_exact(float a, float b) {
    return a * b;
}
inline float add_exact(float a, float b) {
    return a + b;
}
inline float div_exact(float a, float b) {
    return a / b;
}
inline float fma_exact(float a, float b, float c) {
    return std::fmaf(a, b, c);
}
inline float reciprocal_exact(float a) {
    return 1.0f / a;
}
inline u32 undivided(u32 word) {
    return word;
}
inline u32 pick_bytes(u32 low, u32 high, u32 selector) {
    u64 bytes = (u64)high << 32 | low;
    u32 result = 0;
    for (int i = 0; i < 4; i++) {
        u32 nibble = selector >> 4 * i & 15;
        if (nibble & 8) {
            std::fprintf(stderr, "pick_bytes: selector %08x has a top bit\n", selector);
            std::abort();
        }
        result |= (u32)(bytes >> 8 * nibble & 255) << 8 * i;
    }
    return result;
}
inline float half_to_float(u16 bits) {
    return shim::half_value(bits);
}
inline u16 float_to_half(float value) {
    return shim::half_bits(value);
}
inline float h2_low(u32 pair) {
    return shim::half_value((u16)pair);
}
inline float h2_high(u32 pair) {
    return shim::half_value((u16)(pair >> 16));
}
inline float bits_to_float(u32 bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline u32 float_to_bits(float value) {
    u32 bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline u32 h2_pack(double low, double high) {
    return shim::half_bits(low) | (u32)shim::half_bits(high) << 16;
}
inline u32 h2_fma(u32 a, u32 b, u32 c) {
    return h2_pack((double)h2_low(a) * h2_low(b) + h2_low(c),
                   (double)h2_high(a) * h2_high(b) + h2_high(c));
}
inline u32 h2_mul(u32 a, u32 b) {
    return h2_pack((double)h2_low(a) * h2_low(b), (double)h2_high(a) * h2_high(b));
}
template <bool bfloat>
inline u32 no_negative_zero(u32 a) {
    return ((a & 0xffff) == 0x8000 ? 0 : a & 0xffff) | (a >> 16 == 0x8000 ? 0 : a >> 16) << 16;
}
template <bool bfloat>
inline float h2_part(u32 pair, u32 upper) {
    u32 bits = pair >> 16 * upper & 0xffff;
    return bfloat ? bits_to_float(bits << 16) : shim::half_value((u16)bits);
}
template <bool bfloat>
inline u32 h2_pick(u32 a, u32 b, bool is_less) {  // of two, by half, the less or the greater one
    u32 result = 0;
    for (u32 upper = 0; upper < 2; upper++) {
        bool first = (h2_part<bfloat>(a, upper) < h2_part<bfloat>(b, upper)) == is_less;
        result |= (first ? a : b) & 0xffffu << 16 * upper;
    }
    return result;
}
template <bool bfloat>
inline u32 h2_least(u32 a, u32 b) {
    return h2_pick<bfloat>(a, b, true);
}
template <bool bfloat>
inline u32 h2_greatest(u32 a, u32 b) {
    return h2_pick<bfloat>(a, b, false);
}
template <bool bfloat>
inline u32 h2_minus(u32 a, u32 b) {  // not rounded to bfloat16: only its sign is looked at
    float low = h2_part<bfloat>(a, 0) - h2_part<bfloat>(b, 0);
    float high = h2_part<bfloat>(a, 1) - h2_part<bfloat>(b, 1);
    return float_to_bits(low) >> 16 | (float_to_bits(high) & 0xffff0000u);
}
inline u32 h2_neg(u32 a) {
    return a ^ 0x80008000u;
}
inline u32 h2_from(float low, float high) {
    return h2_pack(low, high);
}
inline float exp2_fast(float x) {
    return std::exp2(x);
}
inline float log2_fast(float x) {
    return std::log2(x);
}
inline float inverse_fast(float x) {
    return 1.0f / x;
}
inline void sine_cosine(int phase, float& sine, float& cosine) {
    sine = std::sin((float)phase * 1.4629180792671596e-9f);
    cosine = std::cos((float)phase * 1.4629180792671596e-9f);
}
inline float greater(float a, float b) {
    return a > b ? a : b;
}
inline float size_of(float a) {
    return std::fabs(a);
}
inline int round_to_int(float x) {
    return (int)std::lrint(x);
}
inline void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    u32 left[32][4], right[32][2];
    for (int i = 0; i < 4; i++) {
        u32* all = shim::gather(a[i]);
        for (int lane = 0; lane < 32; lane++) left[lane][i] = all[lane];
    }
    for (int i = 0; i < 2; i++) {
        u32* all = shim::gather(i ? b1 : b0);
        for (int lane = 0; lane < 32; lane++) right[lane][i] = all[lane];
    }
    auto half = [](u32 pair, int second) { return second ? h2_high(pair) : h2_low(pair); };
    u32 r = shim::lane() / 4, q = shim::lane() % 4;
    for (int i = 0; i < 4; i++) {
        u32 row = r + 8 * (i / 2), column = 2 * q + i % 2;
        for (u32 k = 0; k < 16; k++) {
            u32 from = row % 8 * 4 + k % 8 / 2, part = row / 8 + 2 * (k / 8);
            u32 other = column * 4 + k % 8 / 2;
            c[i] += half(left[from][part], k % 2) * half(right[other][k / 8], k % 2);
        }
    }
}
inline u32 transpose8(u32 pair) {
    u32* all = shim::gather(pair);
    u32 r = shim::lane() / 4, q = shim::lane() % 4;
    auto element = [&](u32 row, u32 column) -> u32 {
        return all[row * 4 + column / 2] >> 16 * (column % 2) & 0xffff;
    };
    return element(2 * q, r) | element(2 * q + 1, r) << 16;
}
inline float half_way(float a) {
    float middle = std::fmaf(a, 0.5f, 0.5f);
    return middle > 0.0f ? middle < 1.0f ? middle : 1.0f : 0.0f;
}
inline void load_transposed(const u16* row, u32 (&pairs)[4]) {
    const u16** rows = shim::gather(row);
    u32 column = shim::lane() / 4, first = shim::lane() % 4 * 2;
    for (u32 m = 0; m < 4; m++) {
        const u16** of = rows + 8 * m + first;
        pairs[m] = of[0][column] | (u32)of[1][column] << 16;
    }
}
inline void load_matrices(const u16* row, u32 (&pairs)[4]) {
    const u16** rows = shim::gather(row);
    u32 at = shim::lane() / 4, first = shim::lane() % 4 * 2;
    for (u32 m = 0; m < 4; m++) {
        const u16* own = rows[8 * m + at];
        pairs[m] = own[first] | (u32)own[first + 1] << 16;
    }
}
inline void copy16(void* shared, const void* global) {
    if ((u64)shared % 16 || (u64)global % 16) {
        std::fprintf(stderr, "copy16: not aligned\n");
        std::abort();
    }
    std::memcpy(shared, global, 16);
}
inline void copies_sent() {}
template <int pending>
inline void await_copies() {}
template <int count>
inline void load_once(const u32* from, u32 (&to)[count]) {
    for (int i = 0; i < count; i++) to[i] = from[i];
}
inline void fetch_line(const void*) {}
inline void add_shared(float* at, float value) {
    *at += value;
}
inline void add_shared(int* at, int value) {
    *at += value;
}
inline void greatest_global(u32* at, u32 value) {
    *at = *at > value ? *at : value;
}
inline void mark_global(u32* at, u32 bits) {
    *at |= bits;
}
inline void add_global(float* at, float value) {
    *at += value;
}
inline u32 add_global(u32* at, u32 value) {
    u32 before = *at;
    *at += value;
    return before;
}
inline u32 take_shared(u32* at, u32 value) {
    u32 before = *at;
    *at += value;
    return before;
}
inline void least_shared(u32* at, u32 value) {
    *at = *at < value ? *at : value;
}
inline void greatest_shared(u32* at, u32 value) {
    *at = *at > value ? *at : value;
}
inline u32 arrive(u32* counter, u32 last) {
    u32 before = *counter;
    *counter = before >= last ? 0 : before + 1;
    return before;
}
inline void load_fresh(const float* at, float (&to)[2]) {
    to[0] = at[0], to[1] = at[1];
}
