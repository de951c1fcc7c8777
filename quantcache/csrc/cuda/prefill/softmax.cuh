// The online softmax of a warp's query rows.

#include "prefill/query.cuh"

constexpr float kLowest = -1e30f;  // below every logit, and still a number
// By how much of log2 a score may exceed row_max before that follows: weights of up to 2^kMargin are as good, and the
// output is rescaled a few times and no longer at every new maximum.
constexpr float kMargin = 8.0f;
// Additive masks count as no lower than this, so that a row of nothing but the lowest is uniform.
[[maybe_unused]] constexpr float kLowestMask = -6e29f;

DEVICE float score_scale(const PrefillArgs& args) {
  return HAS_SOFTCAP ? args.softmax_scale : args.softmax_scale * kLog2e;
}

using Scores = float[ROW_TILES][kKeyBlocks][4];

// What a warp keeps of its query rows. A lane holds the rows g and g + 8 of each tile; of row_max all lanes of a row
// hold the same, of row_sum and value_offset each a part.
struct OnlineSoftmax {
  float output[ROW_TILES][2 * kValueChunks][4];  // not normalised, times value_factor
  float row_max[ROW_TILES][2];                   // largest score so far but for kMargin, in units of log2
  float row_sum[ROW_TILES][2];                   // of 2^(score - row_max)
  float value_offset[ROW_TILES][2];              // what the values' zero points take away
  float value_factor;                            // keeps weight * scale inside 16-bit floats; a power of two, or 0
};

// Nothing attended to yet, but for sinks: a sink is one more key without a value, counted by the first split.
DEVICE void start_softmax(const PrefillArgs& args, const QueryRows& rows, OnlineSoftmax& softmax) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  softmax.value_factor = 0.0f;
#pragma unroll
  for (int i = 0; i < ROW_TILES; i++) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      softmax.row_max[i][h] = kLowest;
      softmax.row_sum[i][h] = softmax.value_offset[i][h] = 0.0f;
      if (args.sinks && rows.split == 0) {
        const int row = (threadIdx.x >> 5) * kWarpRows + 16 * i + 8 * h + g;
        const float sink = args.sinks[rows.kv_head * args.group + row_of(args, rows, row).head] * kLog2e;
        softmax.row_max[i][h] = fmaxf(sink, kLowest);
        softmax.row_sum[i][h] = t == 0 ? exp2_approx(sink - softmax.row_max[i][h]) : 0.0f;
      }
    }
#pragma unroll
    for (int n = 0; n < 2 * kValueChunks; n++)
#pragma unroll
      for (int j = 0; j < 4; j++) softmax.output[i][n][j] = 0.0f;
  }
}

// Sets the scores (log2 units) of hidden keys to -inf and adds additive masks.
DEVICE void hide_keys(const PrefillArgs& args, const QueryRows& rows, Scores& scores, const Tile& tile) {
  const int first_key = tile.first_key;
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int number = (threadIdx.x >> 5) * kWarpRows + 16 * i + 8 * h + g;
      const Row row = row_of(args, rows, number);
      const int position = rows.position + row.query;
      int last_key = args.is_causal ? min(position, rows.kv_len - 1) : rows.kv_len - 1;
#if SHARES_PAGES
      if (number < tile.first_row || number >= tile.end_row) last_key = -1;
#endif
      const int earliest_key = args.window ? position - args.window + 1 : 0;
#if HAS_MASK
      const i64 start = mask_start(args, rows, row);
#endif
#pragma unroll
      for (int n = 0; n < kKeyBlocks; n++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const int key = first_key + 8 * n + 2 * t + j;
          float& score = scores[i][n][2 * h + j];
#if HAS_MASK
          const i64 index = start + min(key, rows.kv_len - 1) * args.mask_stride[3];
          if (args.mask_dtype == kBool) {
            if (!static_cast<const u8*>(args.mask)[index]) score = -infinity();
          } else {
            // Not the sum with -inf, which a NaN would survive.
            const float added = load_element(args.mask, args.mask_dtype, index);
            score = added == -infinity() ? added : score + fmaxf(added, kLowestMask) * kLog2e;
          }
#endif
          if (key < earliest_key || key > last_key) score = -infinity();
        }
    }
}

// What the output so far has to be multiplied by.
struct Rescale {
  bool is_needed;
  float factor[ROW_TILES][2];
};

// Turns scores into weights, and sums to the new row_max; the output is to follow. A score is scores * factor + offset,
// in units of log2; -inf where it is hidden.
DEVICE Rescale softmax_step(OnlineSoftmax& softmax, Scores& scores, const float (&factor)[ROW_TILES][2],
                            const float (&offset)[ROW_TILES][2]) {
  Rescale rescale;
  bool is_higher = false;
  float highest[ROW_TILES][2];
#pragma unroll
  for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float x = fmaxf(scores[i][0][2 * h], scores[i][0][2 * h + 1]);
#pragma unroll
      for (int n = 1; n < kKeyBlocks; n++) x = fmaxf(x, fmaxf(scores[i][n][2 * h], scores[i][n][2 * h + 1]));
      highest[i][h] = fmaf(x, factor[i][h], offset[i][h]);
      is_higher |= highest[i][h] > softmax.row_max[i][h] + kMargin;
      rescale.factor[i][h] = 1.0f;
    }
  rescale.is_needed = __any_sync(~0u, is_higher);
  if (rescale.is_needed) {
#pragma unroll
    for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float x = highest[i][h];
        x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
        x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
        x = fmaxf(x, softmax.row_max[i][h]);
        rescale.factor[i][h] = exp2_approx(softmax.row_max[i][h] - x);
        softmax.row_max[i][h] = x;
        softmax.row_sum[i][h] *= rescale.factor[i][h];
        softmax.value_offset[i][h] *= rescale.factor[i][h];
      }
  }
#pragma unroll
  for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float shift = offset[i][h] - softmax.row_max[i][h];
#pragma unroll
      for (int n = 0; n < kKeyBlocks; n++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
          float& score = scores[i][n][2 * h + j];
          score = exp2_approx(fmaf(score, factor[i][h], shift));
          softmax.row_sum[i][h] += score;
        }
    }
  return rescale;
}
DEVICE void rescale_output(OnlineSoftmax& softmax, const Rescale& rescale) {
  if (!rescale.is_needed) return;
#pragma unroll
  for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
    for (int n = 0; n < 2 * kValueChunks; n++)
#pragma unroll
      for (int j = 0; j < 4; j++) softmax.output[i][n][j] *= rescale.factor[i][j / 2];
}
