/* Formats whose blocks are 256 columns. */
#include "kernel.h"

/* One copy of each loop for each format, so that the compiler sees the format as a constant. */
#define DISPATCH(function) \
    switch (p->format) { \
        case Q4_K: function(Q4_K, p, first, last); break; \
        case Q5_K: function(Q5_K, p, first, last); break; \
        case Q6_K: function(Q6_K, p, first, last); break; \
        case IQ4_XS: function(IQ4_XS, p, first, last); break; \
    }

void suri_tiles_256(const struct suri_product *p, int64_t first, int64_t last) { DISPATCH(tiles_of) }

void suri_values_256(const struct suri_product *p, int64_t first, int64_t last) { DISPATCH(values_of) }
