// What a CTA has found: the output, or its part of it where the keys are divided among several.

#include "prefill/softmax.cuh"

// Where the parts of the splits of a CTA's rows begin, counted in parts of kRows rows.
DEVICE i64 first_part(const PrefillArgs& args, int head, int row_tile) {
  return (static_cast<i64>(head) * args.row_tiles + row_tile) * args.num_splits;
}

// Where the output of a row begins, in elements.
DEVICE i64 output_start(const PrefillArgs& args, int batch, int kv_head, int query, int head) {
#if HAS_BLOCK_TABLE
  const i64 token = batch + query;
#else
  const i64 token = static_cast<i64>(batch) * args.query_len + query;
#endif
  return ((token * args.num_kv_heads + kv_head) * args.group + head) * V_HEAD_DIM;
}

DEVICE void write_output(const PrefillArgs& args, const QueryRows& rows, OnlineSoftmax& softmax) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const float inverse = softmax.value_factor == 0.0f ? 0.0f : 1.0f / softmax.value_factor;
#pragma unroll
  for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float sum = softmax.row_sum[i][h], lacks = softmax.value_offset[i][h];
#pragma unroll
      for (int step = 1; step < 4; step *= 2) {
        sum += __shfl_xor_sync(~0u, sum, step);
        lacks += __shfl_xor_sync(~0u, lacks, step);
      }
      const int row = (threadIdx.x >> 5) * kWarpRows + 16 * i + 8 * h + g;
      if (row >= rows.num_rows) continue;
      if (SHARES_PAGES || args.num_splits > 1) {
        const i64 place = (first_part(args, rows.head, rows.row_tile) + rows.split) * kRows + row;
        float2* part = reinterpret_cast<float2*>(args.partial + place * V_HEAD_DIM);
        // What is nothing is not read.
        if (!SHARES_PAGES || sum != 0.0f)
#pragma unroll
          for (int n = 0; n < 2 * kValueChunks; n++)
            part[(channel_at<kValueChunks>(n) + 2 * t) / 2] =
                make_float2(fmaf(softmax.output[i][n][2 * h], inverse, -lacks),
                            fmaf(softmax.output[i][n][2 * h + 1], inverse, -lacks));
        if (t == 0) *reinterpret_cast<float2*>(args.sums + 2 * place) = make_float2(softmax.row_max[i][h], sum);
        continue;
      }
      // A row that has seen nothing is zero.
      const float share = sum == 0.0f ? 0.0f : 1.0f / sum;
      const Row place = row_of(args, rows, row);
      u16* output =
          static_cast<u16*>(args.output) + output_start(args, rows.batch, rows.kv_head, place.query, place.head);
#pragma unroll
      for (int n = 0; n < 2 * kValueChunks; n++)
        *reinterpret_cast<u32*>(output + channel_at<kValueChunks>(n) + 2 * t) =
            pack_elements(fmaf(softmax.output[i][n][2 * h], inverse, -lacks) * share,
                          fmaf(softmax.output[i][n][2 * h + 1], inverse, -lacks) * share);
    }
}

// One row out of its parts, by a warp.
DEVICE void merge_row(const PrefillArgs& args, int head, int row) {
  const int lane = threadIdx.x & 31;
#if HAS_BLOCK_TABLE
  const QueryRows rows = rows_of_tile(args, row / kRows);
  if (row % kRows >= rows.num_rows) return;
  const int index = rows.first_row + row % kRows;
  const i64 output_place = output_start(args, rows.batch, head, index % rows.query_len, index / rows.query_len);
#endif
  const i64 first = first_part(args, head, row / kRows) * kRows + row % kRows;
  const float2* sums = reinterpret_cast<const float2*>(args.sums);
  float row_max = kLowest;
#pragma unroll 4
  for (int split = 0; split < args.num_splits; split++) row_max = fmaxf(row_max, sums[first + split * kRows].x);
  constexpr int pairs = (V_HEAD_DIM / 2 + 31) / 32;
  float2 total[pairs];
#pragma unroll
  for (int k = 0; k < pairs; k++) total[k] = make_float2(0.0f, 0.0f);
  float row_sum = 0.0f;
#pragma unroll 4
  for (int split = 0; split < args.num_splits; split++) {
    const float2 found = sums[first + split * kRows];
    if (found.y == 0.0f) continue;
    const float weight = exp2_approx(found.x - row_max);
    row_sum = fmaf(weight, found.y, row_sum);
    const float2* part = reinterpret_cast<const float2*>(args.partial + (first + split * kRows) * V_HEAD_DIM);
#pragma unroll
    for (int k = 0; k < pairs; k++)
      if (lane + 32 * k < V_HEAD_DIM / 2) {
        const float2 x = part[lane + 32 * k];
        total[k].x = fmaf(weight, x.x, total[k].x), total[k].y = fmaf(weight, x.y, total[k].y);
      }
  }
  const float share = row_sum == 0.0f ? 0.0f : 1.0f / row_sum;
#if !HAS_BLOCK_TABLE
  const i64 output_place = output_start(args, head / args.num_kv_heads, head % args.num_kv_heads, row % args.query_len,
                                        row / args.query_len);
#endif
  u16* output = static_cast<u16*>(args.output) + output_place;
#pragma unroll
  for (int k = 0; k < pairs; k++)
    if (lane + 32 * k < V_HEAD_DIM / 2)
      *reinterpret_cast<u32*>(output + 2 * (lane + 32 * k)) = pack_elements(total[k].x * share, total[k].y * share);
}
