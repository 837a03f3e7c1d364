/* AMX where the processor has it: dot products of one group of a tile with 4, 8 or 16 tokens at once. Whole numbers, so the
 * same as vectors.h computes one token at a time. many.h uses it for what has more tokens.
 *
 * The unpacked codes of a group, eight vectors of four columns of each row, are what AMX wants of its second factor;
 * the codes of tokens, one after the other, of its first. Activations have high and low parts. Either the codes come
 * twice, first multiplied by 2^low, so that one product sums both: 16 tokens a register. Or each token is two rows, one of
 * high parts and one of low, and as many sums: 8 tokens a register. So it is with codes that fill a byte.
 */
#ifndef SURI_MATRIX_H
#define SURI_MATRIX_H
#include "amx.h"
#include "formats.h"

enum { MATRIX_TOKENS = 16, MATRIX_FEW = 8, MATRIX_FEWEST = 4 };

/* So few tokens are faster one at a time. */
INLINE int matrix_worth_it(struct shape shape) { return shape.halved ? 4 : 3; }

#if MATRIX
typedef int8_t line[64];
enum { APART_TOKENS = 8 }; /* so many are two rows each in one register */

/* Registers: 0 and 1 sums, 2 and 3 activations, 4 codes. tokens: that there are, MATRIX_TOKENS at most. */
INLINE void matrix_begin(struct shape shape, int tokens) {
    const int apart = shape.codes_signed;
    const uint8_t rows = (uint8_t)(!apart ? tokens : tokens > APART_TOKENS ? 2 * APART_TOKENS : 2 * tokens);
    const uint16_t wide = apart ? GROUP : 2 * GROUP;
    struct matrix_registers registers = {1, 0, {0}, {64, 64, wide, wide, 64}, {rows, rows, rows, rows, apart ? 8 : 16}};
    matrix_configure(&registers);
}

/* The lines of 64 bytes that the codes of a group take, and that its sums do. */
INLINE int code_lines(struct shape shape) { return shape.codes_signed ? 8 : shape.halved ? 32 : 16; }

INLINE int sum_lines(struct shape shape, int at_once) { return shape.codes_signed || shape.halved ? 2 * at_once : at_once; }

/* The codes of a group as matrix_dots wants them, less what is taken off them, so that sums need no correction. Where
 * codes come twice and halves of the columns are summed apart, they are two factors, and each is zero (and has been made
 * so) where the other is not. mask: the bits of a byte that are left of a code times 2^low. */
INLINE void matrix_codes(struct shape shape, lanes low, lanes mask, const struct group *group, line *to) {
    for (int u = 0; u < 8; u++) {
        lanes codes = group->codes[u];
        if (shape.offset) codes = _mm512_sub_epi8(codes, _mm512_set1_epi8((char)shape.offset));
        if (shape.codes_signed) {
            store(to[u], codes);
            continue;
        }
        int at = shape.halved && u >= 4 ? 16 + u : u;
        lanes moved = _mm512_sllv_epi32(codes, low);
        store(to[at], shape.offset ? both(moved, mask) : moved);
        store(to[at + 8], codes);
    }
}

/* Of each token the sum of all columns; or the sums of its high and of its low parts; or of all tokens that of columns
 * 0 .. 15, then of 16 .. 31. `x`: a token's 64 bytes; the next token's follow. */
INLINE void matrix_dots(struct shape shape, int at_once, const line *codes, const int8_t *x, int32_t (*sums)[LANES]) {
    if (shape.codes_signed) {
        _tile_zero(0);
        _tile_loadd(4, codes[0], 64);
        _tile_loadd(2, x, GROUP);
        _tile_dpbssd(0, 2, 4);
        _tile_stored(0, sums[0], 64);
        if (at_once <= APART_TOKENS) return;
        _tile_zero(1);
        _tile_loadd(3, x + 2 * GROUP * APART_TOKENS, GROUP);
        _tile_dpbssd(1, 3, 4);
        _tile_stored(1, sums[2 * APART_TOKENS], 64);
        return;
    }
    _tile_zero(0);
    _tile_loadd(4, codes[0], 64);
    _tile_loadd(2, x, 64);
    if (shape.offset) _tile_dpbssd(0, 2, 4);
    else _tile_dpbsud(0, 2, 4); /* times 2^low they fill a byte */
    _tile_stored(0, sums[0], 64);
    if (shape.halved) {
        _tile_zero(1);
        _tile_loadd(4, codes[16], 64);
        _tile_dpbssd(1, 2, 4);
        _tile_stored(1, sums[at_once], 64);
    }
}

/* Of one token what has been summed, as dot() of kernel.h has it. */
INLINE lanes matrix_sum(struct shape shape, lanes low, const int32_t (*sums)[LANES], int token) {
    if (!shape.codes_signed) return load(sums[token]);
    return plus(_mm512_sllv_epi32(load(sums[2 * token]), low), load(sums[2 * token + 1]));
}
#endif
#endif
