/* Numbers to codes while a model loads: NF4, Q8_0, and Q4_1 with a search for the scale and minimum that lose least.
 *
 * The slow, obvious twins are weights/nf4.py and weights/int8.py (the same bits) and weights/encode.py (the same search; sums are taken in
 * another order, so that now and then another of two equally good scales is found). Work is shared among threads by
 * `share`, the pool's suri_parallel (pool.h) or null.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "pool.h"

enum { LANES = 16, GROUP = 32, BLOCK = 64, HIGH = 15, TRIES = 7, ROUNDS = 3 };
typedef void (*Share)(int threads, int64_t count, int64_t chunk, suri_work work, const void *argument);
typedef float Lanes[LANES]; /* a number for each of so many groups side by side */
#define EACH for (int l = 0; l < LANES; l++)

struct job {
    const float *values, *midpoints;
    int64_t groups;
    uint8_t *codes;
    float *absmax;
};

static void run(Share share, int threads, int64_t count, suri_work work, const struct job *job) {
    enum { PIECE = 64 };
    if (share && threads > 1 && count > 2 * PIECE)
        share(threads, count, PIECE, work, job);
    else
        work(job, 0, count);
}

static float half_of(float value, uint16_t *bits) { /* nearest finite float16, ties to even, and its bits */
    float size = fabsf(value) > 65504.0f ? 65504.0f : fabsf(value);
    uint32_t word;
    if (size < 6.103515625e-05f) { /* below the normal ones: whole 2^-24 */
        size = (size + 0.75f) - 0.75f;
        *bits = (uint16_t)(size * 16777216.0f);
    } else {
        memcpy(&word, &size, 4);
        word = (word + 0xfff + ((word >> 13) & 1)) & ~(uint32_t)0x1fff;
        memcpy(&size, &word, 4);
        *bits = (uint16_t)((word >> 13) - (112 << 10));
    }
    if (signbit(value)) *bits |= 0x8000;
    return signbit(value) ? -size : size;
}

static float inverse(float x) { return fabsf(x) > 8.673617379884035e-19f ? 1.0f / x : 0.0f; } /* 2^-60 */

static void nearest(const Lanes *x, const Lanes scale, const Lanes minimum, Lanes *codes, Lanes error) {
    Lanes each;
    EACH each[l] = inverse(scale[l]);
    EACH error[l] = 0;
    for (int k = 0; k < GROUP; k++)
        EACH {
            float code = rintf((x[k][l] - minimum[l]) * each[l]);
            code = code < 0 ? 0 : code;
            code = code > HIGH ? HIGH : code;
            float off = code * scale[l] + minimum[l] - x[k][l];
            codes[k][l] = code;
            error[l] += off * off;
        }
}

/* The best of several spans, each with the scale and minimum that fit its codes by least squares. */
static void search(const Lanes *x, const Lanes bottom, const Lanes top, Lanes scale, Lanes minimum) {
    static const float reaches[TRIES] = {14.0f, 14.3f, 14.6f, 14.9f, 15.2f, 15.5f, 15.8f};
    Lanes span, total = {0}, best;
    EACH {
        span[l] = inverse(top[l] - bottom[l]);
        best[l] = -1;
        scale[l] = 0;
        minimum[l] = bottom[l];
    }
    for (int k = 0; k < GROUP; k++) EACH total[l] += x[k][l];
    for (int n = 0; n < TRIES; n++) {
        Lanes ones = {0}, product = {0}, square = {0};
        for (int k = 0; k < GROUP; k++)
            EACH {
                float code = rintf((x[k][l] - bottom[l]) * (span[l] * reaches[n]));
                code = code > HIGH ? HIGH : code;
                ones[l] += code;
                product[l] += code * x[k][l];
                square[l] += code * code;
            }
        EACH {
            float fitted = (GROUP * product[l] - ones[l] * total[l]) * inverse(GROUP * square[l] - ones[l] * ones[l]);
            float lowest = (total[l] - fitted * ones[l]) / GROUP;
            float gain = fitted * product[l] + lowest * total[l];
            int better = gain > best[l] && fitted >= 0;
            best[l] = better ? gain : best[l];
            scale[l] = better ? fitted : scale[l];
            minimum[l] = better ? lowest : minimum[l];
        }
    }
}

static void q4_1_lanes(const float *values, int count, uint8_t *out) {
    Lanes x[GROUP], centred[GROUP], codes[GROUP], fresh[GROUP];
    Lanes bottom, top, centre = {0}, total, error, errors, scale, minimum, trial, low;
    uint16_t bits;
    for (int k = 0; k < GROUP; k++) EACH x[k][l] = l < count ? values[l * GROUP + k] : 0;
    EACH bottom[l] = top[l] = x[0][l];
    for (int k = 0; k < GROUP; k++)
        EACH {
            bottom[l] = x[k][l] < bottom[l] ? x[k][l] : bottom[l];
            top[l] = x[k][l] > top[l] ? x[k][l] : top[l];
            centre[l] += x[k][l];
        }
    EACH {
        total[l] = centre[l];
        centre[l] /= GROUP;
        scale[l] = half_of((top[l] - bottom[l]) / HIGH, &bits);
        minimum[l] = half_of(bottom[l], &bits);
    }
    nearest((const Lanes *)x, scale, minimum, codes, error); /* what is to be beaten */
    for (int k = 0; k < GROUP; k++) EACH centred[k][l] = x[k][l] - centre[l];
    Lanes centred_bottom, centred_top;
    EACH {
        centred_bottom[l] = bottom[l] - centre[l];
        centred_top[l] = top[l] - centre[l];
    }
    search((const Lanes *)centred, centred_bottom, centred_top, trial, low);
    EACH {
        trial[l] = half_of(trial[l], &bits);
        low[l] = half_of(low[l] + centre[l], &bits);
    }
    for (int round = 0; round < ROUNDS; round++) {
        nearest((const Lanes *)x, trial, low, fresh, errors);
        Lanes ones = {0}, product = {0}, square = {0};
        int32_t better[LANES];
        EACH {
            better[l] = errors[l] < error[l];
            error[l] = better[l] ? errors[l] : error[l];
            scale[l] = better[l] ? trial[l] : scale[l];
            minimum[l] = better[l] ? low[l] : minimum[l];
        }
        for (int k = 0; k < GROUP; k++)
            EACH {
                codes[k][l] = better[l] ? fresh[k][l] : codes[k][l];
                ones[l] += codes[k][l];
                product[l] += codes[k][l] * x[k][l];
                square[l] += codes[k][l] * codes[k][l];
            }
        EACH { /* the minimum is rounded first; the scale can make up for a part of that */
            float fitted = (GROUP * product[l] - ones[l] * total[l]) * inverse(GROUP * square[l] - ones[l] * ones[l]);
            low[l] = half_of((total[l] - fitted * ones[l]) / GROUP, &bits);
            trial[l] = half_of((product[l] - low[l] * ones[l]) * inverse(square[l]), &bits);
        }
    }
    for (int l = 0; l < count; l++) {
        uint8_t *block = out + l * (4 + GROUP / 2);
        half_of(scale[l], &bits);
        memcpy(block, &bits, 2);
        half_of(minimum[l], &bits);
        memcpy(block + 2, &bits, 2);
        for (int k = 0; k < GROUP / 2; k++)
            block[4 + k] = (uint8_t)((int)codes[k][l] | (int)codes[k + GROUP / 2][l] << 4);
    }
}

static void q4_1_part(const void *argument, int64_t first, int64_t last) {
    const struct job *j = argument;
    for (int64_t n = first; n < last; n++) {
        int64_t at = n * LANES, left = j->groups - at;
        q4_1_lanes(j->values + at * GROUP, left < LANES ? (int)left : LANES, j->codes + at * (4 + GROUP / 2));
    }
}

/* values (groups, 32), finite and below 2^40, to blocks of 20 bytes: scale, minimum, codes. */
void suri_q4_1(const float *values, int64_t groups, uint8_t *blocks, Share share, int threads) {
    struct job job = {.values = values, .groups = groups, .codes = blocks};
    run(share, threads, (groups + LANES - 1) / LANES, q4_1_part, &job);
}

static void q8_0_part(const void *argument, int64_t first, int64_t last) {
    const struct job *j = argument;
    for (int64_t n = first; n < last; n++) {
        const float *x = j->values + n * GROUP;
        int32_t sizes[GROUP], most = 0; /* finite floats without their signs are in the order of their bits */
        memcpy(sizes, x, sizeof sizes);
        for (int k = 0; k < GROUP; k++) {
            int32_t size = sizes[k] & 0x7fffffff;
            most = size > most ? size : most;
        }
        float largest;
        memcpy(&largest, &most, 4);
        uint16_t bits;
        float scale = half_of(largest / 127.0f, &bits);
        if (scale < 6.103515625e-05f && largest > 127.5f * scale) { /* coarse there: the next one reaches the largest */
            scale += 5.9604644775390625e-08f;
            bits++;
        }
        float each = scale > 0 ? 1.0f / scale : 0.0f;
        uint8_t *block = j->codes + n * (2 + GROUP);
        memcpy(block, &bits, 2);
        int8_t codes[GROUP];
        for (int k = 0; k < GROUP; k++) {
            float code = rintf(x[k] * each);
            code = code > 127.0f ? 127.0f : code;
            code = code < -127.0f ? -127.0f : code;
            codes[k] = (int8_t)code;
        }
        memcpy(block + 2, codes, GROUP);
    }
}

/* values (groups, 32), finite, to blocks of 34 bytes: the float16 scale by which the largest is 127, and the codes that
 * are nearest with that scale. */
void suri_q8_0(const float *values, int64_t groups, uint8_t *blocks, Share share, int threads) {
    struct job job = {.values = values, .groups = groups, .codes = blocks};
    run(share, threads, groups, q8_0_part, &job);
}

static void nf4_part(const void *argument, int64_t first, int64_t last) {
    const struct job *j = argument;
    for (int64_t n = first; n < last; n++) {
        const float *x = j->values + n * BLOCK;
        float largest = 0, scaled[BLOCK];
        int32_t codes[BLOCK] = {0};
        for (int k = 0; k < BLOCK; k++) largest = fabsf(x[k]) > largest ? fabsf(x[k]) : largest;
        float each = 1.0f / (largest > 1e-38f ? largest : 1e-38f);
        for (int k = 0; k < BLOCK; k++) scaled[k] = x[k] * each;
        for (int i = 0; i < 15; i++)
            for (int k = 0; k < BLOCK; k++) codes[k] += j->midpoints[i] < scaled[k];
        for (int k = 0; k < BLOCK / 2; k++)
            j->codes[n * (BLOCK / 2) + k] = (uint8_t)(codes[2 * k] << 4 | codes[2 * k + 1]);
        j->absmax[n] = largest;
    }
}

/* values (blocks, 64), finite, to packed codes (blocks, 32) and absmax (blocks,). `midpoints`: the 15 numbers up to
 * which each entry of the code book but the last is the nearest. */
void suri_nf4(const float *values, int64_t blocks, const float *midpoints, uint8_t *packed, float *absmax,
              Share share, int threads) {
    struct job job = {.values = values, .midpoints = midpoints, .codes = packed, .absmax = absmax};
    run(share, threads, blocks, nf4_part, &job);
}
