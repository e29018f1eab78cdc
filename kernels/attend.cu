// Attention of one query token straight from the packed cache.
//
// Grid: any number of blocks of WARPS warps. The slabs of a (sequence, KV head) and its exact tokens
// in units of 64 are a segment. Each segment is cut into equal parts, one a block, where that leaves
// no block much more than its share; else all segments are laid end to end and cut into equal
// ranges. Within a block each warp takes an equal part of the range, keeps DEPTH - 1 chunks of codes
// under way and ends with its own softmax; the block joins its warps, and the last block to arrive
// joins the blocks of a segment. Nothing depends on the host: lengths lie on the device, counters
// return to 0.
//
// `query`, `output`  (batch, num_heads, HEAD_DIM) half, or bfloat16 with BF16
// `slabs`            pages of 128 tokens, in each KV heads, two slabs each: keys, then values
// `ranges`           (pages, 128) half2: scale and offset of a value token
// `outlier_index`    (pages, num_kv_heads, 2) x {first quad of words, quads} of keys, then values
// `outlier_words`    what the index points to
// `page_table`       (batch, max_pages) page of each 128 tokens
// `state`            (batch, 8): packed tokens, sinks, window tokens, position of the first packed
//                    token, first packed token that is seen; the rest is spare
// `key_table`        scales and offsets (num_kv_heads, STEPS, 4) x 4 half2, or with CHANNEL_LEVELS
//                    levels (num_kv_heads, HEAD_DIM, 2^bits)
// `levels`           (2, 16) half: levels of keys, of values
// `angles`           half2 cosines and sines of positions 0 to 127 in fragment order
// `frequencies`      (HEAD_DIM / 2) turns per token, times 2^64
// `order`            (HEAD_DIM) channel of a head that stands at each place of a packed key
// exact tokens       (batch, num_kv_heads, capacity, HEAD_DIM) keys after RoPE, and values
// `partials`         (blocks + segments, GROUP, HEAD_DIM + 2) float; `counters` one a segment, zero
// `log_sums`         (batch, num_heads) float, written: log of the sum of exp(score); or null
#include "attend_slab.cuh"

constexpr u32 THREADS = WARPS * 32;
constexpr u32 SLAB = KEY_SLAB + VALUE_SLAB;
constexpr u32 KEY_CHUNK = step_bytes(KEY_BITS) * (KEY_BITS == 16 ? 1 : 2);
constexpr u32 VALUE_CHUNK = step_bytes(VALUE_BITS) * (VALUE_BITS == 16 ? 1 : 2);
constexpr u32 KEY_CHUNKS = KEY_SLAB / KEY_CHUNK, CHUNKS = KEY_CHUNKS + VALUE_SLAB / VALUE_CHUNK;
static_assert(CHUNKS % DEPTH == 0 && DEPTH >= 2,
              "a slab's chunks fill the ring a whole number of times");
constexpr u32 SLOT = KEY_CHUNK > VALUE_CHUNK ? KEY_CHUNK : VALUE_CHUNK;
constexpr u32 LISTED = 112;  // outliers of a slab and side that are copied ahead
constexpr u32 SIDE = 256 + (OUTLIERS ? 2 * LISTED * 4 : 0);
// What goes with the next slab arrives while values are read, when this slab's is used up; else two
// buffers take turns.
constexpr u32 SIDES = AHEAD || DEPTH - 1 <= CHUNKS - KEY_CHUNKS ? 1 : 2;
constexpr u32 PARTIAL = HEAD_DIM + 2;
// Shared memory: tables, the query, what warps hand to each other, then each warp's corner.
constexpr u32 HEAD_AT = LUT_BYTES + ANGLE_BYTES, QUERY_AT = HEAD_AT + HEAD_TABLE;
constexpr u32 JOIN_AT = QUERY_AT + GROUP * HEAD_DIM * 4;
constexpr u32 FREQUENCIES_AT = (JOIN_AT + WARPS * GROUP * 12 + 15) / 16 * 16;
constexpr u32 ORDER_AT = FREQUENCIES_AT + HEAD_DIM * 4, CORNER_AT = ORDER_AT + HEAD_DIM * 2;
constexpr u32 CORNER_SIDE = AHEAD ? 0 : DEPTH * SLOT, CORNER_QUERY = CORNER_SIDE + SIDES * SIDE,
              CORNER_SPARSE = CORNER_QUERY + STEPS * QUERY_STEP;
constexpr u32 CORNER_MIX = CORNER_SPARSE + (OUTLIERS ? SPARSE_ROW * GROUP * 4 : 0);
constexpr u32 CORNER = CORNER_MIX + HEAD_DIM * GROUP * 4;
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

// A slab's number among all, its half page's number among all, and its lists of outliers: first quad
// and number of quads of the keys', then of the values'.
struct Slab {
    u32 index, ranges, lists[4];
};

// Units of a KV head of a sequence; none past the last sequence.
DEVICE u32 segment_sizes(const Cache& cache, u32 sequence, Segment& segment) {
    if (sequence >= cache.batch) return 0;
    const int* state = cache.state + 8 * sequence;
    segment.first_slab = (u32)state[4] / 64;
    segment.slabs = ((u32)state[0] + 63) / 64 - segment.first_slab;
    segment.sink_units = ((u32)state[1] + 63) / 64;
    return segment.slabs + segment.sink_units + ((u32)state[2] + 63) / 64;
}

// Segments of a KV head, and of a sequence, which follow each other.
DEVICE u32 segments_of_head(const Cache& cache) {
    return (cache.group_heads + GROUP - 1) / GROUP;
}
DEVICE u32 segments_of(const Cache& cache) {
    return cache.num_kv_heads * segments_of_head(cache);
}

// How the work is cut: whether every block has units of one segment only, or `share` units of all
// there are, the first `longer` blocks one more.
struct Cut {
    bool whole;
    u32 share, longer;
};

DEVICE u32 parts_of(u32 units, u32 share) {
    return units ? larger(units / share, 1) : 0;
}

// Plan the cut for at most `blocks` blocks, a lane a sequence; returns how many have work.
DEVICE u32 plan(const Cache& cache, u32 blocks, u32 lane, Cut& cut) {
    u32 many = segments_of(cache), total = 0, used = 0, longest = 0;
    Segment segment;
    KVQ_ROLLED for (u32 first = 0; first < cache.batch; first += 32)
        total += sum_of_warp(segment_sizes(cache, first + lane, segment));
    total *= many;
    cut.share = larger((total + blocks - 1) / blocks, 1), cut.longer = 0;
    KVQ_ROLLED for (u32 first = 0; first < cache.batch; first += 32) {
        u32 units = segment_sizes(cache, first + lane, segment), parts = parts_of(units, cut.share);
        used += sum_of_warp(parts);
        longest = larger(longest, parts ? (units + parts - 1) / parts : 0);
    }
    used *= many, longest = greatest_of_warp(longest);
    cut.whole = used <= blocks && longest <= cut.share + WARPS;
    if (cut.whole) return used;
    blocks = smaller(blocks, total);
    cut.share = total / blocks, cut.longer = total % blocks;
    return blocks;
}

// The first unit of a block, and the block that has a unit, where blocks have units of all segments.
DEVICE u32 unit_of(const Cut& cut, u32 block) {
    return block * cut.share + smaller(block, cut.longer);
}
DEVICE u32 block_of(const Cut& cut, u32 unit) {
    u32 by_longer = unit / (cut.share + 1);
    return by_longer < cut.longer ? by_longer : (unit - cut.longer) / cut.share;
}

// The segment to which a unit belongs, or where every block has but one, to which a block belongs.
DEVICE Segment find_segment(const Cache& cache, const Cut& cut, u32 at, u32 lane) {
    Segment segment;
    u32 many = segments_of(cache), passed = 0, first = 0, size, owner;
    for (;; first += 32) {  // a lane a sequence
        segment.units = segment_sizes(cache, first + lane, segment);
        size = cut.whole ? parts_of(segment.units, cut.share) : segment.units;
        u32 until = size * many;
        KVQ_UNROLL for (u32 d = 1; d < 32; d *= 2) {
            u32 below = sum_below(until, d);
            if (lane >= d) until += below;
        }
        u32 found = vote(at - passed < until);
        if (found || first + 32 >= cache.batch) {
            owner = found ? lowest_bit(found) : 0;
            passed += from_lane(until, owner) - from_lane(size, owner) * many;
            break;
        }
        passed += from_lane(until, 31);
    }
    segment.sequence = first + owner;
    segment.units = from_lane(segment.units, owner);
    segment.slabs = from_lane(segment.slabs, owner);
    segment.first_slab = from_lane(segment.first_slab, owner);
    segment.sink_units = from_lane(segment.sink_units, owner);
    size = larger(from_lane(size, owner), 1);
    u32 within = (at - passed) / size, groups = segments_of_head(cache), group = 0;
    segment.kv_head = within;
    if (groups > 1) segment.kv_head = within / groups, group = within % groups;
    segment.first_head = segment.kv_head * cache.group_heads + group * GROUP;
    segment.heads = smaller(GROUP, cache.group_heads - group * GROUP);
    segment.index = segment.sequence * many + within;
    segment.start = passed + within * size;
    if (cut.whole) {
        segment.first_block = segment.start, segment.blocks = size;
    } else {
        segment.first_block = block_of(cut, segment.start);
        segment.blocks = block_of(cut, segment.start + segment.units - 1) + 1 - segment.first_block;
    }
    return segment;
}

// What a warp reads: slabs `number` to `last` of a segment, chunk by chunk through its ring.
struct Stream {
    u8* corner;
    u32 lane, number, last;
    u32 parity;  // which of the two side buffers this slab has
    u32 first;   // lane i knows slab first + i
    Slab known;
    Slab slab;                      // the slab that is read
    const u8 *words, *next_words;  // this lane's share of it, and of the next one; null past the last
    const u8* chunk;                        // of the ring
    u32 keys[AHEAD ? AHEAD : 1][KEY_BITS];  // of the next steps, where a warp reads ahead
    u32 values[AHEAD ? AHEAD : 1][VALUE_BITS];
};

DEVICE u8* side_of(const Stream& stream, u32 which) {
    return stream.corner + CORNER_SIDE + which % SIDES * SIDE;
}

// Let every lane find out about one of the next 32 slabs.
DEVICE void look_ahead(const Cache& cache, const Segment& segment, Stream& stream) {
    stream.first = stream.number;
    u32 number = smaller(stream.number + stream.lane, stream.last);
    u32 page = cache.page_table[segment.sequence * cache.max_pages + number / 2];
    Slab& slab = stream.known;
    slab.index = (page * cache.num_kv_heads + segment.kv_head) * 2 + number % 2;
    slab.ranges = page * 2 + number % 2;
    const u32* lists = cache.outlier_index + 4 * (u64)slab.index;
    KVQ_UNROLL for (int i = 0; i < 4; i++) slab.lists[i] = OUTLIERS ? lists[i] : 0;
}

// Take what a lane knows of a slab.
DEVICE Slab known_slab(const Stream& stream, u32 number) {
    Slab slab;
    u32 lane = number - stream.first;
    slab.index = from_lane(stream.known.index, lane);
    slab.ranges = from_lane(stream.known.ranges, lane);
    KVQ_UNROLL for (int i = 0; i < 4; i++) {
        slab.lists[i] = OUTLIERS ? from_lane(stream.known.lists[i], lane) : 0;
    }
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
template <int bits>
DEVICE void load_words(const u8* step, u32 lane, u32 (&words)[bits]) {
    if constexpr (bits == 3 || bits == 16) {
        KVQ_UNROLL for (int i = 0; i < bits; i++) {
            u32 word[1];
            load_once<1>((const u32*)step + word_of<bits>(lane, i), word);
            words[i] = word[0];
        }
    } else {
        load_once<bits>((const u32*)step + bits * lane, words);
    }
}

// Read step `number`, keys first, of this slab or past its end of the next one.
DEVICE void read_ahead(Stream& stream, u32 number) {
    constexpr u32 slot = AHEAD ? AHEAD : 1;
    const u8* words = number < 2 * STEPS || !stream.next_words ? stream.words : stream.next_words;
    u32 step = number % STEPS;
    if (number / STEPS % 2) {
        load_words<VALUE_BITS>(words + KEY_SLAB + step * step_bytes(VALUE_BITS), stream.lane,
                               stream.values[step % slot]);
    } else {
        load_words<KEY_BITS>(words + step * step_bytes(KEY_BITS), stream.lane,
                             stream.keys[step % slot]);
    }
}

// Make `number` the slab that is read.
DEVICE void turn_to(const Cache& cache, const Segment& segment, Stream& stream) {
    if (stream.number + 1 - stream.first >= 32) look_ahead(cache, segment, stream);
    stream.slab = known_slab(stream, stream.number);
    u32 next = from_lane(stream.known.index, stream.number + 1 - stream.first);
    stream.words = words_of(cache, stream, stream.slab.index);
    stream.next_words = stream.number < stream.last ? words_of(cache, stream, next) : nullptr;
}

// Where outliers of keys (0) or values (1) begin, and their words.
DEVICE const u32* outliers_at(const Cache& cache, const Slab& slab, u32 side) {
    return cache.outlier_words + (u64)slab.lists[2 * side] * 4;
}
DEVICE u32 outlier_words(const Slab& slab, u32 side) {
    return (slab.lists[2 * side + 1] & ~IN_ROUNDS) * 4;
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
    sync_warp();
    send(cache, stream, number + DEPTH - 1);
    return stream.corner + number % DEPTH * SLOT;
}

// Begin to read slabs [first, stop) of a segment.
DEVICE void begin(const Cache& cache, const Segment& segment, Stream& stream, u32 first, u32 stop) {
    stream.number = segment.first_slab + first, stream.last = segment.first_slab + stop - 1;
    if (first >= stop) {
        await_copies<0>();  // nothing of its own is under way
        return;
    }
    look_ahead(cache, segment, stream);
    turn_to(cache, segment, stream);
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
        KVQ_UNROLL for (int i = 0; i < KEY_BITS; i++) words[i] = stream.keys[step % AHEAD][i];
        read_ahead(stream, step + AHEAD);
    } else {
        if (step % many == 0 && step) stream.chunk = take(cache, stream, step / many);
        read_words<KEY_BITS>(stream.chunk + step % many * step_bytes(KEY_BITS), stream.lane, words);
    }
}
DEVICE void take_values(const Cache& cache, Stream& stream, u32 step, u32 (&words)[VALUE_BITS]) {
    constexpr u32 many = VALUE_CHUNK / step_bytes(VALUE_BITS);
    if constexpr (AHEAD) {
        KVQ_UNROLL for (int i = 0; i < VALUE_BITS; i++) words[i] = stream.values[step % AHEAD][i];
        read_ahead(stream, STEPS + step + AHEAD);
    } else {
        if (step % many == 0) stream.chunk = take(cache, stream, KEY_CHUNKS + step / many);
        read_words<VALUE_BITS>(stream.chunk + step % many * step_bytes(VALUE_BITS), stream.lane,
                               words);
    }
}

// The list of a slab's outliers: in shared memory, or the first LISTED there and the rest where they
// are.
struct Near {
    const u32* near;
    DEVICE u32 operator()(u32 i) const {
        return near[i];
    }
};
struct Far {
    const u32 *near, *all;
    DEVICE u32 operator()(u32 i) const {
        return i < LISTED ? near[i] : all[i];
    }
};

// Write the query as fragments, turned back by `position` tokens, so that keys need turning by
// their place in the page only.
DEVICE void turn_query(const Warp& warp, const float* query, int position) {
    sync_warp();
    KVQ_UNROLL for (u32 k = 0; k < HEAD_DIM / 2; k += 32) {
        u32 i = warp.lane + k;
        if (HEAD_DIM % 64 && i >= HEAD_DIM / 2) break;
        float sine = 0.0f, cosine = 1.0f;
        if (ROTATED && position) {
            u64 phase = warp.frequencies[i] * (u64)(long long)position;
            sine_cosine((float)(int)(u32)(phase >> 32) * 2.3283064365386963e-10f, sine, cosine);
        }
        KVQ_UNROLL for (int h = 0; h < GROUP; h++) {
            float low = query[h * HEAD_DIM + i], high = query[h * HEAD_DIM + i + HEAD_DIM / 2];
            u32* at = (u32*)(warp.query + query_at(i / 8, h, i % 8 / 2)) + i % 2;
            *at = h2_from(low * cosine + high * sine, high * cosine - low * sine);
        }
    }
    sync_warp();
}

DEVICE void cap_scores(float (&score)[4][4], float cap) {
    if constexpr (SOFTCAP) {
        KVQ_UNROLL for (int i = 0; i < 16; i++) {
            float& s = score[i / 4][i % 4];  // cap tanh(s / cap), in base-2 units throughout
            s = cap * (1.0f - 2.0f * inverse_fast(1.0f + exp2_fast(s * 2.8853901f / cap)));
        }
    }
}

DEVICE void packed_slab(Warp& warp, const Cache& cache, Stream& stream, u32 first, u32 last,
                        float cap) {
    const Slab& slab = stream.slab;
    u32 number = stream.number;
    const u8* side = side_of(stream, stream.parity);
    float score[4][4] = {};
    if constexpr (AHEAD) {
        await_copies<0>();
        sync_warp();
        if (stream.next_words) fetch_slab(stream.next_words, stream.lane);
    } else {
        stream.chunk = take(cache, stream, 0);
    }
    const u32* listed = (const u32*)(side + 256);
    if constexpr (OUTLIERS) {
        clear_sparse(warp);
        sync_warp();
        u32 count = outlier_words(slab, 0);
        if (count <= LISTED) {
            key_outliers(warp, Near{listed}, count, number % 2 * 4);
        } else {
            key_outliers(warp, Far{listed, outliers_at(cache, slab, 0)}, count, number % 2 * 4);
        }
        sync_warp();
        sparse_scores(warp, score);
    }
    KVQ_UNROLL for (u32 step = 0; step < STEPS; step++) {
        u32 words[KEY_BITS];
        take_keys(cache, stream, step, words);
        key_step(warp, words, step, number % 2 * 4, score);
    }
    cap_scores(score, cap);
    u32 weights[4][2];
    if constexpr (OUTLIERS) sync_warp();  // scores are read, weights take their place
    soften(warp, score, VALUE_BITS == 16 ? nullptr : (const u32*)side, first, last, weights);
    if constexpr (OUTLIERS) {
        sync_warp();
        u32 count = outlier_words(slab, 1);
        bool in_rounds = slab.lists[3] & IN_ROUNDS;
        if (count <= LISTED) {
            value_outliers(warp, Near{listed + LISTED}, count, in_rounds);
        } else {
            Far list{listed + LISTED, outliers_at(cache, slab, 1)};
            value_outliers(warp, list, count, in_rounds);
        }
    }
    if constexpr (AHEAD) {
        sync_warp();  // what went with this slab is used up
        if (stream.next_words)
            send_side(cache, stream.lane, known_slab(stream, number + 1), side_of(stream, 0));
        copies_sent();
    }
    KVQ_UNROLL for (u32 m = 0; m < STEPS; m++) {
        u32 words[VALUE_BITS];
        take_values(cache, stream, m, words);
        value_step(warp, words, weights, warp.out[m]);
    }
}

// Up to 64 tokens that are stored exactly: fragments gathered from rows.
DEVICE void exact_unit(Warp& warp, const Cache& cache, const Segment& segment, const Exact& exact,
                       u32 first, u32 tokens, float cap) {
    u64 base =
        ((u64)segment.sequence * cache.num_kv_heads + segment.kv_head) * exact.capacity + first;
    const u16 *key = exact.key + base * HEAD_DIM, *value = exact.value + base * HEAD_DIM;
    auto load = [&](const u16* states, u32 token, u32 channel) {
        return token < tokens ? state_value(states[(u64)token * HEAD_DIM + channel]) : 0.0f;
    };
    // Register arrays are turned by one tile a round, so that the loops over tiles stay short code.
    float score[4][4] = {};
    KVQ_ROLLED for (u32 t = 0; t < 4; t++) {
        float tile[4] = {};
        if (16 * t < tokens) {
            KVQ_UNROLL_4 for (u32 step = 0; step < STEPS; step++) {
                u32 b0, b1, k[4];
                query_fragment(warp, step, b0, b1);
                KVQ_UNROLL for (u32 a = 0; a < 4; a++) {
                    const u16* channel =
                        warp.order + 8 * step + 2 * warp.column + a / 2 * (HEAD_DIM / 2);
                    u32 token = 16 * t + a % 2 * 8 + warp.row;
                    k[a] = h2_from(load(key, token, channel[0]), load(key, token, channel[1]));
                }
                mma(tile, k, b0, b1);
            }
        }
        KVQ_UNROLL for (int i = 0; i < 16; i++) {
            score[i / 4][i % 4] = i < 12 ? score[(i + 4) / 4 % 4][i % 4] : tile[i % 4];
        }
    }
    cap_scores(score, cap);
    u32 weights[4][2];
    soften(warp, score, nullptr, 0, tokens, weights);
    KVQ_ROLLED for (u32 t = 0; 16 * t < tokens; t++) {
        KVQ_UNROLL for (u32 m = 0; m < STEPS; m++) {
            u32 v[4];
            KVQ_UNROLL for (u32 a = 0; a < 4; a++) {
                u32 token = 16 * t + a / 2 * 8 + 2 * warp.column,
                    channel = 16 * m + a % 2 * 8 + warp.row;
                v[a] = h2_from(load(value, token, channel), load(value, token + 1, channel));
            }
            mma(warp.out[m], v, weights[0][0], weights[0][1]);
        }
        KVQ_UNROLL for (int i = 0; i < 6; i++) weights[i / 2][i % 2] = weights[i / 2 + 1][i % 2];
    }
}

#include "attend_block.cuh"
