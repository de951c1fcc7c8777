// restore: states from pages and a tail, bit for bit as reference.restore_key_pages and restore_value_pages.
// Traffic: a code is read once and written as an element, the metadata of a page once for each CTA; the tail is copied:
// bandwidth bound. Launch: (pages and one for the tail if there is one, heads) CTAs of kThreads; keys or values.

#include "pages/elements.cuh"

struct RestoreArgs {
  const Segment* segments;  // num_segments + 1
  const void* tail;         // (batch, num_kv_heads, tail_len, HEAD_DIM or V_HEAD_DIM)
  void* output;             // (heads, tokens, as wide) of the heads from first_head on, counted over the batch
  i64 tail_stride[3];
  int num_kv_heads, heads_in_all, first_head, num_segments, num_pages, tail_len, is_key;
  Segment only;  // the one segment, if there is one; there is no table then
  RowTable row_table;
};
static_assert(sizeof(RestoreArgs) == 136, "as backends/cuda/pages.py packs it");

// Not fminf and fmaxf, which would lose a NaN.
DEVICE float saturated(float x) {
  constexpr float limit = DTYPE == kFloat32    ? 3.4028234663852886e38f
                          : DTYPE == kBFloat16 ? 3.3895313892515355e38f
                                               : 65504.0f;
  return x > limit ? limit : x < -limit ? -limit : x;
}
template <int kHeadDim>
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
#if HAS_ROW_TABLE
  const int batch = head / args.num_kv_heads, kv_head = head % args.num_kv_heads;
  const i64 place = place_of(segment, page, args.row_table.row_of(batch, page), args.num_kv_heads, kv_head);
#else
  const i64 place = (page - segment.first) * args.heads_in_all + head;
#endif
  const uint2* qdata = reinterpret_cast<const uint2*>((args.is_key ? segment.key_qdata : segment.value_qdata) +
                                                      place * kPageSize * kHeadDim);
  const u32* metadata =
      args.is_key ? segment.key_metadata + place * kHeadDim : segment.value_metadata + place * kPageSize;
#pragma unroll 4
  for (int i = threadIdx.x; i < kPageSize * kHeadDim / 8; i += kThreads) {
    const uint2 codes = qdata[i];
    const int token = i / (kHeadDim / 8), channel = i % (kHeadDim / 8) * 8;
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
    float4* output = reinterpret_cast<float4*>(static_cast<float*>(args.output) + target +
                                               static_cast<i64>(token) * kHeadDim + channel);
    output[0] = make_float4(x[0][0], x[0][1], x[0][2], x[0][3]);
    output[1] = make_float4(x[1][0], x[1][1], x[1][2], x[1][3]);
#else
    uint4 v;
    v.x = DTYPE == kBFloat16 ? pack_bfloat2(x[0][0], x[0][1]) : pack_half2(x[0][0], x[0][1]);
    v.y = DTYPE == kBFloat16 ? pack_bfloat2(x[0][2], x[0][3]) : pack_half2(x[0][2], x[0][3]);
    v.z = DTYPE == kBFloat16 ? pack_bfloat2(x[1][0], x[1][1]) : pack_half2(x[1][0], x[1][1]);
    v.w = DTYPE == kBFloat16 ? pack_bfloat2(x[1][2], x[1][3]) : pack_half2(x[1][2], x[1][3]);
    *reinterpret_cast<uint4*>(static_cast<u16*>(args.output) + target + static_cast<i64>(token) * kHeadDim + channel) =
        v;
#endif
  }
}

template <int kHeadDim>
DEVICE void restore_block(const RestoreArgs& args) {
  const int head = args.first_head + blockIdx.y;
  const i64 tokens = static_cast<i64>(args.num_pages) * kPageSize + args.tail_len;
  const i64 target = (blockIdx.y * tokens + static_cast<i64>(blockIdx.x) * kPageSize) * kHeadDim;
  if (static_cast<int>(blockIdx.x) < args.num_pages) {
    restore_page<kHeadDim>(args, blockIdx.x, target);
    return;
  }
  const i64 start = head / args.num_kv_heads * args.tail_stride[0] + head % args.num_kv_heads * args.tail_stride[1];
  for (int i = threadIdx.x; i < args.tail_len * (kHeadDim / 4); i += kThreads) {
    const int token = i / (kHeadDim / 4), channel = i % (kHeadDim / 4) * 4;
    static_cast<Four*>(args.output)[(target + static_cast<i64>(token) * kHeadDim + channel) / 4] =
        static_cast<const Four*>(args.tail)[(start + token * args.tail_stride[2] + channel) / 4];
  }
}
extern "C" __global__ void __launch_bounds__(kThreads) restore(const __grid_constant__ RestoreArgs args) {
  if (args.is_key)
    restore_block<HEAD_DIM>(args);
  else
    restore_block<V_HEAD_DIM>(args);
}
