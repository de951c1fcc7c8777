// From products to weights.

#include "common/matrices.cuh"
#include "prefill/metadata.cuh"
#include "prefill/softmax.cuh"

using Weights = u32[ROW_TILES][kKeyBlocks / 2][4];  // operands A

// What a score is in units of log2: scores * factor + offset.
DEVICE void score_maps(const PrefillArgs& args, const Memory& memory, int slot, float (&factor)[ROW_TILES][2],
                       float (&offset)[ROW_TILES][2]) {
  const Shared& shared = *memory.shared;
  const int g = (threadIdx.x & 31) >> 2, first_row = (threadIdx.x >> 5) * kWarpRows;
  const float scale = score_scale(args), key_factor = shared.key_factor[slot];
  const float offset_factor = shared.offset_factor[slot];
#pragma unroll
  for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = first_row + 16 * i + 8 * h + g;
      const float row_factor = shared.row_factor[row] * scale;
      // Not zero, which would make NaN of what is hidden.
      factor[i][h] = fmaxf(row_factor * key_factor, 0x1p-126f);
      offset[i][h] = -shared.row_offset[row][slot % kGroup] * (row_factor * offset_factor);
    }
}

// The scores themselves, where softmax_step needs more of them than a product and a sum.
DEVICE void map_scores(const PrefillArgs& args, Scores& scores, float (&factor)[ROW_TILES][2],
                       float (&offset)[ROW_TILES][2]) {
#pragma unroll
  for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
      for (int n = 0; n < kKeyBlocks; n++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
          float& score = scores[i][n][2 * h + j];
          score = fmaf(score, factor[i][h], offset[i][h]);
#if HAS_SOFTCAP
          score = args.softcap * kLog2e * tanh_exact(score / args.softcap);
#endif
        }
      factor[i][h] = 1.0f, offset[i][h] = 0.0f;
    }
}

// Has value_factor fit a tile's scales; the output is to follow.
DEVICE void fit_value_factor(const Memory& memory, OnlineSoftmax& softmax, int slot, Rescale& rescale) {
  const float widest = memory.shared->widest[slot];
  if (!(widest * softmax.value_factor <= 128.0f) || softmax.value_factor == 0.0f) {
    // The largest scale becomes 64..128, and with the largest weight half of what 16-bit floats hold.
    const float factor = power_of_two(6 - max(min(exponent_of(widest, -100), 110), -100));
    const float change = softmax.value_factor == 0.0f ? 0.0f : factor / softmax.value_factor;
    softmax.value_factor = factor;
    rescale.is_needed = true;
#pragma unroll
    for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) rescale.factor[i][h] *= change;
  }
}

// The weights times the values' scales, as the operand A.
DEVICE void scale_weights(const Memory& memory, OnlineSoftmax& softmax, const Scores& scores, int slot,
                          Weights& weights) {
  const int t = threadIdx.x & 3;
#pragma unroll
  for (int n = 0; n < kKeyBlocks; n++) {
    const float4 two = *reinterpret_cast<const float4*>(memory.shared->values[slot][8 * n + 2 * t]);
    const float scale[2] = {two.x * softmax.value_factor, two.z * softmax.value_factor};
#pragma unroll
    for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float low = scores[i][n][2 * h], high = scores[i][n][2 * h + 1];
        softmax.value_offset[i][h] = fmaf(low, two.y, fmaf(high, two.w, softmax.value_offset[i][h]));
        weights[i][n / 2][n % 2 * 2 + h] = pack_half2(low * scale[0], high * scale[1]);
      }
  }
}

// The products of a tile as weights; the output is to follow.
DEVICE Rescale weigh(const PrefillArgs& args, const QueryRows& rows, const Memory& memory, OnlineSoftmax& softmax,
                     Scores& scores, int number) {
  const Tile& tile = memory.shared->queue[number % kQueue];
  float factor[ROW_TILES][2], offset[ROW_TILES][2];
  score_maps(args, memory, number % kSlots, factor, offset);
  const bool is_partly = tile.is_partly;
  if (HAS_SOFTCAP || is_partly) map_scores(args, scores, factor, offset);
  if (is_partly) hide_keys(args, rows, scores, tile);
  return softmax_step(softmax, scores, factor, offset);
}
