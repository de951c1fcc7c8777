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
  RowTable row_table;
  // What prefill.cu has found for the pages that some of each `sequences` neighbours share; no parts if none was asked.
  const float* shared_partial;  // (num_kv_heads, tiles of sequences, shared_parts, shared_rows, V_HEAD_DIM)
  const float* shared_sums;     // (..., shared_rows, 2)
  int sequences, shared_parts, shared_rows;
  BlockTable block_table;  // where HAS_BLOCK_TABLE; the tails are then the new states, of all sequences side by side
};
static_assert(sizeof(AttentionArgs) == 456, "as backends/cuda/attention.py packs it");

// The query rows of a CTA: rows of one KV head, those of a query head side by side. Where HAS_BLOCK_TABLE a sequence
// has one query, which `batch` counts among all tokens, so that strides of the batch are those of tokens.
struct QueryRows {
  int batch, kv_head, head;  // head counts the KV heads over the batch
#if HAS_BLOCK_TABLE
  int sequence, num_splits;
#endif
  int split;                // of the pages
  int row_tile, row_tiles;  // which kRows rows of the KV head, and how many such there are
  int first_row, num_rows;
  int query_len, num_pages, kv_len;
  int position;  // the key that the first query stands at
};

DEVICE QueryRows rows_of_cta(const AttentionArgs& args) {
  QueryRows rows;
#if FOLDS_GRID
  const u32 size = args.num_kv_heads * ((args.group * args.query_len + kRows - 1) / kRows);
  const u32 place = blockIdx.z * gridDim.y + blockIdx.y, y = place % size, z = place / size;
#else
  const u32 size = gridDim.y, y = blockIdx.y, z = blockIdx.z;
#endif
  rows.split = blockIdx.x;
  rows.row_tiles = size / args.num_kv_heads;
  rows.row_tile = y % rows.row_tiles;
#if HAS_BLOCK_TABLE
  const BlockTable& table = args.block_table;
  rows.sequence = z, rows.kv_head = y / rows.row_tiles;
  rows.batch = table.new_starts[z], rows.query_len = table.new_tokens(z), rows.kv_len = table.tokens(z);
  rows.num_pages = (rows.kv_len - rows.query_len) / kPageSize;
  // Short sequences are divided among fewer CTAs than the grid has.
  rows.num_splits = min(args.num_splits, max(rows.num_pages / WARPS, 1));
  rows.first_row = rows.row_tile * kRows;
  rows.num_rows = min(kRows, args.group - rows.first_row);
  rows.position = rows.kv_len - rows.query_len;
  rows.head = rows.sequence * args.num_kv_heads + rows.kv_head;
#else
  rows.num_pages = args.lengths ? args.lengths[0] : args.num_pages;
  rows.batch = z, rows.kv_head = y / rows.row_tiles, rows.query_len = args.query_len;
  rows.first_row = rows.row_tile * kRows;
  rows.num_rows = min(kRows, args.group * args.query_len - rows.first_row);
  rows.kv_len = rows.num_pages * kPageSize + (args.lengths ? args.lengths[1] : args.tail_len);
  rows.position = rows.kv_len - rows.query_len;
  rows.head = rows.batch * args.num_kv_heads + rows.kv_head;
#endif
  return rows;
}

// CTAs that the pages of a row tile are divided among, with the tail's and without it.
DEVICE int splits_of(const AttentionArgs& args, const QueryRows& rows) {
#if HAS_BLOCK_TABLE
  return rows.num_splits;
#else
  return args.num_splits;
#endif
}
DEVICE int page_splits_of(const AttentionArgs& args, const QueryRows& rows) {
#if HAS_BLOCK_TABLE
  return rows.num_splits;
#else
  return args.page_splits;
#endif
}

// Query and head of a row within the KV head's group.
DEVICE int query_of(const QueryRows& rows, int row) { return rows.query_len == 1 ? 0 : row % rows.query_len; }
DEVICE int head_of(const QueryRows& rows, int row) { return rows.query_len == 1 ? row : row / rows.query_len; }

// Whether this CTA is the one of its row tile that attends to the tail.
DEVICE bool has_tail(const AttentionArgs& args, const QueryRows& rows) {
  return rows.split == splits_of(args, rows) - 1;
}

// What a warp attends to: the pages first, first + WARPS, ..., of which there are `count`, and 16 keys of the tail in
// turn with the other warps, from the tail_place-th 16 on.
struct PageRange {
  int first, count, tail_place;
};

DEVICE PageRange pages_of_warp(const AttentionArgs& args, const QueryRows& rows, int warp) {
  // What lies before every query's window is left out.
  const int low = args.window ? max(rows.position - args.window + 1, 0) / kPageSize : 0;
  const int page_splits = page_splits_of(args, rows);
  const int pages_each = (max(rows.num_pages - low, 0) + page_splits - 1) / page_splits;
  const int start = low + rows.split * pages_each;
  PageRange range;
  range.first = start + warp;
  const int end = rows.split < page_splits ? min(start + pages_each, rows.num_pages) : 0;
  range.count = max((end - range.first + WARPS - 1) / WARPS, 0);
  // The warps that have a page less take the tail's first keys.
  range.tail_place = (warp - max(end - start, 0)) & (WARPS - 1);
  return range;
}

// Where the mask of a query row begins, in elements.
DEVICE i64 mask_start(const AttentionArgs& args, const QueryRows& rows, int row) {
  return rows.batch * args.mask_stride[0] + (rows.kv_head * args.group + head_of(rows, row)) * args.mask_stride[1] +
         query_of(rows, row) * args.mask_stride[2];
}
