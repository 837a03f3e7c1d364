/* Some tokens at once, by AMX as matrix.h has it, in stages: a slice of groups is unpacked; matrix products sum what each
 * token makes of the codes; the sums are scaled and added up. What one stage leaves in memory the next can read only when
 * it has left for the cache, so each turn has work of all three, for slices that follow each other, and waits for nothing.
 */
#ifndef SURI_STAGED_H
#define SURI_STAGED_H
#include "formats.h"
#include "matrix.h"
#include "product.h"
#include "retile.h"

/* Rows as the file has them, some blocks of 16 of them: to records, which stay in the first cache. */
enum { TURNED_BYTES = 8 << 10 };

INLINE int64_t blocks_turned(struct shape shape) { return TURNED_BYTES / (LANES * shape.bytes); }

INLINE void turn_rows(enum format format, const uint8_t *rows, int64_t row_bytes, int64_t block, int64_t count,
                      uint8_t *to) {
    const struct shape shape = shape_of(format);
    for (int64_t b = block; b < block + count; b++, to += LANES * shape.bytes) {
        const uint8_t *from = rows + b * shape.bytes;
        /* The next 16 rows are one stretch of memory: asked for line by line, as it is read in 16 places at once. */
        for (int line = 0; line < LANES * shape.bytes; line += 64)
            __builtin_prefetch(rows + LANES * (row_bytes + b * shape.bytes) + line);
        one_record(format, from, row_bytes, to);
    }
}

#if MATRIX
enum { SLICE = 2 /* groups */, STAGES = 3 };

/* Codes and sums of a group begin where those of the one before end, so that all stay in the first cache. */
struct panel {
    _Alignas(64) line codes[SLICE * 32];
    float scale[SLICE][LANES], second[SLICE][LANES], minimum[SLICE][LANES];
    int32_t sums[SLICE * 2 * MATRIX_TOKENS][LANES];
    const line *at[SLICE]; /* where the codes of each group are */
};

INLINE void begin_panels(struct shape shape, int tokens, struct panel *panels) {
    matrix_begin(shape, tokens);
    if (shape.halved)
        for (int n = 0; n < STAGES; n++) memset(panels[n].codes, 0, sizeof panels[n].codes);
}

/* Codes that lie in the record as matrix_dots wants them stay there. A record is opened with the `first` of its groups. */
INLINE void unpack_slice(enum format format, lanes low, lanes mask, int ahead, const uint8_t **next, struct record *record,
                         int first, int count, struct panel *panel) {
    const struct shape shape = shape_of(format);
    for (int g = 0; g < count; g++) {
        struct group group;
        const int in_record = shape.groups == 1 ? 0 : first + g;
        if (in_record == 0) {
            if (ahead) ask_ahead(*next, LANES * shape.bytes);
            open_record(format, *next, record);
        }
        unpack(format, *next, record, in_record, &group);
        panel->at[g] = format == Q8_0 ? (const line *)(*next + 32) : panel->codes + g * code_lines(shape);
        if (format != Q8_0) matrix_codes(shape, low, mask, &group, panel->codes + g * code_lines(shape));
        if (in_record + 1 == shape.groups) *next += LANES * shape.bytes;
        store_floats(panel->scale[g], group.scale);
        if (shape.halved) store_floats(panel->second[g], group.second);
        if (shape.minimum) store_floats(panel->minimum[g], group.minimum);
    }
}

/* x: the first token's 64 bytes of the slice's first group; the next group's `step` bytes further on. */
INLINE void sum_slice(struct shape shape, int at_once, const int8_t *x, int64_t step, int count, struct panel *panel) {
    for (int g = 0; g < count; g++, x += step)
        matrix_dots(shape, at_once, panel->at[g], x, panel->sums + g * sum_lines(shape, at_once));
}

/* As add_group of kernel.h has it. What lies after the last token is multiplied too: there is memory behind it (SLACK of
 * product.c), and nobody reads the result. */
INLINE void add_slice(struct shape shape, lanes low, int at_once, const struct suri_group *about, int64_t step, int count,
                      const struct panel *panel, floats *own) {
    for (int g = 0; g < count; g++, about += step) {
        const int32_t(*sums)[LANES] = panel->sums + g * sum_lines(shape, at_once);
        const floats scale = load_floats(panel->scale[g]);
        floats second = scale, minimum = scale;
        if (shape.halved) second = load_floats(panel->second[g]);
        if (shape.minimum) minimum = load_floats(panel->minimum[g]);
#pragma GCC unroll 16
        for (int t = 0; t < at_once; t++) {
            floats scaled = product(scale, to_floats(matrix_sum(shape, low, sums, t)));
            if (shape.halved) scaled = add_product(scaled, second, to_floats(load(sums[at_once + t])));
            own[t] = add_product(own[t], scaled, all_float(about[t].scale));
            if (shape.minimum) own[t] = add_product(own[t], minimum, all_float(about[t].weighted));
        }
    }
}

/* What records() of kernel.h does, for so many tokens (`at_once`) from `token` on. */
INLINE void staged_records(enum format format, int at_once, int ahead, const uint8_t *from, int64_t block, int64_t blocks,
                           const struct suri_input *in, int64_t token, struct panel *panels, float *sums) {
    const struct shape shape = shape_of(format);
    const int64_t groups = blocks * shape.groups, slices = (groups + SLICE - 1) / SLICE, tokens = in->tokens;
    const int last = shape.groups == 1 && groups % SLICE ? 1 : SLICE; /* groups of the last slice */
    const lanes low = all(in->low), mask = all((int32_t)(0x01010101u * (0xffu & 0xffu << in->low)));
    const int8_t *x = in->codes + (block * shape.groups * tokens + token) * 2 * GROUP;
    const struct suri_group *about = in->groups + block * shape.groups * tokens + token;
    struct panel *unpacked = panels, *summed = panels + 1, *added = panels + 2;
    struct record record;
    floats own[MATRIX_TOKENS];
#pragma GCC unroll 16
    for (int t = 0; t < at_once; t++) own[t] = load_floats(sums + t * LANES);
    for (int64_t slice = 0; slice < slices + STAGES - 1; slice++) {
        const int here = shape.groups > 1 || slice + 1 < slices ? SLICE : last;
#define UNPACK(first) unpack_slice(format, low, mask, ahead, &from, &record, first, here, unpacked)
        if (slice >= slices) ; /* nothing is left */
        else if (shape.groups == 1 || slice % 4 == 0) UNPACK(0);
        else if (slice % 4 == 1) UNPACK(2);
        else if (slice % 4 == 2) UNPACK(4);
        else UNPACK(6);
#undef UNPACK
        if (slice >= 1 && slice <= slices) {
            sum_slice(shape, at_once, x, tokens * 2 * GROUP, shape.groups > 1 || slice < slices ? SLICE : last, summed);
            x += SLICE * tokens * 2 * GROUP;
        }
        if (slice >= 2) {
            add_slice(shape, low, at_once, about, tokens, shape.groups > 1 || slice <= slices ? SLICE : last, added, own);
            about += SLICE * tokens;
        }
        struct panel *free = added;
        added = summed, summed = unpacked, unpacked = free;
    }
#pragma GCC unroll 16
    for (int t = 0; t < at_once; t++) store_floats(sums + t * LANES, own[t]);
}

/* What records_of() of kernel.h does. */
INLINE void staged_tile(enum format format, int at_once, const struct suri_product *p, const uint8_t *from, int64_t token,
                        int tokens, struct panel *panels, float *sums) {
    const struct shape shape = shape_of(format);
    const int64_t blocks = p->columns / (GROUP * shape.groups), most = p->in_rows ? blocks_turned(shape) : blocks;
    _Alignas(64) uint8_t turned[TURNED_BYTES];
    for (int64_t block = 0; block < blocks; block += most) {
        const int64_t count = blocks - block < most ? blocks - block : most;
        const uint8_t *records = from + block * LANES * shape.bytes;
        if (p->in_rows) turn_rows(format, from, blocks * shape.bytes, block, count, turned), records = turned;
        for (int t = 0; t < tokens; t += at_once)
            staged_records(format, at_once, !p->in_rows, records, block, count, p->input, token + t, panels,
                           sums + t * LANES);
    }
}
#endif
#endif
