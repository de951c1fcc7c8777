// The query scaled for one page.

#include "attention/query.cuh"
#include "attention/softmax.cuh"
#include "common/matrices.cuh"

constexpr u32 kMagic = 0x64646464u;  // the high byte of 1024..1279 as 16-bit floats
constexpr u32 kBias = 0x64806480u;   // 1152 = 1024 + 128, a pair
constexpr u32 kMinusBias = 0xE480E480u;

// The query as the MMA wants it for one page: times the page's channel scales, as 16-bit floats.
struct PageQuery {
  u32 pair[ROW_TILES][kKeyChunks][2];
  float bias[ROW_TILES][2];    // -1152 times the sum of the query so scaled, for the rows 2 t and 2 t + 1
  float factor[ROW_TILES][2];  // what a logit so found is multiplied by
  float offset[ROW_TILES][2];  // and what is then subtracted
};

// `query` and `metadata` (of the page's keys) are addresses in shared memory.
DEVICE void scale_query(const AttentionArgs& args, PageQuery& scaled, u32 query, u32 metadata) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int i = 0; i < ROW_TILES; i++) {
    float product[kKeyChunks][4];
    float largest = 0.0f, offset = 0.0f;
    u32 row = query + (8 * i + g) * kQueryPitch + 4 * t * kQuerySize;
#pragma unroll
    for (int c = 0; c < kKeyChunks; c++) {
      const uint4 four = load_shared_16(metadata + (16 * c + 4 * t) * 4);
      const u32 words[4] = {four.x, four.y, four.z, four.w};
      float x[4];
      to_floats(load_query(row + 16 * c * kQuerySize), x);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        product[c][j] = x[j] * scale_of(words[j]);
        largest = fmaxf(largest, fabsf(product[c][j]));
        offset = fmaf(product[c][j], zero_point_of(words[j]), offset);
      }
    }
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
      offset += __shfl_xor_sync(~0u, offset, step);
    }
    // A power of two that brings the largest product to 1024..2048: 16-bit floats then hold the small ones, too.
    u32 exponent = min(max(__float_as_uint(largest) >> 23, 11u), 250u);
    float grow = __uint_as_float((264u - exponent) << 23), shrink = __uint_as_float((exponent - 10u) << 23);
#pragma unroll
    for (int c = 0; c < kKeyChunks; c++)
#pragma unroll
      for (int j = 0; j < 2; j++)
        scaled.pair[i][c][j] = pack_half2(product[c][2 * j] * grow, product[c][2 * j + 1] * grow);
    float bias[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    u32 minus_bias[4] = {kMinusBias, kMinusBias, kMinusBias, kMinusBias};
#pragma unroll
    for (int c = 0; c < kKeyChunks; c++) mma_half(bias, minus_bias, scaled.pair[i][c][0], scaled.pair[i][c][1]);
#pragma unroll
    for (int j = 0; j < 2; j++) {
      scaled.bias[i][j] = bias[j];
      scaled.factor[i][j] = __shfl_sync(~0u, shrink, 8 * t + 4 * j) * score_scale(args);
      scaled.offset[i][j] = __shfl_sync(~0u, offset, 8 * t + 4 * j) * score_scale(args);
    }
  }
}
