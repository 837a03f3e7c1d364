/* Attention of a few queries over one key-value head of one sequence, 32 cached tokens at a time.
 *
 * A row is one query head of one token. Rows of the same key-value head share the work of unpacking keys and values. A
 * row's result is a left fold over chunks of CHUNK tokens at fixed positions of the sequence, and within a chunk over
 * blocks of 32: the same operations in the same order whether the row comes alone, among others, or split over threads.
 * Softmax over pieces: Milakov and Gimelshein 2018, arXiv:1805.02867.
 */
#ifndef SURI_ATTEND_H
#define SURI_ATTEND_H

#include <math.h> /* INFINITY */

#include "wide.h"

enum { BLOCK = 32, CHUNK = 256, MAX_HEAD = 256, MAX_ROWS = 32 };
enum { VECTORS = LANES == 16 ? 4 : 2 }; /* of four rows' sums in registers */
enum { KV_F32 = 0, KV_BF16 = 1, KV_F16 = 2, KV_INT8 = 3 };

/* Keys and values of one head in one layer: (slots, head_dim) of `kind`; blocks[n] has tokens 32 n .. 32 n + 31. Where
 * they are KV_INT8, each slot's are codes times its scale; else there are no scales. */
struct cached {
    const void *keys, *values;
    const float *key_scales, *value_scales; /* (slots,), or 0 */
    const int32_t *blocks;
    int kind, head_dim, width; /* width: head_dim rounded up to whole vectors */
};

/* What a row knows after some of the tokens: largest score, sum of e^(score - largest), and the values so weighted. */
struct folded {
    float largest, sum;
    float values[MAX_HEAD];
};

struct row {
    const float *query; /* (head_dim,), times 1 / sqrt(head_dim) */
    int64_t first, end; /* positions it sees: first .. end - 1 */
};

INLINE int whole_vectors(int64_t n) { return (int)((n + LANES - 1) / LANES * LANES); }

INLINE void empty(struct folded *state, int width) {
    state->largest = -INFINITY;
    state->sum = 0;
    memset(state->values, 0, sizeof(float) * (size_t)width);
}

INLINE floats widened(const void *from, int kind, int64_t at) {
    if (kind == KV_F32) return load((const float *)from + at);
    return kind == KV_BF16 ? from_bfloat16((const uint16_t *)from + at) : from_float16((const uint16_t *)from + at);
}

typedef int8_t codes __attribute__((vector_size(LANES)));
typedef int16_t shorts __attribute__((vector_size(2 * LANES)));

INLINE floats from_codes(const int8_t *from) {
    codes own;
    memcpy(&own, from, sizeof own);
    /* In steps of twice the width, which compilers have instructions for. */
    return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(own, shorts), ints), floats);
}

INLINE void widen_codes(const int8_t *from, float scale, int count, float *to) {
    int d = 0;
    for (; d + LANES <= count; d += LANES) store(to + d, from_codes(from + d) * scale);
    if (d < count) {
        int8_t rest[LANES] = {0};
        memcpy(rest, from + d, (size_t)(count - d));
        store(to + d, from_codes(rest) * scale);
    }
}

/* `count` elements as `width` floats. A last vector that is not whole would reach over the row's end, at the pool's end
 * out of it. */
INLINE void widen(const void *from, int kind, int64_t at, int count, float *to) {
    int d = 0;
    for (; d + LANES <= count; d += LANES) store(to + d, widened(from, kind, at + d));
    if (d < count) {
        uint32_t rest[LANES] = {0};
        size_t size = kind == KV_F32 ? 4 : 2;
        memcpy(rest, (const char *)from + (size_t)(at + d) * size, (size_t)(count - d) * size);
        store(to + d, widened(rest, kind, 0));
    }
}

/* One slot's keys or values. */
INLINE void widen_slot(const void *from, const float *scales, int kind, int64_t slot, int count, float *to) {
    if (kind == KV_INT8)
        widen_codes((const int8_t *)from + slot * count, scales[slot], count, to);
    else
        widen(from, kind, slot * count, count, to);
}

/* LANES rows of LANES floats turned over: in each round row i and row i + LANES / 2 are interleaved. */
#if defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 12)
#if defined(__AVX512F__)
#define FIRST_HALVES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define SECOND_HALVES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX__)
#define FIRST_HALVES 0, 8, 1, 9, 2, 10, 3, 11
#define SECOND_HALVES 4, 12, 5, 13, 6, 14, 7, 15
#else
#define FIRST_HALVES 0, 4, 1, 5
#define SECOND_HALVES 2, 6, 3, 7
#endif
INLINE void turn(floats *rows) {
    floats next[LANES];
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < LANES / 2; i++) {
            floats a = rows[i], b = rows[i + LANES / 2];
            next[2 * i] = __builtin_shufflevector(a, b, FIRST_HALVES);
            next[2 * i + 1] = __builtin_shufflevector(a, b, SECOND_HALVES);
        }
        memcpy(rows, next, sizeof next);
    }
}
#else
INLINE void turn(floats *rows) {
    float turned[LANES][LANES], plain[LANES][LANES];
    memcpy(plain, rows, sizeof plain);
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < LANES; j++) turned[j][i] = plain[i][j];
    memcpy(rows, turned, sizeof turned);
}
#endif

/* Keys of LANES tokens turned over: to[d] has dimension d of all of them. Those nobody has written yet are zeros. */
INLINE void turned_keys(const struct cached *of, int64_t slot, int count, float (*to)[LANES]) {
    float wide[LANES][MAX_HEAD];
    for (int t = 0; t < LANES; t++)
        if (t < count)
            widen_slot(of->keys, of->key_scales, of->kind, slot + t, of->head_dim, wide[t]);
        else
            memset(wide[t], 0, sizeof(float) * (size_t)of->width);
    for (int d = 0; d < of->width; d += LANES) {
        floats rows[LANES];
        for (int t = 0; t < LANES; t++) rows[t] = load(&wide[t][d]);
        turn(rows);
        for (int i = 0; i < LANES; i++) store(to[d + i], rows[i]);
    }
}

/* Scores of `n` rows (a constant where this is inlined) with LANES tokens. */
INLINE void score(const struct row *rows, int n, const float (*keys)[LANES], int head_dim, float (*scores)[CHUNK]) {
    floats sums[6];
    for (int r = 0; r < n; r++) sums[r] = all(0.0f);
    for (int d = 0; d < head_dim; d++) {
        floats key = load(keys[d]);
        for (int r = 0; r < n; r++) sums[r] = key * rows[r].query[d] + sums[r];
    }
    for (int r = 0; r < n; r++) store(scores[r], sums[r]);
}

/* Which of LANES tokens from `t` on lie in from .. to - 1: a bit for each. */
INLINE uint32_t seen_of(int t, int from, int to) {
    uint32_t mask = t + LANES > to ? to > t ? (1u << (to - t)) - 1 : 0 : 0xffff;
    return t < from ? mask & (from - t < LANES ? ~0u << (from - t) : 0) : mask;
}

/* Scores of tokens position .. position + count - 1 -> weights e^(score - largest), 0 for what the row does not see. */
INLINE void weigh(const struct row *row, int64_t position, int count, float *scores, struct folded *state) {
    ints place;
    for (int i = 0; i < LANES; i++) place[i] = i;
    int64_t before = row->first - position, after = row->end - position;
    int from = before > 0 ? (int)before : 0, to = after < count ? (int)after : count;
    floats top = all(-INFINITY);
    for (int t = 0; t < count; t += LANES) {
        floats own = chosen((place + t >= from) & (place + t < to), load(scores + t), all(-INFINITY));
        store(scores + t, own);
        top = larger(own, top);
    }
    state->largest = largest_of(top);
    floats sum = all(0.0f);
    for (int t = 0; t < count; t += LANES) {
        floats weight = exponential(load(scores + t) - state->largest);
        store(scores + t, weight);
        sum += weight;
    }
    state->sum = sum_of(sum);
}

/* Weights times the values of `count` tokens, added to `n` rows and `vectors` vectors of dimensions at once. */
INLINE void mix(struct folded *states, const float (*weights)[CHUNK], int n, int vectors, int count, int from,
                const float (*values)[MAX_HEAD]) {
    floats sums[4][VECTORS];
    for (int r = 0; r < n; r++)
        for (int v = 0; v < vectors; v++) sums[r][v] = load(states[r].values + from + v * LANES);
    for (int t = 0; t < count; t++)
        for (int v = 0; v < vectors; v++) {
            floats value = load(values[t] + from + v * LANES);
            for (int r = 0; r < n; r++) sums[r][v] = value * weights[r][t] + sums[r][v];
        }
    for (int r = 0; r < n; r++)
        for (int v = 0; v < vectors; v++) store(states[r].values + from + v * LANES, sums[r][v]);
}

INLINE void mix_all(struct folded *states, const float (*weights)[CHUNK], int n, int width, int count,
                    const float (*values)[MAX_HEAD]) {
    int from = 0;
    for (; from + VECTORS * LANES <= width; from += VECTORS * LANES)
        mix(states, weights, n, VECTORS, count, from, values);
    for (; from < width; from += LANES) mix(states, weights, n, 1, count, from, values);
}

/* Positions start .. end - 1, inside one chunk, into the fresh states of `n` rows that all see some of the chunk. */
static void attend_chunk(const struct cached *of, const struct row *rows, struct folded *states, int n, int64_t start,
                         int64_t end) {
    float scores[MAX_ROWS][CHUNK], values[BLOCK][MAX_HEAD], keys[MAX_HEAD][LANES];
    int count = (int)(end - start);
    for (int t = 0; t < count; t += LANES) {
        int64_t position = start + t;
        turned_keys(of, of->blocks[position / BLOCK] * (int64_t)BLOCK + position % BLOCK, count - t, keys);
        int r = 0;
        for (; r + 6 <= n; r += 6) score(rows + r, 6, keys, of->head_dim, (float(*)[CHUNK])(scores[r] + t));
        switch (n - r) {
            case 5: score(rows + r, 5, keys, of->head_dim, (float(*)[CHUNK])(scores[r] + t)); break;
            case 4: score(rows + r, 4, keys, of->head_dim, (float(*)[CHUNK])(scores[r] + t)); break;
            case 3: score(rows + r, 3, keys, of->head_dim, (float(*)[CHUNK])(scores[r] + t)); break;
            case 2: score(rows + r, 2, keys, of->head_dim, (float(*)[CHUNK])(scores[r] + t)); break;
            case 1: score(rows + r, 1, keys, of->head_dim, (float(*)[CHUNK])(scores[r] + t)); break;
        }
    }
    for (int r = 0; r < n; r++) weigh(&rows[r], start, count, scores[r], &states[r]);
    for (int t = 0; t < count; t += BLOCK) {
        int now = count - t < BLOCK ? count - t : BLOCK;
        int64_t slot = of->blocks[(start + t) / BLOCK] * (int64_t)BLOCK;
        for (int i = 0; i < now; i++)
            widen_slot(of->values, of->value_scales, of->kind, slot + i, of->head_dim, values[i]);
        int r = 0;
        const float(*seen)[MAX_HEAD] = (const float(*)[MAX_HEAD])values;
        for (; r + 4 <= n; r += 4) mix_all(states + r, (const float(*)[CHUNK])(scores[r] + t), 4, of->width, now, seen);
        switch (n - r) {
            case 3: mix_all(states + r, (const float(*)[CHUNK])(scores[r] + t), 3, of->width, now, seen); break;
            case 2: mix_all(states + r, (const float(*)[CHUNK])(scores[r] + t), 2, of->width, now, seen); break;
            case 1: mix_all(states + r, (const float(*)[CHUNK])(scores[r] + t), 1, of->width, now, seen); break;
        }
    }
}

/* The chunk that follows, into what came before it. */
INLINE void fold(struct folded *state, const struct folded *next, int width) {
    if (next->largest == -INFINITY) return; /* it saw nothing there; a NaN is not equal and goes on */
    float largest = larger_of(next->largest, state->largest);
    float mine = state->largest == -INFINITY ? 0.0f : exponential_of(state->largest - largest);
    float theirs = exponential_of(next->largest - largest);
    state->largest = largest;
    state->sum = state->sum * mine + next->sum * theirs;
    for (int d = 0; d < width; d += LANES)
        store(state->values + d, load(state->values + d) * mine + load(next->values + d) * theirs);
}

#endif
