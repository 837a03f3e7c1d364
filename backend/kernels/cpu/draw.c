/* The next token from a row of logits, where the chain of samplers begins with top-k and has nothing unusual behind it:
 * one pass over the row, then the few that are left. Twins: sampling/samplers.py, with its formulas and sources.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "wide.h"

enum { MOST = 1024 /* kept by top-k */, COLUMNS = 4096 };
enum cut { TOP_K, TOP_P, MIN_P, TEMPERATURE };

struct suri_cut {
    int64_t cut;
    double value; /* how many; mass; natural log of the share; temperature */
};

struct candidate {
    float logit;
    int32_t id;
};

/* Of equal logits the one with the lower id counts as the likelier one. */
INLINE int likelier(struct candidate a, struct candidate b) {
    return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

/* A heap with the least likely one on top, as large as it may become. */
struct heap {
    struct candidate *of;
    int64_t count, most;
};

static void sink(struct heap *heap, struct candidate one) {
    int64_t at = 0;
    for (;;) {
        int64_t child = 2 * at + 1;
        if (child >= heap->count) break;
        if (child + 1 < heap->count && likelier(heap->of[child], heap->of[child + 1])) child++;
        if (!likelier(one, heap->of[child])) break;
        heap->of[at] = heap->of[child];
        at = child;
    }
    heap->of[at] = one;
}

static void offer(struct heap *heap, struct candidate one) {
    if (heap->count == heap->most) {
        if (likelier(one, heap->of[0])) sink(heap, one);
        return;
    }
    int64_t at = heap->count++;
    while (at && likelier(heap->of[(at - 1) / 2], one)) {
        heap->of[at] = heap->of[(at - 1) / 2];
        at = (at - 1) / 2;
    }
    heap->of[at] = one;
}

/* A row in columns: lane l of every LANES logits of a group. Their largest tell how large a logit must be at least. */
struct columns {
    float largest[COLUMNS];
    int64_t rows;  /* of a group: so many times LANES logits */
    int64_t count; /* of columns */
};

static void look(const float *logits, int64_t count, struct columns *columns) {
    columns->rows = (count + COLUMNS - 1) / COLUMNS;
    columns->count = 0;
    for (int64_t i = 0; i + LANES * columns->rows <= count; i += LANES * columns->rows) {
        floats best = load(logits + i);
        for (int64_t row = 1; row < columns->rows; row++) {
            floats own = load(logits + i + row * LANES);
            best = chosen(own > best, own, best);
        }
        store(columns->largest + columns->count, best);
        columns->count += LANES;
    }
}

/* The likeliest `heap->most` of a row. */
static void likeliest(const float *logits, int64_t count, struct heap *heap) {
    struct candidate of[MOST];
    struct heap best = {of, 0, heap->most};
    struct columns columns;
    look(logits, count, &columns);
    for (int64_t n = 0; n < columns.count; n++)
        if (best.count < best.most || columns.largest[n] > of[0].logit)
            offer(&best, (struct candidate){columns.largest[n], (int32_t)n});
    float least = best.count == best.most ? of[0].logit : -INFINITY;
    for (int64_t n = 0; n < columns.count; n++) {
        if (columns.largest[n] < least) continue;
        int64_t id = n / LANES * LANES * columns.rows + n % LANES;
        for (int64_t row = 0; row < columns.rows; row++, id += LANES)
            if (logits[id] >= least) offer(heap, (struct candidate){logits[id], (int32_t)id});
    }
    for (int64_t id = columns.count * columns.rows; id < count; id++)
        if (logits[id] >= least) offer(heap, (struct candidate){logits[id], (int32_t)id});
}

static int falling(const void *a, const void *b) {
    return likelier(*(const struct candidate *)b, *(const struct candidate *)a) ? 1 : -1;
}

static int rising(const void *a, const void *b) {
    return ((const struct candidate *)a)->id < ((const struct candidate *)b)->id ? -1 : 1;
}

/* All cuts work on candidates from the likeliest down, and leave that order. */
static int64_t nucleus(const struct candidate *of, int64_t count, double mass) {
    double total = 0, before = 0;
    for (int64_t i = 0; i < count; i++) total += exp((double)of[i].logit - (double)of[0].logit);
    for (int64_t i = 0; i < count; i++) {
        if (i && !(before / total < mass)) return i;
        before += exp((double)of[i].logit - (double)of[0].logit);
    }
    return count;
}

static int64_t above(const struct candidate *of, int64_t count, float share) {
    float threshold = of[0].logit + share;
    while (count > 1 && of[count - 1].logit < threshold) count--;
    return count;
}

static int64_t drawn(struct candidate *of, int64_t count, double uniform) {
    double weights[MOST], total = 0, sum = 0;
    float best = of[0].logit;
    qsort(of, (size_t)count, sizeof *of, rising);
    for (int64_t i = 0; i < count; i++) total += weights[i] = exp((double)of[i].logit - (double)best);
    for (int64_t i = 0; i < count; i++)
        if ((sum += weights[i]) > uniform * total) return of[i].id;
    return of[count - 1].id;
}

/* Without those that must not be drawn. Candidates keep their order. */
static int64_t allowed(struct candidate *of, int64_t count, const int64_t *barred, int64_t barred_count) {
    int64_t left = 0;
    for (int64_t i = 0; i < count; i++) {
        int64_t n = 0;
        while (n < barred_count && barred[n] != of[i].id) n++;
        if (n == barred_count) of[left++] = of[i];
    }
    return left;
}

/* The id at which the cumulative distribution, in order of ids, first exceeds `uniform` in [0, 1). logits (count,):
 * finite or -inf, at least one finite. `barred`: ids that count as -inf. The first cut is a TOP_K. -1: that is not so, or
 * it keeps too many, or all are barred. */
int64_t suri_draw(const float *logits, int64_t count, const struct suri_cut *cuts, int64_t length, double uniform,
                  const int64_t *barred, int64_t barred_count) {
    struct candidate of[MOST];
    if (length < 1 || count < 1 || cuts->cut != TOP_K || cuts->value < 1 || cuts->value + (double)barred_count > MOST)
        return -1;
    struct heap heap = {of, 0, (int64_t)cuts->value + barred_count};
    likeliest(logits, count, &heap);
    int64_t left = heap.count;
    qsort(of, (size_t)left, sizeof *of, falling);
    left = allowed(of, left, barred, barred_count);
    if (left > (int64_t)cuts->value) left = (int64_t)cuts->value;
    while (left && of[left - 1].logit == -INFINITY) left--;
    if (!left) return -1;
    for (int64_t n = 1; n < length; n++) {
        double value = cuts[n].value;
        if (cuts[n].cut == TOP_K && value < (double)left) left = (int64_t)value;
        if (cuts[n].cut == TOP_P) left = nucleus(of, left, value);
        if (cuts[n].cut == MIN_P) left = above(of, left, (float)value);
        if (cuts[n].cut == TEMPERATURE) {
            float best = of[0].logit;
            for (int64_t i = 0; i < left; i++) of[i].logit = (of[i].logit - best) / (float)value;
        }
    }
    return drawn(of, left, uniform);
}

/* Whether all numbers of a row are finite, for each of (rows, count). */
void suri_finite(const float *logits, int64_t rows, int64_t count, uint8_t *finite) {
    for (int64_t row = 0; row < rows; row++) {
        uint32_t top = 0; /* sizes as whole numbers: in the order of the numbers, infinity and NaN last */
        for (int64_t i = 0; i < count; i++) {
            uint32_t size;
            memcpy(&size, logits + row * count + i, 4);
            size &= 0x7fffffff;
            top = size > top ? size : top;
        }
        finite[row] = top < 0x7f800000;
    }
}
