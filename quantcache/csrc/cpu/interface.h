// The plain C interface of the CPU backend: what quantcache/backends/cpu/__init__.py packs and quantcache_* reads.
// Strides are in elements, the last axis of every tensor is contiguous, page_size is 64 and P counts pages.
// Every field is 64 bits wide, so that the layout is the same for every compiler.
#pragma once

#include <cstdint>

constexpr int64_t kPageSize = 64;

enum Dtype : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kBool = 3 };

// Consecutive pages in one allocation; the four tensors of Segment in store/segments.py, each contiguous. Or the blocks of
// a pool, see backends/blocks.py, which chunk_bytes tells: the row table then names a block for each page, and the four
// parts of a KV head lie that many bytes behind those of the one before.
struct SegmentArgs {
  const int8_t* key_qdata;           // (P, rows, num_kv_heads, 64, head_dim)
  const uint32_t* key_metadata;      // (P, rows, num_kv_heads, head_dim) pairs: bfloat16 scale | zero_point << 16
  const int8_t* value_qdata;         // (P, rows, num_kv_heads, 64, v_head_dim)
  const uint32_t* value_metadata;    // (P, rows, num_kv_heads, 64) pairs
  int64_t num_pages, rows;           // P; sequences stored
  int64_t block_bytes, chunk_bytes;  // of a pool, else 0
};

// Which stored row each sequence of the batch reads a page from: null where it is its own, else (batch, pages), int32.
struct RowTableArgs {
  const int32_t* rows;
  int64_t stride;
};

struct AttentionArgs {
  int64_t num_threads, dtype;  // dtype of query, tail and output
  int64_t batch, num_q_heads, num_kv_heads, query_len, head_dim, v_head_dim;
  const SegmentArgs* segments;
  int64_t num_segments;
  RowTableArgs row_table;
  const void* query;  // (batch, num_q_heads, query_len, head_dim)
  int64_t query_stride[3];
  const void* key_tail;    // (batch, num_kv_heads, tail_len, head_dim)
  const void* value_tail;  // (batch, num_kv_heads, tail_len, v_head_dim)
  int64_t tail_len, key_tail_stride[3], value_tail_stride[3];
  const void* attn_mask;  // null, or broadcast by zero strides to (batch, num_q_heads, query_len, kv_len)
  int64_t mask_dtype, mask_stride[4];
  int64_t is_causal, window;      // window 0: none
  double softmax_scale, softcap;  // softcap 0: none
  const float* sinks;             // null or (num_q_heads,)
  void* output;                   // (batch, query_len, num_q_heads, v_head_dim), contiguous
};

struct StoreArgs {
  int64_t num_threads, dtype, is_key;  // keys: a scale per channel of the page; values: per token
  int64_t num_pages, batch, num_kv_heads, head_dim;
  const void* states;  // (batch, num_kv_heads, P * 64, head_dim)
  int64_t stride[3];
  int8_t* qdata;       // (P, batch, num_kv_heads, 64, head_dim)
  uint32_t* metadata;  // (P, batch, num_kv_heads, head_dim or 64)
};

struct RestoreArgs {
  int64_t num_threads, dtype, is_key;
  int64_t batch, num_kv_heads, head_dim;
  const SegmentArgs* segments;  // of each only the keys or only the values are read
  int64_t num_segments;
  RowTableArgs row_table;
  const void* tail;  // (batch, num_kv_heads, tail_len, head_dim)
  int64_t tail_len, tail_stride[3];
  void* output;  // (batch, num_kv_heads, P * 64 + tail_len, head_dim), contiguous
};
