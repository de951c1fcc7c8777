// The online softmax of a warp's query rows.

#include "attention/args.cuh"
#include "common/floats.cuh"

constexpr float kLowest = -1e30f;  // below every logit, and still a number

// A logit times softmax_scale, in units of log2.
DEVICE float capped(const Args& args, float logit) {
#if SOFTCAP
  return args.softcap * kLog2e * tanh_exact(logit / args.softcap);
#else
  return logit;
#endif
}
DEVICE float score_scale(const Args& args) { return SOFTCAP ? args.softmax_scale : args.softmax_scale * kLog2e; }

// What a warp keeps of its query rows: unnormalised output and the two sums of the online softmax.
struct Rows {
  float output[NT][kValueChunks][4];  // times value_factor
  float highest[NT][2], sum[NT][2];   // in units of log2
  float offset[NT][2];                // what the values' zero points take away
  float value_factor;                 // keeps probability * scale inside 16-bit floats; a power of two
};

// Turns scores (log2 units, -inf where hidden) into weights and makes room for them in the sums.
template <int tiles>
DEVICE void softmax_step(Rows& rows, float (&scores)[tiles][NT][4]) {
  bool higher = false;
  float peak[NT][2];
#pragma unroll
  for (int i = 0; i < NT; i++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      float x = fmaxf(scores[0][i][j], scores[0][i][j + 2]);
#pragma unroll
      for (int a = 1; a < tiles; a++) x = fmaxf(x, fmaxf(scores[a][i][j], scores[a][i][j + 2]));
      peak[i][j] = x;
      higher |= x > rows.highest[i][j];
    }
  if (__any_sync(~0u, higher)) {
#pragma unroll
    for (int i = 0; i < NT; i++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        float x = peak[i][j];
        x = fmaxf(x, __shfl_xor_sync(~0u, x, 4));
        x = fmaxf(x, __shfl_xor_sync(~0u, x, 8));
        x = fmaxf(x, __shfl_xor_sync(~0u, x, 16));
        x = fmaxf(x, rows.highest[i][j]);
        float shrink = exp2_approx(rows.highest[i][j] - x);
        rows.highest[i][j] = x;
        rows.sum[i][j] *= shrink;
        rows.offset[i][j] *= shrink;
#pragma unroll
        for (int c = 0; c < kValueChunks; c++) {
          rows.output[i][c][j] *= shrink;
          rows.output[i][c][j + 2] *= shrink;
        }
      }
  }
#pragma unroll
  for (int a = 0; a < tiles; a++)
#pragma unroll
    for (int i = 0; i < NT; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        float weight = exp2_approx(scores[a][i][j] - rows.highest[i][j & 1]);
        scores[a][i][j] = weight;
        rows.sum[i][j & 1] += weight;
      }
}
