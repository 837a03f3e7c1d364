/* The loops over a tile: products with activations, and values. product_32.c and product_256.c make a copy for each
 * format, in two files because compilers take one after the other in the time of one.
 */
#ifndef SURI_KERNEL_H
#define SURI_KERNEL_H
#include "formats.h"
#include "matrix.h"
#include "product.h"
#include "retile.h"

#include <stdlib.h>

enum { TOKENS = 64 /* their sums stay in the first cache */, TURNED_BYTES = 8 << 10, FAR = 20 << 10, NEAR = 3 << 10 };

/* Columns 4 * from .. 4 * to of a group: whole numbers, exact, below 2^28. */
INLINE lanes dot(struct shape shape, int fine, const struct group *group, const int8_t *x, int32_t sum, int from, int to) {
    /* Two chains, so that one need not wait for the other. */
    lanes one = all(0), other = all(0);
#define DOT(sum, u, at) \
    (shape.codes_signed ? dot_signed(sum, group->codes[u], word_at(at)) : dot_codes(sum, group->codes[u], word_at(at)))
    for (int u = from; u < to; u++)
        if (fine) {
            one = DOT(one, u, x + 4 * u);
            other = DOT(other, u, x + GROUP + 4 * u);
        } else if (u & 1) one = DOT(one, u, x + 4 * u);
        else other = DOT(other, u, x + 4 * u);
    return plus(plus(fine ? left(one, 7) : one, other), all(-(shape.codes_signed ? SIGNED_OFFSET : shape.offset) * sum));
}

/* What a group adds to a token's sums. first: the dots with all columns, or with the first 16 where there are two
 * scales, and second with the others. */
INLINE floats add_group(struct shape shape, floats sum, const struct group *group, const struct suri_group *about,
                        lanes first, lanes second) {
    floats scaled = product(group->scale, to_floats(first));
    if (shape.halved) scaled = add_product(scaled, group->second, to_floats(second));
    sum = add_product(sum, scaled, all_float(about->scale));
    return shape.minimum ? add_product(sum, group->minimum, all_float(about->weighted)) : sum;
}

INLINE floats with_group(struct shape shape, int fine, floats sum, const struct group *group, const int8_t *x,
                         const struct suri_group *about) {
    if (shape.halved)
        return add_group(shape, sum, group, about, dot(shape, fine, group, x, about->sums[0], 0, 4),
                         dot(shape, fine, group, x, about->sums[1], 4, 8));
    lanes whole = dot(shape, fine, group, x, about->sums[0] + about->sums[1], 0, 8);
    return add_group(shape, sum, group, about, whole, whole);
}

/* The same for many tokens, 16 at a time. */
INLINE void with_group_many(struct shape shape, int fine, float *sums, const struct group *group, const int8_t *x,
                            const struct suri_group *about, int tokens) {
    _Alignas(64) uint8_t codes[8][64];
    lanes first[MATRIX_TOKENS], second[MATRIX_TOKENS];
    const int offset = shape.codes_signed ? 0 : -shape.offset;
    for (int u = 0; u < 8; u++) store(codes[u], group->codes[u]);
    for (int from = 0; from < tokens; from += MATRIX_TOKENS) {
        matrix_dots(shape, fine, codes[0], x + from * (GROUP << fine), first, second);
        for (int t = from; t < tokens && t < from + MATRIX_TOKENS; t++) {
            const int32_t *s = about[t].sums;
            lanes one = plus(first[t - from], all(offset * (shape.halved ? s[0] : s[0] + s[1]))), other = one;
            if (shape.halved) other = plus(second[t - from], all(offset * s[1]));
            store_floats(sums + t * LANES, add_group(shape, load_floats(sums + t * LANES), group, about + t, one, other));
        }
    }
}

/* `blocks` records of a tile, from column block `block` on, and up to TOKENS tokens, with AMX or without. Adds to sums,
 * which begin as zeros. Each token's sum takes the groups in the same order, however many tokens there are.
 *
 * `ahead`: what follows in memory is asked for, every line of it: far ahead into the second cache, which waits for many
 * more lines at once than the first, and near into the first. Left to the processor, reading takes a third longer. */
INLINE void records(enum format format, int fine, int matrix, int ahead, const uint8_t *from, int64_t block,
                    int64_t blocks, const struct suri_input *in, int64_t token, int tokens, float *sums) {
    struct shape shape = shape_of(format);
    floats alone = load_floats(sums);
    int64_t at = block * shape.groups * in->tokens + token;
    for (; blocks; blocks--, from += LANES * shape.bytes) {
        struct record record;
        struct group group;
        open_record(format, from, &record);
        for (int g = 0; g < shape.groups; g++, at += in->tokens) {
            const int8_t *x = in->codes + at * (GROUP << fine);
            const struct suri_group *about = in->groups + at;
            if (ahead)
                for (int line = 0; line < LANES * shape.bytes / shape.groups; line += 64) {
                    const uint8_t *here = from + g * (LANES * shape.bytes / shape.groups) + line;
                    __builtin_prefetch(here + FAR, 0, 2);
                    __builtin_prefetch(here + NEAR, 0, 3);
                }
            unpack(format, from, &record, g, &group);
            if (tokens == 1) alone = with_group(shape, fine, alone, &group, x, about);
            else if (matrix) with_group_many(shape, fine, sums, &group, x, about, tokens);
            else
                for (int t = 0; t < tokens; t++) {
                    floats sum = load_floats(sums + t * LANES);
                    sum = with_group(shape, fine, sum, &group, x + t * (GROUP << fine), about + t);
                    store_floats(sums + t * LANES, sum);
                }
        }
    }
    if (tokens == 1) store_floats(sums, alone);
}

INLINE void records_of(enum format format, int matrix, int ahead, const uint8_t *from, int64_t block, int64_t blocks,
                       const struct suri_input *in, int64_t token, int tokens, float *sums) {
    if (in->tokens == 1 && in->fine) records(format, 1, 0, ahead, from, block, blocks, in, 0, 1, sums);
    else if (in->fine && !matrix) records(format, 1, 0, ahead, from, block, blocks, in, token, tokens, sums);
    else if (in->fine) records(format, 1, MATRIX, ahead, from, block, blocks, in, token, tokens, sums);
    else /* with AMX only where that is used */
        records(format, 0, MATRIX, ahead, from, block, blocks, in, token, tokens, sums);
}

/* The same for 16 rows as the file has them: turned into records a little at a time, which stay in the first cache. */
INLINE void rows_of(enum format format, int matrix, const uint8_t *rows, int64_t row_bytes, const struct suri_input *in,
                    int64_t token, int tokens, float *sums) {
    struct shape shape = shape_of(format);
    _Alignas(64) uint8_t turned[TURNED_BYTES];
    const int64_t most = TURNED_BYTES / (LANES * shape.bytes), blocks = row_bytes / shape.bytes;
    for (int64_t block = 0; block < blocks; block += most) {
        int64_t count = blocks - block < most ? blocks - block : most;
        for (int64_t b = 0; b < count; b++) {
            const uint8_t *from = rows + (block + b) * shape.bytes;
            /* The next 16 rows are one stretch of memory: asked for line by line, as it is read in 16 places at once. */
            for (int line = 0; line < LANES * shape.bytes; line += 64)
                __builtin_prefetch(rows + LANES * (row_bytes + (block + b) * shape.bytes) + line);
            one_record(format, from, row_bytes, turned + b * LANES * shape.bytes);
        }
        records_of(format, matrix, 0, turned, block, count, in, token, tokens, sums);
    }
}

INLINE void tiles_of(enum format format, const struct suri_product *p, int64_t first, int64_t last) {
    const struct suri_input *in = p->input;
    struct shape shape = shape_of(format);
    int64_t blocks = p->columns / (GROUP * shape.groups), row_bytes = blocks * shape.bytes, tile_bytes = LANES * row_bytes;
    _Alignas(64) float sums[TOKENS * LANES];
    int matrix = in->tokens > MATRIX_WORTH_IT && matrix_allowed();
    if (matrix) matrix_begin();
    for (int64_t n = first; n < last; n++) {
        int64_t rows = p->rows - n * LANES < LANES ? p->rows - n * LANES : LANES;
        const uint8_t *from = p->tiles + n * tile_bytes;
        uint8_t *filled = 0;
        if (p->in_rows && rows < LANES) { /* the last rows: filled up with zeros */
            filled = calloc(1, (size_t)tile_bytes);
            if (!filled) abort();
            from = memcpy(filled, from, (size_t)(rows * row_bytes));
        }
        for (int64_t token = 0; token < in->tokens; token += TOKENS) {
            int tokens = in->tokens - token < TOKENS ? (int)(in->tokens - token) : TOKENS;
            memset(sums, 0, (size_t)tokens * LANES * sizeof(float));
            if (p->in_rows) rows_of(format, matrix, from, row_bytes, in, token, tokens, sums);
            else records_of(format, matrix, 1, from, 0, blocks, in, token, tokens, sums);
            for (int t = 0; t < tokens; t++)
                memcpy(p->out + (token + t) * p->stride + n * LANES, sums + t * LANES, (size_t)rows * sizeof(float));
        }
        free(filled);
    }
    if (matrix) matrix_end();
}

/* Values of rows 16 first .. 16 last as float32, (rows, columns): what the codes mean, without activations. */
INLINE void values_of(enum format format, const struct suri_product *p, int64_t first, int64_t last) {
    struct shape shape = shape_of(format);
    int64_t blocks = p->columns / (GROUP * shape.groups);
    for (int64_t n = first; n < last; n++) {
        int rows = p->rows - n * LANES < LANES ? (int)(p->rows - n * LANES) : LANES;
        for (int64_t b = 0; b < blocks; b++) {
            const uint8_t *from = p->tiles + (n * blocks + b) * LANES * shape.bytes;
            struct record record;
            struct group group;
            open_record(format, from, &record);
            for (int g = 0; g < shape.groups; g++) {
                int8_t codes[8][LANES][4];
                float scale[LANES], second[LANES], minimum[LANES];
                unpack(format, from, &record, g, &group);
                for (int u = 0; u < 8; u++) store(codes[u], group.codes[u]);
                store_floats(scale, group.scale);
                if (shape.halved) store_floats(second, group.second);
                if (shape.minimum) store_floats(minimum, group.minimum);
                for (int r = 0; r < rows; r++) {
                    float *to = p->out + (n * LANES + r) * p->stride + (b * shape.groups + g) * GROUP;
                    for (int j = 0; j < GROUP; j++) {
                        float own = shape.halved && j >= 16 ? second[r] : scale[r];
                        float value = (float)(codes[j / 4][r][j % 4] - shape.offset) * own;
                        to[j] = shape.minimum ? value + minimum[r] : value;
                    }
                }
            }
        }
    }
}
#endif
