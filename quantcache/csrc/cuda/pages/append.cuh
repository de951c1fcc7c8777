// append: new tokens behind those of the tail, as they are.
// Traffic: each element is read and written once. Launch: (words of four elements / kThreads, 1, 2: keys, values) CTAs
// of kThreads, for the wider of the two.

#include "pages/elements.cuh"

struct AppendArgs {
  const void* states[2];  // (batch, num_kv_heads, tokens, HEAD_DIM or V_HEAD_DIM)
  void* tail[2];          // room for more behind `position`
  i64 stride[2][3], tail_stride[2][3];
  int num_kv_heads, batch, tokens, position;
};
static_assert(sizeof(AppendArgs) == 144, "as backends/cuda/pages.py packs it");

// A thread copies four elements.
template <int kHeadDim>
DEVICE void append_states(const AppendArgs& args, int which) {
  const i64 i = static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x;
  const int channel = i % (kHeadDim / 4) * 4;
  const i64 row = i / (kHeadDim / 4);
  const int token = row % args.tokens;
  const i64 head = row / args.tokens;
  if (head >= static_cast<i64>(args.batch) * args.num_kv_heads) return;
  const int batch = head / args.num_kv_heads, kv_head = head % args.num_kv_heads;
  const i64 from =
      batch * args.stride[which][0] + kv_head * args.stride[which][1] + token * args.stride[which][2] + channel;
  const i64 to = batch * args.tail_stride[which][0] + kv_head * args.tail_stride[which][1] +
                 (args.position + token) * args.tail_stride[which][2] + channel;
  static_cast<Four*>(args.tail[which])[to / 4] = static_cast<const Four*>(args.states[which])[from / 4];
}
extern "C" __global__ void __launch_bounds__(kThreads) append(const __grid_constant__ AppendArgs args) {
  if (blockIdx.z == 0)
    append_states<HEAD_DIM>(args, 0);
  else
    append_states<V_HEAD_DIM>(args, 1);
}
