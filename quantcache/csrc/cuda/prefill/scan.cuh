// scan_mask: of each block of kBlockQueries queries and a page of keys, whether any element is seen and whether not all
// are. The layers of a model share what is found.
// Traffic: the mask once; a byte is written for 2048 elements. Launch: one warp of kThreads for each block.

#include "common/floats.cuh"
#include "prefill/args.cuh"

struct ScanArgs {
  const void* mask;  // (batch, heads, queries, kv_len), batch, heads and queries 1 where it is broadcast
  u8* blocks;        // (batch, heads, blocks of queries, blocks of keys), contiguous
  i64 stride[4];
  int batch, heads, queries, kv_len, mask_dtype;
};
static_assert(sizeof(ScanArgs) == 72, "as backends/cuda/prefill.py packs it");

extern "C" __global__ void __launch_bounds__(kThreads) scan_mask(const __grid_constant__ ScanArgs args) {
  const int lane = threadIdx.x & 31;
  const int key_blocks = (args.kv_len + kPageSize - 1) / kPageSize;
  const int query_blocks = (args.queries + kBlockQueries - 1) / kBlockQueries;
  const i64 index = static_cast<i64>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  i64 rest = index;
  const int key_block = rest % key_blocks;
  rest /= key_blocks;
  const int query_block = rest % query_blocks;
  rest /= query_blocks;
  const int head = rest % args.heads;
  rest /= args.heads;
  if (rest >= args.batch) return;

  const i64 start = rest * args.stride[0] + head * args.stride[1];
  const int first_query = query_block * kBlockQueries, count = min(kBlockQueries, args.queries - first_query);
  bool any = false, all = true;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int key = key_block * kPageSize + lane + 32 * h;
    if (key >= args.kv_len) continue;
    const i64 first = start + first_query * args.stride[2] + key * args.stride[3];
    if (args.mask_dtype == kBool) {
#pragma unroll 8
      for (int i = 0; i < count; i++) {
        const bool seen = static_cast<const u8*>(args.mask)[first + i * args.stride[2]];
        any |= seen, all &= seen;
      }
    } else {
#pragma unroll 8
      for (int i = 0; i < count; i++) {
        const float added = load_element(args.mask, args.mask_dtype, first + i * args.stride[2]);
        any |= added != -infinity(), all &= added == 0.0f;
      }
    }
  }
  const bool is_seen = __any_sync(~0u, any), is_whole = __all_sync(~0u, all);
  if (lane == 0) args.blocks[index] = (is_seen ? kSeen : 0) | (is_whole ? 0 : kPartly);
}
