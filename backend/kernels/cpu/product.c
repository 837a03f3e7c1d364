#include "product.h"

#include <stdlib.h>

#include "formats.h"
#include "matrix.h"
#include "pool.h"

enum { CHUNK_BYTES = 96 << 10,
       INPUT_BYTES = 1 << 20,
       SLACK = 64 + MATRIX_TOKENS * 2 * GROUP /* alignment, and tokens that matrix_dots reads after the last ones */ };

const char *suri_vectors(void) { return SURI_VECTORS; }

int64_t suri_input_bytes(int64_t tokens, int64_t columns, int fine) {
    (void)fine; /* room for either */
    return tokens * columns * 2 + tokens * (columns / GROUP) * (int64_t)sizeof(struct suri_group) + SLACK;
}

struct suri_input suri_input_in(void *memory, int64_t tokens, int64_t columns, int fine) {
    int8_t *codes = (int8_t *)(((uintptr_t)memory + 63) & ~(uintptr_t)63);
    if (tokens <= MATRIX_FEW || (MATRIX && !matrix_allowed())) fine = 1; /* arithmetic is not what is waited for */
    return (struct suri_input){tokens, columns, fine, codes, (struct suri_group *)(codes + (tokens * columns << fine))};
}

INLINE void quantise(const float *from, int fine, int8_t *codes, struct suri_group *group) {
    /* The bits of |x| order like the numbers, with infinities and then NaN above all. */
    uint32_t bits[GROUP], top = 0;
    memcpy(bits, from, sizeof bits);
    for (int j = 0; j < GROUP; j++) {
        uint32_t size = bits[j] & 0x7fffffff;
        top = size > top ? size : top;
    }
    float largest;
    memcpy(&largest, &top, 4);
    if (top >= 0x7f800000 || largest < 1e-30f) {
        uint32_t none = top >= 0x7f800000 ? 0x7fc00000 : 0;
        memset(codes, 0, (size_t)GROUP << fine);
        memset(group, 0, sizeof *group);
        memcpy(&group->scale, &none, 4);
        group->weighted = group->scale;
        return;
    }
    const float most = fine ? 128.0f * 127.0f : 127.0f, step = most / largest;
    int32_t sums[2] = {0, 0};
    for (int half = 0; half < 2; half++)
        for (int j = 16 * half; j < 16 * half + 16; j++) {
            /* Added to 1.5 * 2^23, a number is rounded to a whole one, ties to even, in the lowest bits. */
            float moved = from[j] * step + 12582912.0f;
            int32_t code, high;
            memcpy(&code, &moved, 4);
            code -= 0x4b400000;
            sums[half] += code;
            high = fine ? (code + 64) >> 7 : code;
            codes[j] = (int8_t)high;
            if (fine) codes[GROUP + j] = (int8_t)(code - 128 * high);
        }
    group->scale = largest / most;
    group->weighted = group->scale * (float)(sums[0] + sums[1]);
    group->sums[0] = sums[0], group->sums[1] = sums[1];
}

void suri_quantise(const float *x, const struct suri_input *input, int64_t first, int64_t last) {
    for (int64_t t = first; t < last; t++)
        for (int64_t g = 0; g < input->columns / GROUP; g++) {
            int64_t at = g * input->tokens + t;
            const float *from = x + t * input->columns + g * GROUP;
            if (input->fine) quantise(from, 1, input->codes + at * 2 * GROUP, input->groups + at);
            else quantise(from, 0, input->codes + at * GROUP, input->groups + at);
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
    int64_t tile_bytes = p->columns / (GROUP * shape.groups) * LANES * shape.bytes, tiles = tiles_in(p->rows);
    /* Pieces that take some microseconds, and several for each thread. */
    int64_t chunk = CHUNK_BYTES / tile_bytes, most = tiles / (4 * threads);
    if (chunk > most) chunk = most;
    /* So many tokens at a time that their codes stay in the second cache while all weights pass by. */
    int64_t tokens = p->input->tokens, at_once = INPUT_BYTES / (p->columns << p->input->fine) / MATRIX_TOKENS * MATRIX_TOKENS;
    if (at_once < 2 * MATRIX_TOKENS) at_once = 2 * MATRIX_TOKENS;
    for (int64_t first = 0; first < tokens; first += at_once) {
        struct suri_product some = *p;
        some.first = first, some.last = first + at_once < tokens ? first + at_once : tokens;
        suri_parallel(threads, tiles, chunk < 1 ? 1 : chunk, part, &some);
    }
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
 * matrices: each in tiles, or as in a file with `in_rows`. fine: 0 or 1. Returns 0, or -1 where there is no memory. */
int suri_product(int format, int in_rows, int parts, const uint8_t *const *matrices, const int64_t *rows, int64_t columns,
                 const float *x, int64_t tokens, int fine, float *out, int threads) {
    void *memory = malloc((size_t)suri_input_bytes(tokens, columns, fine));
    if (!memory) return -1;
    struct suri_input input = suri_input_in(memory, tokens, columns, fine);
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
