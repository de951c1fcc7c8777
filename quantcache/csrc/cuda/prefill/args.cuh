// What a launch is given, and which part of it a CTA works on.

#include "common/floats.cuh"
#include "prefill/build.cuh"

constexpr int kFewSegments = 16;

struct PrefillArgs {
  const void* query;        // (batch, num_kv_heads * group, query_len, HEAD_DIM)
  void* output;             // (batch, query_len, num_kv_heads * group, V_HEAD_DIM), contiguous
  const Segment* segments;  // num_segments + 1; null if they are the few below
  const void* key_tail;     // (batch, num_kv_heads, tail_len or more, HEAD_DIM)
  const void* value_tail;
  const void* mask;    // (batch, heads, query_len, kv_len), strides of 0 where it is broadcast
  const u8* blocks;    // (batch, heads, blocks of kBlockQueries, blocks of a page's keys): what scan_mask found
  const u32* sighted;  // (batch, heads, blocks of kBlockQueries), likewise; null where other rules hide keys, too
  const float* sinks;  // (num_kv_heads * group,) or null
  const int* lengths;  // pages and tail_len in device memory, or null for the two below
  float* partial;      // (batch, num_kv_heads, row tiles, splits, kRows, V_HEAD_DIM), not normalised
  float* sums;         // (..., kRows, 2): largest logit and sum of weights
  i64 query_stride[3], key_tail_stride[3], value_tail_stride[3], mask_stride[4], block_stride[3];
  i64 sighted_stride[3];
  int num_kv_heads, group, query_len, num_pages, tail_len, num_segments;
  int num_splits, is_causal, window, mask_dtype, batch, row_tiles;
  float softmax_scale, softcap;
  Segment few[kFewSegments];  // those of most calls, which need no copy to the device then
  RowTable row_table;
  int sequences;           // of a CTA, where SHARES_PAGES; in the batch, where HAS_BLOCK_TABLE
  BlockTable block_table;  // where HAS_BLOCK_TABLE; the tails are then the new states, of all sequences side by side
};
static_assert(sizeof(PrefillArgs) == 1016, "as backends/cuda/prefill.py packs it");

constexpr int kBlockQueries = 32;  // whose masks are looked at together
enum : u8 { kSeen = 1, kPartly = 2, kFaint = 4 };

// The query rows of a CTA: rows of one KV head, those of a query head side by side. Where SHARES_PAGES, those of
// num_sequences sequences from `batch` on, one after the other, and head is kv_head. Where HAS_BLOCK_TABLE, row_tile
// counts those of all sequences, `batch` is the sequence's first query among all, so that strides of the batch are those
// of tokens, and head is kv_head.
struct QueryRows {
  int batch, kv_head, head;  // head counts the KV heads over the batch
#if HAS_BLOCK_TABLE
  int sequence, query_len;
#endif
#if SHARES_PAGES
  int num_sequences;
#endif
  int row_tile, split;
  int first_row, num_rows;
  int first_query, last_query;  // of all rows
  int num_pages, kv_len;
  int position;  // the key that the first query stands at
};

#if HAS_BLOCK_TABLE
// The rows of a tile among those of all sequences with several queries, none where there are fewer tiles. By a warp.
DEVICE QueryRows rows_of_tile(const PrefillArgs& args, int tile) {
  const BlockTable& table = args.block_table;
  const int lane = threadIdx.x & 31;
  QueryRows rows;
  rows.row_tile = tile, rows.num_rows = 0;
  int before = 0;  // tiles of the sequences looked at
#pragma unroll 1
  for (int first = 0; first < args.sequences; first += 32) {
    const int sequence = first + lane;
    int start = 0, query_len = 0;
    if (sequence < args.sequences) {
      start = table.new_starts[sequence];
      query_len = table.new_tokens(sequence);
    }
    const int tiles = query_len > 1 ? (args.group * query_len + kRows - 1) / kRows : 0;
    int end = tiles;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int lower = __shfl_up_sync(~0u, end, step);
      if (lane >= step) end += lower;
    }
    end += before;
    const u32 behind = __ballot_sync(~0u, end > tile);
    if (behind) {
      const int found = __ffs(behind) - 1;
      rows.sequence = first + found;
      rows.batch = __shfl_sync(~0u, start, found);
      rows.query_len = __shfl_sync(~0u, query_len, found);
      rows.first_row = (tile - __shfl_sync(~0u, end - tiles, found)) * kRows;
      rows.num_rows = min(kRows, args.group * rows.query_len - rows.first_row);
      return rows;
    }
    before = __shfl_sync(~0u, end, 31);
  }
  return rows;
}

DEVICE QueryRows rows_of_cta(const PrefillArgs& args) {
  u32 index = blockIdx.x;
  const int tile = index % args.row_tiles;
  index /= args.row_tiles;
  QueryRows rows = rows_of_tile(args, tile);
  rows.split = index % args.num_splits, index /= args.num_splits;
  rows.kv_head = rows.head = index;
  if (rows.num_rows == 0) return rows;
  const int last_row = rows.first_row + rows.num_rows - 1;
  const bool is_one_head = rows.first_row / rows.query_len == last_row / rows.query_len;
  rows.first_query = is_one_head ? rows.first_row % rows.query_len : 0;
  rows.last_query = is_one_head ? last_row % rows.query_len : rows.query_len - 1;
  rows.kv_len = args.block_table.tokens(rows.sequence);
  rows.position = rows.kv_len - rows.query_len;
  rows.num_pages = rows.position / kPageSize;
  return rows;
}
#else
DEVICE QueryRows rows_of_cta(const PrefillArgs& args) {
  QueryRows rows;
  // CTAs that run at the same time read the same pages; later rows see more of them and begin first.
  u32 index = blockIdx.x;
  rows.row_tile = args.row_tiles - 1 - index % args.row_tiles, index /= args.row_tiles;
  rows.split = index % args.num_splits, index /= args.num_splits;
  rows.head = index;
#if SHARES_PAGES
  rows.batch = rows.row_tile * args.sequences, rows.kv_head = index;
  rows.num_sequences = min(args.sequences, args.batch - rows.batch);
  rows.first_row = rows.first_query = 0;
  rows.num_rows = rows.num_sequences * args.group * args.query_len;
  rows.last_query = args.query_len - 1;
#else
  rows.batch = index / args.num_kv_heads, rows.kv_head = index % args.num_kv_heads;
  rows.first_row = rows.row_tile * kRows;
  rows.num_rows = min(kRows, args.group * args.query_len - rows.first_row);
  const int last_row = rows.first_row + rows.num_rows - 1;
  const bool is_one_head = rows.first_row / args.query_len == last_row / args.query_len;
  rows.first_query = is_one_head ? rows.first_row % args.query_len : 0;
  rows.last_query = is_one_head ? last_row % args.query_len : args.query_len - 1;
#endif
  rows.num_pages = args.lengths ? args.lengths[0] : args.num_pages;
  rows.kv_len = rows.num_pages * kPageSize + (args.lengths ? args.lengths[1] : args.tail_len);
  rows.position = rows.kv_len - args.query_len;
  return rows;
}
#endif

// The row of the CTA's that a thread holds, the last one where there are fewer, and what of the call it is.
struct Row {
  int query, head;  // of the KV head's group
  int batch;
};
DEVICE Row row_of(const PrefillArgs& args, const QueryRows& rows, int row) {
  const int index = rows.first_row + min(row, rows.num_rows - 1);
#if SHARES_PAGES
  const int rows_each = args.group * args.query_len, sequence = quotient(index, rows_each);
  const int rest = index - sequence * rows_each, head = quotient(rest, args.query_len);
  return {rest - head * args.query_len, head, rows.batch + sequence};
#else
#if HAS_BLOCK_TABLE
  return {index % rows.query_len, index / rows.query_len, rows.batch};
#else
  return {index % args.query_len, index / args.query_len, rows.batch};
#endif
#endif
}

// Where a row of the query or of the mask begins, in elements.
DEVICE i64 query_start(const PrefillArgs& args, const QueryRows& rows, const Row& row) {
  return row.batch * args.query_stride[0] + (rows.kv_head * args.group + row.head) * args.query_stride[1] +
         row.query * args.query_stride[2];
}
DEVICE i64 mask_start(const PrefillArgs& args, const QueryRows& rows, const Row& row) {
  return row.batch * args.mask_stride[0] + (rows.kv_head * args.group + row.head) * args.mask_stride[1] +
         row.query * args.mask_stride[2];
}

// Where the tail of the CTA's KV head begins, in elements.
DEVICE i64 tail_start(const QueryRows& rows, const i64 (&stride)[3]) {
  return rows.batch * stride[0] + rows.kv_head * stride[1];
}

// The exact tokens that the tail begins with where they are in a pool's open page, one behind the other; keys (which is
// 0) or values. Not looked for if those from first_token on are others.
#if HAS_BLOCK_TABLE
struct OpenPage {
  const u16* states;
  int count;
};
DEVICE OpenPage open_page(const PrefillArgs& args, const QueryRows& rows, int which, int first_token) {
  const BlockTable& table = args.block_table;
  const int count = rows.position - rows.num_pages * kPageSize;
  if (first_token >= count) return {nullptr, count};
  const i8* chunk = table.chunk_of(table.block_of(rows.sequence, rows.num_pages + which), rows.kv_head);
  return {reinterpret_cast<const u16*>(chunk), count};
}
#else
struct OpenPage {};
DEVICE OpenPage open_page(const PrefillArgs& args, const QueryRows& rows, int which, int first_token) { return {}; }
#endif

// Pages of keys, the tail counted as further ones, that some row of the CTA may see and that are this split's. Where
// SHARES_PAGES they are every num_splits-th page and nothing of the tail: what is shared lies in front.
struct BlockRange {
  int first, end;
};
DEVICE BlockRange blocks_of_cta(const PrefillArgs& args, const QueryRows& rows) {
  const int low = args.window ? max(rows.position + rows.first_query - args.window + 1, 0) / kPageSize : 0;
  const int last_key = args.is_causal ? rows.position + rows.last_query : rows.kv_len - 1;
  const int end = (last_key + kPageSize) / kPageSize;
#if SHARES_PAGES
  return {low + rows.split, min(end, rows.num_pages)};
#endif
  const int each = (max(end - low, 0) + args.num_splits - 1) / args.num_splits;
  const int first = low + rows.split * each;
  return {first, min(first + each, end)};
}
