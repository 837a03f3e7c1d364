/* Matrices as a file has them -> tiles, at the speed of a copy. */
#include "retile.h"

#include <stdlib.h>

#include "pool.h"

enum { PIECE_BYTES = 256 << 10 };

struct job {
    int format;
    const uint8_t *raw;
    int64_t row_bytes, rows;
    uint8_t *tiles;
};

INLINE void tiles_of(enum format format, const struct job *job, int64_t first, int64_t last) {
    struct shape shape = shape_of(format);
    int64_t row_bytes = job->row_bytes, tile_bytes = row_bytes * LANES;
    for (int64_t n = first; n < last; n++) {
        const uint8_t *rows = job->raw + n * tile_bytes;
        uint8_t *to = job->tiles + n * tile_bytes, *filled = 0;
        if ((n + 1) * LANES > job->rows) { /* the last rows: filled up with zeros */
            size_t there = (size_t)((job->rows - n * LANES) * row_bytes);
            filled = calloc(1, (size_t)tile_bytes);
            if (!filled) abort();
            memcpy(filled, rows, there);
            rows = filled;
        }
        for (int64_t at = 0; at < row_bytes; at += shape.bytes, to += LANES * shape.bytes) {
            /* The next tile is one stretch of memory: asked for line by line, as it is read in sixteen places at once. */
            for (int line = 0; line < LANES * shape.bytes; line += 64) __builtin_prefetch(rows + tile_bytes + LANES * at + line);
            one_record(format, rows + at, row_bytes, to);
        }
        free(filled);
    }
}

static void part(const void *argument, int64_t first, int64_t last) {
    const struct job *job = argument;
    switch (job->format) {
        case Q4_0: tiles_of(Q4_0, job, first, last); break;
        case Q4_1: tiles_of(Q4_1, job, first, last); break;
        case Q5_0: tiles_of(Q5_0, job, first, last); break;
        case Q5_1: tiles_of(Q5_1, job, first, last); break;
        case Q8_0: tiles_of(Q8_0, job, first, last); break;
        case Q4_K: tiles_of(Q4_K, job, first, last); break;
        case Q5_K: tiles_of(Q5_K, job, first, last); break;
        case Q6_K: tiles_of(Q6_K, job, first, last); break;
        case IQ4_NL: tiles_of(IQ4_NL, job, first, last); break;
        case IQ4_XS: tiles_of(IQ4_XS, job, first, last); break;
    }
}

/* raw: `rows` rows of `row_bytes`, side by side; tiles: room for the rows filled up to a multiple of 16. */
void suri_retile(int format, const uint8_t *raw, int64_t row_bytes, int64_t rows, uint8_t *tiles, int threads) {
    struct job job = {format, raw, row_bytes, rows, tiles};
    int64_t chunk = PIECE_BYTES / (row_bytes * LANES);
    suri_parallel(threads, (rows + LANES - 1) / LANES, chunk < 1 ? 1 : chunk, part, &job);
}
