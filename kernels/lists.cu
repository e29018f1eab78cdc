// The last of the kernels that pack a prompt: lists of outliers, from the flags of pack.cu, where
// the host has laid them out. What the arguments are, pack.cu says.
#include "pack_given.cuh"

// Where outliers go that their words do not give back, and what places count by.
struct Spill {
    u32* counts;  // of keys, of values
    u64* places;
    u64 per_token, first;  // elements a token, and those before the slab's first
};

DEVICE void keep_spilled(const Spill& spill, u32 side, u32 room, float state, float dense, u32 word,
                         u32 token, u32 channel) {
    u16 stored = float_to_half(clamp_half(state));
    u16 again = float_to_half(clamp_half(add_exact(dense, h2_high(word))));
    if (again == stored) return;
    u64 place = spill.first + token * spill.per_token + channel;
    u64 at = (u64)side * room + add_global(spill.counts + side, 1);
    spill.places[at] = place << 16 | stored;
}

// From the outliers of each channel to those of the channels before it, and the rounds of the list:
// their number, size, how many have one more, and the outliers of all.
DEVICE void deal_rounds(u32* channels, u32* rounds, u32 lane) {
    u32 before = 0, most = 1, total;
    KVQ_UNROLL for (u32 base = 0; base < HEAD_DIM; base += 32) {
        u32 count = channels[base + lane], at = lanes_before(count, lane, total);
        most = larger(most, count);
        channels[base + lane] = before + at;
        before += total;
    }
    most = larger(greatest_of_warp(most), (before + 31) / 32);
    if (lane == 0) {
        rounds[0] = most, rounds[1] = before / most, rounds[2] = before % most, rounds[3] = before;
    }
}

constexpr u32 ITEMS = 1024;  // outliers of a slab at a time

// Write down where outliers are that a lane found flagged in a step, from `at` on.
DEVICE void write_marks(u16* marks, u32 at, u32 flags, u32 step, u32 lane) {
    KVQ_ROLLED for (; flags; flags &= flags - 1, at++) {
        if (at < ITEMS) marks[at] = (u16)(lowest_bit(flags) << 10 | step * 32 | lane);
    }
}

// Grid: (sequence, KV head, slab). Write the lists of outliers where `index` says, from the flags:
// these are gathered, a warp those of two steps, so that an outlier each is a thread's work, those
// of values behind whole warps of keys.
KERNEL(STEPS * 16)
write_lists(const u16* key, const u16* value, const int* page_table, const float* lower,
            const float* upper, const float* offset, const float* inverse, const float* key_middles,
            const float* value_middles, const u16* order, const float* turns, const u16* levels,
            const u16* key_levels, const u32* ranges, const u8* key_coded, const u16* key_moved,
            const u8* value_coded, const u16* value_moved, const u32* key_flags,
            const u32* value_flags, const u32* index, u32* outlier_words, u32* spills, u64* spilled,
            u32 room, u32 batch, u32 num_kv_heads, u32 tokens, u32 max_pages) {
    constexpr u32 threads = STEPS * 16;
    u32* counts = (u32*)shared_memory();  // of keys, a warp each
    u32* channels = counts + STEPS;     // outliers of each channel of values, then of those before
    u32* rounds = channels + HEAD_DIM;  // how many, their size, how many have one more, and all
    float* middles = (float*)(rounds + 4);  // of keys, of values
    u16* marks = (u16*)(middles + MIDDLES);
    u32 many = (tokens + 63) / 64, lane = thread_index() % 32, warp = thread_index() / 32;
    Place place = find_place(block_index(), num_kv_heads, many, tokens, page_table, max_pages);
    u64 list = ((u64)place.page * num_kv_heads + place.head) * 2 + place.slab % 2;
    u32 flags[2][2];  // of keys, of values
    KVQ_UNROLL for (u32 k = 0; k < 2; k++) {
        u64 at = list * STEPS * 32 + (2 * warp + k) * 32 + lane;
        flags[0][k] = key_flags[at], flags[1][k] = value_flags[at];
    }
    const u32* where = index + 4 * list;
    u32 key_first = where[0], key_quads = where[1], value_first = where[2],
        value_quads = where[3] & ~IN_ROUNDS;
    KVQ_ROLLED for (u32 i = thread_index(); i < larger(LEVELS, 1u << VALUE_BITS) - 1;
                    i += threads) {
        if (!CHANNEL_LEVELS && i < LEVELS - 1) middles[i] = key_middles[i];
        if (i < (1u << VALUE_BITS) - 1) middles[VALUE_MIDDLES + i] = value_middles[i];
    }
    u32 total,
        before = lanes_before(count_bits(flags[0][0]) + count_bits(flags[0][1]), lane, total);
    if (lane == 0) counts[warp] = total;
    // The outliers of a lane's four channels, two of each step, come behind those of the lanes
    // before it; their numbers, 64 at most, are a byte each.
    u32 own = lane / 4 * (HEAD_DIM / 8) + 4 * warp,
        found_here = 0;  // by the remainder modulo 8 first
    KVQ_UNROLL for (u32 c = 0; c < 4; c++) {
        found_here |= count_bits(flags[1][c / 2] & 0x33333333u << c % 2 * 2) << 8 * c;
    }
    u32 ranks = channel_rank(found_here, lane);
    KVQ_UNROLL for (u32 c = 0; c < 4; c++) {
        if (lane % 4 == 3) channels[own + c] = (ranks + found_here) >> 8 * c & 255;
    }
    sync_block();
    if (warp == 0) deal_rounds(channels, rounds, lane);
    u32 keys = 0;
    KVQ_UNROLL for (u32 w = 0; w < STEPS / 2; w++) {
        if (w < warp) before += counts[w];
        keys += counts[w];
    }
    sync_block();
    u32 first_value = (keys + 31) / 32 * 32, end = first_value + rounds[3];
    u32* words[2] = {outlier_words + (u64)key_first * 4, outlier_words + (u64)value_first * 4};
    for (u32 i = keys + thread_index(); i < key_quads * 4; i += threads) words[0][i] = 0;
    if (value_quads && warp == 0) {
        u32 used = HEADER + rounds[3];
        if (lane < HEADER) words[1][lane] = lane < 3 ? rounds[lane] : 0;
        if (lane < value_quads * 4 - used) words[1][used + lane] = 0;
    }
    KeyCode code{lower,
                 upper,
                 offset,
                 inverse,
                 CHANNEL_LEVELS ? key_middles : middles,
                 order,
                 turns + (u64)place.sequence * tokens * HEAD_DIM};
    Decode decode{levels, key_levels, (const u32*)key_levels};
    const u64 first = ((u64)place.sequence * num_kv_heads + place.head) * tokens + place.slab * 64;
    Given given[2] = {{key_coded + first * HEAD_DIM, key_moved + first * HEAD_DIM},
                      {value_coded + first * HEAD_DIM, value_moved + first * HEAD_DIM}};
    Spill spill{
        spills, spilled, (u64)batch * num_kv_heads * HEAD_DIM,
        (((u64)place.slab * 64 * batch + place.sequence) * num_kv_heads + place.head) * HEAD_DIM};
    KVQ_ROLLED for (u32 base = 0; base < end; base += ITEMS) {
        write_marks(marks, before - base, flags[0][0], 2 * warp, lane);
        write_marks(marks, before - base + count_bits(flags[0][0]), flags[0][1], 2 * warp + 1,
                    lane);
        KVQ_UNROLL for (u32 c = 0; c < 4; c++) {
            u32 at = first_value + channels[own + c] + (ranks >> 8 * c & 255) - base;
            u32 chosen = flags[1][c / 2] & 0x33333333u << c % 2 * 2;
            write_marks(marks, at, chosen, 2 * warp + c / 2, lane);
        }
        sync_block();
        KVQ_ROLLED for (u32 i = thread_index(); i < smaller(ITEMS, end - base); i += threads) {
            u32 item = base + i, token, at;
            if (item >= keys && item < first_value) continue;
            u32 n = marks[i] >> 10, step = marks[i] / 32 % 32, its_lane = marks[i] % 32;
            if (item < keys) {
                key_place(n, step, its_lane, token, at);
                KeyChannel channel = key_channel(code, place.head, at);
                Element found;
                if constexpr (KEY_COMP) {
                    found = given_element(given[0], token, channel.channel);
                } else {
                    u32 low = at % (HEAD_DIM / 2);
                    KeyChannel pair[2];
                    pair[0].channel = order[low], pair[1].channel = order[low + HEAD_DIM / 2];
                    float states[2];
                    key_states(pair, key + (first + token) * HEAD_DIM,
                               turn_at(code, place.slab * 64 + token, low), states);
                    found = key_element(channel, at == low ? states[0] : states[1]);
                }
                float dense = key_dense(decode, place.head, at, found.code);
                u32 word = delta_word(found.state, dense, outlier_at(token, at));
                words[0][item] = word;
                keep_spilled(spill, 0, room, found.state, dense, word, token, channel.channel);
            } else {
                value_place(n, step, its_lane, token, at);
                u32 range = ranges[place.page * 128 + place.slab % 2 * 64 + token];
                Element found;
                if constexpr (VALUE_COMP) {
                    found = given_element(given[1], token, at);
                } else {
                    ValueRow row{range, inverse_scale(range), NO_CUTS};
                    found = value_element(middles + VALUE_MIDDLES,
                                          value[(first + token) * HEAD_DIM + at], row, at);
                }
                u32 round = (item - first_value) % rounds[0],
                    within = (item - first_value) / rounds[0];
                u32 slot = HEADER + round * rounds[1] + smaller(round, rounds[2]) + within;
                float dense = value_dense(decode, range, found.code);
                u32 word = delta_word(found.state, dense, outlier_at(token, at));
                words[1][slot] = word;
                keep_spilled(spill, 1, room, found.state, dense, word, token, at);
            }
        }
        sync_block();
    }
}
