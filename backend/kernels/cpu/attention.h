/* Attention of a whole step: every token of every sequence in it, over all that its sequence has in the cache.
 *
 * Work is cut into pieces: a few tokens of one sequence and one key-value head. When there are too few pieces for the
 * threads, a piece is cut by chunks of the sequence as well, and folded afterwards; the arithmetic is the same. Prompts
 * are attended apart, where the processor has AMX: attend_many.h.
 */
#ifndef SURI_ATTENTION_H
#define SURI_ATTENTION_H

#include <stdlib.h>

#include "attend.h"
#include "attend_few.h"
#include "attend_many.h"
#include "step.h"

struct piece {
    int64_t span, head, token, tokens; /* tokens of the span */
    int64_t chunk, chunks;             /* the chunks of the sequence that its rows see */
    int64_t part;                      /* where the states of its chunks begin, if they are kept apart */
};

/* Rows of a prompt, of one key-value head: row r is head r % group of the head's, of the span's token r / group. */
struct stretch {
    int64_t span, head, row, rows;
};

/* How a step's attention is cut up: the same for all layers, so it is planned once. */
struct cut {
    struct stretch *stretches;
    int64_t stretch_count, stretch_room;
    struct piece *pieces;
    int64_t (*tasks)[2]; /* (piece, chunk of it) */
    struct folded *parts;
    int64_t piece_count, task_count, part_count;
    int64_t piece_room, task_room, part_room;
};

struct attention {
    const float *queries; /* (tokens, heads, head_dim), turned and times 1 / sqrt(head_dim) */
    int64_t query_stride; /* from one token to the next */
    float *out;           /* (tokens, heads, head_dim) */
    const struct suri_span *spans;
    const void *keys, *values;              /* of this layer: (kv_heads, slots, head_dim) */
    const float *key_scales, *value_scales; /* of this layer: (kv_heads, slots), or 0 */
    int64_t head_bytes;                     /* from one head to the next */
    int kind;
    int64_t heads, kv_heads, head_dim, window; /* window: 0 for none */
    int64_t uniform;                           /* attend_many takes nothing */
    struct cut *cut;
    int64_t begin; /* the stretch, or the piece, that is first of those being attended */
};

/* Row `r` of a span's rows of one key-value head. */
INLINE struct row row_of(const struct attention *a, const struct suri_span *span, int64_t head, int64_t r) {
    int64_t group = a->heads / a->kv_heads, t = r / group, end = span->start + t + 1;
    return (struct row){
        .query = a->queries + (span->first + t) * a->query_stride + (head * group + r % group) * a->head_dim,
        .first = a->window && end > a->window ? end - a->window : 0,
        .end = end,
    };
}

INLINE int rows_of(const struct attention *a, const struct piece *piece, struct row *rows) {
    int64_t group = a->heads / a->kv_heads;
    int n = (int)(piece->tokens * group);
    for (int r = 0; r < n; r++) rows[r] = row_of(a, &a->spans[piece->span], piece->head, piece->token * group + r);
    return n;
}

INLINE float *out_of(const struct attention *a, const struct suri_span *span, int64_t head, int64_t r) {
    int64_t group = a->heads / a->kv_heads;
    return a->out + ((span->first + r / group) * a->heads + head * group + r % group) * a->head_dim;
}

/* Codes are bytes, so a head's bytes are its slots times head_dim. */
INLINE const float *scales_of(const float *scales, const struct attention *a, int64_t head) {
    return scales ? scales + head * (a->head_bytes / a->head_dim) : 0;
}

INLINE struct cached cached_of(const struct attention *a, int64_t span, int64_t head) {
    return (struct cached){
        .keys = (const char *)a->keys + head * a->head_bytes,
        .values = (const char *)a->values + head * a->head_bytes,
        .key_scales = scales_of(a->key_scales, a, head),
        .value_scales = scales_of(a->value_scales, a, head),
        .blocks = a->spans[span].blocks,
        .kind = a->kind,
        .head_dim = (int)a->head_dim,
        .width = whole_vectors(a->head_dim),
    };
}

#if MATRIX
static void stretches_of(const void *context, int64_t first, int64_t last) {
    const struct attention *a = context;
    for (int64_t s = a->begin + first; s < a->begin + last; s++) {
        const struct stretch *stretch = &a->cut->stretches[s];
        const struct suri_span *span = &a->spans[stretch->span];
        struct row rows[MANY_BLOCKS * MANY_ROWS];
        float *out[MANY_BLOCKS * MANY_ROWS];
        for (int r = 0; r < stretch->rows; r++) {
            rows[r] = row_of(a, span, stretch->head, stretch->row + r);
            out[r] = out_of(a, span, stretch->head, stretch->row + r);
        }
        const struct cached of = cached_of(a, stretch->span, stretch->head);
        attend_many(&of, rows, (int)stretch->rows, out);
    }
}
#endif

/* One chunk of a piece, into fresh states. */
static void attend_piece(const struct attention *a, const struct piece *piece, int64_t chunk, struct folded *states) {
    struct row rows[MAX_ROWS];
    int n = rows_of(a, piece, rows);
    const struct cached of = cached_of(a, piece->span, piece->head);
    int64_t start = chunk * CHUNK, end = start + CHUNK < rows[n - 1].end ? start + CHUNK : rows[n - 1].end;
    for (int r = 0; r < n; r++) empty(&states[r], of.width);
    /* Rows are in order of their tokens, so those that see some of the chunk lie together. */
    int first = 0, last = n;
    while (first < n && rows[first].end <= start) first++;
    while (last > first && rows[last - 1].first >= end) last--;
    if (first >= last) return;
#if MATRIX
    if (few_possible(of.kind, of.head_dim)) {
        attend_few(&of, rows + first, states + first, last - first, start, end);
        return;
    }
#endif
    attend_chunk(&of, rows + first, states + first, last - first, start, end);
}

INLINE void write_out(const struct attention *a, const struct piece *piece, const struct folded *states) {
    int64_t group = a->heads / a->kv_heads;
    for (int64_t r = 0; r < piece->tokens * group; r++) {
        float *to = out_of(a, &a->spans[piece->span], piece->head, piece->token * group + r);
        for (int64_t d = 0; d < a->head_dim; d++) to[d] = states[r].values[d] / states[r].sum;
    }
}

static void whole_pieces(const void *context, int64_t first, int64_t last) {
    const struct attention *a = context;
    int width = whole_vectors(a->head_dim);
    for (int64_t p = a->begin + first; p < a->begin + last; p++) {
        const struct piece *piece = &a->cut->pieces[p];
        int64_t n = piece->tokens * (a->heads / a->kv_heads);
        struct folded all_of[MAX_ROWS], next[MAX_ROWS];
        for (int64_t r = 0; r < n; r++) empty(&all_of[r], width);
        for (int64_t c = 0; c < piece->chunks; c++) {
            attend_piece(a, piece, piece->chunk + c, next);
            for (int64_t r = 0; r < n; r++) fold(&all_of[r], &next[r], width);
        }
        write_out(a, piece, all_of);
    }
}

static void chunks_of_pieces(const void *context, int64_t first, int64_t last) {
    const struct attention *a = context;
    for (int64_t t = first; t < last; t++) {
        const struct piece *piece = &a->cut->pieces[a->cut->tasks[t][0]];
        int64_t c = a->cut->tasks[t][1], n = piece->tokens * (a->heads / a->kv_heads);
        attend_piece(a, piece, piece->chunk + c, a->cut->parts + piece->part + c * n);
    }
}

static void fold_pieces(const void *context, int64_t first, int64_t last) {
    const struct attention *a = context;
    int width = whole_vectors(a->head_dim);
    for (int64_t p = first; p < last; p++) {
        const struct piece *piece = &a->cut->pieces[p];
        int64_t n = piece->tokens * (a->heads / a->kv_heads);
        struct folded all_of[MAX_ROWS];
        for (int64_t r = 0; r < n; r++) empty(&all_of[r], width);
        for (int64_t c = 0; c < piece->chunks; c++)
            for (int64_t r = 0; r < n; r++) fold(&all_of[r], a->cut->parts + piece->part + c * n + r, width);
        write_out(a, piece, all_of);
    }
}

static int grown(void **memory, int64_t *room, int64_t wanted, size_t size) {
    if (wanted <= *room) return 1;
    void *larger = realloc(*memory, (size_t)(wanted + wanted / 2) * size);
    if (!larger) return 0;
    *memory = larger;
    *room = wanted + wanted / 2;
    return 1;
}

static int64_t cut_bytes(const struct cut *cut) {
    return cut->stretch_room * (int64_t)sizeof *cut->stretches + cut->piece_room * (int64_t)sizeof *cut->pieces +
            cut->task_room * (int64_t)sizeof *cut->tasks +
           cut->part_room * (int64_t)sizeof *cut->parts;
}

/* Spans that attend_many takes: prompts, but a single token is not worth it. */
INLINE int is_long(const struct attention *a, int64_t span) {
    return !a->uniform && a->spans[span].prompt && a->spans[span].count > 1 && many_possible(a->kind, a->head_dim);
}

/* Blocks of 32 rows times blocks of 128 tokens: a stretch of a step that may be set aside, at most. */
enum { AT_ONCE = 256 };

#if MATRIX
/* Blocks of rows in a stretch. Each lays out keys and values anew, for half as long as a block takes, so few long ones;
 * but as many for every thread. `most`: see AT_ONCE, but at least one block of rows; 0: any. */
static int64_t stretch_blocks(const struct attention *a, int64_t span_count, int threads, int64_t most) {
    const int64_t group = a->heads / a->kv_heads;
    int64_t best = 1, least = INT64_MAX, keys = 0;
    for (int64_t s = 0; s < span_count; s++) {
        int64_t own = (a->spans[s].start + a->spans[s].count + MANY_KEYS - 1) / MANY_KEYS;
        if (is_long(a, s) && own > keys) keys = own;
    }
    for (int64_t each = 1; each <= MANY_BLOCKS && (each == 1 || !most || each * keys <= most); each++) {
        int64_t stretches = 0;
        for (int64_t s = 0; s < span_count; s++) {
            int64_t blocks = (a->spans[s].count * group + MANY_ROWS - 1) / MANY_ROWS;
            if (is_long(a, s)) stretches += (blocks + each - 1) / each * a->kv_heads;
        }
        int64_t time = (stretches + threads - 1) / threads * (2 * each + 1);
        if (time <= least) least = time, best = each;
    }
    return best;
}

static int plan_stretches(const struct attention *a, int64_t span_count, int threads, int64_t at_once) {
    struct cut *cut = a->cut;
    const int64_t group = a->heads / a->kv_heads, most = stretch_blocks(a, span_count, threads, at_once) * MANY_ROWS;
    int64_t stretches = 0;
    for (int64_t s = 0; s < span_count; s++)
        if (is_long(a, s)) stretches += (a->spans[s].count * group + most - 1) / most * a->kv_heads;
    if (!grown((void **)&cut->stretches, &cut->stretch_room, stretches, sizeof *cut->stretches)) return 0;
    stretches = 0;
    for (int64_t s = 0; s < span_count; s++) {
        int64_t rows = a->spans[s].count * group;
        for (int64_t h = 0; is_long(a, s) && h < a->kv_heads; h++)
            for (int64_t row = 0; row < rows; row += most)
                cut->stretches[stretches++] = (struct stretch){s, h, row, rows - row < most ? rows - row : most};
    }
    cut->stretch_count = stretches;
    return 1;
}
#endif

/* `at_once`: AT_ONCE, or 0 for any. Returns 0 when memory ran out. */
static int plan_cut(const struct attention *a, int64_t span_count, int threads, int64_t at_once) {
    struct cut *cut = a->cut;
    int64_t group = a->heads / a->kv_heads, most = MAX_ROWS / group, tokens = most > 1 ? most : 1;
    int64_t pieces = 0, tasks = 0, parts = 0;
#if MATRIX
    if (!plan_stretches(a, span_count, threads, at_once)) return 0;
#else
    (void)at_once;
#endif
    for (int64_t s = 0; s < span_count; s++) pieces += (a->spans[s].count + tokens - 1) / tokens * a->kv_heads;
    if (!grown((void **)&cut->pieces, &cut->piece_room, pieces, sizeof *cut->pieces)) return 0;
    pieces = 0;
    for (int64_t s = 0; s < span_count; s++)
        for (int64_t t = 0; !is_long(a, s) && t < a->spans[s].count; t += tokens)
            for (int64_t h = 0; h < a->kv_heads; h++) {
                int64_t count = a->spans[s].count - t < tokens ? a->spans[s].count - t : tokens;
                int64_t begin = a->spans[s].start + t + 1, end = begin + count - 1;
                int64_t first = a->window && begin > a->window ? (begin - a->window) / CHUNK : 0;
                struct piece piece = {.span = s, .head = h, .token = t, .tokens = count, .chunk = first};
                piece.chunks = (end + CHUNK - 1) / CHUNK - first;
                piece.part = parts;
                tasks += piece.chunks;
                parts += piece.chunks * count * group;
                cut->pieces[pieces++] = piece;
            }
    cut->piece_count = pieces;
    cut->task_count = 0;
    if (threads == 1 || pieces >= 4 * threads || tasks == pieces) return 1;
    if (!grown((void **)&cut->tasks, &cut->task_room, tasks, sizeof *cut->tasks)) return 0;
    if (!grown((void **)&cut->parts, &cut->part_room, parts, sizeof *cut->parts)) return 0;
    for (int64_t p = 0; p < pieces; p++)
        for (int64_t c = 0; c < cut->pieces[p].chunks; c++) {
            cut->tasks[cut->task_count][0] = p;
            cut->tasks[cut->task_count++][1] = c;
        }
    return 1;
}

typedef void parallel(int threads, int64_t count, int64_t chunk, suri_work work, const void *argument);

/* Jobs that may be done one after the other: stretches, then pieces, or all pieces at once. */
INLINE int64_t attention_jobs(const struct cut *cut) {
    return cut->stretch_count + (cut->task_count ? 1 : cut->piece_count);
}

/* Jobs first .. last - 1. */
static void attend(struct attention *a, parallel *on_pool, int threads, int64_t first, int64_t last) {
    const struct cut *cut = a->cut;
    const int64_t stretches = cut->stretch_count;
    a->begin = first;
#if MATRIX
    if (first < stretches) on_pool(threads, (last < stretches ? last : stretches) - first, 1, stretches_of, a);
#endif
    if (last <= stretches) return;
    a->begin = first > stretches ? first - stretches : 0;
    if (!cut->task_count) {
        on_pool(threads, last - stretches - a->begin, 1, whole_pieces, a);
        return;
    }
    on_pool(threads, cut->task_count, 1, chunks_of_pieces, a);
    on_pool(threads, cut->piece_count, 1, fold_pieces, a);
}

#endif
