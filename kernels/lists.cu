// The last of the kernels that pack a prompt: lists of outliers, from the flags of pack.cu, where the
// host has laid them out. What the arguments are, pack.cu says.
#include "pack_given.cuh"

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

// Grid: (sequence, KV head, slab). Write the lists of outliers where `index` says, from the flags.
KERNEL(STEPS * 32)
write_lists(const u16* key, const u16* value, const int* page_table, const float* lower,
            const float* upper, const float* offset, const float* inverse,
            const float* key_middles, const float* value_middles, const u16* order,
            const float* turns, const u16* levels, const u16* key_levels, const u32* ranges,
            const u8* key_coded, const u16* key_moved, const u8* value_coded,
            const u16* value_moved, u32* flags, const u32* index, u32* outlier_words, u32* spills,
            u64* spilled, u32 room, u32 batch, u32 num_kv_heads, u32 tokens, u32 max_pages) {
    u32* counts = (u32*)shared_memory();   // of keys, a step each
    u32* channels = counts + STEPS;         // outliers of each channel of values, then of those before
    u32* rounds = channels + HEAD_DIM;      // how many, their size, and how many have one more
    u32 many = (tokens + 63) / 64, lane = thread_index() % 32, step = thread_index() / 32;
    Place place = find_place(block_index(), num_kv_heads, many, tokens, page_table, max_pages);
    u64 list = ((u64)place.page * num_kv_heads + place.head) * 2 + place.slab % 2;
    u32 key_flags = *flags_of(flags, list, 0, thread_index());
    u32 value_flags = *flags_of(flags, list, 1, thread_index());
    KeyCode code{lower, upper, offset, inverse, key_middles, order,
                 turns + (u64)place.sequence * tokens * HEAD_DIM};
    Decode decode{levels, key_levels, (const u32*)key_levels};
    const u64 first = ((u64)place.sequence * num_kv_heads + place.head) * tokens + place.slab * 64;
    Given given[2] = {{key_coded + first * HEAD_DIM, key_moved + first * HEAD_DIM},
                      {value_coded + first * HEAD_DIM, value_moved + first * HEAD_DIM}};
    Spill spill{spills, spilled, (u64)batch * num_kv_heads * HEAD_DIM,
                (((u64)place.slab * 64 * batch + place.sequence) * num_kv_heads + place.head) *
                    HEAD_DIM};
    const u32* where = index + 4 * list;
    u32* words = outlier_words + (u64)where[0] * 4;
    u32 total, before = lanes_before(count_bits(key_flags), lane, total);
    if (lane == 0) counts[step] = total;
    // The outliers of a lane's two channels come behind those of the lanes before it.
    u32 places[2], own = lane / 4 * (HEAD_DIM / 8) + 2 * step;  // by the remainder modulo 8 first
    KVQ_UNROLL for (u32 upper = 0; upper < 2; upper++) {
        u32 count = count_bits(value_flags & 0x33333333u << 2 * upper);
        places[upper] = channel_rank(count, lane);
        if (lane % 4 == 3) channels[own + upper] = places[upper] + count;
    }
    sync_block();
    if (step == 0) deal_rounds(channels, rounds, lane);
    sync_block();
    KVQ_UNROLL for (u32 upper = 0; upper < 2; upper++) places[upper] += channels[own + upper];
    for (u32 s = 0; s < step; s++) before += counts[s];
    KVQ_ROLLED for (u32 left = key_flags; left; left &= left - 1, before++) {
        u32 token, at, n = lowest_bit(left);
        key_place(n, step, lane, token, at);
        u32 low = at % (HEAD_DIM / 2), partner = at / (HEAD_DIM / 2);
        KeyChannel pair[2] = {key_channel(code, place.head, low),
                              key_channel(code, place.head, low + HEAD_DIM / 2)};
        u32 channel = partner ? pair[1].channel : pair[0].channel;
        Element found[2];
        if constexpr (KEY_COMP) {
            found[0] = found[1] = given_element(given[0], token, channel);
        } else {
            key_pair(pair, key + (first + token) * HEAD_DIM,
                     turn_at(code, place.slab * 64 + token, low), found);
        }
        Element element = partner ? found[1] : found[0];
        float dense = key_dense(decode, place.head, at, element.code);
        u32 word = delta_word(element.state, dense, key_word(token, at));
        words[before] = word;
        keep_spilled(spill, element.state, dense, word, token, channel);
    }
    if (step == STEPS - 1 && lane == 31) {
        for (; before < where[1] * 4; before++) words[before] = 0;
    }
    u32 list_room = (where[3] & ~IN_ROUNDS) * 4;
    words = outlier_words + (u64)where[2] * 4;
    spill.count++, spill.places += room;
    if (list_room && step == 0) {
        u32 end = HEADER + rounds[3];
        if (lane < HEADER) words[lane] = lane < 3 ? rounds[lane] : 0;
        if (lane < list_room - end) words[end + lane] = 0;
    }
    KVQ_ROLLED for (u32 left = value_flags; left; left &= left - 1) {
        u32 token, at, n = lowest_bit(left);
        value_place(n, step, lane, token, at);
        u32 range = ranges[place.page * 128 + place.slab % 2 * 64 + token];
        Element found;
        if constexpr (VALUE_COMP) {
            found = given_element(given[1], token, at);
        } else {
            ValueRow row{range, inverse_scale(range), NO_CUTS};
            found = value_element(value_middles, value[(first + token) * HEAD_DIM + at], row, at);
        }
        u32& place_of = n / 2 % 2 ? places[1] : places[0];
        u32 round = place_of % rounds[0];
        u32 slot = HEADER + round * rounds[1] + smaller(round, rounds[2]) + place_of++ / rounds[0];
        float dense = value_dense(decode, range, found.code);
        u32 word = delta_word(found.state, dense, at << 8 | token << 2);
        words[slot] = word;
        keep_spilled(spill, found.state, dense, word, token, at);
    }
}
