// The online softmax of a warp's query rows.

#include "attention/args.cuh"
#include "common/floats.cuh"

constexpr float kLowest = -1e30f;  // below every logit, and still a number

// A logit times softmax_scale, in units of log2.
DEVICE float softcapped(const AttentionArgs& args, float logit) {
#if HAS_SOFTCAP
  return args.softcap * kLog2e * tanh_exact(logit / args.softcap);
#else
  return logit;
#endif
}
DEVICE float score_scale(const AttentionArgs& args) {
  return HAS_SOFTCAP ? args.softmax_scale : args.softmax_scale * kLog2e;
}

// What a warp keeps of its query rows. A lane holds the rows 8 i + 2 t and 8 i + 2 t + 1; of row_max all lanes of a row
// hold the same, of row_sum and value_offset each a part.
struct OnlineSoftmax {
  float output[ROW_TILES][kValueChunks][4];  // not normalised, times value_factor
  float row_max[ROW_TILES][2];               // largest score so far, in units of log2
  float row_sum[ROW_TILES][2];               // of 2^(score - row_max)
  float value_offset[ROW_TILES][2];          // what the values' zero points take away
  float value_factor;                        // keeps weight * scale inside 16-bit floats; a power of two
};

// Nothing attended to yet, but for sinks: a sink is one more key without a value, counted by the first split's first
// warp.
DEVICE void start_softmax(const AttentionArgs& args, const QueryRows& rows, const Thread& thread,
                          OnlineSoftmax& softmax) {
  softmax.value_factor = 1.0f;
#pragma unroll
  for (int i = 0; i < ROW_TILES; i++) {
#pragma unroll
    for (int j = 0; j < 2; j++) {
      softmax.row_max[i][j] = kLowest;
      softmax.row_sum[i][j] = softmax.value_offset[i][j] = 0.0f;
      const int row = 8 * i + 2 * thread.t + j;
      if (args.sinks && rows.split == 0 && thread.warp == 0 && row < rows.num_rows) {
        const float sink = args.sinks[rows.kv_head * args.group + head_of(rows, rows.first_row + row)] * kLog2e;
        softmax.row_max[i][j] = fmaxf(sink, kLowest);
        // Of the lanes that share a row the first counts it.
        softmax.row_sum[i][j] = thread.g == 0 ? exp2_approx(sink - softmax.row_max[i][j]) : 0.0f;
      }
    }
#pragma unroll
    for (int c = 0; c < kValueChunks; c++)
#pragma unroll
      for (int j = 0; j < 4; j++) softmax.output[i][c][j] = 0.0f;
  }
}

// Turns scores (log2 units, -inf where hidden) into weights, and scales what is kept to the new row_max.
template <int kKeyTiles>
DEVICE void softmax_step(OnlineSoftmax& softmax, float (&scores)[kKeyTiles][ROW_TILES][4]) {
  bool is_higher = false;
  float tile_max[ROW_TILES][2];
#pragma unroll
  for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      tile_max[i][j] = fmaxf(scores[0][i][j], scores[0][i][j + 2]);
#pragma unroll
      for (int a = 1; a < kKeyTiles; a++)
        tile_max[i][j] = fmaxf(tile_max[i][j], fmaxf(scores[a][i][j], scores[a][i][j + 2]));
      is_higher |= tile_max[i][j] > softmax.row_max[i][j];
    }
  if (__any_sync(~0u, is_higher)) {
#pragma unroll
    for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        float new_max = tile_max[i][j];
        new_max = fmaxf(new_max, __shfl_xor_sync(~0u, new_max, 4));
        new_max = fmaxf(new_max, __shfl_xor_sync(~0u, new_max, 8));
        new_max = fmaxf(new_max, __shfl_xor_sync(~0u, new_max, 16));
        new_max = fmaxf(new_max, softmax.row_max[i][j]);
        const float rescale = exp2_approx(softmax.row_max[i][j] - new_max);
        softmax.row_max[i][j] = new_max;
        softmax.row_sum[i][j] *= rescale;
        softmax.value_offset[i][j] *= rescale;
#pragma unroll
        for (int c = 0; c < kValueChunks; c++) {
          softmax.output[i][c][j] *= rescale;
          softmax.output[i][c][j + 2] *= rescale;
        }
      }
  }
#pragma unroll
  for (int a = 0; a < kKeyTiles; a++)
#pragma unroll
    for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        float weight = exp2_approx(scores[a][i][j] - softmax.row_max[i][j & 1]);
        scores[a][i][j] = weight;
        softmax.row_sum[i][j & 1] += weight;
      }
}
