// attention: up to a few dozen query rows per KV head, over int8 pages and an exact tail. AttentionArgs says what is
// read.
//
// Operands are swapped: S^T = K Q^T with the keys as the M of mma.m16n8k16, so that four query rows cost eight and not
// sixteen. Bytes become 16-bit floats by one byte permute for two (1024 + code + 128), and that bias is taken out where
// it is free: for keys in the accumulator's first value, for values by one subtraction of a pair.
//
// Keys of a page: K[token][d] = scale[d] * (code[token][d] - zero_point[d]). The scale goes into the query, once for a
// page; the zero points make one number for a query row and page. Values: V[token][d] = scale[token] * (code[token][d]
// - zero_point[token]). The scale goes into the weight; the zero points make one running sum for a query row.
//
// A warp takes every WARPS-th page of the CTA's range through copies of its own and waits for nobody else. Warps are
// merged at the end, splits by the last CTA to arrive.
//
// Traffic: each page is read once for a row tile, 64 * (HEAD_DIM + V_HEAD_DIM) bytes of codes and 4 * (HEAD_DIM + 64)
// of metadata; the tail once; queries and output once; with several splits kRows * (V_HEAD_DIM + 2) floats of each are
// written and read. Bandwidth bound while rows are few.
// Launch: (num_splits, num_kv_heads * row tiles, batch) CTAs of kThreads with the shared memory of plan.py's Shape; see
// attention/build.cuh for the macros. With FOLDS_GRID (num_splits, y, z), y * z of all row tiles of all heads or more.

#include "attention/merge.cuh"
#include "attention/page_tile.cuh"
#include "attention/tail_tile.cuh"

// Where 128 registers are enough, sixteen warps a processor. Reading masks takes more, and would cost CTAs without a
// bound; they get what as many CTAs leave them as shared memory has room for.
constexpr int kRoom = 233472 / (kQueryBytes + WARPS * STAGES * kStageBytes + 1024);  // of 9.0; elsewhere there is less
constexpr int kMostBlocks = HAS_MASK && kRoom < 16 / WARPS ? kRoom : 16 / WARPS;
constexpr int kMinBlocks =
    ROW_TILES == 1 && DTYPE != kFloat32 && HEAD_DIM <= 128 && V_HEAD_DIM <= 128 && kMostBlocks > 0 ? kMostBlocks : 1;

extern "C" __global__ void __launch_bounds__(kThreads, kMinBlocks)
    attention(const __grid_constant__ AttentionArgs args) {
  extern __shared__ __align__(128) u8 memory[];
  const Thread thread = this_thread();
  const QueryRows rows = rows_of_cta(args);
  if (FOLDS_GRID && rows.batch >= args.batch) return;
#if HAS_BLOCK_TABLE
  // Another kernel's sequence, one of padding, or a split that a short one has not got.
  if (rows.query_len != 1 || rows.split >= rows.num_splits) return;
#endif
  const PageRange range = pages_of_warp(args, rows, thread.warp);

  const u32 query = shared_address(memory);
  copy_query(args, rows, query);
  commit_copies();
  if (has_tail(args, rows)) prefetch_tail(args, rows, range.tail_place);

  PageRing ring;
  ring.open(args, rows, range, query + kQueryBytes + thread.warp * STAGES * kStageBytes);
  PageWindow window;
  window.open(args, rows, range);
  ring.fill(args, window);

  if (!HAS_BLOCK_TABLE && args.num_new && has_tail(args, rows)) write_new_tokens(args, rows);

  OnlineSoftmax softmax;
  start_softmax(args, rows, thread, softmax);
  wait_for_copies<STAGES - 1>();  // of the query
  __syncthreads();
  if (has_tail(args, rows)) attend_tail(args, rows, softmax, query, range.tail_place);
  attend_pages(args, rows, softmax, query, ring, window);
  wait_for_copies<0>();
  __syncthreads();

  share_softmax(thread, softmax, memory);
  __syncthreads();
  const i64 part = first_part(args, rows);
  merge_warps(args, rows, part, memory);
  if (splits_of(args, rows) == 1) return;
  if (is_last_split(args, rows)) merge_splits(args, rows, thread, part, memory);
}
