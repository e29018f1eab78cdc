// Codes from a table of cells, which takes half the instructions of a search. See pack.cu.
#pragma once
#include "pack.cuh"

// [-1, 1] is cut into CELLS. A byte each says where the first middle lies that is not before the
// cell; where no cell has two, one comparison finds the rest.
constexpr u32 CELLS = 256;
struct Cells {
    float* middles;  // one more than there are, 16 at least: the others are infinite
    u8* before;      // CELLS: four times how many middles there are before, which is below 64
    u32* crowded;    // whether a cell has two middles

    // The least floats are integers times 2^-149: a product's bits are the cell.
    DEVICE static u32 cell_of(float u) {
        return float_to_bits(mul_exact(half_way(u), bits_to_float(CELLS - 1)));
    }
    // Add the index of the nearest level to nibble n of two words that are summed up later.
    DEVICE void add_nearest(u32 (&words)[2], u32 n, float u) const {
        u32 at = before[cell_of(u)];
        words[0] += n ? at << (4 * n - 2) : at >> 2;
        words[1] += *(const float*)((const u8*)middles + at) < u ? 1u << 4 * n : 0;
    }
};

// Lay cells out, 16-byte aligned; whole blocks do, and meet. There are none for codes of 8 bits.
template <int bits, u32 threads>
DEVICE Cells make_cells(u8* memory, const float* middles) {
    constexpr u32 count = (1u << bits) - 1, room = count < 16 ? 16 : count + 1;
    Cells cells{(float*)memory, memory + 4 * room, (u32*)(memory + 4 * room + CELLS)};
    u32* cells_of = cells.crowded + 4;  // 16, of the middles
    for (u32 i = thread_index(); i < room; i += threads) {
        cells.middles[i] = i < count ? middles[i] : bits_to_float(0x7f800000);
        if (bits < 8) cells_of[i] = i < count ? Cells::cell_of(middles[i]) : ~0u;
    }
    if (thread_index() == 0) *cells.crowded = bits == 8;
    sync_block();
    if constexpr (bits == 8) return cells;
    if (thread_index() + 1 < count && cells_of[thread_index()] == cells_of[thread_index() + 1]) {
        *cells.crowded = 1;
    }
    for (u32 i = thread_index(); i < CELLS; i += threads) {
        u32 before = 0;
        KVQ_UNROLL for (u32 step = 8; step; step /= 2) {
            if (cells_of[before + step - 1] < i) before += step;
        }
        cells.before[i] = (u8)(4 * before);
    }
    sync_block();
    return cells;
}
