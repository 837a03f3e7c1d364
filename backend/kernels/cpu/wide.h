/* A register of floats at a time, in the compiler's own vector notation: one source for every processor.
 *
 * Results are the same for every caller: each lane is computed in the order written here, whatever the number of tokens
 * or threads around it.
 */
#ifndef SURI_WIDE_H
#define SURI_WIDE_H

#include <stdint.h>
#include <string.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

/* What the processor's registers hold: the compiler would take wider vectors apart through memory. */
#if defined(__AVX512F__)
enum { LANES = 16, ROUNDS = 4 };
#elif defined(__AVX__)
enum { LANES = 8, ROUNDS = 3 };
#else
enum { LANES = 4, ROUNDS = 2 };
#endif

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef float floats_anywhere __attribute__((vector_size(4 * LANES), aligned(4)));

#define INLINE static inline __attribute__((always_inline, unused))

INLINE floats load(const float *from) { return *(const floats_anywhere *)from; }

INLINE void store(float *to, floats value) { *(floats_anywhere *)to = value; }

INLINE floats all(float value) { return (floats){0} + value; }

/* Lanes added pairwise, always in the same order. */
INLINE float sum_of(floats v) {
    float part[LANES];
    memcpy(part, &v, sizeof part);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) part[i] += part[i + width];
    return part[0];
}

INLINE floats chosen(ints mask, floats yes, floats no) { /* mask lanes: 0 or -1 */
    return (floats)((mask & (ints)yes) | (~mask & (ints)no));
}

/* Of two: the larger, or NaN where one of them is. */
INLINE floats larger(floats a, floats b) { return chosen((a > b) | (a != a), a, b); }

INLINE float larger_of(float a, float b) { return a > b || a != a ? a : b; }

INLINE float largest_of(floats v) {
    float best = v[0];
    for (int i = 1; i < LANES; i++) best = larger_of(v[i], best);
    return best;
}

/* e^x with a relative error below 2e-7 for x from -87 to 88; 0 below, NaN for NaN. Cephes' reduction by ln 2 in two
 * parts and a polynomial of degree six. */
INLINE floats exponential(floats x) {
    floats clamped = chosen(x > all(88.0f), all(88.0f), x);
    floats n = clamped * 1.44269504088896341f + 12582912.0f; /* 1.5 * 2^23: rounds to a whole number */
    n = n - 12582912.0f;
    floats r = clamped - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    floats whole = chosen(n == n, n, all(0.0f)); /* a NaN has no whole number; the polynomial carries it */
    whole = chosen(whole < all(-127.0f), all(-127.0f), whole);
    ints exponent = (__builtin_convertvector(whole, ints) + 127) << 23;
    return chosen(x < all(-87.0f), all(0.0f), p * (floats)exponent);
}

INLINE float exponential_of(float x) { return exponential(all(x))[0]; }

INLINE floats from_bfloat16(const uint16_t *from) {
    halves bits;
    memcpy(&bits, from, sizeof bits);
    return (floats)(__builtin_convertvector(bits, words) << 16);
}

INLINE floats from_float16(const uint16_t *from) {
#if defined(__AVX512F__)
    return (floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#elif defined(__AVX__) && defined(__F16C__)
    return (floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
#else
    halves bits;
    memcpy(&bits, from, sizeof bits);
    words wide = __builtin_convertvector(bits, words);
    words small = (words)((wide & 0x7c00) == 0), special = (words)((wide & 0x7c00) == 0x7c00);
    /* The exponents' biases differ by 112. Numbers below the normal ones are set right by a difference, since processors
     * take a hundred cycles to multiply what is below float32's normal ones. */
    words moved = ((wide & 0x7fff) << 13) + (112u << 23) + (small & (1u << 23)) + (special & (112u << 23));
    words value = (words)((floats)moved - (floats)(small & (113u << 23)));
    return (floats)(value | (wide & 0x8000) << 16);
#endif
}

INLINE uint16_t to_bfloat16(float value) { /* to nearest, ties to even */
    uint32_t word;
    memcpy(&word, &value, 4);
    if ((word & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (uint16_t)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

INLINE uint16_t to_float16(float value) { /* to nearest, ties to even; too large becomes infinity */
    uint32_t word;
    memcpy(&word, &value, 4);
    uint32_t sign = (word >> 16) & 0x8000, magnitude = word & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    if (magnitude < 0x38800000) { /* below the normal ones: adding 0.5 rounds at the right bit */
        float shifted;
        memcpy(&shifted, &magnitude, 4);
        shifted += 0.5f;
        memcpy(&magnitude, &shifted, 4);
        return (uint16_t)(sign | (magnitude - 0x3f000000));
    }
    magnitude += 0xfff + ((magnitude >> 13) & 1);
    return (uint16_t)(sign | ((magnitude - 0x38000000) >> 13));
}

#endif
