#include "step.h"

#include <math.h>
#include <sched.h>
#include <stdlib.h>
#include <time.h>

#include "attention.h"
#include "wide.h"

enum { NUMBERS_AT_ONCE = 5000 }; /* of what is done token by token: less is not worth a second thread */

/* Of a layer: between two of them a step may be set aside, and between two rounds of its attention. */
enum phase { QKV, ATTENTION, UP, DOWN, PHASES };

struct suri_workspace {
    struct cut cut;
    double took[PHASES]; /* seconds of each, the last time; of attention for one job of each thread */
    void *memory;
    int64_t bytes;
};

struct suri_workspace *suri_workspace_new(void) { return calloc(1, sizeof(struct suri_workspace)); }

void suri_workspace_free(struct suri_workspace *workspace) {
    if (!workspace) return;
    free(workspace->cut.stretches);
    free(workspace->cut.pieces);
    free(workspace->cut.tasks);
    free(workspace->cut.parts);
    free(workspace->memory);
    free(workspace);
}

int64_t suri_workspace_bytes(const struct suri_workspace *workspace) {
    return workspace->bytes + cut_bytes(&workspace->cut);
}

/* What the phases of a step read and write. */
struct run {
    const struct suri_model *model;
    const struct suri_step *step;
    const struct suri_layer *layer;
    struct attention attention;
    struct suri_input input; /* of the product that comes next */
    const float *norm;       /* of the norm that comes next, or 0 where the input is `mixed` as it is */
    const int64_t *row;      /* which tokens the norm is for; 0: all */
    int rounded;             /* the product that comes next has tiles, so its input is rounded */
    int add;                 /* what the last product gave belongs to the residual stream */
    float *heads;            /* (tokens, heads + 2 kv_heads, head_dim): queries, keys, values */
    float *mixed;            /* (tokens, heads * head_dim) */
    float *gates;            /* (tokens, 2 ffn_dim): gate, then up; then their product, (tokens, ffn_dim) */
    float *change;           /* (tokens, dim) */
    float *normed;           /* (tokens, dim) */
    int64_t number;          /* of the layer */
    int threads;
};

/* phases ----------------------------------------------------------------------------------------------------------- */

/* x += change; x / sqrt(mean(x^2) + eps) * norm (Zhang and Sennrich 2019, arXiv:1910.07467), as the next input. */
static void norm_tokens(const void *argument, int64_t first, int64_t last) {
    const struct run *run = argument;
    int64_t dim = run->model->dim;
    for (int64_t t = first; t < last; t++) {
        int64_t token = run->row ? run->row[t] : t, d = 0;
        float *x = run->step->x + token * dim, *to = run->normed + t * dim;
        const float *change = run->change + token * dim;
        floats squares = all(0.0f);
        float rest = 0;
        for (; d + LANES <= dim; d += LANES) {
            floats own = load(x + d);
            if (run->add) store(x + d, own = own + load(change + d));
            squares = own * own + squares;
        }
        for (; d < dim; d++) {
            if (run->add) x[d] += change[d];
            rest += x[d] * x[d];
        }
        float scale = 1.0f / sqrtf((sum_of(squares) + rest) / (float)dim + (float)run->model->norm_eps);
        for (d = 0; d < dim; d++) to[d] = x[d] * scale * run->norm[d];
    }
    if (run->rounded) run->model->tools.quantise(run->normed, &run->input, first, last);
}

static void quantise_mixed(const void *argument, int64_t first, int64_t last) {
    const struct run *run = argument;
    if (run->rounded) run->model->tools.quantise(run->mixed, &run->input, first, last);
}

/* Queries and keys turned by their positions (Su et al. 2021, arXiv:2104.09864), queries scaled for the softmax. */
INLINE void turn_head(float *head, const float *turns, int64_t size, int64_t interleaved, float scale) {
    int64_t half = size / 2, apart = interleaved ? 1 : half, step = interleaved ? 2 : 1;
    for (int64_t i = 0; i < half; i++) {
        float a = head[i * step], b = head[i * step + apart], c = turns[2 * i], s = turns[2 * i + 1];
        head[i * step] = (a * c - b * s) * scale;
        head[i * step + apart] = (a * s + b * c) * scale;
    }
}

/* Symmetric codes and their scale: cache/int8.py says what, and both give the same bits. */
INLINE void keep_codes(const float *from, int8_t *to, float *scale, int64_t count) {
    uint32_t top = 0; /* bits of the largest size: they are in the order of the numbers, infinity and NaN last */
    for (int64_t i = 0; i < count; i++) {
        uint32_t size;
        memcpy(&size, from + i, 4);
        size &= 0x7fffffff;
        top = size > top ? size : top;
    }
    float largest;
    memcpy(&largest, &top, 4);
    int finite = top < 0x7f800000, none = largest < 1e-30f;
    float inverse = finite && !none ? 127.0f / largest : 0.0f;
    *scale = !finite ? NAN : none ? 0.0f : largest / 127.0f;
    for (int64_t i = 0; i < count; i++) to[i] = finite ? (int8_t)rintf(from[i] * inverse) : 0;
}

INLINE void keep(const float *from, void *pool, float *scales, int64_t kind, int64_t slot, int64_t count) {
    int64_t at = slot * count;
    if (kind == KV_INT8)
        keep_codes(from, (int8_t *)pool + at, scales + slot, count);
    else if (kind == KV_F32)
        memcpy((float *)pool + at, from, (size_t)count * 4);
    else if (kind == KV_BF16)
        for (int64_t i = 0; i < count; i++) ((uint16_t *)pool)[at + i] = to_bfloat16(from[i]);
    else
        for (int64_t i = 0; i < count; i++) ((uint16_t *)pool)[at + i] = to_float16(from[i]);
}

static void store_tokens(const struct run *run, const struct suri_span *span, int64_t first, int64_t last) {
    const struct suri_model *m = run->model;
    int64_t size = m->head_dim, all_heads = m->heads + 2 * m->kv_heads;
    float scale = 1.0f / sqrtf((float)size);
    for (int64_t t = first; t < last; t++) {
        float *heads = run->heads + (span->first + t) * all_heads * size;
        const float *turns = run->step->turns + (span->start + t) * size;
        if (m->interleaved)
            for (int64_t h = 0; h < m->heads + m->kv_heads; h++)
                turn_head(heads + h * size, turns, size, 1, h < m->heads ? scale : 1.0f);
        else
            for (int64_t h = 0; h < m->heads + m->kv_heads; h++)
                turn_head(heads + h * size, turns, size, 0, h < m->heads ? scale : 1.0f);
        int64_t position = span->start + t, slot = span->blocks[position / BLOCK] * (int64_t)BLOCK + position % BLOCK;
        for (int64_t h = 0; h < m->kv_heads; h++) {
            char *keys = (char *)m->keys + run->number * m->layer_bytes + h * m->head_bytes;
            char *values = (char *)m->values + run->number * m->layer_bytes + h * m->head_bytes;
            float *key_scales = 0, *value_scales = 0;
            if (m->kind == KV_INT8) { /* codes are bytes, so a head's bytes are its slots times its size */
                key_scales = m->key_scales + (run->number * m->layer_bytes + h * m->head_bytes) / size;
                value_scales = m->value_scales + (run->number * m->layer_bytes + h * m->head_bytes) / size;
            }
            keep(heads + (m->heads + h) * size, keys, key_scales, m->kind, slot, size);
            keep(heads + (m->heads + m->kv_heads + h) * size, values, value_scales, m->kind, slot, size);
        }
    }
}

static void place_tokens(const void *argument, int64_t first, int64_t last) {
    const struct run *run = argument;
    for (int64_t s = 0; s < run->step->spans; s++) { /* spans follow each other in the batch */
        const struct suri_span *span = run->step->span + s;
        int64_t from = first > span->first ? first - span->first : 0, to = last - span->first;
        store_tokens(run, span, from, to < span->count ? to : span->count);
    }
}

/* SwiGLU (Shazeer 2020, arXiv:2002.05202): gate / (1 + e^-gate) * up, as the next product's input. */
static void gate_tokens(const void *argument, int64_t first, int64_t last) {
    const struct run *run = argument;
    int64_t size = run->model->ffn_dim;
    for (int64_t t = first; t < last; t++) {
        const float *gate = run->gates + t * 2 * size, *up = gate + size;
        float *to = run->mixed + t * size;
        int64_t d = 0;
        for (; d + LANES <= size; d += LANES) {
            floats own = load(gate + d);
            store(to + d, own / (exponential(-own) + 1.0f) * load(up + d));
        }
        for (; d < size; d++) to[d] = gate[d] / (exponential_of(-gate[d]) + 1.0f) * up[d];
    }
    if (run->rounded) run->model->tools.quantise(run->mixed, &run->input, first, last);
}

/* Through the rounded input for tiles, through x, (tokens, columns), for plain numbers. */
static void multiply(const struct run *run, const struct suri_stack *stack, const float *x, int64_t tokens,
                     float *out) {
    const struct suri_tools *tools = &run->model->tools;
    int64_t row = 0;
    for (int64_t n = 0; n < stack->count; n++) {
        const struct suri_weight *part = &stack->parts[n];
        if (part->format >= PLAIN) {
            suri_plain((int)part->format - PLAIN, x, tokens, stack->columns, part->numbers, part->rows, out + row,
                       stack->rows, tools->parallel, run->threads);
        } else {
            const struct suri_product product = {
                (int)part->format, part->rows, stack->columns, part->numbers, &run->input, out + row, stack->rows,
            };
            tools->product_of(&product, run->threads);
        }
        row += part->rows;
    }
    if (stack->bias)
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t r = 0; r < stack->rows; r++) out[t * stack->rows + r] += stack->bias[r];
}

/* the step --------------------------------------------------------------------------------------------------------- */

INLINE int64_t tokens_at_once(int64_t columns) { return columns < NUMBERS_AT_ONCE ? NUMBERS_AT_ONCE / columns : 1; }

/* `work` on all tokens, which leaves the input of the product that comes next. */
static void prepare(struct run *run, suri_work work, int64_t tokens, int64_t few, const struct suri_stack *next,
                    void *memory) {
    const struct suri_tools *tools = &run->model->tools;
    int low = 7;
    run->rounded = 0;
    for (int64_t n = 0; n < next->count; n++)
        if (next->parts[n].format < PLAIN) {
            int own = tools->low_bits((int)next->parts[n].format);
            low = own < low ? own : low;
            run->rounded = 1;
        }
    run->input = tools->input_in(memory, tokens, few, next->columns, low);
    tools->parallel(run->threads, tokens, tokens_at_once(next->columns), work, run);
}

/* Tokens that are multiplied as whole numbers: those of the spans before the first long prompt. So what a reply's tokens
 * are multiplied as does not depend on whose prompt is read in the same step, where replies come first. */
static int64_t few_tokens(const struct suri_model *model, const struct suri_step *step) {
    int64_t few = 0;
    if (model->uniform) return step->tokens;
    for (int64_t s = 0; s < step->spans; s++) {
        if (step->span[s].prompt && step->span[s].count > SURI_FEW) break;
        few += step->span[s].count;
    }
    return few;
}

/* The same for the output. The last token of a prompt is one of few. */
static int64_t few_rows(const struct suri_step *step, int64_t few) {
    int64_t rows = 0;
    while (rows < step->rows && step->row[rows] < few) rows++;
    return step->rows - rows <= SURI_FEW ? step->rows : rows;
}

/* One phase of the step's layer; of attention so many of its jobs. What the phases leave for each other is in the
 * workspace and in the residual stream. */
static void run_phase(struct run *run, enum phase phase, int64_t jobs, void *memory) {
    const struct suri_model *m = run->model;
    const struct suri_layer *layer = &m->layer[run->number];
    int64_t tokens = run->step->tokens, few = few_tokens(m, run->step);
    switch (phase) {
        case QKV:
            run->add = run->number > 0;
            run->norm = layer->attention_norm;
            prepare(run, norm_tokens, tokens, few, &layer->qkv, memory);
            multiply(run, &layer->qkv, run->normed, tokens, run->heads);
            m->tools.parallel(run->threads, tokens, tokens_at_once(layer->qkv.rows), place_tokens, run);
            break;
        case ATTENTION:
            run->attention.keys = (const char *)m->keys + run->number * m->layer_bytes;
            run->attention.values = (const char *)m->values + run->number * m->layer_bytes;
            if (m->kind == KV_INT8) {
                run->attention.key_scales = m->key_scales + run->number * m->layer_bytes / m->head_dim;
                run->attention.value_scales = m->value_scales + run->number * m->layer_bytes / m->head_dim;
            }
            attend(&run->attention, m->tools.parallel, run->threads, run->step->job, run->step->job + jobs);
            break;
        case UP:
            prepare(run, quantise_mixed, tokens, few, &layer->o, memory);
            multiply(run, &layer->o, run->mixed, tokens, run->change);
            run->add = 1;
            run->norm = layer->ffn_norm;
            prepare(run, norm_tokens, tokens, few, &layer->gate_up, memory);
            multiply(run, &layer->gate_up, run->normed, tokens, run->gates);
            break;
        default:
            prepare(run, gate_tokens, tokens, few, &layer->down, memory);
            multiply(run, &layer->down, run->mixed, tokens, run->change);
    }
}

/* What comes after this phase, or after so many jobs of attention. */
static void go_on(struct suri_step *step, int64_t jobs, int64_t all_jobs) {
    step->job += jobs;
    if (step->phase == ATTENTION && step->job < all_jobs) return;
    step->job = 0;
    if (++step->phase < PHASES) return;
    step->phase = QKV;
    step->layer++;
}

/* How many jobs of attention fit into so many seconds: one for each thread at least. */
static int64_t jobs_in(double seconds, double took, int threads, int64_t most) {
    double rounds = took > 0 ? seconds / took : 1;
    if (isinf(seconds) || rounds * threads >= (double)most) return most;
    int64_t jobs = threads * (rounds > 1 ? (int64_t)rounds : 1);
    return jobs < most ? jobs : most;
}

/* Room for all arrays of a step, one after the other, each at a multiple of 64 bytes. */
static int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

int suri_run_step(const struct suri_model *m, struct suri_step *step, struct suri_workspace *workspace, int threads,
                  double seconds) {
    int64_t tokens = step->tokens, inner = m->heads * m->head_dim, widest = inner > m->ffn_dim ? inner : m->ffn_dim;
    if (m->dim > widest) widest = m->dim;
    const int64_t sizes[] = {
        aligned(tokens * (m->heads + 2 * m->kv_heads) * m->head_dim * 4),
        aligned(tokens * (inner > m->ffn_dim ? inner : m->ffn_dim) * 4),
        aligned(tokens * 2 * m->ffn_dim * 4),
        aligned(tokens * m->dim * 4),
        aligned(tokens * m->dim * 4),
        aligned(m->tools.input_bytes(tokens, widest)),
    };
    int64_t total = 64;
    for (int i = 0; i < 6; i++) total += sizes[i];
    if (total > workspace->bytes) {
        free(workspace->memory);
        workspace->memory = malloc((size_t)total);
        workspace->bytes = workspace->memory ? total : 0;
        if (!workspace->memory) return -1;
    }
    char *at[6], *next = (char *)(((uintptr_t)workspace->memory + 63) & ~(uintptr_t)63);
    for (int i = 0; i < 6; next += sizes[i++]) at[i] = next;
    struct run run = {.model = m, .step = step, .threads = threads, .heads = (float *)at[0], .mixed = (float *)at[1],
                      .gates = (float *)at[2], .change = (float *)at[3], .normed = (float *)at[4]};
    run.attention = (struct attention){
        .queries = run.heads, .query_stride = (m->heads + 2 * m->kv_heads) * m->head_dim, .out = run.mixed,
        .spans = step->span, .head_bytes = m->head_bytes, .kind = (int)m->kind, .heads = m->heads,
        .kv_heads = m->kv_heads, .head_dim = m->head_dim, .window = m->window, .uniform = m->uniform,
        .cut = &workspace->cut,
    };
    /* Once for a step: what has been attended must not depend on who calls. */
    const int begun = step->layer || step->phase || step->job;
    if (!begun && !plan_cut(&run.attention, step->spans, threads, isinf(seconds) ? 0 : AT_ONCE)) return -1;
    const int64_t all_jobs = attention_jobs(&workspace->cut);
    /* Who has just been woken to send the last tokens may stand in line behind this thread: let it go first. Else it
     * waits until the system takes the processor away from us, which it does after milliseconds. */
    sched_yield();
    const double begin = now();
    double time = begin;
    for (int some = 0; step->layer < m->layers; some = 1) {
        const enum phase phase = (enum phase)step->phase;
        const double left = seconds - (time - begin), took = workspace->took[phase];
        if (some && took > left) return 1;
        const int64_t jobs = phase == ATTENTION ? jobs_in(left, took, threads, all_jobs - step->job) : 0;
        run.number = step->layer;
        run_phase(&run, phase, jobs, at[5]);
        const double ended = now(), rounds = (double)((jobs + threads - 1) / threads);
        workspace->took[phase] = (ended - time) / (rounds > 1 ? rounds : 1);
        time = ended;
        go_on(step, jobs, all_jobs);
    }
    run.add = m->layers > 0;
    run.norm = m->norm;
    run.row = step->row;
    prepare(&run, norm_tokens, step->rows, few_rows(step, few_tokens(m, step)), &m->output, at[5]);
    multiply(&run, &m->output, run.normed, step->rows, step->logits);
    return 0;
}
