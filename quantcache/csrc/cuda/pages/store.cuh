// store_pages: closed pages from exact states, bit for bit as reference.quantize_key_pages and quantize_value_pages.
//   states    (batch, num_kv_heads, pages * 64, width), any strides in multiples of 4 but the last, which is 1
//   qdata     (pages, batch, num_kv_heads, 64, width), contiguous
//   metadata  (pages, batch, num_kv_heads, HEAD_DIM) of keys, (..., 64) of values
// Traffic: an element is read once and written as a byte, and 4 bytes of metadata a channel or token: bandwidth bound.
// Launch: (pages, y, 2 z: keys, values) CTAs of kStoreThreads, y * z of batch * num_kv_heads or more, since a grid is
// limited in each. advance stores pages by the same functions.

#include "pages/affine.cuh"

constexpr int kTokenGroups = 8, kTokensPerThread = kPageSize / kTokenGroups;

struct StoreArgs {
  const void* states[2];        // keys and values, (batch, num_kv_heads, pages * 64, HEAD_DIM or V_HEAD_DIM)
  i8* qdata[2];                 // (pages, batch, num_kv_heads, 64, HEAD_DIM or V_HEAD_DIM)
  u32* metadata[2];             // (pages, batch, num_kv_heads, HEAD_DIM or 64)
  i64 stride[2][3];             // of the states: batch, head, token
  int num_kv_heads, num_heads;  // num_heads counts the batch
};
static_assert(sizeof(StoreArgs) == 104, "as backends/cuda/pages.py packs it");
static_assert(kTokenGroups * (HEAD_DIM / 4) <= kStoreThreads && HEAD_DIM <= kStoreThreads, "a thread for each channel");
static_assert(kStoreThreads % 32 == 0 && kStoreThreads <= 1024, "whole warps of one CTA");

// `place` counts pages and heads; `start` is where the page begins in the states.
//
// One page of one head. A thread holds four channels of every eighth token; the eight meet in shared memory, where a
// thread for each channel makes its map.
DEVICE void store_keys(const StoreArgs& args, i64 place, i64 start) {
  constexpr int groups = HEAD_DIM / 4;
  __shared__ float4 low[kTokenGroups][groups], high[kTokenGroups][groups];
  __shared__ float4 inverse[groups], zero_point[groups], correction[groups];
  const int channels = threadIdx.x % groups, token_group = threadIdx.x / groups;
  const bool works = token_group < kTokenGroups;
  Four states[kTokensPerThread];
  bool has_others = false;  // than finite ones
  if (works) {
    const Four* source =
        static_cast<const Four*>(args.states[0]) + (start + token_group * args.stride[0][2]) / 4 + channels;
    const i64 step = kTokenGroups * args.stride[0][2] / 4;
#pragma unroll
    for (int i = 0; i < kTokensPerThread; i++) states[i] = source[i * step];
    Four lowest = states[0], highest = states[0];
#pragma unroll
    for (int i = 1; i < kTokensPerThread; i++) lowest = lower(lowest, states[i]), highest = higher(highest, states[i]);
    float lows[4], highs[4];
    to_floats(lowest, lows);
    to_floats(highest, highs);
    FourRanges ranges;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      ranges.of[j] = {lows[j], highs[j]};
      has_others |= !is_finite(ranges.of[j]);
    }
    if (has_others) {
      ranges.open();
#pragma unroll 1
      for (int i = 0; i < kTokensPerThread; i++) ranges.add(source[i * step]);
    }
    low[token_group][channels] = make_float4(ranges.of[0].low, ranges.of[1].low, ranges.of[2].low, ranges.of[3].low);
    high[token_group][channels] =
        make_float4(ranges.of[0].high, ranges.of[1].high, ranges.of[2].high, ranges.of[3].high);
  }
  __syncthreads();
  if (const int d = threadIdx.x; d < HEAD_DIM) {
    Range range = {reinterpret_cast<const float*>(low[0])[d], reinterpret_cast<const float*>(high[0])[d]};
#pragma unroll
    for (int i = 1; i < kTokenGroups; i++) {
      range.low = lower(range.low, reinterpret_cast<const float*>(low[i])[d]);
      range.high = higher(range.high, reinterpret_cast<const float*>(high[i])[d]);
    }
    range = or_zero(range);
    reinterpret_cast<float*>(low[0])[d] = range.low;
    reinterpret_cast<float*>(high[0])[d] = range.high;
    u32 metadata;
    const Affine map = Affine::of(range, metadata);
    args.metadata[0][place * HEAD_DIM + d] = metadata;
    reinterpret_cast<float*>(inverse)[d] = map.inverse;
    reinterpret_cast<float*>(zero_point)[d] = map.zero_point;
    reinterpret_cast<float*>(correction)[d] = map.correction;
  }
  __syncthreads();
  if (!works) return;
  if (has_others) {
    const float4 lows = low[0][channels], highs = high[0][channels];
    const FourRanges ranges = {{{lows.x, highs.x}, {lows.y, highs.y}, {lows.z, highs.z}, {lows.w, highs.w}}};
#pragma unroll
    for (int i = 0; i < kTokensPerThread; i++) states[i] = within(states[i], ranges);
  }
  const float4 inverses = inverse[channels], zero_points = zero_point[channels], corrections = correction[channels];
  const Affine map[4] = {{inverses.x, zero_points.x, corrections.x},
                         {inverses.y, zero_points.y, corrections.y},
                         {inverses.z, zero_points.z, corrections.z},
                         {inverses.w, zero_points.w, corrections.w}};
  u32* target = reinterpret_cast<u32*>(args.qdata[0] + (place * kPageSize + token_group) * HEAD_DIM) + channels;
#pragma unroll
  for (int i = 0; i < kTokensPerThread; i++) target[i * kTokenGroups * groups] = codes_of(states[i], map);
}

// One page of one head: a warp takes every warps-th token, a lane every 32nd group of four channels. The maps of a
// warp's tokens are made side by side, a lane each. k is a token of the warp, r a round of 32 groups.
DEVICE void store_values(const StoreArgs& args, i64 place, i64 start) {
  constexpr int groups = V_HEAD_DIM / 4, rounds = (groups + 31) / 32, warps = kStoreThreads / 32;
  constexpr int tokens = (kPageSize + warps - 1) / warps;
  static_assert(tokens <= 32, "a lane makes the map of a token");
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const Four* source = static_cast<const Four*>(args.states[1]) + start / 4;
  // A lane or a token too many reads the last one again, which changes no range.
  auto four_of = [&](int k, int r) {
    return source[min(warp + k * warps, kPageSize - 1) * (args.stride[1][2] / 4) + min(r * 32 + lane, groups - 1)];
  };
  Four states[tokens][rounds];
#pragma unroll
  for (int k = 0; k < tokens; k++)
#pragma unroll
    for (int r = 0; r < rounds; r++) states[k][r] = four_of(k, r);
  Range own = {0.0f, 0.0f};
#pragma unroll
  for (int k = 0; k < tokens; k++) {
    Four lowest = states[k][0], highest = states[k][0];
#pragma unroll
    for (int r = 1; r < rounds; r++) lowest = lower(lowest, states[k][r]), highest = higher(highest, states[k][r]);
    float lows[4], highs[4];
    to_floats(lowest, lows);
    to_floats(highest, highs);
    const Range range = warp_range({lower(lower(lows[0], lows[1]), lower(lows[2], lows[3])),
                                    higher(higher(highs[0], highs[1]), higher(highs[2], highs[3]))});
    if (lane == k) own = range;
  }
  if (__any_sync(~0u, !is_finite(own))) {
#pragma unroll 1
    for (int k = 0; k < tokens; k++) {
      FourRanges ranges;
      ranges.open();
      for (int r = 0; r < rounds; r++) ranges.add(four_of(k, r));
      Range range = ranges.of[0];
      for (int j = 1; j < 4; j++) range = {fminf(range.low, ranges.of[j].low), fmaxf(range.high, ranges.of[j].high)};
      range = or_zero(warp_range(range));
      if (lane == k) own = range;
    }
#pragma unroll
    for (int k = 0; k < tokens; k++) {
      const Range range = {__shfl_sync(~0u, own.low, k), __shfl_sync(~0u, own.high, k)};
      const FourRanges ranges = {{range, range, range, range}};
#pragma unroll
      for (int r = 0; r < rounds; r++) states[k][r] = within(states[k][r], ranges);
    }
  }
  u32 metadata;
  const Affine mine = Affine::of(own, metadata);
  if (lane < tokens && warp + lane * warps < kPageSize)
    args.metadata[1][place * kPageSize + warp + lane * warps] = metadata;
#pragma unroll
  for (int k = 0; k < tokens; k++) {
    const Affine one = {__shfl_sync(~0u, mine.inverse, k), __shfl_sync(~0u, mine.zero_point, k),
                        __shfl_sync(~0u, mine.correction, k)};
    const Affine map[4] = {one, one, one, one};
    const int token = warp + k * warps;
    if (token < kPageSize)
#pragma unroll
      for (int r = 0; r < rounds; r++)
        if (r * 32 + lane < groups)
          reinterpret_cast<u32*>(args.qdata[1] + (place * kPageSize + token) * V_HEAD_DIM)[r * 32 + lane] =
              codes_of(states[k][r], map);
  }
}

// Four CTAs a processor, of float32 three, hide the latency of memory, where the registers of one allow it.
constexpr int kStoreBlocks = kStoreThreads > 256 ? 1 : DTYPE == kFloat32 ? 3 : 4;
extern "C" __global__ void __launch_bounds__(kStoreThreads, kStoreBlocks)
    store_pages(const __grid_constant__ StoreArgs args) {
  const int which = blockIdx.z % 2, head = blockIdx.z / 2 * gridDim.y + blockIdx.y;
  if (head >= args.num_heads) return;
  const i64 place = static_cast<i64>(blockIdx.x) * args.num_heads + head;
  const i64 start = head / args.num_kv_heads * args.stride[which][0] +
                    head % args.num_kv_heads * args.stride[which][1] +
                    static_cast<i64>(blockIdx.x) * kPageSize * args.stride[which][2];
  if (which == 0)
    store_keys(args, place, start);
  else
    store_values(args, place, start);
}
