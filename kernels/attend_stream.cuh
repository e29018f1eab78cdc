// How a warp of attend.cu gets the codes of one slab after another, and what goes with them:
// through a ring in shared memory, or AHEAD steps early into registers, from lines that it has
// fetched to the second cache one slab early.
#pragma once
#include "attend_layout.cuh"

constexpr u32 MOST_BITS = KEY_BITS > VALUE_BITS ? KEY_BITS : VALUE_BITS;
static_assert(!AHEAD || 2 * STEPS % AHEAD == 0, "a step's registers are the same in every slab");

// What a warp reads: slabs `number` to `last` of a segment, chunk by chunk through its ring.
struct Stream {
    u8* corner;
    u32 lane, number, last;
    u32 parity;  // which of the two side buffers this slab has
    u32 first;   // lane i knows slab first + i
    Slab known;
    u32 late;   // what `known` lacks until `end_look`
    Slab slab;  // the slab that is read
    const u8 *words,
        *next_words;  // this lane's share of it, and of the next one; null past the last
    const u8* chunk;  // of the ring
    u32 early[AHEAD ? AHEAD : 1][MOST_BITS];  // of the next steps, where a warp reads ahead
};

DEVICE u8* side_of(const Stream& stream, u32 which) {
    return stream.corner + CORNER_SIDE + which % SIDES * SIDE;
}

// Let every lane find out about one of the next 32 slabs; where their lists lie is known at
// `end_look`, so that nothing waits for that before.
DEVICE void look_ahead(const Cache& cache, const Segment& segment, Stream& stream) {
    stream.first = stream.number;
    u32 number = smaller(stream.number + stream.lane, stream.last);
    u32 page = cache.page_table[segment.sequence * cache.max_pages + number / 2];
    Slab& slab = stream.known;
    slab.index = (page * cache.num_kv_heads + segment.kv_head) * 2 + number % 2;
    slab.ranges = page * 2 + number % 2;
    const u32* lists = cache.outlier_index + 4 * (u64)slab.index;
    slab.first[0] = OUTLIERS ? lists[0] : 0, slab.first[1] = OUTLIERS ? lists[2] : 0;
    slab.quads = OUTLIERS ? lists[1] : 0, stream.late = OUTLIERS ? lists[3] : 0;
}
DEVICE void end_look(Stream& stream) {
    if constexpr (OUTLIERS)
        stream.known.quads |= (stream.late & ~IN_ROUNDS) << 16 | (stream.late & IN_ROUNDS);
}

// Take what a lane knows of a slab.
DEVICE Slab known_slab(const Stream& stream, u32 number) {
    Slab slab;
    u32 lane = number - stream.first;
    slab.index = from_lane(stream.known.index, lane);
    slab.ranges = from_lane(stream.known.ranges, lane);
    KVQ_UNROLL for (int i = 0; i < 2; i++) {
        slab.first[i] = OUTLIERS ? from_lane(stream.known.first[i], lane) : 0;
    }
    slab.quads = OUTLIERS ? from_lane(stream.known.quads, lane) : 0;
    return slab;
}

// A lane's share: 16 bytes of each 512, or where it reads ahead, its first word.
DEVICE const u8* words_of(const Cache& cache, const Stream& stream, u32 index) {
    return cache.slabs + (u64)index * SLAB + (AHEAD ? 0 : 16 * stream.lane);
}

// Bring a slab to the second cache.
DEVICE void fetch_slab(const u8* words, u32 lane) {
    KVQ_UNROLL for (u32 i = 0; i < SLAB; i += 4096) {
        if (i + 4096 <= SLAB || i + 128 * lane < SLAB) fetch_line(words + i + 128 * lane);
    }
}

// Read a step's words from the slab.
template <int bits, int room>
DEVICE void load_words(const u8* step, u32 lane, u32 (&to)[room]) {
    constexpr int together = bits == 3 || bits >= 8 ? 1 : bits;
    KVQ_UNROLL for (int i = 0; i < bits; i += together) {
        u32 words[together];
        load_once<together>((const u32*)step + word_of<bits>(lane, i), words);
        KVQ_UNROLL for (int j = 0; j < together; j++) to[i + j] = words[j];
    }
}

// Read step `number`, keys first, of this slab or past its end of the next one.
DEVICE void read_ahead(Stream& stream, u32 number) {
    const u8* words = number < 2 * STEPS || !stream.next_words ? stream.words : stream.next_words;
    u32 step = number % STEPS;
    u32(&to)[MOST_BITS] = stream.early[number % (AHEAD ? AHEAD : 1)];
    if (number / STEPS % 2) {
        load_words<VALUE_BITS>(words + KEY_SLAB + step * step_bytes(VALUE_BITS), stream.lane, to);
    } else {
        load_words<KEY_BITS>(words + step * step_bytes(KEY_BITS), stream.lane, to);
    }
}

// The words of step `number`, keys first, and what comes AHEAD of it sent for. Lanes meet, for else
// the compiler begins so many steps that registers do not suffice.
template <int bits>
DEVICE void take_ahead(Stream& stream, u32 number, u32 (&words)[bits]) {
    KVQ_UNROLL for (int i = 0; i < bits; i++) words[i] =
        stream.early[number % (AHEAD ? AHEAD : 1)][i];
    read_ahead(stream, number + AHEAD);
    sync_warp();
}

// Make `number` the slab that is read, of which a lane knows.
DEVICE void turn_to_known(const Cache& cache, Stream& stream) {
    stream.slab = known_slab(stream, stream.number);
    u32 next = from_lane(stream.known.index, stream.number + 1 - stream.first);
    stream.words = words_of(cache, stream, stream.slab.index);
    stream.next_words = stream.number < stream.last ? words_of(cache, stream, next) : nullptr;
}

// Make `number`, which has gone on by one, the slab that is read.
DEVICE void turn_to(const Cache& cache, const Segment& segment, Stream& stream) {
    if (stream.number + 1 - stream.first >= 32)
        look_ahead(cache, segment, stream), end_look(stream);
    turn_to_known(cache, stream);
}

// Where outliers of keys (0) or values (1) begin, and their words.
DEVICE const u32* outliers_at(const Cache& cache, const Slab& slab, u32 side) {
    return cache.outlier_words + (u64)slab.first[side] * 4;
}
DEVICE u32 outlier_words(const Slab& slab, u32 side) {
    return (side ? slab.quads >> 16 & 0x7fff : slab.quads & 0xffff) * 4;
}

// Copy what goes with a slab beside its words: ranges of its values and the start of its outliers.
DEVICE void send_side(const Cache& cache, u32 lane, const Slab& slab, u8* to) {
    if (VALUE_BITS != 16 && lane < 16) {
        copy16(to + 16 * lane, (const u8*)cache.ranges + (u64)slab.ranges * 256 + 16 * lane);
    }
    if constexpr (OUTLIERS) {
        KVQ_UNROLL for (u32 side = 0; side < 2; side++) {
            const u32* from = outliers_at(cache, slab, side) + 4 * lane;
            if (4 * lane < smaller(outlier_words(slab, side), LISTED))
                copy16(to + 256 + side * LISTED * 4 + 16 * lane, from);
        }
    }
}

// Send chunk `number` of the slab, or past its end of the next one; both are known when compiling,
// so that a chunk is a few copies from one pointer.
DEVICE void send(const Cache& cache, const Stream& stream, u32 number) {
    bool beyond = number >= CHUNKS;
    const u8* words = beyond ? stream.next_words : stream.words;
    if (words) {
        u32 chunk = beyond ? number - CHUNKS : number;
        bool is_key = chunk < KEY_CHUNKS;
        u32 size = is_key ? KEY_CHUNK : VALUE_CHUNK;
        words += is_key ? chunk * KEY_CHUNK : KEY_SLAB + (chunk - KEY_CHUNKS) * VALUE_CHUNK;
        u8* to = stream.corner + number % DEPTH * SLOT + 16 * stream.lane;
        KVQ_UNROLL for (u32 i = 0; i < SLOT; i += 512) {
            if (i + 512 <= size || i + 16 * stream.lane < size) copy16(to + i, words + i);
        }
        if (chunk == 0) {
            Slab slab = beyond ? known_slab(stream, stream.number + 1) : stream.slab;
            send_side(cache, stream.lane, slab, side_of(stream, stream.parity + beyond));
        }
    }
    copies_sent();
}

// Wait for chunk `number` of the slab, send the one that takes the place of its predecessor.
DEVICE const u8* take(const Cache& cache, const Stream& stream, u32 number) {
    await_copies<DEPTH - 2>();
    // Of 4-bit codes a lane reads what it has copied itself; only what goes with a slab is shared.
    bool shares = number == 0 || number + DEPTH - 1 == CHUNKS;
    if (KEY_BITS != 4 || VALUE_BITS != 4 || shares) sync_warp();
    send(cache, stream, number + DEPTH - 1);
    return stream.corner + number % DEPTH * SLOT;
}

// Begin to read a warp's slabs, after `look_ahead`.
DEVICE void begin(const Cache& cache, Stream& stream) {
    end_look(stream);
    turn_to_known(cache, stream);
    sync_warp();
    if constexpr (AHEAD) {
        fetch_slab(stream.words, stream.lane);
        KVQ_UNROLL for (u32 i = 0; i < AHEAD; i++) read_ahead(stream, i);
        send_side(cache, stream.lane, stream.slab, side_of(stream, 0));
        copies_sent();
    } else {
        KVQ_UNROLL for (u32 i = 0; i < DEPTH - 1; i++) send(cache, stream, i);
    }
}

// The words of a step, of keys or of values, and what comes behind it sent for.
DEVICE void take_keys(const Cache& cache, Stream& stream, u32 step, u32 (&words)[KEY_BITS]) {
    constexpr u32 many = KEY_CHUNK / step_bytes(KEY_BITS);
    if constexpr (AHEAD) {
        take_ahead(stream, step, words);
    } else {
        if (step % many == 0 && step) stream.chunk = take(cache, stream, step / many);
        read_words<KEY_BITS>(stream.chunk + step % many * step_bytes(KEY_BITS), stream.lane, words);
    }
}
DEVICE void take_values(const Cache& cache, Stream& stream, u32 step, u32 (&words)[VALUE_BITS]) {
    constexpr u32 many = VALUE_CHUNK / step_bytes(VALUE_BITS);
    if constexpr (AHEAD) {
        take_ahead(stream, STEPS + step, words);
    } else {
        if (step % many == 0) stream.chunk = take(cache, stream, KEY_CHUNKS + step / many);
        read_words<VALUE_BITS>(stream.chunk + step % many * step_bytes(VALUE_BITS), stream.lane,
                               words);
    }
}
