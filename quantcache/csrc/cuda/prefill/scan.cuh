// scan_mask: of each block of kBlockQueries queries and a page of keys, whether any element is seen and whether not all
// are. The layers of a model share what is found.
//
// Additive masks may hide keys by the lowest number of their type in place of -inf: a faint element. Where its row sees
// another key, the weight is exactly zero, and the block need not be read; where a row sees none, all its keys weigh the
// same. So a bit for each query of a block says whether the row sees any key at all.
// Traffic: the mask once; a byte is written for 2048 elements. Launch: one warp of kThreads for each block.

#include "common/floats.cuh"
#include "prefill/args.cuh"

struct ScanArgs {
  const void* mask;    // (batch, heads, queries, kv_len), batch, heads and queries 1 where it is broadcast
  u8* blocks;          // (batch, heads, blocks of queries, blocks of keys), contiguous
  u32* sighted;        // (batch, heads, blocks of queries), contiguous, zeros before; null for a mask of bools
  const int* lengths;  // pages and tail_len in device memory, behind which no key counts as seen, or null
  i64 stride[4];
  int batch, heads, queries, kv_len, mask_dtype;
};
static_assert(sizeof(ScanArgs) == 88, "as backends/cuda/prefill.py packs it");

// Half of the lowest number, for what was added to it; above it a score could make up for the mask.
DEVICE float faintest(int mask_dtype) { return mask_dtype == kFloat16 ? -32752.0f : -0x1p127f; }

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
  const int seq_len = args.lengths ? args.lengths[0] * kPageSize + args.lengths[1] : args.kv_len;
  bool any = false, faint = false, all = true;
  u32 sighted = count < kBlockQueries ? ~0u << count : 0;  // queries that are not there miss nothing
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
        const bool seen = !(added <= faintest(args.mask_dtype));
        any |= seen, faint |= added != -infinity(), all &= added == 0.0f;
        if (seen && key < seq_len) sighted |= 1u << i;
      }
    }
  }
  const bool is_seen = __any_sync(~0u, any), is_faint = __any_sync(~0u, faint), is_whole = __all_sync(~0u, all);
  if (lane == 0) args.blocks[index] = (is_seen ? kSeen : is_faint ? kFaint : 0) | (is_whole ? 0 : kPartly);
  if (args.sighted) {
    sighted = __reduce_or_sync(~0u, sighted);
    if (lane == 0) atomicOr(args.sighted + index / key_blocks, sighted);
  }
}
