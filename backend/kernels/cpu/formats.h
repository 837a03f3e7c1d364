/* The storage formats in tiles, and how a group of 32 columns of a tile is unpacked.
 *
 * A tile is 16 rows. It takes exactly the bytes that its rows take in the file: for each block of 32 or 256 columns one
 * record, in which each field of the block stands for all 16 rows, row after row in units of 2 or 4 bytes (tiles.py has
 * the table). So making tiles is moving bytes, and unit u of the codes is one vector with four columns of every row.
 *
 * What a group means: value = scale * (code - offset) + minimum, with the scale exact in float32.
 */
#ifndef SURI_FORMATS_H
#define SURI_FORMATS_H
#include "vectors.h"

/* Numbers of ggml; from 1000 on, our own. */
enum format {
    Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14, IQ4_NL = 20, IQ4_XS = 23,
};
enum { GROUP = 32, MAX_GROUPS = 8 };
enum { FAR = 20 << 10, NEAR = 3 << 10 };

/* What follows these bytes in memory is asked for, every line of it: far ahead into the second cache, which waits for many
 * more lines at once than the first, and near into the first. */
INLINE void ask_ahead(const uint8_t *from, int bytes) {
    for (int line = 0; line < bytes; line += 64) {
        __builtin_prefetch(from + FAR + line, 0, 2);
        __builtin_prefetch(from + NEAR + line, 0, 3);
    }
}

struct shape { /* of one block of one row: bytes, groups of 32, what is taken off the codes */
    int bytes, groups, offset, minimum, codes_signed, halved;
    int low; /* bits of the low part of activations: so many as codes leave of a byte; 7 for codes of 8 bits */
};

INLINE struct shape shape_of(enum format format) {
    switch (format) {
        case Q4_0: return (struct shape){18, 1, 8, 0, 0, 0, 4};
        case Q4_1: return (struct shape){20, 1, 0, 1, 0, 0, 4};
        case Q5_0: return (struct shape){22, 1, 16, 0, 0, 0, 3};
        case Q5_1: return (struct shape){24, 1, 0, 1, 0, 0, 3};
        case Q8_0: return (struct shape){34, 1, 0, 0, 1, 0, 7};
        case Q4_K: return (struct shape){144, 8, 0, 1, 0, 0, 4};
        case Q5_K: return (struct shape){176, 8, 0, 1, 0, 0, 3};
        case Q6_K: return (struct shape){210, 8, 32, 0, 0, 1, 2}; /* a scale for each 16 columns */
        case IQ4_NL: return (struct shape){18, 1, 0, 0, 1, 0, 7};
        case IQ4_XS: return (struct shape){136, 8, 0, 0, 1, 0, 7};
    }
    return (struct shape){0, 0, 0, 0, 0, 0, 0};
}

static const int8_t iq4_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

/* What is worked out once for a record: scales of 6 bits as four words a row. */
struct record {
    floats scale, minimum;
    lanes scales[2], minima[2];
};

/* One group: eight vectors of codes for columns 4 u .. 4 u + 3, and what they are worth. */
struct group {
    lanes codes[8];
    floats scale, second, minimum; /* second: the scale of columns 16..31 where that is another */
};

INLINE void open_record(enum format format, const uint8_t *from, struct record *record) {
    record->scale = record->minimum = halves(from);
    if (format == Q4_1 || format == Q5_1) record->minimum = halves(from + 32);
    if (format == Q4_K || format == Q5_K) {
        record->minimum = product(halves(from + 32), all_float(-1.0f));
        lanes first = load(from + 64), second = load(from + 128), last = load(from + 192);
        lanes six = all(0x3f3f3f3f), four = all(0x0f0f0f0f), high = all(0x30303030);
        record->scales[0] = both(first, six);
        record->minima[0] = both(second, six);
        record->scales[1] = either(both(last, four), both(right(first, 2), high));
        record->minima[1] = either(both(right(last, 4), four), both(right(second, 2), high));
    }
    if (format == IQ4_XS) { /* low four bits: a nibble a group; high two: 16 bits a row */
        lanes low = load(from + 64), high;
        uint16_t bits[LANES];
        uint32_t wide[LANES];
        memcpy(bits, from + 32, sizeof bits);
        for (int r = 0; r < LANES; r++) wide[r] = bits[r];
        high = load(wide);
        record->scales[0] = low;
        record->scales[1] = high;
    }
}

INLINE floats byte_of_lanes(lanes words, int n) { return to_floats(both(right(words, 8 * n), all(255))); }

/* 16 bytes a row, columns j and j + 16 in the two halves of byte j. */
INLINE void nibbles(const uint8_t *from, lanes *codes) {
    lanes four = all(0x0f0f0f0f);
    for (int u = 0; u < 4; u++) {
        lanes bytes = load(from + 64 * u);
        codes[u] = both(bytes, four);
        codes[u + 4] = both(right(bytes, 4), four);
    }
}

INLINE void unpack(enum format format, const uint8_t *from, const struct record *record, int g, struct group *group) {
    lanes four = all(0x0f0f0f0f);
    group->scale = record->scale;
    switch (format) {
        case Q4_0:
            nibbles(from + 32, group->codes);
            break;
        case Q4_1:
            nibbles(from + 64, group->codes);
            group->minimum = record->minimum;
            break;
        case Q5_0:
        case Q5_1: { /* bit u of byte b of a row's word: the fifth bit of column 4 u + b */
            const uint8_t *fifth = from + (format == Q5_0 ? 32 : 64);
            lanes bits = load(fifth), mask = all(0x10101010);
            nibbles(fifth + 64, group->codes);
            for (int u = 0; u < 8; u++)
                group->codes[u] = either(group->codes[u], both(u < 4 ? left(bits, 4 - u) : right(bits, u - 4), mask));
            group->minimum = record->minimum;
            break;
        }
        case Q8_0:
            for (int u = 0; u < 8; u++) group->codes[u] = load(from + 32 + 64 * u);
            break;
        case Q4_K:
        case Q5_K: {
            const uint8_t *codes = from + (format == Q4_K ? 256 : 768) + 512 * (g / 2);
            for (int u = 0; u < 8; u++) {
                group->codes[u] = both(right(load(codes + 64 * u), 4 * (g & 1)), four);
                if (format == Q5_K)
                    group->codes[u] = either(group->codes[u],
                                             left(both(right(load(from + 256 + 64 * u), g), all(0x01010101)), 4));
            }
            group->scale = product(record->scale, byte_of_lanes(record->scales[g / 4], g & 3));
            group->minimum = product(record->minimum, byte_of_lanes(record->minima[g / 4], g & 3));
            break;
        }
        case Q6_K: { /* each half of 128 columns: group k has its low bits in bytes 32 (k % 2) .., high ones in bits 2 k */
            int h = g / 4, k = g & 3;
            const uint8_t *low = from + 288 + 1024 * h + 512 * (k & 1), *high = from + 288 + 2048 + 512 * h;
            lanes mask = all(0x30303030);
            for (int u = 0; u < 8; u++) {
                lanes two = load(high + 64 * u);
                two = both(k < 2 ? left(two, 4 - 2 * k) : right(two, 2 * k - 4), mask);
                group->codes[u] = either(both(right(load(low + 64 * u), 4 * (k / 2)), four), two);
            }
            lanes scales = load(from + 32 + 64 * (g / 2));
            int at = 16 * (g & 1);
            group->scale = product(record->scale, to_floats(right_signed(left(scales, 24 - at), 24)));
            group->second = product(record->scale, to_floats(right_signed(left(scales, 16 - at), 24)));
            break;
        }
        case IQ4_NL:
            nibbles(from + 32, group->codes);
            for (int u = 0; u < 8; u++) group->codes[u] = look_up(group->codes[u], iq4_values);
            break;
        case IQ4_XS: {
            nibbles(from + 128 + 256 * g, group->codes);
            for (int u = 0; u < 8; u++) group->codes[u] = look_up(group->codes[u], iq4_values);
            lanes low = both(right(record->scales[0], 4 * g), all(15)), high = both(right(record->scales[1], 2 * g), all(3));
            group->scale = product(record->scale, to_floats(plus(either(low, left(high, 4)), all(-32))));
            break;
        }
    }
}
#endif
