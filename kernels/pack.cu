// From the states a model computed to pages: codes, ranges and outliers, the same bits as codec.py.
//
// Three kernels, so that lists of outliers get exactly the room they need: `survey_values` finds
// each token's range and which elements are outliers, `survey_keys` counts them, and, once the host
// has laid out the lists, `pack_slabs` writes everything. Each float operation is one IEEE
// operation in the order of codec.py; nothing is contracted.
//
// `states`  (batch, num_kv_heads, tokens, HEAD_DIM) half, or bfloat16 with BF16; keys after RoPE
// `turns`   (batch, tokens, HEAD_DIM / 2) float cosine and sine a pair by place, with ROTATED
// `ranges`  (pages, 128) half2: scale and offset
// `cuts`    (batch, tokens) Cuts
// `index`   (pages, num_kv_heads, 2) x {first quad, quads} of keys, then of values; SORTED lists of
//           values begin with 32 bytes, where each reading lane's words are
// `spilled` (2, room) of keys and of values, how many in `spills` (2): outliers that adding delta and
//           code does not give back, (token * batch + sequence) * channels + channel above the half
// `key_coded`, `key_moved` and those of values: from compensate.cu, with KEY_COMP and VALUE_COMP
// Macros: HEAD_DIM, KEY_BITS, VALUE_BITS, CHANNEL_LEVELS, ROTATED, OUTLIERS, BF16, WARPS; of
// `pack_slabs` also KEY_COMP and VALUE_COMP: codes are there already.
#include "pack.cuh"

// Grid: (sequence, KV head, slab). Leaves the number of key outliers in `counts` (lists, 2).
KERNEL(STEPS * 32)
survey_keys(const u16* key, const int* page_table, const float* lower, const float* upper,
            const float* offset, const float* inverse, const float* middles, const u16* order,
            const float* turns, u32* counts, u32 num_kv_heads, u32 tokens, u32 max_pages) {
    u16* staged = (u16*)shared_memory();
    u32 slabs = (tokens + 63) / 64, lane = thread_index() % 32, step = thread_index() / 32;
    Place place = find_place(block_index(), num_kv_heads, slabs, tokens, page_table, max_pages);
    KeyCode code{lower, upper, offset, inverse, middles, order,
                 turns + (u64)place.sequence * tokens * HEAD_DIM};
    stage(key, place, num_kv_heads, tokens, staged);
    sync_block();
    KeyChannel channels[2][2];
    lane_channels(code, place.head, step, lane, channels);
    u32 found = 0, total;
    KVQ_UNROLL_4 for (u32 n = 0; n < 16; n++) {
        u32 token = n / 2 * 8 + lane / 4, e = n % 2;
        if (token >= place.tokens) continue;
        Element pair[2];
        key_pair(code, channels[e], staged + token * ROW, place.slab * 64 + token,
                 8 * step + lane % 4 * 2 + e, pair);
        found += pair[0].is_outlier + pair[1].is_outlier;
    }
    lanes_before(found, lane, total);
    u32 list = (place.page * num_kv_heads + place.head) * 2 + place.slab % 2;
    if (lane == 0 && total) add_global(counts + 2 * list, total);
}

constexpr u32 LISTED = 128;  // candidates for outliers of a tail

// A warp's scratch: a token's values in order, and either candidates of both tails or bins.
struct Scratch {
    u32* words;  // 1024
    u16* keys;
};

// What a token's outliers are: the cuts, and the least and the greatest item between them. `listed`
// are the candidates of each tail in the scratch.
struct Found {
    Cuts cuts, rest;
    u32 listed[2];
};

// The `rank`-th least of a tail's candidates and the one after it; candidates of the upper tail
// are complemented.
DEVICE void rank_items(const u32* items, u32 count, u32 rank, u32 lane, u32& cut, u32& next) {
    u32 mine[LISTED / 32];
    KVQ_UNROLL for (u32 k = 0; k < LISTED / 32; k++)
        mine[k] = lane + 32 * k < count ? items[lane + 32 * k] : ~0u;
    KVQ_ROLLED for (u32 n = 0; n <= rank; n++) {
        u32 least = ~0u;
        KVQ_UNROLL for (u32 k = 0; k < LISTED / 32; k++) least = smaller(least, mine[k]);
        cut = next, next = least_of_warp(least);
        KVQ_UNROLL for (u32 k = 0; k < LISTED / 32; k++) mine[k] = mine[k] == next ? ~0u : mine[k];
    }
}

// Find a token's outliers where few elements can be some: those up to the `per_tail`-th of the
// lanes' least items, and likewise at the other end. False where there are too many candidates, or
// none is left between the cuts.
DEVICE bool few_candidates(const Scratch& scratch, u32 channels, u32 per_tail, u32 lane,
                           u32 lane_least, u32 lane_greatest, Found& found) {
    if (per_tail > 32) return false;
    u32 low_end = 0, high_end = 0;
    KVQ_ROLLED for (u32 n = 0; n < per_tail; n++) {
        low_end = least_of_warp(lane_least), high_end = greatest_of_warp(lane_greatest);
        if (lane_least == low_end) lane_least = ~0u;
        if (lane_greatest == high_end) lane_greatest = 0;
    }
    u32(&listed)[2] = found.listed;
    listed[0] = listed[1] = 0;
    KVQ_UNROLL_4 for (u32 base = 0; base < channels / 2; base += 32) {
        u32 i = smaller(base + lane, channels / 2 - 1), pair = ((const u32*)scratch.keys)[i];
        bool exists = base + lane < channels / 2;
        u32 items[2] = {item_of(pair & 0xffff, 2 * i), item_of(pair >> 16, 2 * i + 1)};
        KVQ_UNROLL for (u32 k = 0; k < 4; k++) {
            u32 tail = k / 2, item = items[k % 2];
            bool mine = exists && (tail ? item >= high_end : item <= low_end);
            u32 all = vote(mine);
            if (!all) continue;
            u32 at = listed[tail] + count_bits(all & ((1u << lane) - 1));
            if (mine && at < LISTED) scratch.words[tail * LISTED + at] = tail ? ~item : item;
            listed[tail] += count_bits(all);
        }
    }
    sync_warp();
    if (listed[0] > LISTED || listed[1] > LISTED) return false;
    if (listed[0] == per_tail || listed[1] == per_tail) return false;
    u32 low = 0, next_low = 0, high = 0, next_high = 0;
    rank_items(scratch.words, listed[0], per_tail, lane, low, next_low);
    rank_items(scratch.words + LISTED, listed[1], per_tail, lane, high, next_high);
    found.cuts = Cuts{low, ~high}, found.rest = Cuts{next_low, ~next_high};
    return next_low < ~high && ~next_high > low;
}

// The cuts of any token, by two histograms a tail: of the upper bytes, then of the lower bytes
// within a bin, and then a count of channels among equals.
DEVICE Cuts rank_all(const Scratch& scratch, u32 channels, u32 per_tail, u32 lane) {
    u32* bins = scratch.words;
    const u16* keys = scratch.keys;
    sync_warp();
    KVQ_UNROLL_4 for (u32 i = lane; i < 1024; i += 32) bins[i] = 0;
    sync_warp();
    for (u32 i = lane; i < channels; i += 32) add_shared((int*)bins + (keys[i] >> 8), 1);
    sync_warp();
    u32 low_left = per_tail, high_left = per_tail;
    u32 low_bin = rank_bin<false>(bins, lane, low_left);
    u32 high_bin = rank_bin<true>(bins, lane, high_left);
    for (u32 i = lane; i < channels; i += 32) {
        if (keys[i] >> 8 == low_bin) add_shared((int*)bins + 512 + (keys[i] & 255), 1);
        if (keys[i] >> 8 == high_bin) add_shared((int*)bins + 768 + (keys[i] & 255), 1);
    }
    sync_warp();
    u32 low = low_bin << 8 | rank_bin<false>(bins + 512, lane, low_left);
    u32 high = high_bin << 8 | rank_bin<true>(bins + 768, lane, high_left);
    return Cuts{item_of(low, tie_channel<false>(keys, channels, lane, low, low_left)),
                item_of(high, tie_channel<true>(keys, channels, lane, high, high_left))};
}

// Grid: tokens of all sequences, a warp each. The `per_tail` least and greatest elements of a token
// over all KV heads are outliers, lower channels first among the least that are equal, higher ones
// among the greatest; the range is that of the rest.
KERNEL(WARPS * 32)
survey_values(const u16* value, const int* page_table, u32* ranges, Cuts* cuts, u32* counts,
              u32 batch, u32 num_kv_heads, u32 tokens, u32 max_pages, u32 per_tail) {
    u32 lane = thread_index() % 32, warp = thread_index() / 32, channels = num_kv_heads * HEAD_DIM;
    u32 number = block_index() * WARPS + warp, sequence = number / tokens, token = number % tokens;
    if (number >= batch * tokens) return;
    u32* words = (u32*)(shared_memory() + warp * (channels * 2 + 4096));
    Scratch scratch{words, (u16*)(words + 1024)};
    u32 least = ~0u, greatest = 0;  // of this lane
    const u16* row = value + ((u64)sequence * num_kv_heads * tokens + token) * HEAD_DIM;
    KVQ_UNROLL_4 for (u32 i = lane; i < channels / 2; i += 32) {
        u32 head = 2 * i / HEAD_DIM, at = 2 * i % HEAD_DIM;
        u32 pair = *(const u32*)(row + (u64)head * tokens * HEAD_DIM + at);
        u32 low = order_key((u16)pair), high = order_key((u16)(pair >> 16));
        ((u32*)scratch.keys)[i] = low | high << 16;
        u32 first = item_of(low, 2 * i), second = item_of(high, 2 * i + 1);
        least = smaller(least, smaller(first, second));
        greatest = larger(greatest, larger(first, second));
    }
    sync_warp();
    u32 page = page_table[sequence * max_pages + token / 128];
    u32* count = counts + ((u64)page * num_kv_heads * 2 + token / 64 % 2) * 2 + 1;
    Found found{NO_CUTS, Cuts{least_of_warp(least), greatest_of_warp(greatest)}, {0, 0}};
    bool few = per_tail &&
               few_candidates(scratch, channels, per_tail, lane, least, greatest, found);
    if (few) {
        KVQ_UNROLL for (u32 tail = 0; tail < 2; tail++) {
            for (u32 i = lane; i < found.listed[tail]; i += 32) {
                u32 item = scratch.words[tail * LISTED + i];
                if (item <= (tail ? ~found.cuts.high : found.cuts.low))
                    add_global(count + ((tail ? ~item : item) & 0xffff) / HEAD_DIM * 4, 1);
            }
        }
    } else if (per_tail) {
        found.cuts = rank_all(scratch, channels, per_tail, lane);
        u32 low = ~0u, high = 0;
        for (u32 i = lane; i < channels; i += 32) {
            u32 item = item_of(scratch.keys[i], i);
            if (is_cut(found.cuts, item)) {
                add_global(count + i / HEAD_DIM * 4, 1);
            } else {
                low = smaller(low, item), high = larger(high, item);
            }
        }
        found.rest = Cuts{least_of_warp(low), greatest_of_warp(high)};
    }
    if (lane != 0) return;
    ranges[page * 128 + token % 128] = range_of(found.rest.low >> 16, found.rest.high >> 16);
    cuts[number] = found.cuts;
}

// Where outliers go that their words do not give back: this side's, and what places count by.
struct Spill {
    u32* count;
    u64* places;
    u64 per_token, first;  // elements a token, and those before the slab's first
};

DEVICE void keep_spilled(const Spill& spill, float state, float dense, u32 word, u32 token,
                         u32 channel) {
    u16 stored = float_to_half(clamp_half(state));
    u16 again = float_to_half(clamp_half(add_exact(dense, h2_high(word))));
    if (again == stored) return;
    u64 place = spill.first + token * spill.per_token + channel;
    spill.places[add_global(spill.count, 1)] = place << 16 | stored;
}

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

// Grid: (sequence, KV head, slab). A warp writes one step of the keys and one of the values.
KERNEL(STEPS * 32)
pack_slabs(const u16* key, const u16* value, const int* page_table, const float* lower,
           const float* upper, const float* offset, const float* inverse, const float* key_middles,
           const float* value_middles, const u16* order, const float* turns, const u16* levels,
           const u16* key_levels, const u32* ranges, const Cuts* cuts, const u32* index, u8* slabs,
           u32* outlier_words, u32* spills, u64* spilled, const u8* key_coded, const u16* key_moved,
           const u8* value_coded, const u16* value_moved, u32 room, u32 batch, u32 num_kv_heads,
           u32 tokens, u32 max_pages) {
    u16* staged = (u16*)shared_memory();
    u16* staged_value = staged + 64 * ROW;
    float* middles = (float*)(staged_value + 64 * ROW);  // of keys, of values
    ValueRow* rows = (ValueRow*)(middles + 32);
    u32* counts = (u32*)(rows + 64);
    u32* cursors = counts + STEPS;  // where each lane's outliers of values go
    for (u32 i = thread_index(); i < 32; i += STEPS * 32) {
        if (!CHANNEL_LEVELS && i < LEVELS - 1) middles[i] = key_middles[i];
        if (i >= 16 && i < 15 + (1u << VALUE_BITS)) middles[i] = value_middles[i - 16];
        cursors[i] = 0;
    }
    u32 many = (tokens + 63) / 64, lane = thread_index() % 32, step = thread_index() / 32;
    Place place = find_place(block_index(), num_kv_heads, many, tokens, page_table, max_pages);
    KeyCode code{lower, upper, offset, inverse, CHANNEL_LEVELS ? key_middles : middles,
                 order, turns + (u64)place.sequence * tokens * HEAD_DIM};
    Decode decode{levels, key_levels, (const u32*)key_levels};
    if constexpr (!KEY_COMP) stage(key, place, num_kv_heads, tokens, staged);
    if constexpr (!VALUE_COMP) stage(value, place, num_kv_heads, tokens, staged_value);
    u64 row = ((u64)place.sequence * num_kv_heads + place.head) * tokens + place.slab * 64;
    Given keys{key_coded + row * HEAD_DIM, key_moved + row * HEAD_DIM};
    Given values{value_coded + row * HEAD_DIM, value_moved + row * HEAD_DIM};
    u32 head_channel = place.head * HEAD_DIM;
    auto find_keys = [&](const KeyChannel(&pair)[2], u32 token, u32 at, Element(&found)[2]) {
        if constexpr (KEY_COMP) {
            found[0] = given_element(keys, token, pair[0].channel);
            found[1] = given_element(keys, token, pair[1].channel);
        } else {
            key_pair(code, pair, staged + token * ROW, place.slab * 64 + token, at, found);
        }
    };
    auto find_value = [&](u32 token, u32 at) {
        if constexpr (VALUE_COMP) return given_element(values, token, at);
        return value_element(middles + 16, staged_value[token * ROW + at], rows[token],
                             head_channel + at);
    };
    u32 parity = place.slab % 2;
    for (u32 i = thread_index(); i < place.tokens; i += STEPS * 32) {
        u32 range = ranges[place.page * 128 + parity * 64 + i];
        rows[i] = ValueRow{range, inverse_scale(range),
                           cuts[(u64)place.sequence * tokens + place.slab * 64 + i]};
    }
    sync_block();
    u64 list = ((u64)place.page * num_kv_heads + place.head) * 2 + parity;
    u8* to = slabs + list * STEPS * (step_bytes(KEY_BITS) + step_bytes(VALUE_BITS));
    u32 key_flags = 0, value_flags = 0, tiles[4] = {0, 0, 0, 0};
    KeyChannel channels[2][2];
    lane_channels(code, place.head, step, lane, channels);
    KVQ_ROLLED for (u32 t = 0; t < 4; t++) {
        u32 word = 0;
        KVQ_UNROLL for (u32 n = 0; n < 4; n++) {
            u32 e = n % 2, i = n / 2 * 2 + e, token = t * 16 + n / 2 * 8 + lane / 4;
            if (token >= place.tokens) continue;
            Element found[2];
            find_keys(channels[e], token, 8 * step + lane % 4 * 2 + e, found);
            word |= found[0].code << 4 * i | found[1].code << 4 * (i + 4);
            key_flags |= (u32)found[0].is_outlier << (8 * t + i);
            key_flags |= (u32)found[1].is_outlier << (8 * t + i + 4);
        }
        KVQ_UNROLL for (int k = 0; k < 3; k++) tiles[k] = tiles[k + 1];
        tiles[3] = word;
    }
    store_codes<KEY_BITS>(to + step * step_bytes(KEY_BITS), lane, tiles);
    KVQ_ROLLED for (u32 t = 0; t < 4; t++) {
        u32 word = 0;
        KVQ_UNROLL for (u32 n = 0; n < 4; n++) {
            u32 e = n % 2, i = n / 2 * 4 + e, token = t * 16 + n / 2 * 8 + lane % 4 * 2 + e;
            if (token >= place.tokens) continue;
            KVQ_UNROLL for (u32 upper = 0; upper < 2; upper++) {
                Element found = find_value(token, 16 * step + 8 * upper + lane / 4);
                word |= found.code << 4 * (i + 2 * upper);
                value_flags |= (u32)found.is_outlier << (8 * t + i + 2 * upper);
            }
        }
        KVQ_UNROLL for (int k = 0; k < 3; k++) tiles[k] = tiles[k + 1];
        tiles[3] = word;
    }
    store_codes<VALUE_BITS>(to + STEPS * step_bytes(KEY_BITS) + step * step_bytes(VALUE_BITS), lane,
                            tiles);
    if constexpr (!OUTLIERS) return;

    Spill spill{spills, spilled, (u64)batch * num_kv_heads * HEAD_DIM,
                ((u64)place.slab * 64 * batch + place.sequence) * num_kv_heads * HEAD_DIM +
                    head_channel};
    const u32* where = index + 4 * list;
    u32* words = outlier_words + (u64)where[0] * 4;
    u32 total, before = lanes_before(count_bits(key_flags), lane, total);
    if (lane == 0) counts[step] = total;
    // A lane of the reader takes channels that are equal modulo 32.
    u32 owner = step % 2 * 16 + lane / 4;
    add_shared((int*)cursors + owner, count_bits(value_flags & 0x33333333u));
    add_shared((int*)cursors + owner + 8, count_bits(value_flags & 0xccccccccu));
    sync_block();
    for (u32 s = 0; s < step; s++) before += counts[s];
    KVQ_ROLLED for (u32 left = key_flags; left; left &= left - 1, before++) {
        u32 token, at, n = lowest_bit(left);
        key_place(n, step, lane, token, at);
        Element found[2];
        u32 e = n % 2, partner = n / 4 % 2;
        KeyChannel pair[2] = {e ? channels[1][0] : channels[0][0],
                              e ? channels[1][1] : channels[0][1]};
        find_keys(pair, token, 8 * step + lane % 4 * 2 + e, found);
        float state = partner ? found[1].state : found[0].state;
        float dense = key_dense(decode, place.head, at, partner ? found[1].code : found[0].code);
        words[before] = delta_word(state, dense, key_word(token, at));
        u32 channel = partner ? pair[1].channel : pair[0].channel;
        keep_spilled(spill, state, dense, words[before], token, channel);
    }
    if (step == STEPS - 1 && lane == 31) {
        for (; before < where[1] * 4; before++) words[before] = 0;
    }
    bool sorted = where[3] & SORTED;
    u32 list_room = (where[3] & ~SORTED) * 4;
    words = outlier_words + (u64)where[2] * 4;
    spill.count++, spill.places += room;
    if (step == 0) {
        u32 start = lanes_before(cursors[lane], lane, total) + (sorted ? STARTS : 0);
        sync_warp();
        cursors[lane] = start;
        sync_warp();
        if (sorted && lane < STARTS) {
            u32 word = 0;
            KVQ_UNROLL for (u32 k = 0; k < 4; k++) word |= cursors[4 * lane + k] << 8 * k;
            words[lane] = word;
        }
        u32 end = total + (sorted ? STARTS : 0);
        if (lane < list_room - end && list_room) words[end + lane] = 0;
    }
    sync_block();
    KVQ_ROLLED for (u32 left = value_flags; left; left &= left - 1) {
        u32 token, at, n = lowest_bit(left);
        value_place(n, step, lane, token, at);
        Element found = find_value(token, at);
        u32 slot = take_shared(cursors + at % 32, 1);
        float dense = value_dense(decode, rows[token].range, found.code);
        words[slot] = delta_word(found.state, dense, at << 8 | token << 2);
        keep_spilled(spill, found.state, dense, words[slot], token, at);
    }
}
