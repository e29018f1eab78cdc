// What a block of attend.cu works on: where things lie in its shared memory and in the cache.
#pragma once
#include "attend_outliers.cuh"

constexpr u32 SLAB = KEY_SLAB + VALUE_SLAB;
constexpr u32 KEY_CHUNK = step_bytes(KEY_BITS) * (KEY_BITS >= 8 ? 1 : CHUNK_STEPS);
constexpr u32 VALUE_CHUNK = step_bytes(VALUE_BITS) * (VALUE_BITS >= 8 ? 1 : CHUNK_STEPS);
constexpr u32 KEY_CHUNKS = KEY_SLAB / KEY_CHUNK, CHUNKS = KEY_CHUNKS + VALUE_SLAB / VALUE_CHUNK;
static_assert(CHUNKS % DEPTH == 0 && DEPTH >= 2,
              "a slab's chunks fill the ring a whole number of times");
constexpr u32 SLOT = KEY_CHUNK > VALUE_CHUNK ? KEY_CHUNK : VALUE_CHUNK;
constexpr u32 SIDE = 256 + (OUTLIERS ? 2 * LISTED * 4 : 0);
// What goes with the next slab arrives while values are read, when this slab's is used up; else two
// buffers take turns.
constexpr u32 SIDES = AHEAD || DEPTH - 1 <= CHUNKS - KEY_CHUNKS ? 1 : 2;
constexpr u32 PARTIAL = HEAD_DIM + 2;
// Shared memory: tables, the query, what warps hand to each other, then each warp's corner.
constexpr u32 PLACES_AT = LUT_BYTES + ANGLE_BYTES, HEAD_AT = PLACES_AT + PLACE_BYTES;
constexpr u32 QUERY_AT = HEAD_AT + HEAD_TABLE;
constexpr u32 JOIN_AT = QUERY_AT + GROUP * HEAD_DIM * 4;
constexpr u32 FREQUENCIES_AT = (JOIN_AT + WARPS * GROUP * 12 + 15) / 16 * 16;
constexpr u32 ORDER_AT = FREQUENCIES_AT + HEAD_DIM * 4, TERMS_AT = ORDER_AT + HEAD_DIM * 2;
constexpr u32 TERM_BYTES = ROTATED ? (STEPS - TURNED) * 128 : 0;  // coefficients of their terms
constexpr u32 KEPT_AT = TERMS_AT + TERM_BYTES;
// Whole rows of banks: copies into the middle of one take longer.
constexpr u32 CORNER_AT = (KEPT_AT + 48 + 127) / 128 * 128;
constexpr u32 CORNER_SIDE = AHEAD ? 0 : DEPTH * SLOT, CORNER_QUERY = CORNER_SIDE + SIDES * SIDE,
              CORNER_TERMS = CORNER_QUERY + HEAD_DIM * GROUP * 2,
              CORNER_WEIGHTS = CORNER_TERMS + (STEPS - TURNED) * TERM_STEP,
              CORNER_OFFSETS = CORNER_WEIGHTS + (GROUP < 4 ? GROUP * 128 : 0),
              CORNER_SPARSE = CORNER_OFFSETS + 32;
constexpr u32 CORNER_MIX = CORNER_SPARSE + (OUTLIERS ? SPARSE_ROW * GROUP * 4 : 0);
constexpr u32 CORNER = (CORNER_MIX + HEAD_DIM * GROUP * 4 + 127) / 128 * 128;
constexpr u32 RAW_AT = CORNER_AT + CORNER_QUERY;  // where the first warp's query will be
static_assert(CORNER_AT + WARPS * CORNER <= SHARED_BYTES, "the launcher asked for too little");

struct Exact {
    const u16 *key, *value;
    u32 capacity;
};
struct Cache {
    const u8* slabs;
    const u32 *ranges, *outlier_index, *outlier_words;
    const int *page_table, *state;
    u32 batch, group_heads, num_kv_heads, max_pages;  // group_heads: query heads of a KV head
    const u64* frequencies;
    const u32* coefficients;
    const u16* order;
    Exact sinks, window;
};

// A KV head of a sequence with up to GROUP of its query heads: the work of one softmax.
struct Segment {
    u32 sequence, kv_head, first_head, heads, index;
    u32 first_slab, slabs, sink_units, units;
    u32 start;                // among the units of all segments; else among the blocks
    u32 first_block, blocks;  // that share it
};

// What a block keeps in shared memory, not in registers, while it reads slabs: where their result
// goes, and what comes next.
struct Kept {
    u32 first_row, heads;  // of the output
    u32 index, first_block, blocks, warps;
    u32 share, longer, whole;  // the cut
    u32 next, end;             // units
};
static_assert(sizeof(Kept) <= CORNER_AT - KEPT_AT, "it has room");

// A slab's number among all, its half page's number among all, and its lists of outliers: first
// quads of the keys' and of the values', and how many quads both have, the values' in the upper
// half beside IN_ROUNDS.
struct Slab {
    u32 index, ranges, first[2], quads;
};
static_assert(64 * HEAD_DIM / 4 + 1 < 0x8000,
              "a list of all elements, with its header, is counted");
