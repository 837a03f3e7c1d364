/* Products of plain 16-bit weights. */
#ifndef SURI_PLAIN_H
#define SURI_PLAIN_H
#include "pool.h"

enum kind { BF16 = 1, F16 = 2 };

typedef void suri_parallel_for(int threads, int64_t count, int64_t chunk, suri_work work, const void *argument);

/* y = x W^T. x float32 (tokens, columns), weights (rows, columns) of `kind`, y float32 (tokens, rows), each token's
 * `stride` values after the last one's. `on_pool` hands out the rows: suri_parallel, whose library is another one. */
void suri_plain(int kind, const float *x, int64_t tokens, int64_t columns, const uint16_t *weights, int64_t rows,
                float *y, int64_t stride, suri_parallel_for *on_pool, int threads);
#endif
