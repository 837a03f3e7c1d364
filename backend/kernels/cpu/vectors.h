/* Sixteen lanes of 32 bits, the same few operations on every processor: AVX-512 VNNI, AVX2 (with AVX-VNNI or without),
 * NEON with dot products, and plain C. A lane is one output row of a tile. What the compiler was told of the processor
 * decides; SURI_PORTABLE asks for plain C.
 *
 * dot_codes(sum, codes, x): sum + four products a lane; codes 0..63 unsigned, x four int8 in one word, for all lanes.
 * dot_signed: the same with signed codes -128..127, less SIGNED_OFFSET times the sum of x; x is never -128.
 */
#ifndef SURI_VECTORS_H
#define SURI_VECTORS_H
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline, unused))
enum { LANES = 16 };

INLINE float half_to_float(uint16_t bits) {
    /* The exponent's bias differs by 112: a product sets it right, also for numbers below the normal ones. */
    uint32_t word = (uint32_t)(bits & 0x7fff) << 13, sign = (uint32_t)(bits & 0x8000) << 16;
    float value;
    memcpy(&value, &word, 4);
    value *= 5.192296858534828e33f; /* 2^112 */
    memcpy(&word, &value, 4);
    if ((bits & 0x7c00) == 0x7c00) word = 0x7f800000 | (uint32_t)(bits & 0x3ff) << 13;
    word |= sign;
    memcpy(&value, &word, 4);
    return value;
}

INLINE int32_t word_at(const int8_t *x) {
    int32_t word;
    memcpy(&word, x, 4);
    return word;
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && !defined(SURI_PORTABLE)
#include <immintrin.h>
#define SURI_VECTORS "AVX-512 VNNI"
enum { SIGNED_OFFSET = 128 };
typedef __m512i lanes;
typedef __m512 floats;
INLINE lanes load(const void *p) { return _mm512_loadu_si512(p); }
INLINE lanes all(int32_t x) { return _mm512_set1_epi32(x); }
INLINE lanes both(lanes a, lanes b) { return _mm512_and_si512(a, b); }
INLINE lanes either(lanes a, lanes b) { return _mm512_or_si512(a, b); }
INLINE lanes plus(lanes a, lanes b) { return _mm512_add_epi32(a, b); }
INLINE lanes right(lanes a, int n) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(n)); }
INLINE lanes left(lanes a, int n) { return _mm512_sll_epi32(a, _mm_cvtsi32_si128(n)); }
INLINE lanes right_signed(lanes a, int n) { return _mm512_sra_epi32(a, _mm_cvtsi32_si128(n)); }
INLINE lanes look_up(lanes codes, const int8_t *table) { /* 16 signed values */
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table)), codes);
}
INLINE lanes dot_codes(lanes sum, lanes codes, int32_t x) { return _mm512_dpbusd_epi32(sum, codes, all(x)); }
INLINE lanes dot_signed(lanes sum, lanes codes, int32_t x) {
    return _mm512_dpbusd_epi32(sum, _mm512_xor_si512(codes, all((int32_t)0x80808080)), all(x));
}
INLINE floats to_floats(lanes a) { return _mm512_cvtepi32_ps(a); }
INLINE floats halves(const void *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE floats all_float(float x) { return _mm512_set1_ps(x); }
INLINE floats product(floats a, floats b) { return _mm512_mul_ps(a, b); }
INLINE floats add_product(floats sum, floats a, floats b) { return _mm512_fmadd_ps(a, b, sum); }
INLINE floats load_floats(const float *p) { return _mm512_loadu_ps(p); }
INLINE void store_floats(float *p, floats a) { _mm512_storeu_ps(p, a); }
INLINE void store(void *p, lanes a) { _mm512_storeu_si512(p, a); }

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(SURI_PORTABLE)
#include <immintrin.h>
typedef struct { __m256i a, b; } lanes;
typedef struct { __m256 a, b; } floats;
#define TWICE(type, expression_a, expression_b) ((type){(expression_a), (expression_b)})
INLINE lanes load(const void *p) {
    return TWICE(lanes, _mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)p + 1));
}
INLINE lanes all(int32_t x) { return TWICE(lanes, _mm256_set1_epi32(x), _mm256_set1_epi32(x)); }
INLINE lanes both(lanes x, lanes y) { return TWICE(lanes, _mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)); }
INLINE lanes either(lanes x, lanes y) { return TWICE(lanes, _mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)); }
INLINE lanes plus(lanes x, lanes y) { return TWICE(lanes, _mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)); }
INLINE lanes right(lanes x, int n) {
    __m128i by = _mm_cvtsi32_si128(n);
    return TWICE(lanes, _mm256_srl_epi32(x.a, by), _mm256_srl_epi32(x.b, by));
}
INLINE lanes left(lanes x, int n) {
    __m128i by = _mm_cvtsi32_si128(n);
    return TWICE(lanes, _mm256_sll_epi32(x.a, by), _mm256_sll_epi32(x.b, by));
}
INLINE lanes right_signed(lanes x, int n) {
    __m128i by = _mm_cvtsi32_si128(n);
    return TWICE(lanes, _mm256_sra_epi32(x.a, by), _mm256_sra_epi32(x.b, by));
}
INLINE lanes look_up(lanes codes, const int8_t *table) {
    __m256i values = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
    return TWICE(lanes, _mm256_shuffle_epi8(values, codes.a), _mm256_shuffle_epi8(values, codes.b));
}
#if defined(__AVXVNNI__)
#define SURI_VECTORS "AVX2 with AVX-VNNI"
enum { SIGNED_OFFSET = 128 };
INLINE __m256i dot_half(__m256i sum, __m256i codes, __m256i x) { return _mm256_dpbusd_avx_epi32(sum, codes, x); }
INLINE __m256i dot_half_signed(__m256i sum, __m256i codes, __m256i x) {
    return dot_half(sum, _mm256_xor_si256(codes, _mm256_set1_epi32((int32_t)0x80808080)), x);
}
#else
#define SURI_VECTORS "AVX2"
enum { SIGNED_OFFSET = 0 };
/* Pairs are added in 16 bits: 2 * 63 * 127 and 2 * 128 * 127 both fit. */
INLINE __m256i dot_half(__m256i sum, __m256i codes, __m256i x) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), _mm256_set1_epi16(1)));
}
INLINE __m256i dot_half_signed(__m256i sum, __m256i codes, __m256i x) {
    return dot_half(sum, _mm256_abs_epi8(codes), _mm256_sign_epi8(x, codes));
}
#endif
INLINE lanes dot_codes(lanes sum, lanes codes, int32_t x) {
    __m256i word = _mm256_set1_epi32(x);
    return TWICE(lanes, dot_half(sum.a, codes.a, word), dot_half(sum.b, codes.b, word));
}
INLINE lanes dot_signed(lanes sum, lanes codes, int32_t x) {
    __m256i word = _mm256_set1_epi32(x);
    return TWICE(lanes, dot_half_signed(sum.a, codes.a, word), dot_half_signed(sum.b, codes.b, word));
}
INLINE floats to_floats(lanes x) { return TWICE(floats, _mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)); }
INLINE floats halves(const void *p) {
    const __m128i *from = (const __m128i *)p;
    return TWICE(floats, _mm256_cvtph_ps(_mm_loadu_si128(from)), _mm256_cvtph_ps(_mm_loadu_si128(from + 1)));
}
INLINE floats all_float(float x) { return TWICE(floats, _mm256_set1_ps(x), _mm256_set1_ps(x)); }
INLINE floats product(floats x, floats y) { return TWICE(floats, _mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)); }
INLINE floats add_product(floats sum, floats x, floats y) {
    return TWICE(floats, _mm256_fmadd_ps(x.a, y.a, sum.a), _mm256_fmadd_ps(x.b, y.b, sum.b));
}
INLINE floats load_floats(const float *p) { return TWICE(floats, _mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)); }
INLINE void store_floats(float *p, floats x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
INLINE void store(void *p, lanes x) {
    _mm256_storeu_si256((__m256i *)p, x.a);
    _mm256_storeu_si256((__m256i *)p + 1, x.b);
}

#elif defined(__ARM_FEATURE_DOTPROD) && !defined(SURI_PORTABLE)
#include <arm_neon.h>
#define SURI_VECTORS "NEON dot product"
enum { SIGNED_OFFSET = 0 };
typedef int32x4x4_t lanes;
typedef float32x4x4_t floats;
#define FOUR_TIMES(type, expression)                                     \
    type made;                                                           \
    for (int i = 0; i < 4; i++) made.val[i] = (expression);              \
    return made
#define BYTES(x) vreinterpretq_s8_s32(x)
INLINE lanes load(const void *p) { FOUR_TIMES(lanes, vreinterpretq_s32_u8(vld1q_u8((const uint8_t *)p + 16 * i))); }
INLINE lanes all(int32_t x) { FOUR_TIMES(lanes, vdupq_n_s32(x)); }
INLINE lanes both(lanes a, lanes b) { FOUR_TIMES(lanes, vandq_s32(a.val[i], b.val[i])); }
INLINE lanes either(lanes a, lanes b) { FOUR_TIMES(lanes, vorrq_s32(a.val[i], b.val[i])); }
INLINE lanes plus(lanes a, lanes b) { FOUR_TIMES(lanes, vaddq_s32(a.val[i], b.val[i])); }
INLINE lanes right(lanes a, int n) {
    FOUR_TIMES(lanes, vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a.val[i]), vdupq_n_s32(-n))));
}
INLINE lanes left(lanes a, int n) { FOUR_TIMES(lanes, vshlq_s32(a.val[i], vdupq_n_s32(n))); }
INLINE lanes right_signed(lanes a, int n) { FOUR_TIMES(lanes, vshlq_s32(a.val[i], vdupq_n_s32(-n))); }
INLINE lanes look_up(lanes codes, const int8_t *table) {
    int8x16_t values = vld1q_s8(table);
    FOUR_TIMES(lanes, vreinterpretq_s32_s8(vqtbl1q_s8(values, vreinterpretq_u8_s32(codes.val[i]))));
}
INLINE lanes dot_codes(lanes sum, lanes codes, int32_t x) {
    FOUR_TIMES(lanes, vdotq_s32(sum.val[i], BYTES(codes.val[i]), BYTES(vdupq_n_s32(x))));
}
INLINE lanes dot_signed(lanes sum, lanes codes, int32_t x) { return dot_codes(sum, codes, x); }
INLINE floats to_floats(lanes a) { FOUR_TIMES(floats, vcvtq_f32_s32(a.val[i])); }
INLINE floats halves(const void *p) {
    FOUR_TIMES(floats, vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8((const uint8_t *)p + 8 * i))));
}
INLINE floats all_float(float x) { FOUR_TIMES(floats, vdupq_n_f32(x)); }
INLINE floats product(floats a, floats b) { FOUR_TIMES(floats, vmulq_f32(a.val[i], b.val[i])); }
INLINE floats add_product(floats sum, floats a, floats b) {
    FOUR_TIMES(floats, vfmaq_f32(sum.val[i], a.val[i], b.val[i]));
}
INLINE floats load_floats(const float *p) { FOUR_TIMES(floats, vld1q_f32(p + 4 * i)); }
INLINE void store_floats(float *p, floats a) {
    for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, a.val[i]);
}
INLINE void store(void *p, lanes a) {
    for (int i = 0; i < 4; i++) vst1q_s32((int32_t *)p + 4 * i, a.val[i]);
}

#else
#define SURI_VECTORS "plain C"
enum { SIGNED_OFFSET = 0 };
typedef int32_t lanes __attribute__((vector_size(64)));
typedef uint32_t unsigned_lanes __attribute__((vector_size(64)));
typedef float floats __attribute__((vector_size(64)));
INLINE lanes load(const void *p) {
    lanes made;
    memcpy(&made, p, sizeof made);
    return made;
}
INLINE lanes all(int32_t x) { return x - (lanes){0}; }
INLINE lanes both(lanes a, lanes b) { return a & b; }
INLINE lanes either(lanes a, lanes b) { return a | b; }
INLINE lanes plus(lanes a, lanes b) { return a + b; }
INLINE lanes right(lanes a, int n) { return (lanes)((unsigned_lanes)a >> n); }
INLINE lanes left(lanes a, int n) { return (lanes)((unsigned_lanes)a << n); }
INLINE lanes right_signed(lanes a, int n) { return a >> n; }
INLINE lanes look_up(lanes codes, const int8_t *table) {
    int8_t bytes[4 * LANES];
    memcpy(bytes, &codes, sizeof bytes);
    for (int i = 0; i < 4 * LANES; i++) bytes[i] = table[bytes[i]];
    return load(bytes);
}
INLINE lanes dot_codes(lanes sum, lanes codes, int32_t x) {
    for (int b = 0; b < 4; b++) {
        int up = 24 - 8 * b;
        sum += ((lanes)((unsigned_lanes)codes << up) >> 24) * ((int32_t)((uint32_t)x << up) >> 24);
    }
    return sum;
}
INLINE lanes dot_signed(lanes sum, lanes codes, int32_t x) { return dot_codes(sum, codes, x); }
INLINE floats to_floats(lanes a) { return __builtin_convertvector(a, floats); }
INLINE floats halves(const void *p) {
    uint16_t bits[LANES];
    floats made;
    memcpy(bits, p, sizeof bits);
    for (int i = 0; i < LANES; i++) made[i] = half_to_float(bits[i]);
    return made;
}
INLINE floats all_float(float x) { return x - (floats){0}; }
INLINE floats product(floats a, floats b) { return a * b; }
INLINE floats add_product(floats sum, floats a, floats b) { return sum + a * b; }
INLINE floats load_floats(const float *p) {
    floats made;
    memcpy(&made, p, sizeof made);
    return made;
}
INLINE void store_floats(float *p, floats a) { memcpy(p, &a, sizeof a); }
INLINE void store(void *p, lanes a) { memcpy(p, &a, sizeof a); }
#endif
#endif
