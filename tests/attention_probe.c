/* Attention of compiled steps by itself, for test_compiled_step.py. */
#include "attention.h"

int probe(const float *queries, float *out, const int64_t (*spans)[3], int64_t span_count, const int32_t *blocks,
          int64_t most_blocks, const void *keys, const void *values, const float *key_scales,
          const float *value_scales, int64_t head_bytes, int kind, int64_t heads,
          int64_t kv_heads, int64_t head_dim, int64_t window, parallel *on_pool, int threads) {
    struct suri_span described[16];
    struct cut cut = {0};
    for (int64_t i = 0; i < span_count; i++)
        described[i] = (struct suri_span){spans[i][0], spans[i][1], spans[i][2], blocks + i * most_blocks, spans[i][1] > 16};
    struct attention a = {
        .queries = queries, .query_stride = heads * head_dim, .out = out, .spans = described, .keys = keys,
        .values = values, .key_scales = key_scales, .value_scales = value_scales, .head_bytes = head_bytes, .kind = kind, .heads = heads, .kv_heads = kv_heads,
        .head_dim = head_dim, .window = window, .cut = &cut,
    };
    int planned = plan_cut(&a, span_count, threads, 0);
    if (planned) attend(&a, on_pool, threads, 0, attention_jobs(&cut));
    free(cut.pieces), free(cut.tasks), free(cut.parts);
    return planned && cut_bytes(&cut) > 0;
}
