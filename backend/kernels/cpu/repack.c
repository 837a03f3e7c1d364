/* Blocks of a GGUF file -> the layout of torch's packed 4-bit product (int4.py), tile by tile, in one pass.
 *
 * A tile is 2 * half rows. For each tile and column the packed matrix has `half` bytes: byte r holds the code of row r
 * (low four bits) and of row r + half (high four bits). Scales and zeros are bfloat16 pairs, (groups, all rows, 2):
 * value = (code - 8) * scale + zero. The slow, obvious twin is planes.py with pack_codes_twin.
 */
#include <stdint.h>
#include <string.h>

enum { Q4_0 = 2, Q4_1 = 3, Q8_0 = 8, Q4_K = 12 };
enum { GROUP = 32, MAX_HALF = 32 };

static float half_to_float(const uint8_t *bytes) {
    uint16_t bits;
    memcpy(&bits, bytes, 2);
    /* The exponent's bias differs by 112: a product sets it right, also for numbers below the normal ones. */
    uint32_t word = (uint32_t)(bits & 0x7fff) << 13, sign = (uint32_t)(bits & 0x8000) << 16;
    float value;
    memcpy(&value, &word, 4);
    value *= 5.192296858534828e33f; /* 2^112 */
    memcpy(&word, &value, 4);
    if ((bits & 0x7c00) == 0x7c00) word = 0x7f800000 | (uint32_t)(bits & 0x3ff) << 13;
    word |= sign;
    memcpy(&value, &word, 4);
    return value;
}

static uint16_t to_bfloat16(float value) { /* to nearest, ties to even */
    uint32_t word;
    memcpy(&word, &value, 4);
    if ((word & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (uint16_t)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

static float rounded(float value) {
    uint32_t word = (uint32_t)to_bfloat16(value) << 16;
    memcpy(&value, &word, 4);
    return value;
}

static void put(uint16_t *pair, float scale, float zero) {
    pair[0] = to_bfloat16(scale);
    pair[1] = to_bfloat16(zero);
}

static void nibbles(const uint8_t *bytes, uint8_t *codes) { /* 16 bytes: elements 0..15 low, 16..31 high */
    for (int j = 0; j < 16; j++) {
        codes[j] = bytes[j] & 15;
        codes[j + 16] = bytes[j] >> 4;
    }
}

/* One block of one row: the codes of each group of 32 and plane, and the scale and zero of each group (of Q8_0 only the
 * codes: repack does its scales in a loop of their own, which is twice as fast). Steps: from one group to the next. */
static inline __attribute__((always_inline)) void unpack(int format, const uint8_t *block, uint8_t *first,
                                                         uint8_t *second, int code_step, uint16_t *pair,
                                                         int pair_step) {
    float scale = half_to_float(block);
    if (format == Q4_0) {
        nibbles(block + 2, first);
        put(pair, scale, 0.0f);
    } else if (format == Q4_1) {
        nibbles(block + 4, first);
        put(pair, scale, half_to_float(block + 2) + 8 * scale);
    } else if (format == Q8_0) {
        for (int j = 0; j < GROUP; j++) {
            uint8_t code = block[2 + j] ^ 128;
            first[j] = code >> 4;
            second[j] = code & 15;
        }
    } else { /* Q4_K: eight groups; each 32 bytes hold one group in their low and the next in their high four bits */
        float minimum = half_to_float(block + 2);
        const uint8_t *s = block + 4;
        for (int j = 0; j < 8; j++) {
            int scale6 = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | (s[j - 4] >> 6) << 4;
            int minimum6 = j < 4 ? s[j + 4] & 63 : s[j + 4] >> 4 | (s[j] >> 6) << 4;
            float own = scale * (float)scale6;
            put(pair + j * pair_step, own, 8 * own - minimum * (float)minimum6);
        }
        for (int c = 0; c < 4; c++) {
            const uint8_t *bytes = block + 16 + c * GROUP;
            uint8_t *low = first + 2 * c * code_step, *high = low + code_step;
            for (int k = 0; k < GROUP; k++) {
                low[k] = bytes[k] & 15;
                high[k] = bytes[k] >> 4;
            }
        }
    }
}

/* 16 x 16 bytes turned over: in each of four rounds row i and row i + 8 are interleaved. */
#if defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 12)
typedef uint8_t bytes16 __attribute__((vector_size(16)));

static void turn(bytes16 *rows) {
    bytes16 next[16];
    for (int round = 0; round < 4; round++) {
        for (int i = 0; i < 8; i++) {
            bytes16 a = rows[i], b = rows[i + 8];
            next[2 * i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            next[2 * i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
        memcpy(rows, next, sizeof next);
    }
}

static void store(uint8_t codes[][GROUP], int half, uint8_t *packed) {
    for (int k = 0; k < GROUP; k += 16)
        for (int r = 0; r < half; r += 16) {
            bytes16 rows[16], high;
            for (int i = 0; i < 16; i++) {
                memcpy(&rows[i], &codes[r + i][k], 16);
                memcpy(&high, &codes[r + half + i][k], 16);
                rows[i] |= high << 4;
            }
            turn(rows);
            for (int i = 0; i < 16; i++) memcpy(packed + (k + i) * half + r, &rows[i], 16);
        }
}
#else
static void store(uint8_t codes[][GROUP], int half, uint8_t *packed) {
    for (int k = 0; k < GROUP; k++)
        for (int r = 0; r < half; r++) packed[k * half + r] = codes[r][k] | codes[r + half][k] << 4;
}
#endif

/* Tiles `first_tile` to `last_tile` of a matrix: raw rows of `row_bytes`; `packed` and `scales` (one or two planes) are
 * those of the whole product, in which this matrix begins at row `row_offset`, a multiple of the tile. */
static inline __attribute__((always_inline)) void repack(
    int format, const uint8_t *raw, int64_t row_bytes, int64_t columns, int half, int64_t first_tile, int64_t last_tile,
    int64_t row_offset, int64_t all_rows, uint8_t *packed_first, uint8_t *packed_second, uint16_t *scales_first,
    uint16_t *scales_second) {
    enum { MAX_GROUPS = 8 };
    uint8_t first[MAX_GROUPS][2 * MAX_HALF][GROUP], second[2 * MAX_HALF][GROUP];
    uint16_t pairs_first[MAX_GROUPS][2 * MAX_HALF][2], pairs_second[2 * MAX_HALF][2];
    int groups = format == Q4_K ? 8 : 1, tile = 2 * half;
    int64_t block_bytes = format == Q4_0 ? 18 : format == Q4_1 ? 20 : format == Q8_0 ? 34 : 144;
    for (int64_t t = first_tile; t < last_tile; t++) {
        int64_t out = row_offset + t * tile;
        for (int64_t group = 0; group < columns / GROUP; group += groups) {
            for (int r = 0; r < tile; r++) {
                unpack(format, raw + (t * tile + r) * row_bytes + group / groups * block_bytes, first[0][r], second[r],
                       2 * MAX_HALF * GROUP, pairs_first[0][r], 4 * MAX_HALF);
            }
            if (format == Q8_0)
                for (int r = 0; r < tile; r++) {
                    /* Both planes share one value, rounded once; 8 and 16 times it are exact. */
                    float scale = rounded(half_to_float(raw + (t * tile + r) * row_bytes + group * block_bytes));
                    put(pairs_first[0][r], 16 * scale, 0.0f);
                    put(pairs_second[r], scale, 8 * scale);
                }
            for (int g = 0; g < groups; g++) {
                store(first[g], half, packed_first + out * (columns / 2) + (group + g) * GROUP * half);
                memcpy(scales_first + ((group + g) * all_rows + out) * 2, pairs_first[g], (size_t)tile * 4);
            }
            if (packed_second) {
                store(second, half, packed_second + out * (columns / 2) + group * GROUP * half);
                memcpy(scales_second + (group * all_rows + out) * 2, pairs_second, (size_t)tile * 4);
            }
        }
    }
}

/* One copy of the loop for each format, so that the compiler sees the format as a constant. */
void suri_repack(int format, const uint8_t *raw, int64_t row_bytes, int64_t columns, int half, int64_t first_tile,
                 int64_t last_tile, int64_t row_offset, int64_t all_rows, uint8_t *packed_first, uint8_t *packed_second,
                 uint16_t *scales_first, uint16_t *scales_second) {
#define CASE(format)                                                                                        \
    case format:                                                                                            \
        repack(format, raw, row_bytes, columns, half, first_tile, last_tile, row_offset, all_rows, packed_first, \
               packed_second, scales_first, scales_second);                                                 \
        break
    switch (format) {
        CASE(Q4_0);
        CASE(Q4_1);
        CASE(Q8_0);
        CASE(Q4_K);
    }
}

/* Rows of Q6_K to bfloat16: what has no packed product is kept as values. out (rows, columns). */
void suri_q6_k_to_bfloat16(const uint8_t *raw, int64_t first_block, int64_t last_block, uint16_t *out) {
    for (int64_t block = first_block; block < last_block; block++) {
        const uint8_t *low = raw + block * 210, *high = low + 128;
        const int8_t *scales = (const int8_t *)(high + 64);
        float scale = half_to_float(high + 80);
        uint16_t *values = out + block * 256;
        for (int h = 0; h < 2; h++)
            for (int k = 0; k < 4; k++)
                for (int part = 0; part < 2; part++) {
                    float own = scale * (float)scales[8 * h + 2 * k + part];
                    const uint8_t *four = low + 64 * h + 32 * (k % 2) + 16 * part, *two = high + 32 * h + 16 * part;
                    uint16_t *to = values + 128 * h + 32 * k + 16 * part;
                    for (int b = 0; b < 16; b++) {
                        int code = (four[b] >> 4 * (k / 2) & 15) | (two[b] >> 2 * k & 3) << 4;
                        to[b] = to_bfloat16(own * (float)(code - 32));
                    }
                }
    }
}
