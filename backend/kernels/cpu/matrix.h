/* AMX where the processor has it: dot products of one group of a tile with 8 or 16 tokens at once. Whole numbers, so the
 * same as vectors.h computes one token at a time. many.h uses it for what has more tokens.
 *
 * The unpacked codes of a group, eight vectors of four columns of each row, are what AMX wants of its second factor;
 * the codes of 16 tokens, one after the other, of its first. Activations have high and low parts: the codes come twice,
 * first multiplied by 2^low, so that one product sums both. Codes that fill a byte take two products.
 */
#ifndef SURI_MATRIX_H
#define SURI_MATRIX_H
#include "amx.h"
#include "formats.h"

enum { MATRIX_TOKENS = 16, MATRIX_FEW = 8, MATRIX_WORTH_IT = 4 /* so few tokens are faster one at a time */ };

struct sums {
    _Alignas(64) int32_t high[MATRIX_TOKENS][LANES], low[MATRIX_TOKENS][LANES];
};

#if MATRIX
/* Registers: 0 and 1 sums; 2 and 3 activations and codes, high and low parts; 4 and 5 one of the parts. tokens: at once,
 * MATRIX_TOKENS or MATRIX_FEW. */
INLINE void matrix_begin(int tokens) {
    uint8_t t = (uint8_t)tokens;
    struct matrix_registers registers = {1, 0, {0}, {64, 64, 64, 64, 32, 64}, {t, t, t, 16, t, 8}};
    _tile_loadconfig(&registers);
}

/* The codes of a group as matrix_dots wants them, less what is taken off them, so that sums need no correction. Formats
 * that take off nothing may have codes of all 8 bits: those are unsigned. Where halves of the columns are summed apart,
 * they are two factors, and each is zero (and has been made so) where the other is not. */
INLINE void matrix_codes(struct shape shape, int low, const struct group *group, int8_t (*to)[64]) {
    for (int u = 0; u < 8; u++) {
        lanes codes = group->codes[u];
        if (shape.codes_signed) {
            store(to[u], codes);
            continue;
        }
        if (shape.offset) codes = _mm512_sub_epi8(codes, _mm512_set1_epi8((char)shape.offset));
        int at = shape.halved && u >= 4 ? 16 + u : u;
        store(to[at], both(left(codes, low), all((int32_t)(0x01010101u * (0xffu & 0xffu << low)))));
        store(to[at + 8], codes);
    }
}

/* All columns, or columns 0 .. 15 and 16 .. 31: first (and second) get the sums of the tokens, one vector a token, and of
 * the low parts apart where codes fill a byte. `x`: a token's 64 bytes; the next token's follow. */
INLINE void matrix_dots(struct shape shape, int8_t (*codes)[64], const int8_t *x, struct sums *first, struct sums *second) {
    _tile_zero(0);
    if (shape.codes_signed) {
        _tile_zero(1);
        _tile_loadd(5, codes[0], 64);
        _tile_loadd(4, x, 64);
        _tile_dpbssd(0, 4, 5);
        _tile_loadd(4, x + GROUP, 64);
        _tile_dpbssd(1, 4, 5);
        _tile_stored(0, first->high, 64);
        _tile_stored(1, first->low, 64);
        return;
    }
    _tile_loadd(3, codes[0], 64);
    _tile_loadd(2, x, 64);
    if (shape.offset) _tile_dpbssd(0, 2, 3);
    else _tile_dpbsud(0, 2, 3);
    _tile_stored(0, first->high, 64);
    if (shape.halved) {
        _tile_zero(1);
        _tile_loadd(3, codes[16], 64);
        _tile_dpbssd(1, 2, 3);
        _tile_stored(1, second->high, 64);
    }
}
#endif
#endif
