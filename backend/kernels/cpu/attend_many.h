/* Attention of a prompt's tokens by AMX, in bfloat16 with float32 sums: 32 rows at a time with 128 cached tokens.
 *
 * A row is one query head of one token, as in attend.h; those of one key-value head go through its keys and values
 * together, which are laid out for AMX once for all of them. Scores are folded as they come (Dao et al. 2022,
 * arXiv:2205.14135). What bfloat16 loses of queries and weights is at most 2^-8 of each; of a cache in bfloat16 nothing.
 */
#ifndef SURI_ATTEND_MANY_H
#define SURI_ATTEND_MANY_H
#include "amx.h"
#include "attend.h"

enum { MANY_ROWS = 32, MANY_KEYS = 128, MANY_BLOCKS = 8 /* of rows in one task */, AHEAD = 96 /* tokens */ };

INLINE int many_possible(int kind, int64_t head_dim) {
    return MATRIX && kind != KV_F32 && head_dim % 32 == 0 && head_dim <= MAX_HEAD && matrix_allowed();
}

#if MATRIX
typedef uint16_t pairs[16 * 32]; /* a second factor: 16 pairs, of each 16 columns */

struct many_block {
    _Alignas(64) uint16_t queries[MANY_ROWS][MAX_HEAD]; /* (32, head_dim), one after the other */
    _Alignas(64) float values[MANY_ROWS * MAX_HEAD];    /* (32, head_dim) */
    float largest[MANY_ROWS], sum[MANY_ROWS];
};

struct many_cached { /* MANY_KEYS tokens */
    _Alignas(64) pairs keys[MAX_HEAD / 32][MANY_KEYS / 16];
    _Alignas(64) pairs values[MANY_KEYS / 32][MAX_HEAD / 16];
};

/* 32 elements from `d` on of a slot's keys or values, as bfloat16. */
INLINE __m512i slot_bfloat16(const void *from, const float *scales, int kind, int64_t slot, int head_dim, int d) {
    int64_t at = slot * head_dim + d;
    if (kind == KV_BF16) return _mm512_loadu_si512((const uint16_t *)from + at);
    floats first, second;
    if (kind == KV_INT8) {
        first = from_codes((const int8_t *)from + at) * scales[slot];
        second = from_codes((const int8_t *)from + at + LANES) * scales[slot];
    } else {
        first = widened(from, kind, at);
        second = widened(from, kind, at + LANES);
    }
    return (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}

/* Tokens position .. position + count - 1, of a sequence up to `end`. Beyond them values are zeros, since nobody may have
 * written any yet. */
static void lay_out(const struct cached *of, int64_t position, int count, int64_t end, struct many_cached *to) {
    const int64_t row = (of->kind == KV_INT8 ? 1 : 2) * of->head_dim; /* bytes */
    for (int t = 0; t < count; t += 16) { /* blocks of 32, so 16 slots lie together */
        int64_t slot = of->blocks[(position + t) / BLOCK] * (int64_t)BLOCK + (position + t) % BLOCK;
        if (position + t + AHEAD < end) { /* blocks lie anywhere: the processor cannot know which comes next */
            int64_t later = position + t + AHEAD, at = of->blocks[later / BLOCK] * (int64_t)BLOCK + later % BLOCK;
            for (int64_t line = at * row; line < (at + 16) * row; line += 64) {
                __builtin_prefetch((const char *)of->keys + line);
                __builtin_prefetch((const char *)of->values + line);
            }
        }
        for (int d = 0; d < of->head_dim; d += 32) {
            floats rows[LANES]; /* pairs of dimensions are 32 bits */
            for (int i = 0; i < LANES; i++)
                rows[i] = (floats)slot_bfloat16(of->keys, of->key_scales, of->kind, slot + i, of->head_dim, d);
            turn(rows);
            for (int i = 0; i < LANES; i++) store((float *)to->keys[d / 32][t / 16] + i * LANES, rows[i]);
        }
        for (int i = 0; i < 16; i += 2)
            for (int d = 0; d < of->head_dim; d += 32) {
                __m512i even = _mm512_setzero_si512(), odd = even;
                if (t + i < count)
                    even = slot_bfloat16(of->values, of->value_scales, of->kind, slot + i, of->head_dim, d);
                if (t + i + 1 < count)
                    odd = slot_bfloat16(of->values, of->value_scales, of->kind, slot + i + 1, of->head_dim, d);
                for (int half = 0; half < 2; half++) {
                    __m256i low = half ? _mm512_extracti64x4_epi64(even, 1) : _mm512_castsi512_si256(even);
                    __m256i high = half ? _mm512_extracti64x4_epi64(odd, 1) : _mm512_castsi512_si256(odd);
                    __m512i pair = _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16);
                    _mm512_storeu_si512(to->values[t / 32][d / 16 + half] + (t % 32 + i) / 2 * 32,
                                        _mm512_or_si512(_mm512_cvtepu16_epi32(low), pair));
                }
            }
    }
    for (int t = (count + 15) / 16 * 16; t < (count + 31) / 32 * 32; t += 16) /* half of 16 pairs */
        for (int d = 0; d < of->head_dim / 16; d++) memset(to->values[t / 32][d] + 8 * 32, 0, 8 * 64);
}

/* Scores of 16 or 32 rows with tokens 0 .. keys - 1, a multiple of 32. */
INLINE void many_scores(const struct many_block *block, const struct many_cached *cached, int head_dim, int keys, int few,
                        float *scores) {
    for (int t = 0; t < keys; t += 32) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int d = 0; d < head_dim; d += 32) {
            const uint16_t *rows = (const uint16_t *)block->queries + d;
            _tile_loadd(4, rows, head_dim * 2);
            _tile_loadd(6, cached->keys[d / 32][t / 16], 64);
            _tile_loadd(7, cached->keys[d / 32][t / 16 + 1], 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (few) continue;
            _tile_loadd(5, rows + 16 * head_dim, head_dim * 2);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, scores + t, MANY_KEYS * 4);
        _tile_stored(1, scores + t + 16, MANY_KEYS * 4);
        if (few) continue;
        _tile_stored(2, scores + 16 * MANY_KEYS + t, MANY_KEYS * 4);
        _tile_stored(3, scores + 16 * MANY_KEYS + t + 16, MANY_KEYS * 4);
    }
}

/* 2^x for x <= 0 with a relative error below 3e-6, far below what bfloat16 keeps of it; 2^-125 for less, NaN for
 * NaN. A polynomial of degree four for the fraction. */
INLINE __m512 power_of_two(__m512 x) {
    /* Not below the normal numbers: those take the processor a hundred times as long. Of two of which one is no number,
     * max gives the second. */
    x = _mm512_max_ps(_mm512_set1_ps(-125.0f), x);
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_fmadd_ps(r, _mm512_set1_ps(9.58283e-3f), _mm512_set1_ps(5.590639e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4024099e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.931242e-1f));
    return _mm512_scalef_ps(_mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f)), whole);
}

/* Scores of one row -> weights 2^(score - largest) in bfloat16; what is folded already is scaled to the new largest. A
 * score that is no number is not the largest, but makes the sum and the values such. */
INLINE void many_weigh(const struct row *row, int64_t position, int keys, const float *scores, int head_dim,
                       float *largest, float *sum, float *values, uint16_t *weights) {
    const int64_t before = row->first - position, after = row->end - position;
    const int from = before > 0 ? before > keys ? keys : (int)before : 0, to = after < keys ? (int)after : keys;
    __m512 own[MANY_KEYS / LANES], top = _mm512_set1_ps(-INFINITY), added = _mm512_setzero_ps();
    __mmask16 seen[MANY_KEYS / LANES];
    for (int t = 0; t < keys; t += LANES) {
        seen[t / LANES] = (__mmask16)seen_of(t, from, to);
        own[t / LANES] = _mm512_mask_blend_ps(seen[t / LANES], _mm512_set1_ps(-INFINITY), _mm512_load_ps(scores + t));
        top = _mm512_max_ps(own[t / LANES], top);
    }
    float most = _mm512_reduce_max_ps(top);
    most = most > *largest ? most : *largest;
    if (most == -INFINITY) { /* nothing seen yet, or nothing that is a number */
        for (int t = 0; t < keys; t += LANES) {
            __mmask16 none = _mm512_cmpunord_ps_mask(own[t / LANES], own[t / LANES]);
            added = _mm512_add_ps(added, _mm512_maskz_mov_ps(none, own[t / LANES]));
        }
        *sum += _mm512_reduce_add_ps(added);
        memset(weights, 0, (size_t)keys * 2);
        return;
    }
    const __m512 less = _mm512_set1_ps(most);
    for (int t = 0; t < keys; t += 2 * LANES) {
        const int n = t / LANES;
        __m512 first = _mm512_maskz_mov_ps(seen[n], power_of_two(_mm512_sub_ps(own[n], less)));
        __m512 second = _mm512_maskz_mov_ps(seen[n + 1], power_of_two(_mm512_sub_ps(own[n + 1], less)));
        added = _mm512_add_ps(added, _mm512_add_ps(first, second));
        _mm512_store_si512(weights + t, (__m512i)_mm512_cvtne2ps_pbh(second, first));
    }
    if (most != *largest) {
        const float kept = _mm512_cvtss_f32(power_of_two(_mm512_set1_ps(*largest - most)));
        *sum *= kept;
        *largest = most;
        for (int d = 0; d < head_dim; d += LANES) store(values + d, load(values + d) * kept);
    }
    *sum += _mm512_reduce_add_ps(added);
}

INLINE void many_mix(struct many_block *block, const struct many_cached *cached, int head_dim, int keys, int few,
                     const uint16_t *weights) {
    const int stride = head_dim * 4;
    for (int d = 0; d < head_dim; d += 32) {
        float *to = block->values + d;
        _tile_loadd(0, to, stride);
        _tile_loadd(1, to + 16, stride);
        if (!few) {
            _tile_loadd(2, to + 16 * head_dim, stride);
            _tile_loadd(3, to + 16 * head_dim + 16, stride);
        }
        for (int t = 0; t < keys; t += 32) {
            _tile_loadd(4, weights + t, MANY_KEYS * 2);
            _tile_loadd(6, cached->values[t / 32][d / 16], 64);
            _tile_loadd(7, cached->values[t / 32][d / 16 + 1], 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (few) continue;
            _tile_loadd(5, weights + 16 * MANY_KEYS + t, MANY_KEYS * 2);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, to, stride);
        _tile_stored(1, to + 16, stride);
        if (few) continue;
        _tile_stored(2, to + 16 * head_dim, stride);
        _tile_stored(3, to + 16 * head_dim + 16, stride);
    }
}

/* `n` rows in the order of their tokens, at most MANY_BLOCKS * MANY_ROWS. out[r]: (head_dim,) of row r. */
static void attend_many(const struct cached *of, const struct row *rows, int n, float *const *out) {
    static _Thread_local struct many_cached cached;
    static _Thread_local struct many_block blocks[MANY_BLOCKS];
    _Alignas(64) float scores[MANY_ROWS * MANY_KEYS];
    _Alignas(64) uint16_t weights[MANY_ROWS * MANY_KEYS] = {0};
    const int head_dim = of->head_dim, count = (n + MANY_ROWS - 1) / MANY_ROWS;
    for (int b = 0; b < count; b++)
        for (int r = 0; r < MANY_ROWS; r++) {
            struct many_block *block = &blocks[b];
            const float *query = rows[b * MANY_ROWS + r < n ? b * MANY_ROWS + r : n - 1].query;
            for (int d = 0; d < head_dim; d += 32) { /* powers of two take fewer steps than those of e */
                floats first = load(query + d) * 1.44269504f, second = load(query + d + LANES) * 1.44269504f;
                _mm512_storeu_si512((uint16_t *)block->queries + r * head_dim + d,
                                    (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
            }
            memset(block->values + r * head_dim, 0, (size_t)head_dim * 4);
            block->largest[r] = -INFINITY, block->sum[r] = 0;
        }
    matrix_whole();
    const int64_t end = rows[n - 1].end;
    for (int64_t position = rows[0].first / MANY_KEYS * MANY_KEYS; position < end; position += MANY_KEYS) {
        int now = end - position < MANY_KEYS ? (int)(end - position) : MANY_KEYS, keys = (now + 31) / 32 * 32;
        lay_out(of, position, now, end, &cached);
        for (int b = 0; b < count; b++) {
            const struct row *own = rows + b * MANY_ROWS;
            int last = n - b * MANY_ROWS < MANY_ROWS ? n - b * MANY_ROWS : MANY_ROWS;
            if (own[last - 1].end <= position || own[0].first >= position + now) continue;
            const int few = last <= 16; /* what lies behind the last row is computed too where it shares a register with it */
            many_scores(&blocks[b], &cached, head_dim, keys, few, scores);
            for (int r = 0; r < last; r++)
                many_weigh(&own[r], position, keys, scores + r * MANY_KEYS, head_dim, &blocks[b].largest[r],
                           &blocks[b].sum[r], blocks[b].values + r * head_dim, weights + r * MANY_KEYS);
            many_mix(&blocks[b], &cached, head_dim, keys, few, weights);
        }
    }
    matrix_end();
    for (int r = 0; r < n; r++) {
        const struct many_block *block = &blocks[r / MANY_ROWS];
        const float *values = block->values + r % MANY_ROWS * head_dim, sum = block->sum[r % MANY_ROWS];
        for (int d = 0; d < head_dim; d += LANES) store(out[r] + d, load(values + d) / sum);
    }
}
#endif
#endif
