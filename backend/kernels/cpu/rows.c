/* Products of weights that are kept row by row, as their files have them: int8 with a scale per row, the same with the
 * activations of LLM.int8, and 4-bit code books (NF4, FP4). Output rows are shared among threads by `share`, the pool's
 * suri_parallel (pool.h) or null; a row's result is the same whoever computes it, and however many tokens there are.
 * Activations are float32 (tokens, columns), results float32 (tokens, rows).
 *
 * The slow, obvious twins are in weights/int8.py, llm_int8.py and nf4.py.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "pool.h"
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

enum { AHEAD = 2048 }; /* bytes: the processor itself does not fetch ahead across pages of 4 KiB */
enum { WIDE = 16, STEP = 4 * WIDE, TOKENS = 4 }; /* numbers in a vector, columns in a step, tokens side by side */
#define INLINE static inline __attribute__((always_inline))

/* Vectors of 16 float32. Without AVX-512 the compiler makes them of what there is. */
#if defined(__AVX512F__)
typedef __m512 Floats;
INLINE Floats zeros(void) { return _mm512_setzero_ps(); }
INLINE Floats load(const float *from) { return _mm512_loadu_ps(from); }
INLINE Floats fused(Floats a, Floats b, Floats sum) { return _mm512_fmadd_ps(a, b, sum); }
INLINE Floats all(float value) { return _mm512_set1_ps(value); }
INLINE Floats of_int8(const int8_t *from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
}
#else
typedef float Floats __attribute__((vector_size(4 * WIDE)));
INLINE Floats zeros(void) { return (Floats){0}; }
INLINE Floats load(const float *from) {
    Floats v;
    memcpy(&v, from, sizeof v);
    return v;
}
INLINE Floats fused(Floats a, Floats b, Floats sum) { return a * b + sum; }
INLINE Floats all(float value) { return zeros() + value; }
typedef int8_t Bytes __attribute__((vector_size(WIDE)));
INLINE Floats of_int8(const int8_t *from) {
    Bytes v;
    memcpy(&v, from, sizeof v);
    return __builtin_convertvector(v, Floats);
}
#endif

INLINE float total(Floats v) { /* always in the same order */
    float parts[WIDE];
    memcpy(parts, &v, sizeof parts);
    for (int half = WIDE / 2; half; half /= 2)
        for (int i = 0; i < half; i++) parts[i] += parts[i + half];
    return parts[0];
}

typedef void (*Share)(int threads, int64_t count, int64_t chunk, suri_work work, const void *argument);

struct job {
    const float *x;
    int64_t tokens, columns, rows;
    const void *codes;
    const float *scale; /* of each row, or of each block of a row */
    float *y;
    const int8_t *x_codes; /* LLM.int8 from here */
    const float *x_scale;
    const int32_t *sums;
    const int64_t *outliers;
    int64_t found;
    const float *book; /* code books from here */
    int64_t block, from;
    uint16_t *values;
};

static void run(Share share, int threads, suri_work work, const struct job *job, int64_t row_bytes) {
    enum { PIECE = 1 << 16 }; /* bytes of weights that a thread takes at a time */
    if (share && threads > 1 && job->rows * row_bytes > 2 * PIECE)
        share(threads, job->rows, row_bytes < PIECE ? PIECE / row_bytes : 1, work, job);
    else
        work(job, 0, job->rows);
}

/* int8, activations as they are -------------------------------------------------------------------------------------*/

/* `pair` rows, 1 or 2, from r on for `count` tokens. Two rows share what is loaded of the activations. */
INLINE void int8_tile(const int count, const int pair, const struct job *j, int64_t token, int64_t r) {
    int64_t columns = j->columns, k = 0;
    const int8_t *rows = (const int8_t *)j->codes + r * columns;
    const float *x = j->x + token * columns;
    Floats sums[TOKENS][2][2];
    for (int t = 0; t < count; t++)
        for (int p = 0; p < pair; p++) sums[t][p][0] = sums[t][p][1] = zeros();
    for (; k + STEP <= columns; k += STEP) {
        for (int p = 0; p < pair; p++) __builtin_prefetch(rows + p * columns + k + AHEAD);
        for (int i = 0; i < 4; i++) {
            Floats w[2];
            for (int p = 0; p < pair; p++) w[p] = of_int8(rows + p * columns + k + i * WIDE);
            for (int t = 0; t < count; t++) {
                Floats own = load(x + t * columns + k + i * WIDE);
                for (int p = 0; p < pair; p++) sums[t][p][i % 2] = fused(w[p], own, sums[t][p][i % 2]);
            }
        }
    }
    for (int t = 0; t < count; t++)
        for (int p = 0; p < pair; p++) {
            float sum = total(sums[t][p][0] + sums[t][p][1]);
            for (int64_t rest = k; rest < columns; rest++)
                sum += x[t * columns + rest] * (float)rows[p * columns + rest];
            j->y[(token + t) * j->rows + r + p] = sum * j->scale[r + p];
        }
}

static void int8_part(const void *argument, int64_t first, int64_t last) {
    const struct job *j = argument;
    for (int64_t r = first; r < last; r += 2) {
        int64_t t = 0;
        if (r + 1 < last) {
            for (; t + TOKENS <= j->tokens; t += TOKENS) int8_tile(TOKENS, 2, j, t, r);
            for (; t < j->tokens; t++) int8_tile(1, 2, j, t, r);
        } else {
            for (; t < j->tokens; t++) int8_tile(1, 1, j, t, r);
        }
    }
}

/* y = scale * sum x code. codes (rows, columns), scale (rows,). */
void suri_int8(const float *x, int64_t tokens, int64_t columns, const int8_t *codes, const float *scale, float *y,
               int64_t rows, Share share, int threads) {
    struct job job = {.x = x, .tokens = tokens, .columns = columns, .rows = rows, .codes = codes, .scale = scale,
                      .y = y};
    run(share, threads, int8_part, &job, columns);
}

/* LLM.int8 ----------------------------------------------------------------------------------------------------------*/

static float to_half(float value) { /* rounded to float16, ties to even; what is beyond its range stays beyond 6 */
    if (fabsf(value) < 6.103515625e-05f) return (value + 0.75f) - 0.75f; /* below the normal ones: whole 2^-24 */
    uint32_t word;
    memcpy(&word, &value, 4);
    word = (word + 0xfff + ((word >> 13) & 1)) & ~(uint32_t)0x1fff;
    memcpy(&value, &word, 4);
    return value;
}

/* Each token's columns as int8, its largest number below `threshold` being 127, and 0 in columns of which any token is
 * at or beyond it; those columns' numbers go to `outliers`, and how many they are is returned. `scale` (tokens,): what
 * one code is worth; not a number for tokens that have one that is none. `sums` (tokens,) of the codes.
 * `marks`: scratch of `columns` bytes. */
int64_t suri_llm_int8_quantise(const float *x, int64_t tokens, int64_t columns, float threshold, int8_t *codes,
                               float *scale, int32_t *sums, int64_t *outliers, uint8_t *marks) {
    memset(marks, 0, (size_t)columns);
    for (int64_t t = 0; t < tokens; t++) {
        const float *row = x + t * columns;
        float largest = 0;
        int odd = 0;
        for (int64_t k = 0; k < columns; k++) {
            float size = fabsf(to_half(row[k]));
            uint8_t out = size >= threshold;
            marks[k] |= out;
            odd |= row[k] != row[k];
            size = out ? 0 : size;
            largest = size > largest ? size : largest;
        }
        float each = largest > 0 ? 1.0f / largest * 127.0f : 0; /* in this order, as torch divides */
        for (int64_t k = 0; k < columns; k++) {
            float value = to_half(row[k]);
            value = fabsf(value) < threshold ? value * each : 0; /* also where it is not a number */
            codes[t * columns + k] = (int8_t)rintf(value);
        }
        scale[t] = odd ? NAN : largest / 127.0f;
    }
    int64_t found = 0;
    for (int64_t k = 0; k < columns; k++)
        if (marks[k]) outliers[found++] = k;
    for (int64_t t = 0; t < tokens; t++) {
        int8_t *row = codes + t * columns;
        for (int64_t i = 0; i < found; i++) row[outliers[i]] = 0;
        int32_t sum = 0;
        for (int64_t k = 0; k < columns; k++) sum += row[k];
        sums[t] = sum;
    }
    return found;
}

/* sum of codes * row for each of `count` tokens, exactly. */
INLINE void whole_tile(const int count, const int8_t *codes, const int32_t *code_sums, int64_t columns,
                       const int8_t *row, int32_t *result) {
    int64_t k = 0;
    for (int t = 0; t < count; t++) result[t] = 0;
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    /* The instruction multiplies unsigned by signed bytes: 128 is added to the weights, and 128 times the sum of the
     * activations taken off again. The last columns are masked: both factors 0 there, but for the 128. */
    const __m512i flip = _mm512_set1_epi8((char)0x80);
    __m512i sums[TOKENS][2];
    for (int t = 0; t < count; t++) sums[t][0] = sums[t][1] = _mm512_setzero_si512();
    for (; k + 128 <= columns; k += 128)
        for (int i = 0; i < 2; i++) {
            __m512i w = _mm512_xor_si512(_mm512_loadu_si512(row + k + 64 * i), flip);
            __builtin_prefetch(row + k + 64 * i + AHEAD);
            for (int t = 0; t < count; t++)
                sums[t][i] = _mm512_dpbusd_epi32(sums[t][i], w, _mm512_loadu_si512(codes + t * columns + k + 64 * i));
        }
    for (; k < columns; k += 64) {
        __mmask64 mask = columns - k >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << (columns - k)) - 1;
        __m512i w = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, row + k), flip);
        for (int t = 0; t < count; t++)
            sums[t][0] =
                _mm512_dpbusd_epi32(sums[t][0], w, _mm512_maskz_loadu_epi8(mask, codes + t * columns + k));
    }
    for (int t = 0; t < count; t++)
        result[t] = _mm512_reduce_add_epi32(_mm512_add_epi32(sums[t][0], sums[t][1])) - 128 * code_sums[t];
#else
    (void)code_sums;
    for (; k < columns; k++)
        for (int t = 0; t < count; t++) result[t] += (int32_t)codes[t * columns + k] * (int32_t)row[k];
#endif
}

INLINE void llm_int8_tile(const int count, const struct job *j, int64_t token, int64_t r) {
    const int8_t *row = (const int8_t *)j->codes + r * j->columns, *codes = j->x_codes + token * j->columns;
    const float *x = j->x + token * j->columns;
    int32_t whole[TOKENS];
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    whole_tile(count, codes, j->sums + token, j->columns, row, whole);
#else
    for (int t = 0; t < count; t++) whole_tile(1, codes + t * j->columns, j->sums, j->columns, row, whole + t);
#endif
    for (int t = 0; t < count; t++) {
        float beside = 0;
        for (int64_t i = 0; i < j->found; i++)
            beside += x[t * j->columns + j->outliers[i]] * (float)row[j->outliers[i]];
        j->y[(token + t) * j->rows + r] = ((float)whole[t] * j->x_scale[token + t] + beside) * j->scale[r];
    }
}

static void llm_int8_part(const void *argument, int64_t first, int64_t last) {
    const struct job *j = argument;
    for (int64_t r = first; r < last; r++) {
        int64_t t = 0;
        for (; t + TOKENS <= j->tokens; t += TOKENS) llm_int8_tile(TOKENS, j, t, r);
        for (; t < j->tokens; t++) llm_int8_tile(1, j, t, r);
    }
}

/* y = scale * (x scale * sum code' code + sum over outliers of x code); codes', x_scale, sums, outliers: see above. */
void suri_llm_int8(const float *x, const int8_t *x_codes, const float *x_scale, const int32_t *sums,
                   const int64_t *outliers, int64_t found, int64_t tokens, int64_t columns, const int8_t *codes,
                   const float *scale, float *y, int64_t rows, Share share, int threads) {
    struct job job = {.x = x, .tokens = tokens, .columns = columns, .rows = rows, .codes = codes, .scale = scale,
                      .y = y, .x_codes = x_codes, .x_scale = x_scale, .sums = sums, .outliers = outliers,
                      .found = found};
    run(share, threads, llm_int8_part, &job, columns);
}

/* 4-bit code books --------------------------------------------------------------------------------------------------*/

/* Numbers in the order in which codes come apart: of each 32 columns those of even number, then the others. */
void suri_deal(const float *x, int64_t count, float *out) {
    for (int64_t at = 0; at < count; at += 2 * WIDE)
        for (int i = 0; i < WIDE; i++) {
            out[at + i] = x[at + 2 * i];
            out[at + WIDE + i] = x[at + 2 * i + 1];
        }
}

#if defined(__AVX512F__)
typedef __m512 Book;
INLINE Book open_book(const float *book) { return _mm512_loadu_ps(book); }
INLINE void look_up(Book book, const uint8_t *bytes, Floats *high, Floats *low) {
    __m512i whole = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)bytes));
    *low = _mm512_permutexvar_ps(whole, book); /* of each index the lowest four bits count */
    *high = _mm512_permutexvar_ps(_mm512_srli_epi32(whole, 4), book);
}
#else
typedef const float *Book;
INLINE Book open_book(const float *book) { return book; }
INLINE void look_up(Book book, const uint8_t *bytes, Floats *high, Floats *low) {
    for (int i = 0; i < WIDE; i++) {
        (*high)[i] = book[bytes[i] >> 4];
        (*low)[i] = book[bytes[i] & 15];
    }
}
#endif

INLINE void book_tile(const int count, const int pair, const struct job *j, Book book, int64_t block, int64_t token,
                      int64_t r) {
    int64_t columns = j->columns, row_bytes = columns / 2;
    const uint8_t *rows = (const uint8_t *)j->codes + r * row_bytes;
    const float *x = j->x + token * columns, *absmax = j->scale + r * (columns / block);
    Floats sums[TOKENS][2];
    for (int t = 0; t < count; t++)
        for (int p = 0; p < pair; p++) sums[t][p] = zeros();
    for (int64_t at = 0; at < columns; at += block) {
        Floats own[TOKENS][2];
        for (int t = 0; t < count; t++)
            for (int p = 0; p < pair; p++) own[t][p] = zeros();
        for (int p = 0; p < pair; p++)
            for (int64_t k = at / 2; k < (at + block) / 2; k += 64)
                __builtin_prefetch(rows + p * row_bytes + k + AHEAD);
        for (int64_t k = at; k < at + block; k += 2 * WIDE) {
            Floats high[2], low[2];
            for (int p = 0; p < pair; p++) look_up(book, rows + p * row_bytes + k / 2, &high[p], &low[p]);
            for (int t = 0; t < count; t++) {
                Floats even = load(x + t * columns + k), odd = load(x + t * columns + k + WIDE);
                for (int p = 0; p < pair; p++) own[t][p] = fused(low[p], odd, fused(high[p], even, own[t][p]));
            }
        }
        for (int p = 0; p < pair; p++) {
            float scale = absmax[p * (columns / block) + at / block];
            for (int t = 0; t < count; t++) sums[t][p] = fused(own[t][p], all(scale), sums[t][p]);
        }
    }
    for (int t = 0; t < count; t++)
        for (int p = 0; p < pair; p++) j->y[(token + t) * j->rows + r + p] = total(sums[t][p]);
}

INLINE void book_rows(const struct job *j, int64_t block, int64_t first, int64_t last) {
    Book book = open_book(j->book);
    for (int64_t r = first; r < last; r += 2) {
        int64_t t = 0;
        if (r + 1 < last) {
            for (; t + TOKENS <= j->tokens; t += TOKENS) book_tile(TOKENS, 2, j, book, block, t, r);
            for (; t < j->tokens; t++) book_tile(1, 2, j, book, block, t, r);
        } else {
            for (; t < j->tokens; t++) book_tile(1, 1, j, book, block, t, r);
        }
    }
}

static void book_part(const void *argument, int64_t first, int64_t last) {
    const struct job *j = argument;
    if (j->block == 64) /* the usual one, known to the compiler */
        book_rows(j, 64, first, last);
    else
        book_rows(j, j->block, first, last);
}

/* y = sum over blocks of absmax * sum x book[code]. x as `suri_deal` leaves it; packed (rows, columns / 2), of two
 * codes the first in the high bits; absmax (rows, columns / block); block a multiple of 32. */
void suri_codebook(const float *x, int64_t tokens, int64_t columns, const uint8_t *packed, const float *book,
                   const float *absmax, int64_t block, float *y, int64_t rows, Share share, int threads) {
    struct job job = {.x = x, .tokens = tokens, .columns = columns, .rows = rows, .codes = packed, .scale = absmax,
                      .y = y, .book = book, .block = block};
    run(share, threads, book_part, &job, columns / 2);
}

static uint16_t to_bfloat16(float value) { /* to nearest, ties to even; for finite numbers */
    uint32_t word;
    memcpy(&word, &value, 4);
    return (uint16_t)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

static void decode_part(const void *argument, int64_t first, int64_t last) {
    const struct job *j = argument;
    Book open = open_book(j->book);
    for (int64_t r = first; r < last; r++)
        for (int64_t k = 0; k < j->columns; k += 2 * WIDE) {
            Floats high, low;
            int64_t at = (j->from + r) * j->columns + k;
            float values[2][WIDE], scale = j->scale[at / j->block];
            uint16_t *to = j->values + r * j->columns + k;
            look_up(open, (const uint8_t *)j->codes + at / 2, &high, &low);
            high *= all(scale);
            low *= all(scale);
            memcpy(values[0], &high, sizeof high);
            memcpy(values[1], &low, sizeof low);
            for (int i = 0; i < WIDE; i++) {
                to[2 * i] = to_bfloat16(values[0][i]);
                to[2 * i + 1] = to_bfloat16(values[1][i]);
            }
        }
}

/* `rows` rows from `from` on as bfloat16 values, (rows, columns). */
void suri_codebook_decode(int64_t columns, const uint8_t *packed, const float *book, const float *absmax,
                          int64_t block, uint16_t *out, int64_t from, int64_t rows, Share share, int threads) {
    struct job job = {.columns = columns, .rows = rows, .codes = packed, .scale = absmax, .book = book, .block = block,
                      .from = from, .values = out};
    run(share, threads, decode_part, &job, 2 * columns);
}
