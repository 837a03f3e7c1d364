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

/* 64 bytes for each group of 32 columns and each token, and one suri_group: of group g and token t number g * tokens + t.
 * The first `few` tokens are whole numbers, 2^low high + low, in steps of the group's largest / (127 * 2^low): 32 high
 * parts of 8 bits, then 32 low ones. The others, where the processor multiplies matrices, are 32 bfloat16. */
struct suri_input {
    int64_t tokens, few, columns;
    int low;
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
    int64_t first, last; /* of the few tokens; suri_product_of takes all, in turn */
    int in_rows; /* `tiles` are rows as the file has them; slower, by what turning them into tiles takes in the cache */
};

/* How finely whole numbers may be rounded for a format; an input for several takes the smallest. */
int suri_low_bits(int format);

/* Bytes to reserve for an input; the memory is cut up by suri_input_in. What comes after the `few` first tokens should be
 * worth it: more than SURI_FEW tokens of one text. */
enum { SURI_FEW = 32, MANY_TILES = 8 /* tiles whose bfloat16 stays in the second cache */ };
int64_t suri_input_bytes(int64_t tokens, int64_t columns);
struct suri_input suri_input_in(void *memory, int64_t tokens, int64_t few, int64_t columns, int low);

/* x float32 (tokens, columns), into tokens first .. last of the input. A group of whole numbers with a NaN or an infinity
 * becomes NaN; one of nothing above 1e-30 becomes zeros. */
void suri_quantise(const float *x, const struct suri_input *input, int64_t first, int64_t last);

/* Rows 16 first .. 16 last of the result, on this thread. The same bits however the work is cut. */
void suri_product_tiles(const struct suri_product *product, int64_t first, int64_t last);

/* All rows, on the pool. */
void suri_product_of(const struct suri_product *product, int threads);
#endif
