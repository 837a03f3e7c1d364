/* The loops over a tile: products with activations, and values. product_32.c and product_256.c make a copy for each
 * format, in two files because compilers take one after the other in the time of one.
 */
#ifndef SURI_KERNEL_H
#define SURI_KERNEL_H
#include "formats.h"
#include "many.h"
#include "matrix.h"
#include "product.h"
#include "retile.h"
#include "staged.h"

#include <stdlib.h>

enum { TOKENS = 128 /* their sums stay in the first cache */ };

struct panel; /* of staged.h, where there is AMX */

/* Columns 4 * from .. 4 * to of a group: whole numbers, exact, below 2^28. */
INLINE lanes dot(struct shape shape, int low, const struct group *group, const int8_t *x, int32_t sum, int from, int to) {
    /* Four chains, so that none need wait for another. */
    lanes high[2] = {all(0), all(0)}, rest[2] = {all(0), all(0)};
#define DOT(sum, u, at) \
    (shape.codes_signed ? dot_signed(sum, group->codes[u], word_at(at)) : dot_codes(sum, group->codes[u], word_at(at)))
    for (int u = from; u < to; u++) {
        high[u & 1] = DOT(high[u & 1], u, x + 4 * u);
        rest[u & 1] = DOT(rest[u & 1], u, x + GROUP + 4 * u);
    }
#undef DOT
    lanes one = plus(high[0], high[1]), other = plus(rest[0], rest[1]);
    return plus(plus(left(one, low), other), all(-(shape.codes_signed ? SIGNED_OFFSET : shape.offset) * sum));
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

INLINE floats with_group(struct shape shape, int low, floats sum, const struct group *group, const int8_t *x,
                         const struct suri_group *about) {
    if (shape.halved)
        return add_group(shape, sum, group, about, dot(shape, low, group, x, about->sums[0], 0, 4),
                         dot(shape, low, group, x, about->sums[1], 4, 8));
    lanes whole = dot(shape, low, group, x, about->sums[0] + about->sums[1], 0, 8);
    return add_group(shape, sum, group, about, whole, whole);
}

/* `blocks` records of a tile, from column block `block` on, and up to TOKENS tokens, one after the other. Adds to sums,
 * which begin as zeros. Each token's sum takes the groups in the same order, however many tokens there are.
 * `ahead`: what follows in memory is asked for. */
INLINE void records(enum format format, int ahead, const uint8_t *from, int64_t block, int64_t blocks,
                    const struct suri_input *in, int64_t token, int tokens, float *sums) {
    struct shape shape = shape_of(format);
    floats alone = load_floats(sums);
    int64_t at = block * shape.groups * in->tokens + token;
    for (; blocks; blocks--, from += LANES * shape.bytes) {
        struct record record;
        struct group group;
        open_record(format, from, &record);
        for (int g = 0; g < shape.groups; g++, at += in->tokens) {
            const int8_t *x = in->codes + at * 2 * GROUP;
            const struct suri_group *about = in->groups + at;
            const int bytes = LANES * shape.bytes / shape.groups;
            if (ahead) ask_ahead(from + g * bytes, bytes);
            unpack(format, from, &record, g, &group);
            if (tokens == 1) alone = with_group(shape, in->low, alone, &group, x, about);
            else
                for (int t = 0; t < tokens; t++) {
                    floats sum = load_floats(sums + t * LANES);
                    sum = with_group(shape, in->low, sum, &group, x + t * 2 * GROUP, about + t);
                    store_floats(sums + t * LANES, sum);
                }
        }
    }
    if (tokens == 1) store_floats(sums, alone);
}

INLINE void records_of(enum format format, int ahead, const uint8_t *from, int64_t block, int64_t blocks,
                       const struct suri_input *in, int64_t token, int tokens, float *sums) {
    if (tokens == 1) records(format, ahead, from, block, blocks, in, token, 1, sums);
    else records(format, ahead, from, block, blocks, in, token, tokens, sums);
}

INLINE void rows_of(enum format format, const uint8_t *rows, int64_t row_bytes, const struct suri_input *in, int64_t token,
                    int tokens, float *sums) {
    const struct shape shape = shape_of(format);
    _Alignas(64) uint8_t turned[TURNED_BYTES];
    const int64_t most = blocks_turned(shape), blocks = row_bytes / shape.bytes;
    for (int64_t block = 0; block < blocks; block += most) {
        int64_t count = blocks - block < most ? blocks - block : most;
        turn_rows(format, rows, row_bytes, block, count, turned);
        records_of(format, 0, turned, block, count, in, token, tokens, sums);
    }
}

/* The first tokens, as whole numbers: `at_once` of them by AMX, where there are panels, or one after the other. */
INLINE void few_tokens(enum format format, int at_once, const struct suri_product *p, int64_t n, const uint8_t *from,
                       struct panel *panels) {
    struct shape shape = shape_of(format);
    const struct suri_input *in = p->input;
    int64_t blocks = p->columns / (GROUP * shape.groups), rows = rows_of_tile(p, n);
    _Alignas(64) float sums[TOKENS * LANES];
    for (int64_t token = p->first; token < p->last; token += TOKENS) {
        int tokens = p->last - token < TOKENS ? (int)(p->last - token) : TOKENS;
        memset(sums, 0, (size_t)tokens * LANES * sizeof(float));
        /* Another thread may have written there: the lines are on their way while the sums are computed. */
        for (int t = 0; t < tokens; t++) __builtin_prefetch(p->out + (token + t) * p->stride + n * LANES, 1);
#if MATRIX
        if (panels) staged_tile(format, at_once, p, from, token, tokens, panels, sums);
        else
#endif
            if (p->in_rows) rows_of(format, from, blocks * shape.bytes, in, token, tokens, sums);
        else records_of(format, 1, from, 0, blocks, in, token, tokens, sums);
        float *out = p->out + token * p->stride + n * LANES;
        if (rows == LANES) /* of a size that the compiler knows */
            for (int t = 0; t < tokens; t++) store_floats(out + t * p->stride, load_floats(sums + t * LANES));
        else
            for (int t = 0; t < tokens; t++) memcpy(out + t * p->stride, sums + t * LANES, (size_t)rows * sizeof(float));
    }
}

/* `filled`: stands for the last tile, or 0. */
INLINE void few_tiles(enum format format, int at_once, const struct suri_product *p, int64_t first, int64_t last,
                      const uint8_t *filled) {
    const struct shape shape = shape_of(format);
    const int64_t tile_bytes = p->columns / (GROUP * shape.groups) * shape.bytes * LANES;
#if MATRIX
    struct panel room[STAGES], *panels = at_once ? room : 0;
    if (panels) begin_panels(shape, p->last - p->first < at_once ? (int)(p->last - p->first) : at_once, panels);
#else
    struct panel *panels = 0;
#endif
    for (int64_t n = first; n < last; n++)
        few_tokens(format, at_once, p, n, filled && n + 1 == last ? filled : p->tiles + n * tile_bytes, panels);
#if MATRIX
    if (panels) matrix_end();
#endif
}

INLINE void tiles_of(enum format format, const struct suri_product *p, int64_t first, int64_t last) {
    struct shape shape = shape_of(format);
    int64_t tile_bytes = p->columns / (GROUP * shape.groups) * shape.bytes * LANES;
    uint8_t *filled = 0; /* the last rows, where they are as in the file and fewer than 16: filled up with zeros */
    int64_t rows = rows_of_tile(p, last - 1);
    if (p->in_rows && rows < LANES) {
        if (!(filled = calloc(1, (size_t)tile_bytes))) abort();
        memcpy(filled, p->tiles + (last - 1) * tile_bytes, (size_t)(rows * (tile_bytes / LANES)));
    }
    const int64_t few = p->last - p->first;
    if (MATRIX && few > matrix_worth_it(shape) && matrix_allowed()) {
        if (few <= MATRIX_FEWEST) few_tiles(format, MATRIX_FEWEST, p, first, last, filled);
        else if (few <= MATRIX_FEW) few_tiles(format, MATRIX_FEW, p, first, last, filled);
        else few_tiles(format, MATRIX_TOKENS, p, first, last, filled);
    } else if (few)
        few_tiles(format, 0, p, first, last, filled);
#if MATRIX
    if (!p->first && p->input->few < p->input->tokens) many_tokens(format, p, first, last, filled);
#endif
    free(filled);
}

/* Values of rows 16 first .. 16 last as float32, (rows, columns): what the codes mean, without activations. Of each 16
 * rows those from p->first to p->last only, unless that is 0. */
INLINE void values_of(enum format format, const struct suri_product *p, int64_t first, int64_t last) {
    struct shape shape = shape_of(format);
    int64_t blocks = p->columns / (GROUP * shape.groups);
    for (int64_t n = first; n < last; n++) {
        int rows = p->rows - n * LANES < LANES ? (int)(p->rows - n * LANES) : LANES, row = (int)p->first;
        if (p->last) rows = (int)p->last;
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
                for (int r = row; r < rows; r++) {
                    float *to = p->out + (n * LANES + r - row) * p->stride + (b * shape.groups + g) * GROUP;
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
