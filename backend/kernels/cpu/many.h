/* Many tokens at once, by AMX: some rows and columns of the weights become bfloat16 for all tokens, which are bfloat16
 * too; products are exact and sums float32. A value loses at most 2^-8 of its size by it, half that of its last bit; many
 * times the tokens a second pass through in return, as nothing has to be scaled between.
 */
#ifndef SURI_MANY_H
#define SURI_MANY_H
#include "formats.h"
#include "matrix.h"
#include "product.h"
#include "retile.h"

INLINE int64_t rows_of_tile(const struct suri_product *p, int64_t n) {
    return p->rows - n * LANES < LANES ? p->rows - n * LANES : LANES;
}

#if MATRIX
enum { MANY_GROUPS = 18, MANY_AT_ONCE = 32 /* tokens, and rows */, MOST_BYTES = 210 };

typedef uint16_t factor[GROUP * LANES]; /* 16 pairs of columns; of each pair all rows: what AMX wants of a second factor */

/* Column `byte` of four, of each row. */
INLINE floats value_of(struct shape shape, lanes codes, int byte, floats scale, floats base) {
    lanes code;
    if (shape.codes_signed) code = right_signed(byte == 3 ? codes : left(codes, 24 - 8 * byte), 24);
    else code = byte == 3 ? right(codes, 24) : both(right(codes, 8 * byte), all(0xff));
    if (shape.minimum || shape.offset) return add_product(base, scale, to_floats(code));
    return product(scale, to_floats(code));
}

INLINE void fill_factor(struct shape shape, const struct group *group, uint16_t *to) {
    /* Two vectors become one of 16-bit numbers, one after the other; wanted in turn. */
    const __m512i in_turn = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                             21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    floats less = all_float((float)-shape.offset); /* a power of two, so scale * (code - offset) is rounded once */
    floats base = shape.minimum ? group->minimum : product(group->scale, less);
#pragma GCC unroll 8
    for (int u = 0; u < 8; u++)
        for (int pair = 0; pair < 2; pair++) {
            int other = shape.halved && u >= 4;
            floats scale = other ? group->second : group->scale, from = other ? product(group->second, less) : base;
            floats even = value_of(shape, group->codes[u], 2 * pair, scale, from);
            floats odd = value_of(shape, group->codes[u], 2 * pair + 1, scale, from);
            store(to + 32 * (2 * u + pair), _mm512_permutexvar_epi16(in_turn, (__m512i)_mm512_cvtne2ps_pbh(odd, even)));
        }
}

/* `blocks` blocks of a tile's columns from `block` on; factors: of the first group, the next MANY_TILES further on. */
INLINE void fill_factors(enum format format, const struct suri_product *p, const uint8_t *tile, int64_t block, int64_t blocks,
                         factor *to) {
    struct shape shape = shape_of(format);
    int64_t row_bytes = p->columns / (GROUP * shape.groups) * shape.bytes;
    for (int64_t b = block; b < block + blocks; b++) {
        _Alignas(64) uint8_t turned[LANES * MOST_BYTES];
        const uint8_t *from = tile + b * LANES * shape.bytes;
        struct record record;
        struct group group;
        if (p->in_rows) {
            one_record(format, tile + b * shape.bytes, row_bytes, turned);
            from = turned;
        }
        open_record(format, from, &record);
        for (int g = 0; g < shape.groups; g++, to += MANY_TILES) {
            unpack(format, from, &record, g, &group);
            fill_factor(shape, &group, *to);
        }
    }
}

/* Up to 32 tokens and 32 rows: out += x factors, or = at the `beginning`. x: a group's tokens; the next group's `step`
 * bytes further on. */
INLINE void multiply_block(factor *one, factor *other, const int8_t *x, int64_t step, int groups, float *out, int64_t stride,
                           int tokens, int rows, int beginning) {
    _Alignas(64) float beside[4][16 * LANES]; /* for what is smaller than 16 tokens and rows */
    float *at[4], *place[4];
    int64_t apart[4];
    int high[4];
    size_t wide[4];
    for (int q = 0; q < 4; q++) {
        int own = tokens - 16 * (q / 2), width = rows - 16 * (q % 2);
        place[q] = out + 16 * (q / 2) * stride + 16 * (q % 2), at[q] = place[q], apart[q] = stride * 4, high[q] = 0;
        if (own >= 16 && width >= 16) continue;
        high[q] = width <= 0 || own < 0 ? 0 : own < 16 ? own : 16;
        wide[q] = width < 16 ? (size_t)width * 4 : 64;
        at[q] = beside[q], apart[q] = 64;
        for (int t = 0; !beginning && t < high[q]; t++) memcpy(beside[q] + t * 16, place[q] + t * stride, wide[q]);
    }
#define BEGIN(q)                  \
    if (beginning) _tile_zero(q); \
    else _tile_loadd(q, at[q], apart[q])
#define END(q) _tile_stored(q, at[q], apart[q])
    if (tokens > 16 && rows > 16) {
        BEGIN(0);
        BEGIN(1);
        BEGIN(2);
        BEGIN(3);
        for (int g = 0; g < groups; g++, x += step, one += MANY_TILES, other += MANY_TILES) {
            _tile_loadd(4, x, 64);
            _tile_loadd(6, *one, 64);
            _tile_loadd(7, *other, 64);
            _tile_loadd(5, x + 16 * 64, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        END(0);
        END(1);
        END(2);
        END(3);
    } else if (tokens > 16) {
        BEGIN(0);
        BEGIN(2);
        for (int g = 0; g < groups; g++, x += step, one += MANY_TILES) {
            _tile_loadd(4, x, 64);
            _tile_loadd(6, *one, 64);
            _tile_loadd(5, x + 16 * 64, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(2, 5, 6);
        }
        END(0);
        END(2);
    } else {
        BEGIN(0);
        BEGIN(1);
        for (int g = 0; g < groups; g++, x += step, one += MANY_TILES, other += MANY_TILES) {
            _tile_loadd(4, x, 64);
            _tile_loadd(6, *one, 64);
            _tile_loadd(7, *other, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
        }
        END(0);
        if (rows > 16) END(1);
    }
#undef BEGIN
#undef END
    for (int q = 0; q < 4; q++)
        for (int t = 0; t < high[q]; t++) memcpy(place[q] + t * stride, beside[q] + t * 16, wide[q]);
}

/* Tokens after the few, for rows of up to MANY_TILES tiles. `filled`: stands for the last of them, or 0. */
INLINE void many_tiles(enum format format, const struct suri_product *p, int64_t tile, int tiles, const uint8_t *filled) {
    struct shape shape = shape_of(format);
    const struct suri_input *in = p->input;
    int64_t blocks = p->columns / (GROUP * shape.groups), tile_bytes = blocks * LANES * shape.bytes;
    _Alignas(64) factor factors[MANY_GROUPS][MANY_TILES];
    /* Columns in as few parts as fit, and of about the same size: after each, sums go to memory. */
    const int64_t parts = (blocks * shape.groups + MANY_GROUPS - 1) / MANY_GROUPS;
    int64_t most = (blocks + parts - 1) / parts;
    if (most > MANY_GROUPS / shape.groups) most = MANY_GROUPS / shape.groups;
    for (int64_t block = 0; block < blocks; block += most) {
        int64_t count = blocks - block < most ? blocks - block : most;
        for (int n = 0; n < tiles; n++)
            fill_factors(format, p, filled && n + 1 == tiles ? filled : p->tiles + (tile + n) * tile_bytes, block, count,
                         &factors[0][n]);
        for (int64_t token = in->few; token < in->tokens; token += MANY_AT_ONCE) {
            int tokens = in->tokens - token < MANY_AT_ONCE ? (int)(in->tokens - token) : MANY_AT_ONCE;
            const int8_t *x = in->codes + (block * shape.groups * in->tokens + token) * 2 * GROUP;
            for (int n = 0; n < tiles; n += 2) {
                int64_t row = (tile + n) * LANES, last = (tile + tiles) * LANES < p->rows ? (tile + tiles) * LANES : p->rows;
                int rows = last - row < MANY_AT_ONCE ? (int)(last - row) : MANY_AT_ONCE, other = n + 1 < tiles ? n + 1 : n;
                multiply_block(&factors[0][n], &factors[0][other], x, in->tokens * 2 * GROUP, (int)count * shape.groups,
                               p->out + token * p->stride + row, p->stride, tokens, rows, block == 0);
            }
        }
    }
}

INLINE void many_tokens(enum format format, const struct suri_product *p, int64_t first, int64_t last, const uint8_t *filled) {
    matrix_whole();
    for (int64_t n = first; n < last; n += MANY_TILES) {
        int tiles = last - n < MANY_TILES ? (int)(last - n) : MANY_TILES;
        many_tiles(format, p, n, tiles, n + tiles == last ? filled : 0);
    }
    matrix_end();
}
#endif
#endif
