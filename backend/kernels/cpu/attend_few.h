/* Attention of a few rows over one chunk of the cache by AMX: attend_chunk of attend.h, where keys and values are
 * bfloat16.
 *
 * Keys are multiplied as they lie in the cache: they are the first factor, and the queries the second. A query, and a
 * weight, is the sum of two bfloat16, which keep 16 bits of it; products with keys and values are then exact, and sums
 * are float32. Each row's numbers depend on nothing but the row, as in attend.h.
 */
#ifndef SURI_ATTEND_FEW_H
#define SURI_ATTEND_FEW_H
#include "amx.h"
#include "attend.h"

enum { FEW_ROWS = 8 /* and what is left of them: the rows of a register */ };

INLINE int few_possible(int kind, int64_t head_dim) {
    return MATRIX && kind == KV_BF16 && head_dim % 32 == 0 && head_dim <= MAX_HEAD && matrix_allowed();
}

#if MATRIX
/* 32 numbers -> what bfloat16 keeps of them, and of the rest. */
INLINE void few_parts(__m512 first, __m512 second, __m512i *high, __m512i *low) {
    *high = (__m512i)_mm512_cvtne2ps_pbh(second, first);
    __m512 kept = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(*high)), 16));
    __m512 other = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(*high, 1)), 16));
    *low = (__m512i)_mm512_cvtne2ps_pbh(_mm512_sub_ps(second, other), _mm512_sub_ps(first, kept));
}

/* Up to 8 queries as second factors: for each 32 dimensions 16 pairs, of 8 columns for the rows and 8 for the rest. */
INLINE void few_queries(const struct row *rows, int n, int head_dim, uint16_t (*to)[16 * 32]) {
    for (int d = 0; d < head_dim; d += 32) {
        floats columns[LANES];
        for (int r = 0; r < FEW_ROWS; r++) {
            __m512i high = _mm512_setzero_si512(), low = high;
            if (r < n) few_parts((__m512)load(rows[r].query + d), (__m512)load(rows[r].query + d + LANES), &high, &low);
            columns[r] = (floats)high, columns[r + FEW_ROWS] = (floats)low;
        }
        turn(columns);
        for (int i = 0; i < LANES; i++) store((float *)to[d / 32] + i * LANES, columns[i]);
    }
}

/* Products of 16 tokens with 16 columns, (tokens, columns) -> scores, (rows, tokens): 8 columns added to the other 8, then
 * turned over as two squares of 8. */
INLINE void few_turned(const float (*products)[LANES], int n, float (*scores)[CHUNK]) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
    const __m512i second = _mm512_setr_epi32(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    __m512 whole[8], pairs[8], fours[8];
    for (int i = 0; i < 8; i++) { /* tokens i and i + 8 */
        const float *own = products[i], *other = products[i + 8];
        __m512 high = _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_load_ps(own)), _mm256_load_ps(other), 1);
        __m512 low = _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_load_ps(own + 8)), _mm256_load_ps(other + 8), 1);
        whole[i] = _mm512_add_ps(high, low);
    }
    for (int i = 0; i < 4; i++) {
        pairs[i] = _mm512_unpacklo_ps(whole[2 * i], whole[2 * i + 1]);
        pairs[i + 4] = _mm512_unpackhi_ps(whole[2 * i], whole[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++) /* of tokens 4 i .. 4 i + 3, columns 0 and 4, 1 and 5, 2 and 6, 3 and 7 */
        for (int j = 0; j < 2; j++) {
            __m512d even = _mm512_castps_pd(pairs[2 * i + 4 * j]), odd = _mm512_castps_pd(pairs[2 * i + 4 * j + 1]);
            fours[4 * i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(even, odd));
            fours[4 * i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd));
        }
    for (int c = 0; c < 4; c++) {
        if (c < n) store(scores[c], (floats)_mm512_permutex2var_ps(fours[c], first, fours[4 + c]));
        if (c + 4 < n) store(scores[c + 4], (floats)_mm512_permutex2var_ps(fours[c], second, fours[4 + c]));
    }
}

/* Scores of up to 8 rows with the tokens of a chunk, 64 at a time: those of a block that nobody has written yet too. */
INLINE void few_scores(const struct cached *of, int64_t start, int64_t end, const uint16_t (*queries)[16 * 32], int n,
                       float (*scores)[CHUNK]) {
    _Alignas(64) float products[64][LANES];
    const int64_t head_dim = of->head_dim, stride = head_dim * 2;
    for (int64_t at = start; at < end; at += 2 * BLOCK) {
        const int both = at + BLOCK < end;
        const uint16_t *one = (const uint16_t *)of->keys + of->blocks[at / BLOCK] * (int64_t)BLOCK * head_dim;
        const uint16_t *other = one;
        if (both) other = (const uint16_t *)of->keys + of->blocks[at / BLOCK + 1] * (int64_t)BLOCK * head_dim;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t d = 0; d < head_dim; d += 32) {
            _tile_loadd(6, queries[d / 32], 64);
            _tile_loadd(4, one + d, stride);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, one + 16 * head_dim + d, stride);
            _tile_dpbf16ps(1, 5, 6);
            if (!both) continue;
            _tile_loadd(4, other + d, stride);
            _tile_dpbf16ps(2, 4, 6);
            _tile_loadd(5, other + 16 * head_dim + d, stride);
            _tile_dpbf16ps(3, 5, 6);
        }
        _tile_stored(0, products[0], 64);
        _tile_stored(1, products[16], 64);
        if (both) {
            _tile_stored(2, products[32], 64);
            _tile_stored(3, products[48], 64);
        }
        for (int t = 0; t < (both ? 64 : 32); t += 16)
            few_turned((const float(*)[LANES])(products + t), n, (float(*)[CHUNK])(scores[0] + (at - start) + t));
    }
}

/* Values of a chunk as second factors: pairs of tokens, 16 of them, with 16 dimensions each. Of 32 dimensions the first
 * factor has those that the processor interleaves first: 0-3, 8-11, 16-19, 24-27. What nobody has written yet is 0.
 *
 * The cache's blocks lie anywhere, so what is read next is asked for: the values of the block after, and its keys, which
 * few_scores wants. */
INLINE void few_values(const struct cached *of, int64_t start, int count, uint16_t (*to)[16 * 32]) {
    const int head_dim = of->head_dim, factors = head_dim / 16;
    for (int t = 0; t < count; t += BLOCK, to += factors) {
        const int32_t *block = of->blocks + (start + t) / BLOCK, *after = block + (t + BLOCK < count);
        const uint16_t *values = (const uint16_t *)of->values + *block * (int64_t)BLOCK * head_dim;
        const uint16_t *next = (const uint16_t *)of->values + *after * (int64_t)BLOCK * head_dim;
        const uint16_t *keys = (const uint16_t *)of->keys + *block * (int64_t)BLOCK * head_dim;
        for (int i = 0; i < BLOCK; i += 2)
            for (int d = 0; d < head_dim; d += 32) {
                __builtin_prefetch(keys + i * head_dim + d);
                __builtin_prefetch(keys + (i + 1) * head_dim + d);
                __builtin_prefetch(next + i * head_dim + d);
                __builtin_prefetch(next + (i + 1) * head_dim + d);
                __m512i even = _mm512_setzero_si512(), odd = even;
                if (t + i < count) even = _mm512_loadu_si512(values + i * head_dim + d);
                if (t + i + 1 < count) odd = _mm512_loadu_si512(values + (i + 1) * head_dim + d);
                _mm512_store_si512(to[d / 16] + i * 16, _mm512_unpacklo_epi16(even, odd));
                _mm512_store_si512(to[d / 16 + 1] + i * 16, _mm512_unpackhi_epi16(even, odd));
            }
    }
}

/* e^x for x <= 0 with a relative error below 3e-7 - 6e-8 x; 2^-125 for less, NaN for NaN. */
INLINE __m512 few_exponential(__m512 x) {
    /* Not below the normal numbers: those take the processor a hundred times as long. Of two of which one is no number,
     * max gives the second. */
    x = _mm512_max_ps(_mm512_set1_ps(-125.0f), _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)));
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_fmadd_ps(r, _mm512_set1_ps(1.5403530e-4f), _mm512_set1_ps(1.3333558e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9314718e-1f));
    return _mm512_scalef_ps(_mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f)), whole);
}

/* Scores of positions start .. start + count - 1, whole blocks -> weights e^(score - largest) as first factor: what
 * bfloat16 keeps of them, and the rest; 0 for what the row does not see. */
INLINE void few_weigh(const struct row *row, int64_t start, int count, const float *scores, struct folded *state,
                      uint16_t *high, uint16_t *low) {
    const int64_t before = row->first - start, after = row->end - start;
    const int from = before > 0 ? (int)before : 0, to = after < count ? (int)after : count;
    __m512 own[CHUNK / LANES], top = _mm512_set1_ps(-INFINITY), added = _mm512_setzero_ps();
    __mmask16 seen[CHUNK / LANES], none = 0;
    for (int t = 0, n = 0; t < count; t += LANES, n++) {
        seen[n] = (__mmask16)seen_of(t, from, to);
        own[n] = _mm512_mask_load_ps(_mm512_set1_ps(-INFINITY), seen[n], scores + t);
        none |= _mm512_cmpunord_ps_mask(own[n], own[n]);
        top = _mm512_max_ps(top, own[n]);
    }
    state->largest = none ? NAN : _mm512_reduce_max_ps(top);
    const __m512 largest = _mm512_set1_ps(state->largest);
    for (int t = 0, n = 0; t < count; t += 2 * LANES, n += 2) {
        __m512 first = _mm512_maskz_mov_ps(seen[n], few_exponential(_mm512_sub_ps(own[n], largest)));
        __m512 second = _mm512_maskz_mov_ps(seen[n + 1], few_exponential(_mm512_sub_ps(own[n + 1], largest)));
        __m512i kept, rest;
        added = _mm512_add_ps(added, _mm512_add_ps(first, second));
        few_parts(first, second, &kept, &rest);
        _mm512_store_si512(high + t, kept);
        _mm512_store_si512(low + t, rest);
    }
    state->sum = _mm512_reduce_add_ps(added);
}

/* 32 dimensions of the rows' values, from the sums of both factors of few_values. */
INLINE void few_sums(float (*sums)[2 * FEW_ROWS][LANES], int n, int d, struct folded *states) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int r = 0; r < n; r++) {
        __m512 low = (__m512)(load(sums[0][r]) + load(sums[0][r + FEW_ROWS]));
        __m512 high = (__m512)(load(sums[1][r]) + load(sums[1][r + FEW_ROWS]));
        store(states[r].values + d, (floats)_mm512_permutex2var_ps(low, first, high));
        store(states[r].values + d + LANES, (floats)_mm512_permutex2var_ps(low, second, high));
    }
}

/* Weights times values. What lies after the last row is multiplied too, and not read. */
INLINE void few_mix(const uint16_t (*weights)[CHUNK], const uint16_t (*values)[16 * 32], int n, int count, int head_dim,
                    struct folded *states) {
    _Alignas(64) float sums[4][2 * FEW_ROWS][LANES];
    for (int d = 0; d < head_dim; d += 64) {
        const int both = d + 32 < head_dim;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int t = 0; t < count; t += BLOCK) {
            const uint16_t (*factors)[16 * 32] = values + t / BLOCK * (head_dim / 16) + d / 16;
            _tile_loadd(4, weights[0] + t, CHUNK * 2);
            _tile_loadd(5, factors[0], 64);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(6, factors[1], 64);
            _tile_dpbf16ps(1, 4, 6);
            if (!both) continue;
            _tile_loadd(5, factors[2], 64);
            _tile_dpbf16ps(2, 4, 5);
            _tile_loadd(6, factors[3], 64);
            _tile_dpbf16ps(3, 4, 6);
        }
        _tile_stored(0, sums[0][0], 64);
        _tile_stored(1, sums[1][0], 64);
        if (both) {
            _tile_stored(2, sums[2][0], 64);
            _tile_stored(3, sums[3][0], 64);
        }
        few_sums(sums, n, d, states);
        if (both) few_sums(sums + 2, n, d + 32, states);
    }
}

/* As attend_chunk. */
static void attend_few(const struct cached *of, const struct row *rows, struct folded *states, int n, int64_t start,
                       int64_t end) {
    _Alignas(64) float scores[FEW_ROWS][CHUNK];
    _Alignas(64) uint16_t queries[MAX_HEAD / 32][16 * 32], weights[2 * FEW_ROWS][CHUNK];
    static _Thread_local _Alignas(64) uint16_t values[CHUNK / BLOCK * (MAX_HEAD / 16)][16 * 32];
    const int count = (int)(end - start), whole = (count + BLOCK - 1) / BLOCK * BLOCK, head_dim = of->head_dim;
    matrix_whole();
    few_values(of, start, count, values);
    for (int r = 0; r < n; r += FEW_ROWS) {
        const int some = n - r < FEW_ROWS ? n - r : FEW_ROWS;
        few_queries(rows + r, some, head_dim, queries);
        few_scores(of, start, end, (const uint16_t(*)[16 * 32])queries, some, scores);
        for (int i = 0; i < some; i++)
            few_weigh(&rows[r + i], start, whole, scores[i], &states[r + i], weights[i], weights[i + FEW_ROWS]);
        few_mix((const uint16_t(*)[CHUNK])weights, (const uint16_t(*)[16 * 32])values, some, count, head_dim, states + r);
    }
    matrix_end();
}
#endif
#endif
