// advance: one step of a layer of fixed capacity, whose lengths are in device memory: pages that are due are closed,
// what is left of the source becomes the tail, and new tokens follow. The source may be the tail itself.
// Traffic: that of store_pages for the pages closed, and the rest of the source and the new tokens read and written
// once.
// Launch: (CTAs that share a head's pages, 1 if the source is the tail; CTAs that share the heads; 2: keys, values) of
// kStoreThreads. A step that closes no page has little to do, and few CTAs do it soonest.

#include "common/memory.cuh"
#include "pages/store.cuh"

// Of a pair the first are the keys, HEAD_DIM wide, and the second the values, V_HEAD_DIM wide.
struct AdvanceArgs {
  const void* source[2];      // the exact tokens behind the closed pages, (batch, num_kv_heads, any, width)
  const void* states[2];      // new ones, (batch, num_kv_heads, new_tokens, width), if there are
  void* tail[2];              // (batch, num_kv_heads, tail_capacity, width), contiguous
  i8* qdata[2];               // (capacity, batch, num_kv_heads, 64, width)
  u32* metadata[2];           // (capacity, batch, num_kv_heads, HEAD_DIM or 64)
  const int* source_lengths;  // closed pages, tokens in the source, tokens in all
  int* lengths;               // the same of the result, and a counter that is zero; may be the source's
  i64 source_stride[2][3], states_stride[2][3];
  int num_kv_heads, num_heads, capacity, tail_capacity, residual_length, new_tokens;  // num_heads counts the batch
};
static_assert(sizeof(AdvanceArgs) == 216, "as backends/cuda packs it");

// What is left of a head's source becomes its tail.
template <int kHeadDim>
DEVICE void move_to_tail(const AdvanceArgs& args, int which, int head, i64 from, int first, int rest) {
  constexpr int row = kHeadDim / 4, words = kPageSize * row / kStoreThreads;
  const Four* source = static_cast<const Four*>(args.source[which]) + from / 4;
  Four* tail = static_cast<Four*>(args.tail[which]) + static_cast<i64>(head) * args.tail_capacity * row;
  const i64 step = args.source_stride[which][2] / 4;
  // A page at a time: what is written over has been read, since tokens only move towards the front, by pages.
  for (int start = 0; start < rest; start += kPageSize) {
    Four moved[words + 1];
#pragma unroll
    for (int k = 0; k <= words; k++) {
      const int i = threadIdx.x + k * kStoreThreads, token = start + i / row;
      if (i < kPageSize * row && token < rest) moved[k] = source[(first + token) * step + i % row];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k <= words; k++) {
      const int i = threadIdx.x + k * kStoreThreads, token = start + i / row;
      if (i < kPageSize * row && token < rest) tail[token * row + i % row] = moved[k];
    }
    __syncthreads();
  }
}

// New tokens of the heads from first_head on, behind the `rest` tokens of their tails.
template <int kHeadDim>
DEVICE void add_to_tails(const AdvanceArgs& args, int which, int first_head, int num_heads, int rest) {
  constexpr int row = kHeadDim / 4;
  const int words = args.new_tokens * row;
  for (int i = threadIdx.x; i < num_heads * words; i += kStoreThreads) {
    const int head = first_head + i / words, word = i % words;
    const i64 from = head / args.num_kv_heads * args.states_stride[which][0] +
                     head % args.num_kv_heads * args.states_stride[which][1] +
                     word / row * args.states_stride[which][2];
    static_cast<Four*>(args.tail[which])[(static_cast<i64>(head) * args.tail_capacity + rest) * row + word] =
        static_cast<const Four*>(args.states[which])[from / 4 + word % row];
  }
}

extern "C" __global__ void __launch_bounds__(kStoreThreads) advance(const __grid_constant__ AdvanceArgs args) {
  const int which = blockIdx.z;
  const int pages = args.source_lengths[0], tokens = args.source_lengths[1], all = args.source_lengths[2];
  const int due = max(tokens - args.residual_length, 0) / kPageSize;
  const int closing = min(due, args.capacity - pages);
  const int rest = min(tokens - closing * kPageSize, args.tail_capacity);
  const int stored = rest + args.new_tokens <= args.tail_capacity ? args.new_tokens : 0;
  const int heads_each = (args.num_heads + gridDim.y - 1) / gridDim.y;
  const int first_head = blockIdx.y * heads_each, num_here = min(heads_each, args.num_heads - first_head);

  if (closing || args.tail[which] != args.source[which]) {
    StoreArgs store;
    for (int i = 0; i < 2; i++) {
      store.states[i] = args.source[i], store.qdata[i] = args.qdata[i], store.metadata[i] = args.metadata[i];
      for (int j = 0; j < 3; j++) store.stride[i][j] = args.source_stride[i][j];
    }
#pragma unroll 1
    for (int head = first_head; head < first_head + num_here; head++) {
      const i64 from = head / args.num_kv_heads * args.source_stride[which][0] +
                       head % args.num_kv_heads * args.source_stride[which][1];
      for (int page = blockIdx.x; page < closing; page += gridDim.x) {
        const i64 place = static_cast<i64>(pages + page) * args.num_heads + head;
        const i64 start = from + static_cast<i64>(page) * kPageSize * args.source_stride[which][2];
        if (which == 0)
          store_keys(store, place, start);
        else
          store_values(store, place, start);
        __syncthreads();
      }
      if (blockIdx.x == 0) {
        if (which == 0)
          move_to_tail<HEAD_DIM>(args, which, head, from, closing * kPageSize, rest);
        else
          move_to_tail<V_HEAD_DIM>(args, which, head, from, closing * kPageSize, rest);
      }
    }
  }
  if (blockIdx.x == 0 && stored) {
    if (which == 0)
      add_to_tails<HEAD_DIM>(args, which, first_head, num_here, rest);
    else
      add_to_tails<V_HEAD_DIM>(args, which, first_head, num_here, rest);
  }
  // Every CTA has read the lengths when the last one writes them.
  __syncthreads();
  if (threadIdx.x == 0 && arrives_last(reinterpret_cast<u32*>(args.lengths) + 3, gridDim.x * gridDim.y * gridDim.z)) {
    args.lengths[0] = pages + closing;
    args.lengths[1] = rest + stored;
    args.lengths[2] = all + args.new_tokens;
  }
}
