/* Dot products of one group of a tile with 8 or 16 tokens at once, by AMX where the processor has it. Whole numbers, so the
 * same as vectors.h computes one token at a time.
 *
 * The unpacked codes of a group, eight vectors of four columns of each row, are what AMX wants of its second factor;
 * the codes of 16 tokens, one after the other, of its first.
 */
#ifndef SURI_MATRIX_H
#define SURI_MATRIX_H
#include "formats.h"

enum { MATRIX_TOKENS = 16, MATRIX_FEW = 8, MATRIX_WORTH_IT = 6 /* so few tokens are faster one at a time */ };

struct sums {
    _Alignas(64) int32_t high[MATRIX_TOKENS][LANES], low[MATRIX_TOKENS][LANES];
};

#if defined(__AMX_INT8__) && defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__linux__) && !defined(SURI_PORTABLE)
#include <sys/syscall.h>
#include <unistd.h>

enum { MATRIX = 1 };

/* The system gives the large registers to those who ask; once for the process. */
INLINE int matrix_allowed(void) {
    static _Atomic int known; /* 0: not asked yet */
    if (!known) known = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0 ? 1 : -1;
    return known > 0;
}

/* Registers: 0 and 1 sums, 2 and 3 codes of activations and weights of 32 columns, 4 and 5 of 16 columns. */
INLINE void matrix_begin(int tokens) { /* at once: MATRIX_TOKENS or MATRIX_FEW */
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {1, 0, {0}, {64, 64, 32, 64, 16, 64}, {tokens, tokens, tokens, 8, tokens, 4}};
    _tile_loadconfig(&config);
}

INLINE void matrix_end(void) { _tile_release(); }

/* Signed codes: what is taken off them is taken off before, so that sums need no correction. */
INLINE lanes signed_codes(lanes codes, int offset) { return _mm512_sub_epi8(codes, _mm512_set1_epi8((char)offset)); }

/* Columns 0 .. 31, or 16 .. 31 and 0 .. 15: first (and second) get the sums of the tokens, one vector a token, and of the
 * low parts of the activations where these are `fine`. `x` of token t is at x + t * step; its low parts 32 bytes on. */
INLINE void matrix_dots(struct shape shape, int fine, const int8_t *codes, const int8_t *x, struct sums *first,
                        struct sums *second) {
    const int step = GROUP << fine;
#define DOTS(a, b, from, out)                      \
    do {                                           \
        _tile_zero(0);                             \
        _tile_loadd(b, codes + (from) * LANES, 64); \
        _tile_loadd(a, x + (from), step);          \
        _tile_dpbssd(0, a, b);                     \
        _tile_stored(0, (out)->high, 64);          \
        if (fine) {                                \
            _tile_zero(1);                         \
            _tile_loadd(a, x + GROUP + (from), step); \
            _tile_dpbssd(1, a, b);                 \
            _tile_stored(1, (out)->low, 64);       \
        }                                          \
    } while (0)
    if (shape.halved) {
        DOTS(4, 5, 0, first);
        DOTS(4, 5, 16, second);
    } else DOTS(2, 3, 0, first);
#undef DOTS
}
#else
enum { MATRIX = 0 };
INLINE int matrix_allowed(void) { return 0; }
INLINE void matrix_begin(int tokens) { /* at once: MATRIX_TOKENS or MATRIX_FEW */}
INLINE void matrix_end(void) {}
INLINE lanes signed_codes(lanes codes, int offset) { return (void)offset, codes; }
INLINE void matrix_dots(struct shape shape, int fine, const int8_t *codes, const int8_t *x, struct sums *first,
                        struct sums *second) {
    (void)shape, (void)fine, (void)codes, (void)x, (void)first, (void)second;
}
#endif
#endif
