// prefill: any number of query rows over int8 pages and an exact tail. PrefillArgs says what is read.
//
// Rows are arithmetic and no longer memory, so a CTA holds as many as registers allow, and converts each tile of keys
// and values once for all of them, to 16-bit floats in shared memory. mma.m16n8k16 has the queries as its M. Keys of a
// page: K[token][d] = scale[d] * (code[token][d] - zero_point[d]). The scale is multiplied in while a tile is converted;
// the zero points make one number for a query row and page, see metadata.cuh. Values: V[token][d] = scale[token] *
// (code[token][d] - zero_point[token]). The scale goes into the weight; the zero points make one running sum.
//
// Tiles that no row of a CTA sees are not loaded. Where a CTA has two buffers, the next tile is converted between the
// products of the current one, whose tensor cores leave the other units idle.
//
// Traffic: the visible pages once for kRows query rows, 64 * (HEAD_DIM + V_HEAD_DIM) bytes of codes; bound by the tensor
// cores. Launch: batch * num_kv_heads * num_splits * row_tiles CTAs of kThreads with the shared memory of
// backends/cuda/prefill.py's Shape; then, where there are several splits, merge_parts: one warp a row.
// Before both, where there is a mask, scan_mask. Where SHARES_PAGES, with num_kv_heads and tiles of sequences in place of
// batch * num_kv_heads and row_tiles; attention.cu then merges the parts.

#include "prefill/attend.cuh"
#include "prefill/attend_warpgroup.cuh"
#include "prefill/output.cuh"
#include "prefill/scan.cuh"

static_assert(kQueryBytes + BUFFERS * (kKeyTileBytes + kValueTileBytes) + kCodeBytes + sizeof(Shared) == SHARED_BYTES,
              "as Shape.shared_bytes of backends/cuda/prefill.py");

constexpr int kMinBlocks = WARPS == 4 && BUFFERS == 1 ? 2 : AT_ONCE;
// While one warp waits for the table of rows, those with query rows can wait for these.
constexpr bool kLoadsQueryFirst = SHARES_PAGES && WARPGROUP;

extern "C" __global__ void __launch_bounds__(kThreads, kMinBlocks) prefill(const __grid_constant__ PrefillArgs args) {
  extern __shared__ __align__(1024) u8 bytes[];
  const Memory memory(bytes);
  Shared& shared = *memory.shared;
  const QueryRows rows = rows_of_cta(args);
#if HAS_BLOCK_TABLE
  if (rows.num_rows == 0) return;
#endif
  const BlockRange range = blocks_of_cta(args, rows);

#if __CUDA_ARCH__ >= 900
  // The kernel that merges what is found here may begin with what it has to do itself.
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  if (threadIdx.x == 0) {
    shared.filled = 0, shared.next_block = range.first;
    shared.tail_largest[0] = shared.tail_largest[1] = 0;
  }
  __syncthreads();
  if (threadIdx.x / 32 == kFirstMaker) {
#pragma unroll 1
    for (int turn = -kNotice; turn < 0; turn++) fill_queue(args, rows, range, shared, turn);
  }
  if (kLoadsQueryFirst && threadIdx.x < kRowThreads) load_query(args, rows, memory);
#if !SHARES_PAGES
  // Of the tail what the CTA converts.
  const int first = max(range.first - rows.num_pages, 0) * kPageSize;
  const int end = min(rows.kv_len, range.end * kPageSize) - rows.num_pages * kPageSize;
  if (first < end) {
    find_largest<kKeyChunks>(args.key_tail, open_page(args, rows, 0, first), tail_start(rows, args.key_tail_stride),
                             args.key_tail_stride[2], first, end, &shared.tail_largest[0]);
    find_largest<kValueChunks>(args.value_tail, open_page(args, rows, 1, first),
                               tail_start(rows, args.value_tail_stride), args.value_tail_stride[2], first, end,
                               &shared.tail_largest[1]);
  }
  __syncthreads();
#endif
  if (threadIdx.x == 0) set_tail_factors(shared);
  __syncthreads();

#if WARPGROUP
  if (threadIdx.x >= kRowThreads) {
    give_registers<kMakerRegisters>();
    const int queued = shared.queued[0];
    if (queued > 0) make_tiles(args, rows, range, memory, queued);
  } else {
    take_registers<kRowRegisters>();
    const int queued = shared.queued[0];
    if (!kLoadsQueryFirst) load_query(args, rows, memory);
    __syncwarp();
    OnlineSoftmax softmax;
    start_softmax(args, rows, softmax);
    if (queued > 0) attend_in_turns(args, rows, memory, softmax, queued);
    write_output(args, rows, softmax);
  }
#else
  const int queued = shared.queued[0];
  load_query(args, rows, memory);
  __syncwarp();
  OnlineSoftmax softmax;
  start_softmax(args, rows, softmax);
  if (queued > 0) attend_tiles(args, rows, range, memory, softmax, queued);
  write_output(args, rows, softmax);
#endif
}

// Launch: one warp of kThreads for each row.
extern "C" __global__ void __launch_bounds__(kThreads) merge_parts(const __grid_constant__ PrefillArgs args) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");  // launched while parts are still being found
#endif
  const i64 index = static_cast<i64>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
#if HAS_BLOCK_TABLE
  const int rows = args.row_tiles * kRows;
#else
  const int rows = args.group * args.query_len;
#endif
  const int head = index / rows;
  if (head < args.batch * args.num_kv_heads) merge_row(args, head, index % rows);
}
