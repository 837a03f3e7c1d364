/* Formats whose blocks are 32 columns. */
#include "kernel.h"

/* One copy of each loop for each format, so that the compiler sees the format as a constant. */
#define DISPATCH(function) \
    switch (p->format) { \
        case Q4_0: function(Q4_0, p, first, last); break; \
        case Q4_1: function(Q4_1, p, first, last); break; \
        case Q5_0: function(Q5_0, p, first, last); break; \
        case Q5_1: function(Q5_1, p, first, last); break; \
        case Q8_0: function(Q8_0, p, first, last); break; \
        case IQ4_NL: function(IQ4_NL, p, first, last); break; \
    }

void suri_tiles_32(const struct suri_product *p, int64_t first, int64_t last) { DISPATCH(tiles_of) }

void suri_values_32(const struct suri_product *p, int64_t first, int64_t last) { DISPATCH(values_of) }
