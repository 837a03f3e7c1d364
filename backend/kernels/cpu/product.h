/* Products of quantised activations with weights in tiles. To call from Python: suri_product. To call from C, as a part
 * of something larger: quantise the input once (suri_quantise), then suri_product_of on the pool, or tiles of it with
 * suri_product_tiles on a thread of your own.
 */
#ifndef SURI_PRODUCT_H
#define SURI_PRODUCT_H
#include <stdint.h>

/* The activations of a group of 32 columns of one token: value = scale * code; whole sums of the codes of each half, and
 * scale times the sum of all. */
struct suri_group {
    float scale, weighted;
    int32_t sums[2];
};

/* Groups of all tokens, column group by column group: of group g and token t number g * tokens + t. A code of 8 bits is
 * one int8, -127..127. A fine one, of 15 bits, is 128 high + low, -16256..16256: first the 32 high parts, then the low. */
struct suri_input {
    int64_t tokens, columns;
    int fine;
    int8_t *codes;
    struct suri_group *groups;
};

struct suri_product {
    int format; /* of formats.h */
    int64_t rows, columns;
    const uint8_t *tiles;
    const struct suri_input *input;
    float *out; /* (tokens, rows), each token's `stride` values after the last one's */
    int64_t stride;
    int64_t first, last; /* tokens */
    int in_rows; /* `tiles` are rows as the file has them; slower, by what turning them into tiles takes in the cache */
};

/* Bytes to reserve for an input; the memory is cut up by suri_input_in. `fine` 0 is granted from 9 tokens on. */
int64_t suri_input_bytes(int64_t tokens, int64_t columns, int fine);
struct suri_input suri_input_in(void *memory, int64_t tokens, int64_t columns, int fine);

/* x float32 (tokens, columns), into tokens first .. last of the input. A group with a NaN or an infinity becomes NaN;
 * one of nothing above 1e-30 becomes zeros. Error of a value: half a step, the group's largest / 32512 or / 254. */
void suri_quantise(const float *x, const struct suri_input *input, int64_t first, int64_t last);

/* Rows 16 first .. 16 last of the result, on this thread. The same bits however the work is cut. */
void suri_product_tiles(const struct suri_product *product, int64_t first, int64_t last);

/* All rows, on the pool. */
void suri_product_of(const struct suri_product *product, int threads);
#endif
