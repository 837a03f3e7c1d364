/* Blocks as a file has them -> records of a tile (formats.h). Moves bytes, changes no value. */
#ifndef SURI_RETILE_H
#define SURI_RETILE_H
#include "formats.h"

/* 4 x 4 units of 4 bytes turned over: four rows of 16 bytes that lie `from_step` apart, to four that lie `to_step` apart. */
INLINE void turn(const uint8_t *from, int64_t from_step, uint8_t *to, int64_t to_step) {
#if defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 12)
    typedef uint32_t four __attribute__((vector_size(16)));
    four a, b, c, d, ab, cd, out[4];
    memcpy(&a, from, 16);
    memcpy(&b, from + from_step, 16);
    memcpy(&c, from + 2 * from_step, 16);
    memcpy(&d, from + 3 * from_step, 16);
    ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
    out[0] = __builtin_shufflevector(ab, cd, 0, 1, 4, 5), out[1] = __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
    ab = __builtin_shufflevector(a, b, 2, 6, 3, 7), cd = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    out[2] = __builtin_shufflevector(ab, cd, 0, 1, 4, 5), out[3] = __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
    for (int i = 0; i < 4; i++) memcpy(to + i * to_step, &out[i], 16);
#else
    for (int r = 0; r < 4; r++)
        for (int u = 0; u < 4; u++) memcpy(to + u * to_step + 4 * r, from + r * from_step + 4 * u, 4);
#endif
}

/* `count` units of 2 or 4 bytes at `at` of each row's block, row after row. Returns where the next field goes. */
INLINE uint8_t *field(const uint8_t *block, int64_t row_bytes, int at, int unit, int count, uint8_t *to) {
    int u = 0;
    if (unit == 4)
        for (; u + 4 <= count; u += 4)
            for (int r = 0; r < LANES; r += 4)
                turn(block + r * row_bytes + at + 4 * u, row_bytes, to + (u * LANES + r) * 4, LANES * 4);
    for (; u < count; u++)
        for (int r = 0; r < LANES; r++) memcpy(to + (u * LANES + r) * unit, block + r * row_bytes + at + u * unit, (size_t)unit);
    return to + LANES * unit * count;
}

/* The fifth bits of 32 columns, bit j for column j -> bit u of byte b for column 4 u + b. */
INLINE uint8_t *fifth_bits(const uint8_t *block, int64_t row_bytes, int at, uint8_t *to) {
    for (int r = 0; r < LANES; r++) {
        uint32_t bits, turned = 0;
        memcpy(&bits, block + r * row_bytes + at, 4);
        for (int u = 0; u < 8; u++) turned |= (((bits >> 4 * u & 15) * 0x00204081u) & 0x01010101u) << u;
        memcpy(to + 4 * r, &turned, 4);
    }
    return to + 4 * LANES;
}

/* One block of 16 rows that lie `row_bytes` apart. The order of fields is that of formats.h and tiles.py. */
INLINE void one_record(enum format format, const uint8_t *block, int64_t row_bytes, uint8_t *to) {
#define FIELD(at, unit, count) to = field(block, row_bytes, at, unit, count, to)
    switch (format) {
        case Q4_0:
        case IQ4_NL: FIELD(0, 2, 1); FIELD(2, 4, 4); break;
        case Q4_1: FIELD(0, 2, 2); FIELD(4, 4, 4); break;
        case Q5_0: FIELD(0, 2, 1); to = fifth_bits(block, row_bytes, 2, to); FIELD(6, 4, 4); break;
        case Q5_1: FIELD(0, 2, 2); to = fifth_bits(block, row_bytes, 4, to); FIELD(8, 4, 4); break;
        case Q8_0: FIELD(0, 2, 1); FIELD(2, 4, 8); break;
        case Q4_K: FIELD(0, 2, 2); FIELD(4, 4, 35); break;
        case Q5_K: FIELD(0, 2, 2); FIELD(4, 4, 43); break;
        case Q6_K: FIELD(208, 2, 1); FIELD(192, 4, 4); FIELD(0, 4, 48); break;
        case IQ4_XS: FIELD(0, 2, 2); FIELD(4, 4, 33); break;
    }
}
#undef FIELD
#endif
