#include "product.h"

#include <stdlib.h>

#include "formats.h"
#include "matrix.h"
#include "pool.h"

enum { CHUNK_BYTES = 96 << 10,
       INPUT_BYTES = 1 << 20,
       SLACK = 64 + 2 * MATRIX_TOKENS * 2 * GROUP /* alignment, and tokens that are read after the last ones */ };

const char *suri_vectors(void) { return SURI_VECTORS; }

/* Whether more than SURI_FEW tokens are multiplied in bfloat16. */
int suri_matrix(void) { return MATRIX && matrix_allowed(); }

int suri_low_bits(int format) { return shape_of((enum format)format).low; }

int64_t suri_input_bytes(int64_t tokens, int64_t columns) {
    return tokens * columns * 2 + tokens * (columns / GROUP) * (int64_t)sizeof(struct suri_group) + SLACK;
}

struct suri_input suri_input_in(void *memory, int64_t tokens, int64_t few, int64_t columns, int low) {
    int8_t *codes = (int8_t *)(((uintptr_t)memory + 63) & ~(uintptr_t)63);
    if (!MATRIX || !matrix_allowed()) few = tokens;
    /* What is read after the last tokens are the groups, so the slack is behind those. */
    return (struct suri_input){tokens, few, columns, low, codes, (struct suri_group *)(codes + tokens * columns * 2)};
}

/* The largest size of 32 numbers, as bits: those order like the numbers, with infinities and then NaN above all. */
INLINE uint32_t largest_bits(const float *from) {
#if defined(__AVX512F__) && !defined(SURI_PORTABLE)
    __m512i first = _mm512_loadu_si512(from), second = _mm512_loadu_si512(from + 16), size = _mm512_set1_epi32(0x7fffffff);
    return _mm512_reduce_max_epu32(_mm512_max_epu32(_mm512_and_si512(first, size), _mm512_and_si512(second, size)));
#else
    uint32_t bits[GROUP], top = 0;
    memcpy(bits, from, sizeof bits);
    for (int j = 0; j < GROUP; j++) {
        uint32_t size = bits[j] & 0x7fffffff;
        top = size > top ? size : top;
    }
    return top;
#endif
}

/* 32 numbers, in steps -> whole numbers, nearest, ties to even: their high parts, then their low ones; and the sum of each
 * half. */
INLINE void split(const float *from, float steps, int low, int8_t *parts, int32_t *sums) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && !defined(SURI_PORTABLE)
    const __m512i by = _mm512_set1_epi32(low), half = _mm512_set1_epi32(1 << (low - 1)), top = _mm512_set1_epi8((char)0x80);
    const __m512i in_turn = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512 step = _mm512_set1_ps(steps);
    __m512i first = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(from), step));
    __m512i second = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(from + 16), step));
    __m512i high = _mm512_srav_epi32(_mm512_add_epi32(first, half), by);
    __m512i other = _mm512_srav_epi32(_mm512_add_epi32(second, half), by);
    __m512i rest = _mm512_sub_epi32(first, _mm512_sllv_epi32(high, by));
    __m512i more = _mm512_sub_epi32(second, _mm512_sllv_epi32(other, by));
    __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(high, other), _mm512_packs_epi32(rest, more));
    bytes = _mm512_permutexvar_epi32(in_turn, bytes); /* each lane of 128 bits has had four of each of the four */
    _mm512_storeu_si512(parts, bytes);
    /* Eight bytes at a time, each 128 more than it is. */
    __m512i eight = _mm512_sad_epu8(_mm512_xor_si512(bytes, top), _mm512_setzero_si512());
    eight = _mm512_add_epi64(eight, _mm512_shuffle_epi32(eight, (_MM_PERM_ENUM)0x4e));
    eight = _mm512_sub_epi64(eight, _mm512_set1_epi64(16 * 128));
    __m256i both = _mm256_sllv_epi32(_mm512_castsi512_si256(eight), _mm256_set1_epi32(low));
    both = _mm256_add_epi32(both, _mm512_extracti64x4_epi64(eight, 1));
    sums[0] = _mm256_cvtsi256_si32(both);
    sums[1] = _mm_cvtsi128_si32(_mm256_extracti128_si256(both, 1));
#else
    for (int h = 0; h < 2; h++) {
        sums[h] = 0;
        for (int j = 16 * h; j < 16 * h + 16; j++) {
            /* Added to 1.5 * 2^23, a number is rounded to a whole one in the lowest bits. */
            float moved = from[j] * steps + 12582912.0f;
            int32_t code;
            memcpy(&code, &moved, 4);
            code -= 0x4b400000;
            sums[h] += code;
            int32_t high = (code + (1 << (low - 1))) >> low;
            parts[j] = (int8_t)high;
            parts[GROUP + j] = (int8_t)(code - high * (1 << low));
        }
    }
#endif
}

static void quantise(const float *from, int low, int8_t *codes, struct suri_group *group) {
    const uint32_t top = largest_bits(from);
    float largest;
    memcpy(&largest, &top, 4);
    if (top >= 0x7f800000 || largest < 1e-30f) {
        uint32_t none = top >= 0x7f800000 ? 0x7fc00000 : 0;
        memset(codes, 0, 2 * GROUP);
        memset(group, 0, sizeof *group);
        memcpy(&group->scale, &none, 4);
        group->weighted = group->scale;
        return;
    }
    const float most = (float)(127 << low), step = most / largest;
    group->scale = largest / most;
    split(from, step, low, codes, group->sums);
    group->weighted = group->scale * (float)(group->sums[0] + group->sums[1]);
}

/* Rounded to the nearest bfloat16, ties to even; NaN stays NaN. */
INLINE uint16_t as_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)rounded;
}

void suri_quantise(const float *x, const struct suri_input *input, int64_t first, int64_t last) {
    for (int64_t t = first; t < last; t++)
        for (int64_t g = 0; g < input->columns / GROUP; g++) {
            int64_t at = g * input->tokens + t;
            const float *from = x + t * input->columns + g * GROUP;
            int8_t *codes = input->codes + at * 2 * GROUP;
            if (t < input->few) {
                quantise(from, input->low, codes, input->groups + at);
                continue;
            }
            uint16_t values[GROUP];
            for (int j = 0; j < GROUP; j++) values[j] = as_bfloat16(from[j]);
            memcpy(codes, values, sizeof values);
        }
}

/* The loops of kernel.h, for the formats of each file. */
void suri_tiles_32(const struct suri_product *p, int64_t first, int64_t last);
void suri_tiles_256(const struct suri_product *p, int64_t first, int64_t last);
void suri_values_32(const struct suri_product *p, int64_t first, int64_t last);
void suri_values_256(const struct suri_product *p, int64_t first, int64_t last);

void suri_product_tiles(const struct suri_product *p, int64_t first, int64_t last) {
    if (shape_of((enum format)p->format).groups == 1) suri_tiles_32(p, first, last);
    else suri_tiles_256(p, first, last);
}

static void values_tiles(const struct suri_product *p, int64_t first, int64_t last) {
    if (shape_of((enum format)p->format).groups == 1) suri_values_32(p, first, last);
    else suri_values_256(p, first, last);
}

static void part(const void *argument, int64_t first, int64_t last) { suri_product_tiles(argument, first, last); }

static int64_t tiles_in(int64_t rows) { return (rows + LANES - 1) / LANES; }

void suri_product_of(const struct suri_product *p, int threads) {
    struct shape shape = shape_of((enum format)p->format);
    const struct suri_input *in = p->input;
    int64_t tile_bytes = p->columns / (GROUP * shape.groups) * LANES * shape.bytes, tiles = tiles_in(p->rows);
    /* Pieces that take some microseconds, and several for each thread; of many tokens as many tiles as fit together, and
     * about the same for each thread. */
    int64_t chunk = CHUNK_BYTES / tile_bytes, most = tiles / (4 * threads);
    if (chunk > most) chunk = most;
    if (in->few < in->tokens) {
        int64_t pieces = (tiles + MANY_TILES - 1) / MANY_TILES;
        pieces = (pieces + threads - 1) / threads * threads;
        chunk = (tiles + 2 * pieces - 1) / (2 * pieces) * 2;
    }
    /* So many few tokens at a time that their codes stay in the second cache while all weights pass by. */
    int64_t at_once = INPUT_BYTES / (2 * p->columns) / MATRIX_TOKENS * MATRIX_TOKENS, first = 0;
    if (at_once < 2 * MATRIX_TOKENS) at_once = 2 * MATRIX_TOKENS;
    do {
        struct suri_product some = *p;
        some.first = first, some.last = first + at_once < in->few ? first + at_once : in->few;
        suri_parallel(threads, tiles, chunk < 1 ? 1 : chunk, part, &some);
    } while ((first += at_once) < in->few);
}

struct quantising {
    const float *x;
    const struct suri_input *input;
};

static void quantise_part(const void *argument, int64_t first, int64_t last) {
    const struct quantising *q = argument;
    suri_quantise(q->x, q->input, first, last);
}

/* y = x W^T for `parts` matrices of one format, one above the other: x float32 (tokens, columns), out (tokens, all rows).
 * matrices: each in tiles, or as in a file with `in_rows`. few: see struct suri_input. Returns 0, or -1 where there is no
 * memory. */
int suri_product(int format, int in_rows, int parts, const uint8_t *const *matrices, const int64_t *rows, int64_t columns,
                 const float *x, int64_t tokens, int64_t few, float *out, int threads) {
    void *memory = malloc((size_t)suri_input_bytes(tokens, columns));
    if (!memory) return -1;
    struct suri_input input = suri_input_in(memory, tokens, few, columns, suri_low_bits(format));
    struct quantising quantising = {x, &input};
    suri_parallel(threads, tokens, 4, quantise_part, &quantising);
    int64_t stride = 0;
    for (int n = 0; n < parts; n++) stride += rows[n];
    for (int n = 0; n < parts; out += rows[n++]) {
        struct suri_product p = {format, rows[n], columns, matrices[n], &input, out, stride, 0, 0, in_rows};
        suri_product_of(&p, threads);
    }
    free(memory);
    return 0;
}

static void values_part(const void *argument, int64_t first, int64_t last) { values_tiles(argument, first, last); }

/* The weight as float32 values, (rows, columns). */
void suri_values(int format, const uint8_t *tiles, int64_t rows, int64_t columns, float *out, int threads) {
    struct suri_product p = {format, rows, columns, tiles, 0, out, columns, 0, 0, 0};
    suri_parallel(threads, tiles_in(rows), 4, values_part, &p);
}

struct looking_up {
    int format;
    const uint8_t *tiles;
    int64_t columns;
    const int64_t *ids;
    float *out;
};

static void rows_part(const void *argument, int64_t first, int64_t last) {
    const struct looking_up *l = argument;
    const struct shape shape = shape_of((enum format)l->format);
    const int64_t tile_bytes = l->columns / (GROUP * shape.groups) * LANES * shape.bytes;
    for (int64_t n = first; n < last; n++) {
        const int64_t row = l->ids[n] % LANES;
        const uint8_t *from = l->tiles + l->ids[n] / LANES * tile_bytes;
        struct suri_product p = {l->format, LANES, l->columns, from, 0, l->out + n * l->columns, l->columns, row, row + 1, 0};
        values_tiles(&p, 0, 1);
    }
}

/* Rows ids[0 .. count - 1] of the weight as float32 values, (count, columns). */
void suri_rows(int format, const uint8_t *tiles, int64_t columns, const int64_t *ids, int64_t count, float *out,
               int threads) {
    struct looking_up looking_up = {format, tiles, columns, ids, out};
    suri_parallel(threads, count, 8, rows_part, &looking_up);
}
