// Quantising pages, restoring them and writing the tail. Bit for bit what reference.py says.
//
// Macros: DK, DV (head_dims), DTYPE (of the states).

#include "common.cuh"

constexpr int kStoreThreads = DK * 2 > 256 ? DK * 2 : 256;
constexpr int kThreads = 256;
constexpr int kTokenGroups = 8, kTokensPerThread = kPageSize / kTokenGroups;

// scheme.py explains the numbers.
constexpr float kQMin = -128.0f, kMinScale = 0x1p-120f;
constexpr int kMaxSteps = 254, kMaxAbsSteps = 32512;
constexpr u32 kNanPair = 0x7FC0;  // scale NaN, zero_point 0
constexpr u32 kInfinityBits = 0x7F800000u;

struct StoreArgs {
  const void* states[2];  // keys and values, (batch, num_kv_heads, pages * 64, DK or DV)
  i8* qdata[2];           // (pages, batch, num_kv_heads, 64, DK or DV)
  u32* metadata[2];       // (pages, batch, num_kv_heads, DK or 64)
  i64 stride[2][3];       // of the states: batch, head, token
  int num_kv_heads;
};

struct RestoreArgs {
  const Segment* segments;  // num_segments + 1
  const void* tail;         // (batch, num_kv_heads, tail_len, D)
  void* output;             // (heads, tokens, D) for the heads from first_head on, heads counted over the batch
  i64 tail_stride[3];
  int num_kv_heads, heads_in_all, first_head, num_segments, num_pages, first_page, tail_len, is_key;
  Segment only;  // the one segment, if there is one; there is no table then
};

struct AppendArgs {
  const void* states[2];  // (batch, num_kv_heads, tokens, DK or DV)
  void* tail[2];          // room for more behind `position`
  i64 stride[2][3], tail_stride[2][3];
  const int* lengths;  // pages and tail_len in device memory, or null for position
  int num_kv_heads, batch, tokens, position;
};

struct Range {
  float low, high;  // NaN if an element is
};
// Minimum and maximum that keep a NaN.
DEVICE float lower(float a, float b) {
  float r;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
DEVICE float higher(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

// Range of a warp's elements. Floats in the order of integers can be reduced in one instruction; a NaN made canonical is
// the largest, so that the maximum shows it.
DEVICE Range warp_range(const Range& range) {
  auto ordered = [](float x) {
    const int bits = __float_as_int(x);
    return bits ^ (bits >> 31 & 0x7FFFFFFF);
  };
  const int low = __reduce_min_sync(~0u, ordered(range.low)), high = __reduce_max_sync(~0u, ordered(range.high));
  return {__int_as_float(low ^ (low >> 31 & 0x7FFFFFFF)), __int_as_float(high ^ (high >> 31 & 0x7FFFFFFF))};
}

constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds, and leaves the integer in the low bits

// x / kDivisor as IEEE has it: a product, and one step of Newton with the exact remainder (Markstein). Quotients below
// kMinScale may be off.
template <int kDivisor>
DEVICE float divided(float x) {
  constexpr float inverse = 1.0f / kDivisor;
  const float quotient = __fmul_rn(x, inverse);
  return fmaf(fmaf(-quotient, static_cast<float>(kDivisor), x), inverse, quotient);
}

// The affine map of a group; an inverse of 0 stands for a group that is not finite, whose codes are all 0.
struct Affine {
  float inverse, zero_point;
  float correction;  // of float32 the scale, else what the inverse lacks

  static DEVICE Affine of(const Range& range, u32& metadata) {
    const float largest = higher(fabsf(range.low), fabsf(range.high));
    if (!(__float_as_uint(largest) < kInfinityBits)) {
      metadata = kNanPair;
      return {0.0f, 0.0f, 0.0f};
    }
    // Divided before they are subtracted: the range of a float32 group can exceed float32.
    const float spread = __fsub_rn(divided<kMaxSteps>(range.high), divided<kMaxSteps>(range.low));
    const float wanted = fmaxf(fmaxf(spread, divided<kMaxAbsSteps>(largest)), kMinScale);
    const float scale = __uint_as_float((__float_as_uint(wanted) + 0xFFFFu) & 0xFFFF0000u);
    Affine map = {reciprocal_approx(scale), 0.0f, scale};
    if (DTYPE != kFloat32) map.correction = fmaf(-scale, map.inverse, 1.0f) * map.inverse;
    map.zero_point = kQMin - (map.steps(range.low) - kRounder);
    metadata = __float_as_uint(scale) >> 16 | static_cast<u32>(static_cast<int>(map.zero_point)) << 16;
    return map;
  }
  // kRounder and x in steps of the scale, rounded as the exact quotient would be, a tie to even.
  DEVICE float steps(float x) const {
#if DTYPE == 0
    // The product with the inverse finds the nearest multiple or its neighbour; the remainder, which is exact, tells.
    const float scale = correction;
    float rounded = fmaf(x, inverse, kRounder);
    const float remainder = fmaf(kRounder - rounded, scale, x), excess = fabsf(remainder) - 0.5f * scale;
    if (excess >= 0.0f && (excess > 0.0f || (__float_as_uint(rounded) & 1))) rounded += copysignf(1.0f, remainder);
    return rounded;
#else
    // A quotient of a 16-bit float and a scale, which has 8 bits, is a tie, or further from one than this product errs.
    return __fadd_rn(fmaf(x, inverse, __fmul_rn(x, correction)), kRounder);
#endif
  }
  // In the lowest byte, if the group is finite.
  DEVICE u32 code(float x) const { return __float_as_uint(__fadd_rn(steps(x), zero_point)); }
  DEVICE u32 mask() const { return inverse == 0.0f ? 0u : ~0u; }
};

DEVICE u32 pack_codes(u32 a, u32 b, u32 c, u32 d) { return prmt(prmt(a, b, 0x0040), prmt(c, d, 0x0040), 0x5410); }

// Four consecutive elements as they are stored.
#if DTYPE == 0
using Four = float4;
DEVICE void to_floats(const Four& v, float (&x)[4]) { x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w; }
DEVICE Four lower(const Four& a, const Four& b) {
  return make_float4(lower(a.x, b.x), lower(a.y, b.y), lower(a.z, b.z), lower(a.w, b.w));
}
DEVICE Four higher(const Four& a, const Four& b) {
  return make_float4(higher(a.x, b.x), higher(a.y, b.y), higher(a.z, b.z), higher(a.w, b.w));
}
#else
using Four = uint2;
DEVICE void to_floats(const Four& v, float (&x)[4]) {
  x[0] = DTYPE == kBFloat16 ? bfloat_low(v.x) : half_low(v.x);
  x[1] = DTYPE == kBFloat16 ? bfloat_high(v.x) : half_high(v.x);
  x[2] = DTYPE == kBFloat16 ? bfloat_low(v.y) : half_low(v.y);
  x[3] = DTYPE == kBFloat16 ? bfloat_high(v.y) : half_high(v.y);
}
#if DTYPE == 1
#define PAIR "bf16x2"
#else
#define PAIR "f16x2"
#endif
DEVICE u32 lower_pair(u32 a, u32 b) {
  u32 r;
  asm("min.NaN." PAIR " %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
DEVICE u32 higher_pair(u32 a, u32 b) {
  u32 r;
  asm("max.NaN." PAIR " %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
DEVICE Four lower(const Four& a, const Four& b) { return make_uint2(lower_pair(a.x, b.x), lower_pair(a.y, b.y)); }
DEVICE Four higher(const Four& a, const Four& b) { return make_uint2(higher_pair(a.x, b.x), higher_pair(a.y, b.y)); }
#endif
DEVICE u32 codes_of(const Four& v, const Affine (&map)[4]) {
  float x[4];
  to_floats(v, x);
  const u32 codes = pack_codes(map[0].code(x[0]), map[1].code(x[1]), map[2].code(x[2]), map[3].code(x[3]));
  return codes & pack_codes(map[0].mask(), map[1].mask(), map[2].mask(), map[3].mask());
}

// One page of one head. A thread holds four channels of every eighth token; the eight meet in shared memory, where a
// thread for each channel makes its map.
DEVICE void store_keys(const StoreArgs& args, i64 place, i64 start) {
  constexpr int groups = DK / 4;
  __shared__ float4 low[kTokenGroups][groups], high[kTokenGroups][groups];
  __shared__ float4 inverse[groups], zero_point[groups], correction[groups];
  const int channels = threadIdx.x % groups, token_group = threadIdx.x / groups;
  const bool works = token_group < kTokenGroups;
  Four states[kTokensPerThread];
  if (works) {
    const Four* source =
        static_cast<const Four*>(args.states[0]) + (start + token_group * args.stride[0][2]) / 4 + channels;
    const i64 step = kTokenGroups * args.stride[0][2] / 4;
#pragma unroll
    for (int i = 0; i < kTokensPerThread; i++) states[i] = source[i * step];
    Four lowest = states[0], highest = states[0];
#pragma unroll
    for (int i = 1; i < kTokensPerThread; i++) lowest = lower(lowest, states[i]), highest = higher(highest, states[i]);
    float x[4];
    to_floats(lowest, x);
    low[token_group][channels] = make_float4(x[0], x[1], x[2], x[3]);
    to_floats(highest, x);
    high[token_group][channels] = make_float4(x[0], x[1], x[2], x[3]);
  }
  __syncthreads();
  if (const int d = threadIdx.x; d < DK) {
    Range range = {reinterpret_cast<const float*>(low[0])[d], reinterpret_cast<const float*>(high[0])[d]};
#pragma unroll
    for (int i = 1; i < kTokenGroups; i++) {
      range.low = lower(range.low, reinterpret_cast<const float*>(low[i])[d]);
      range.high = higher(range.high, reinterpret_cast<const float*>(high[i])[d]);
    }
    u32 metadata;
    const Affine map = Affine::of(range, metadata);
    args.metadata[0][place * DK + d] = metadata;
    reinterpret_cast<float*>(inverse)[d] = map.inverse;
    reinterpret_cast<float*>(zero_point)[d] = map.zero_point;
    reinterpret_cast<float*>(correction)[d] = map.correction;
  }
  __syncthreads();
  if (!works) return;
  const float4 n = inverse[channels], z = zero_point[channels], c = correction[channels];
  const Affine map[4] = {{n.x, z.x, c.x}, {n.y, z.y, c.y}, {n.z, z.z, c.z}, {n.w, z.w, c.w}};
  u32* target = reinterpret_cast<u32*>(args.qdata[0] + (place * kPageSize + token_group) * DK) + channels;
#pragma unroll
  for (int i = 0; i < kTokensPerThread; i++) target[i * kTokenGroups * groups] = codes_of(states[i], map);
}

// One page of one head: a warp takes every warps-th token, a lane every 32nd group of four channels. The maps of a
// warp's tokens are made side by side, a lane each.
DEVICE void store_values(const StoreArgs& args, i64 place, i64 start) {
  constexpr int groups = DV / 4, rounds = (groups + 31) / 32, warps = kStoreThreads / 32;
  constexpr int tokens = (kPageSize + warps - 1) / warps;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const Four* source = static_cast<const Four*>(args.states[1]) + start / 4;
  Four states[tokens][rounds];
#pragma unroll
  for (int k = 0; k < tokens; k++)
#pragma unroll
    for (int r = 0; r < rounds; r++) {
      // A lane or a token too many reads the last one again, which changes no range.
      const int token = min(warp + k * warps, kPageSize - 1), group = min(r * 32 + lane, groups - 1);
      states[k][r] = source[token * (args.stride[1][2] / 4) + group];
    }
  Range own = {0.0f, 0.0f};
#pragma unroll
  for (int k = 0; k < tokens; k++) {
    Four lowest = states[k][0], highest = states[k][0];
#pragma unroll
    for (int r = 1; r < rounds; r++) lowest = lower(lowest, states[k][r]), highest = higher(highest, states[k][r]);
    float x[4], y[4];
    to_floats(lowest, x);
    to_floats(highest, y);
    const Range range =
        warp_range({lower(lower(x[0], x[1]), lower(x[2], x[3])), higher(higher(y[0], y[1]), higher(y[2], y[3]))});
    if (lane == k) own = range;
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
          reinterpret_cast<u32*>(args.qdata[1] + (place * kPageSize + token) * DV)[r * 32 + lane] =
              codes_of(states[k][r], map);
  }
}

// Grid: pages, batch * num_kv_heads, 2 (keys, values).
// Four CTAs a processor hide the latency of memory, where the registers of one allow it.
constexpr int kStoreBlocks = DTYPE != kFloat32 && kStoreThreads == 256 ? 4 : 1;
extern "C" __global__ void __launch_bounds__(kStoreThreads, kStoreBlocks)
    store_pages(const __grid_constant__ StoreArgs args) {
  const int head = blockIdx.y, which = blockIdx.z;
  const i64 place = static_cast<i64>(blockIdx.x) * gridDim.y + head;
  const i64 start = head / args.num_kv_heads * args.stride[which][0] +
                    head % args.num_kv_heads * args.stride[which][1] +
                    static_cast<i64>(blockIdx.x) * kPageSize * args.stride[which][2];
  if (which == 0)
    store_keys(args, place, start);
  else
    store_values(args, place, start);
}

// Not fminf and fmaxf, which would lose a NaN.
DEVICE float saturated(float x) {
  constexpr float limit = DTYPE == kFloat32    ? 3.4028234663852886e38f
                          : DTYPE == kBFloat16 ? 3.3895313892515355e38f
                                               : 65504.0f;
  return x > limit ? limit : x < -limit ? -limit : x;
}
template <int D>
DEVICE void restore_page(const RestoreArgs& args, int page, i64 target) {
  const int head = args.first_head + blockIdx.y, lane = threadIdx.x & 31;
  Segment segment = args.only;
  if (args.num_segments > 1) {
    int index = -1;
    for (int first = 0; first < args.num_segments; first += 32)
      index +=
          __popc(__ballot_sync(~0u, first + lane < args.num_segments && args.segments[first + lane].first <= page));
    segment = args.segments[index];
  }
  const i64 place = (page - segment.first) * args.heads_in_all + head;
  const uint2* qdata =
      reinterpret_cast<const uint2*>((args.is_key ? segment.key_qdata : segment.value_qdata) + place * kPageSize * D);
  const u32* metadata = args.is_key ? segment.key_metadata + place * D : segment.value_metadata + place * kPageSize;
#pragma unroll 4
  for (int i = threadIdx.x; i < kPageSize * D / 8; i += kThreads) {
    const uint2 codes = qdata[i];
    const int token = i / (D / 8), channel = i % (D / 8) * 8;
    u32 words[8];
    if (args.is_key) {
      const uint4 a = *reinterpret_cast<const uint4*>(metadata + channel);
      const uint4 b = *reinterpret_cast<const uint4*>(metadata + channel + 4);
      words[0] = a.x, words[1] = a.y, words[2] = a.z, words[3] = a.w;
      words[4] = b.x, words[5] = b.y, words[6] = b.z, words[7] = b.w;
    } else {
      const u32 word = metadata[token];
      for (int j = 0; j < 8; j++) words[j] = word;
    }
    float x[2][4];
#pragma unroll
    for (int j = 0; j < 8; j++) {
      // 2^23 + 128 + code as a float: no conversion, which is slow.
      const u32 four = (j < 4 ? codes.x : codes.y) ^ 0x80808080u;
      const float q = __uint_as_float(prmt(four, 0x4B000000u, 0x7440 | j % 4)) - 8388736.0f;
      x[j / 4][j % 4] = saturated((q - zero_point_of(words[j])) * scale_of(words[j]));
    }
#if DTYPE == 0
    float4* output =
        reinterpret_cast<float4*>(static_cast<float*>(args.output) + target + static_cast<i64>(token) * D + channel);
    output[0] = make_float4(x[0][0], x[0][1], x[0][2], x[0][3]);
    output[1] = make_float4(x[1][0], x[1][1], x[1][2], x[1][3]);
#else
    uint4 v;
    v.x = DTYPE == kBFloat16 ? pack_bfloat2(x[0][0], x[0][1]) : pack_half2(x[0][0], x[0][1]);
    v.y = DTYPE == kBFloat16 ? pack_bfloat2(x[0][2], x[0][3]) : pack_half2(x[0][2], x[0][3]);
    v.z = DTYPE == kBFloat16 ? pack_bfloat2(x[1][0], x[1][1]) : pack_half2(x[1][0], x[1][1]);
    v.w = DTYPE == kBFloat16 ? pack_bfloat2(x[1][2], x[1][3]) : pack_half2(x[1][2], x[1][3]);
    *reinterpret_cast<uint4*>(static_cast<u16*>(args.output) + target + static_cast<i64>(token) * D + channel) = v;
#endif
  }
}

// Grid: pages from first_page on and one for the tail if there is one, heads.
template <int D>
DEVICE void restore_block(const RestoreArgs& args) {
  const int head = args.first_head + blockIdx.y, pages = args.num_pages - args.first_page;
  const i64 tokens = static_cast<i64>(pages) * kPageSize + args.tail_len;
  const i64 target = (blockIdx.y * tokens + static_cast<i64>(blockIdx.x) * kPageSize) * D;
  if (static_cast<int>(blockIdx.x) < pages) {
    restore_page<D>(args, args.first_page + blockIdx.x, target);
    return;
  }
  const i64 start = head / args.num_kv_heads * args.tail_stride[0] + head % args.num_kv_heads * args.tail_stride[1];
  for (int i = threadIdx.x; i < args.tail_len * (D / 4); i += kThreads) {
    const int token = i / (D / 4), channel = i % (D / 4) * 4;
    static_cast<Four*>(args.output)[(target + static_cast<i64>(token) * D + channel) / 4] =
        static_cast<const Four*>(args.tail)[(start + token * args.tail_stride[2] + channel) / 4];
  }
}
extern "C" __global__ void __launch_bounds__(kThreads) restore(const __grid_constant__ RestoreArgs args) {
  if (args.is_key)
    restore_block<DK>(args);
  else
    restore_block<DV>(args);
}

// New tokens behind `position` of the tail, words of four elements. Grid: words over threads, 1, 2 (keys, values).
template <int D>
DEVICE void append_states(const AppendArgs& args, int which) {
  const i64 i = static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x;
  const int channel = i % (D / 4) * 4;
  const i64 row = i / (D / 4);
  const int token = row % args.tokens;
  const i64 head = row / args.tokens;
  if (head >= static_cast<i64>(args.batch) * args.num_kv_heads) return;
  const int batch = head / args.num_kv_heads, kv_head = head % args.num_kv_heads;
  const int position = args.lengths ? args.lengths[1] : args.position;
  const i64 from =
      batch * args.stride[which][0] + kv_head * args.stride[which][1] + token * args.stride[which][2] + channel;
  const i64 to = batch * args.tail_stride[which][0] + kv_head * args.tail_stride[which][1] +
                 (position + token) * args.tail_stride[which][2] + channel;
  static_cast<Four*>(args.tail[which])[to / 4] = static_cast<const Four*>(args.states[which])[from / 4];
}
extern "C" __global__ void __launch_bounds__(kThreads) append(const __grid_constant__ AppendArgs args) {
  if (blockIdx.z == 0)
    append_states<DK>(args, 0);
  else
    append_states<DV>(args, 1);
}

// The state of one layer of fixed capacity, its lengths in device memory, taken one step on: pages that are due are
// closed, what is left of the source becomes the tail, and new tokens follow. The source may be the tail itself.
struct AdvanceArgs {
  const void* source[2];      // the exact tokens behind the closed pages, (batch, num_kv_heads, any, DK or DV)
  const void* states[2];      // new ones, (batch, num_kv_heads, new_tokens, DK or DV), if there are
  void* tail[2];              // (batch, num_kv_heads, tail_capacity, DK or DV), contiguous
  i8* qdata[2];               // (capacity, batch, num_kv_heads, 64, DK or DV)
  u32* metadata[2];           // (capacity, batch, num_kv_heads, DK or 64)
  const int* source_lengths;  // closed pages, tokens in the source, tokens in all
  int* lengths;               // the same of the result, and a counter that is zero; may be the source's
  i64 source_stride[2][3], states_stride[2][3];
  int num_kv_heads, num_heads, capacity, tail_capacity, residual_length, new_tokens;  // num_heads counts the batch
};

// What is left of a head's source becomes its tail.
template <int D>
DEVICE void move_to_tail(const AdvanceArgs& args, int which, int head, i64 from, int first, int rest) {
  constexpr int row = D / 4, words = kPageSize * row / kStoreThreads;
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
template <int D>
DEVICE void add_to_tails(const AdvanceArgs& args, int which, int first_head, int num_heads, int rest) {
  constexpr int row = D / 4;
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

// Grid: CTAs that share the pages, 1 if the source is the tail; CTAs that share the heads; 2 (keys, values). A step that
// closes no page has little to do, and few CTAs do it soonest.
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
          move_to_tail<DK>(args, which, head, from, closing * kPageSize, rest);
        else
          move_to_tail<DV>(args, which, head, from, closing * kPageSize, rest);
      }
    }
  }
  if (blockIdx.x == 0 && stored) {
    if (which == 0)
      add_to_tails<DK>(args, which, first_head, num_here, rest);
    else
      add_to_tails<DV>(args, which, first_head, num_here, rest);
  }
  // Every CTA has read the lengths when the last one writes them.
  __syncthreads();
  if (threadIdx.x == 0 && arrives_last(reinterpret_cast<u32*>(args.lengths) + 3, gridDim.x * gridDim.y * gridDim.z)) {
    args.lengths[0] = pages + closing;
    args.lengths[1] = rest + stored;
    args.lengths[2] = all + args.new_tokens;
  }
}
