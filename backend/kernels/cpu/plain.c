/* Products of weights that are plain 16-bit numbers with few tokens: activations stay float32, and so do sums.
 *
 * With one token torch's own product of bfloat16 reads memory at half its speed or less, and rounds the activations. A
 * row's result is the same whoever computes it, and however many tokens there are.
 */
#include "plain.h"

#include "wide.h"

enum { TOKENS = 4, ROWS = 4, STEP = 2 * LANES, AHEAD = 1024 /* elements */, PIECE = 1 << 16 /* bytes */ };

struct job {
    enum kind kind;
    const float *x; /* (tokens, columns) */
    int64_t tokens, columns, rows;
    const uint16_t *weights; /* (rows, columns) */
    float *y;                /* (tokens, rows), each token's `stride` values after the last one's */
    int64_t stride;
};

INLINE floats widened(enum kind kind, const uint16_t *from) {
    return kind == BF16 ? from_bfloat16(from) : from_float16(from);
}

INLINE float one_of(enum kind kind, uint16_t bits) {
    uint16_t wide[LANES] = {bits};
    return widened(kind, wide)[0];
}

/* Rows r .. r + rows - 1 for tokens t .. t + tokens - 1: numbers that are constants where this is inlined. */
INLINE void block(enum kind kind, int tokens, int rows, const struct job *j, int64_t t, int64_t r) {
    int64_t columns = j->columns, k = 0;
    const uint16_t *weights = j->weights + r * columns;
    const float *x = j->x + t * columns;
    floats even[TOKENS][ROWS], odd[TOKENS][ROWS]; /* two chains, so that one need not wait for the other */
    for (int n = 0; n < tokens; n++)
        for (int i = 0; i < rows; i++) even[n][i] = odd[n][i] = all(0.0f);
    for (; k + STEP <= columns; k += STEP) {
        for (int i = 0; i < rows; i++) __builtin_prefetch(weights + i * columns + k + AHEAD);
        for (int i = 0; i < rows; i++) {
            floats first = widened(kind, weights + i * columns + k);
            floats second = widened(kind, weights + i * columns + k + LANES);
            for (int n = 0; n < tokens; n++) {
                even[n][i] = first * load(x + n * columns + k) + even[n][i];
                odd[n][i] = second * load(x + n * columns + k + LANES) + odd[n][i];
            }
        }
    }
    for (int n = 0; n < tokens; n++)
        for (int i = 0; i < rows; i++) {
            float sum = sum_of(even[n][i] + odd[n][i]);
            for (int64_t rest = k; rest < columns; rest++)
                sum += x[n * columns + rest] * one_of(kind, weights[i * columns + rest]);
            j->y[(t + n) * j->stride + r + i] = sum;
        }
}

INLINE void rows_of(enum kind kind, int rows, const struct job *j, int64_t r) {
    int64_t t = 0;
    /* Two rows for several tokens: their sums fill the registers. */
    for (; t + TOKENS <= j->tokens; t += TOKENS)
        for (int i = 0; i < rows; i += rows > 1 ? 2 : 1) block(kind, TOKENS, rows > 1 ? 2 : 1, j, t, r + i);
    for (; t + 2 <= j->tokens; t += 2) block(kind, 2, rows, j, t, r);
    for (; t < j->tokens; t++) block(kind, 1, rows, j, t, r);
}

INLINE void part(enum kind kind, const struct job *j, int64_t first, int64_t last) {
    int64_t r = first;
    for (; r + ROWS <= last; r += ROWS) rows_of(kind, ROWS, j, r);
    for (; r < last; r++) rows_of(kind, 1, j, r);
}

static void bf16_part(const void *argument, int64_t first, int64_t last) { part(BF16, argument, first, last); }

static void f16_part(const void *argument, int64_t first, int64_t last) { part(F16, argument, first, last); }

/* y = x W^T. x float32 (tokens, columns), weights (rows, columns) of `kind`, y float32 (tokens, rows). */
void suri_plain(int kind, const float *x, int64_t tokens, int64_t columns, const uint16_t *weights, int64_t rows,
                float *y, int64_t stride, suri_parallel_for *on_pool, int threads) {
    struct job job = {(enum kind)kind, x, tokens, columns, rows, weights, y, stride};
    int64_t chunk = PIECE / (2 * columns) / ROWS * ROWS;
    on_pool(threads, rows, chunk > ROWS ? chunk : ROWS, kind == BF16 ? bf16_part : f16_part, &job);
}
