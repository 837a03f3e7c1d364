/* A whole step of a LLaMA decoder in one call: what backend/model/llama.py says, on tiles, for a flat batch of tokens.
 *
 * A token of a reply is computed by the same operations in the same order whatever other tokens are in the batch and
 * however many threads work: a reply goes on in the same way alone and among others. Where the processor has AMX, a
 * prompt's attention is computed in bfloat16, and so are the products of more than SURI_FEW tokens of a sequence.
 */
#ifndef SURI_STEP_H
#define SURI_STEP_H
#include <stdint.h>

#include "plain.h"
#include "product.h"

enum { MAX_PARTS = 3, PLAIN = 2000 /* and a kind of plain.h: formats that are no tiles */ };

/* What this library uses of the other one (pool.c, product.c), which the process has only once. */
struct suri_tools {
    suri_parallel_for *parallel;
    void (*quantise)(const float *x, const struct suri_input *input, int64_t first, int64_t last);
    void (*product_of)(const struct suri_product *product, int threads);
    int64_t (*input_bytes)(int64_t tokens, int64_t columns);
    struct suri_input (*input_in)(void *memory, int64_t tokens, int64_t few, int64_t columns, int low);
    int (*low_bits)(int format);
};

/* Weights that read the same input, one above the other. */
struct suri_weight {
    int64_t format, rows; /* format: of formats.h, or PLAIN + kind */
    const void *numbers;  /* tiles, or (rows, columns) */
};

struct suri_stack {
    int64_t count, rows, columns; /* rows: of all parts */
    struct suri_weight parts[MAX_PARTS];
    const float *bias; /* (rows,), or 0 */
};

struct suri_layer {
    const float *attention_norm, *ffn_norm; /* (dim,) */
    struct suri_stack qkv, o, gate_up, down;
};

struct suri_model {
    struct suri_tools tools;
    int64_t dim, ffn_dim, heads, kv_heads, head_dim, layers, window; /* window: 0 for none */
    double norm_eps;
    int64_t interleaved; /* which pairs are turned: see ModelConfig.rope_interleaved */
    const struct suri_layer *layer;
    const float *norm;
    struct suri_stack output;
    /* The cache: (layers, kv_heads, slots, head_dim) of `kind` (attend.h), in blocks of 32 slots. */
    void *keys, *values;
    float *key_scales, *value_scales; /* (layers, kv_heads, slots) where the cache is int8, else 0 */
    int64_t layer_bytes, head_bytes, kind;
    int64_t uniform; /* prompts are computed as replies are: slower, and the same bits however they are cut */
};

/* One sequence's tokens in the batch, span after span: `first` .. `first + count - 1`, at positions `start` .. of the sequence. The
 * sequence's tokens 32 n .. 32 n + 31 are in the cache's block blocks[n]. */
struct suri_span {
    int64_t first, count, start;
    const int32_t *blocks;
    int64_t prompt; /* its tokens are a prompt's, whose attention may be rounded otherwise than a reply's */
};

struct suri_step {
    int64_t tokens, spans, rows;
    float *x;                      /* (tokens, dim): embeddings; overwritten */
    const float *turns;            /* (positions, head_dim / 2, 2): cosine and sine of all positions so far */
    const struct suri_span *span;
    const int64_t *row;            /* (rows,): which tokens' logits are wanted */
    float *logits;                 /* (rows, output rows) */
    int64_t layer, phase, job;     /* that comes next: 0 to begin with */
};

/* Memory of a step, kept for the next one: it grows with the largest. */
struct suri_workspace *suri_workspace_new(void);
void suri_workspace_free(struct suri_workspace *workspace);
int64_t suri_workspace_bytes(const struct suri_workspace *workspace);

/* As many phases of the layers as fit into so many seconds, by what each took the last time; at least one. 0: the step is
 * done; 1: it is to be called again; -1: there is no memory, and nothing was computed. What the step points to must stay
 * as it is between calls, and the workspace must be this step's; others may run meanwhile in one of their own. */
int suri_run_step(const struct suri_model *model, struct suri_step *step, struct suri_workspace *workspace, int threads,
                  double seconds);
#endif
