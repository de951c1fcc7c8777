// What a launch is given, and which part of it a CTA works on.

#include "attention/build.cuh"

struct AttentionArgs {
  const void* query;        // (batch, num_kv_heads * group, query_len, HEAD_DIM)
  void* output;             // (batch, query_len, num_kv_heads * group, V_HEAD_DIM), contiguous
  const Segment* segments;  // num_segments + 1, not read if there is one
  void* key_tail;           // (batch, num_kv_heads, tail_len or more, HEAD_DIM); written where there are new tokens
  void* value_tail;
  const void* mask;     // (batch, heads, query_len, kv_len), strides of 0 where it is broadcast
  const float* sinks;   // (num_kv_heads * group,) or null
  const int* lengths;   // pages and tail_len in device memory, or null for the two below
  float* partial;       // (batch, num_kv_heads, row tiles, splits, kRows, V_HEAD_DIM)
  float* partial_sums;  // (..., kRows, 2): largest logit and sum of weights
  u32* counters;        // (batch, num_kv_heads, row tiles), zero before and after
  i64 query_stride[3], key_tail_stride[3], value_tail_stride[3], mask_stride[4];
  int num_kv_heads, group, query_len, num_pages, tail_len, num_segments;
  int page_splits, num_splits, is_causal, window, mask_dtype, batch;
  float softmax_scale, softcap;
  Segment only;               // the one segment, if there is one: a table in memory costs its latency
  const void* new_states[2];  // keys and values of the last num_new tokens of the tail, which are not there yet
  i64 new_stride[2][3];
  int num_new;
};

struct QueryRows {
  int batch, kv_head, first_row, num_rows, query_len, kv_len;
};

// Head and query of a row, rows of a head side by side.
DEVICE int query_of(const QueryRows& rows, int row) { return rows.query_len == 1 ? 0 : row % rows.query_len; }
DEVICE int head_of(const QueryRows& rows, int row) { return rows.query_len == 1 ? row : row / rows.query_len; }

// Where the mask of a query row begins, in elements.
DEVICE i64 mask_start(const AttentionArgs& args, const QueryRows& rows, int row) {
  return rows.batch * args.mask_stride[0] + (rows.kv_head * args.group + head_of(rows, row)) * args.mask_stride[1] +
         query_of(rows, row) * args.mask_stride[2];
}
