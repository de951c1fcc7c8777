// One result out of what the warps of a CTA and the CTAs of a head's splits have found.

#include "attention/softmax.cuh"
#include "common/memory.cuh"

constexpr int kMaxSplits = 128;  // that can be merged; plan.py chooses no more
static_assert(kMaxSplits % 32 == 0, "a lane takes every 32nd");
constexpr int kQuads = V_HEAD_DIM / 4;  // of output elements in a row

// Where the parts of the splits of a CTA's rows begin, counted in parts of kRows rows.
DEVICE i64 first_part(const AttentionArgs& args, const QueryRows& rows) {
  return (static_cast<i64>(rows.head) * rows.row_tiles + rows.row_tile) * args.num_splits;
}

DEVICE void add_weighted(float4& total, float weight, const float4& part) {
  total.x = fmaf(weight, part.x, total.x), total.y = fmaf(weight, part.y, total.y);
  total.z = fmaf(weight, part.z, total.z), total.w = fmaf(weight, part.w, total.w);
}

// Elements d.. of a row of the output, normalised. A row that has seen nothing is zero.
DEVICE void write_output(const AttentionArgs& args, const QueryRows& rows, int row, int d, float4 total,
                         float row_sum) {
  const float share = row_sum == 0.0f ? 0.0f : 1.0f / row_sum;
  const int index = rows.first_row + row;
  const i64 token = static_cast<i64>(rows.batch) * rows.query_len + query_of(rows, index);
  const i64 place = ((token * args.num_kv_heads + rows.kv_head) * args.group + head_of(rows, index)) * V_HEAD_DIM + d;
  if (DTYPE == kFloat32) {
    *reinterpret_cast<float4*>(static_cast<float*>(args.output) + place) =
        make_float4(total.x * share, total.y * share, total.z * share, total.w * share);
  } else {
    uint2 words;
    words.x = DTYPE == kBFloat16 ? pack_bfloat2(total.x * share, total.y * share)
                                 : pack_half2(total.x * share, total.y * share);
    words.y = DTYPE == kBFloat16 ? pack_bfloat2(total.z * share, total.w * share)
                                 : pack_half2(total.z * share, total.w * share);
    *reinterpret_cast<uint2*>(static_cast<u16*>(args.output) + place) = words;
  }
}

#if HAS_ROW_TABLE
// Adds to elements d.. of a row what has been found for the pages that its sequence shares with others.
DEVICE void add_shared_parts(const AttentionArgs& args, const QueryRows& rows, int row, int d, float4& total,
                             float& row_max, float& row_sum) {
  const int tiles = (args.batch + args.sequences - 1) / args.sequences, rows_each = args.group * rows.query_len;
  const i64 tile = static_cast<i64>(rows.kv_head) * tiles + rows.batch / args.sequences;
  const i64 first =
      tile * args.shared_parts * args.shared_rows + rows.batch % args.sequences * rows_each + rows.first_row + row;
  constexpr int kAtOnce = 16;  // parts that are loaded before one is used
#if __CUDA_ARCH__ >= 900
  // Until here this kernel may have run beside the one whose parts these are.
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
#pragma unroll 1
  for (int part = 0; part < args.shared_parts; part += kAtOnce) {
    float2 sums[kAtOnce];
    float4 outputs[kAtOnce];
    float new_max = row_max;
#pragma unroll
    for (int n = 0; n < kAtOnce; n++) {
      const i64 place = first + min(part + n, args.shared_parts - 1) * args.shared_rows;
      sums[n] = *reinterpret_cast<const float2*>(args.shared_sums + 2 * place);
      outputs[n] = *reinterpret_cast<const float4*>(args.shared_partial + place * V_HEAD_DIM + d);
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; n++) new_max = fmaxf(new_max, sums[n].x);
    const float rescale = exp2_approx(row_max - new_max);
    total = make_float4(total.x * rescale, total.y * rescale, total.z * rescale, total.w * rescale);
    row_max = new_max, row_sum *= rescale;
#pragma unroll
    for (int n = 0; n < kAtOnce; n++) {
      if (part + n >= args.shared_parts || sums[n].y == 0.0f) continue;  // of nothing there is no output
      const float weight = exp2_approx(sums[n].x - row_max);
      row_sum = fmaf(weight, sums[n].y, row_sum);
      add_weighted(total, weight, outputs[n]);
    }
  }
}
#endif

// A row that is complete but for the pages that its sequence shares with others; then to the output.
DEVICE void finish_row(const AttentionArgs& args, const QueryRows& rows, int row, int d, float4 total, float row_max,
                       float row_sum) {
#if HAS_ROW_TABLE
  if (args.shared_parts) add_shared_parts(args, rows, row, d, total, row_max, row_sum);
#endif
  write_output(args, rows, row, d, total, row_sum);
}

// A warp's output (kRows, V_HEAD_DIM) and its row_max and row_sum (kRows, 2) to shared memory.
DEVICE void share_softmax(const Thread& thread, const OnlineSoftmax& softmax, u8* memory) {
  float* outputs = reinterpret_cast<float*>(memory);   // (WARPS, kRows, V_HEAD_DIM)
  float* sums = outputs + WARPS * kRows * V_HEAD_DIM;  // (WARPS, kRows, 2)
#pragma unroll
  for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      float row_sum = softmax.row_sum[i][j], offset = softmax.value_offset[i][j];
#pragma unroll
      for (int step = 4; step < 32; step *= 2) {
        row_sum += __shfl_xor_sync(~0u, row_sum, step);
        offset += __shfl_xor_sync(~0u, offset, step);
      }
      const int row = thread.warp * kRows + 8 * i + 2 * thread.t + j;
      if (thread.g == 0) {
        sums[2 * row] = softmax.row_max[i][j];
        sums[2 * row + 1] = row_sum;
      }
      const float shrink = 1.0f / softmax.value_factor;
#pragma unroll
      for (int c = 0; c < kValueChunks; c++) {
        float2 pair = {softmax.output[i][c][j] * shrink - offset, softmax.output[i][c][j + 2] * shrink - offset};
        *reinterpret_cast<float2*>(outputs + row * V_HEAD_DIM + 16 * c + 2 * thread.g) = pair;
      }
    }
}

// The warps of a CTA: to the output if there is one split, else to the split's part of partial and partial_sums.
DEVICE void merge_warps(const AttentionArgs& args, const QueryRows& rows, i64 part, const u8* memory) {
  const float* outputs = reinterpret_cast<const float*>(memory);
  const float* sums = outputs + WARPS * kRows * V_HEAD_DIM;
  for (int i = threadIdx.x; i < rows.num_rows * kQuads; i += kThreads) {
    const int row = i / kQuads, d = i % kQuads * 4;
    float row_max = kLowest, row_sum = 0.0f;
    float4 total = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) row_max = fmaxf(row_max, sums[2 * (warp * kRows + row)]);
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) {
      const float weight = exp2_approx(sums[2 * (warp * kRows + row)] - row_max);
      const float4 output = *reinterpret_cast<const float4*>(outputs + (warp * kRows + row) * V_HEAD_DIM + d);
      row_sum = fmaf(weight, sums[2 * (warp * kRows + row) + 1], row_sum);
      add_weighted(total, weight, output);
    }
    if (splits_of(args, rows) == 1) {
      finish_row(args, rows, row, d, total, row_max, row_sum);
      continue;
    }
    const i64 place = (part + rows.split) * kRows + row;
    *reinterpret_cast<float4*>(args.partial + place * V_HEAD_DIM + d) = total;
    if (d == 0) *reinterpret_cast<float2*>(args.partial_sums + 2 * place) = make_float2(row_max, row_sum);
  }
}

// Whether this CTA is the last of its head's splits to arrive, and sees what all have written.
DEVICE bool is_last_split(const AttentionArgs& args, const QueryRows& rows) {
  __shared__ u32 is_last;
  __syncthreads();
  if (threadIdx.x == 0)
    is_last = arrives_last(args.counters + rows.head * rows.row_tiles + rows.row_tile, splits_of(args, rows));
  __syncthreads();
  return is_last;
}

// weights (num_splits, kRows): what a split's output counts for in a row; row_sums (kRows,), and, where they are needed,
// row_maxima behind them.
constexpr int kRowMaxima = HAS_ROW_TABLE ? kRows : 0;
DEVICE void weigh_splits(const AttentionArgs& args, const QueryRows& rows, const Thread& thread, i64 part,
                         float* weights, float* row_sums) {
  const int lane = thread.lane, num_splits = splits_of(args, rows);
  for (int row = thread.warp; row < rows.num_rows; row += WARPS) {
    constexpr int rounds = kMaxSplits / 32;  // all loaded before one is used
    float2 sums[rounds];
    float row_max = kLowest, row_sum = 0.0f;
#pragma unroll
    for (int k = 0; k < rounds; k++) {
      const int split = min(lane + 32 * k, num_splits - 1);
      sums[k] = __ldcg(reinterpret_cast<const float2*>(args.partial_sums + 2 * ((part + split) * kRows + row)));
    }
#pragma unroll
    for (int k = 0; k < rounds; k++) row_max = fmaxf(row_max, sums[k].x);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) row_max = fmaxf(row_max, __shfl_xor_sync(~0u, row_max, step));
#pragma unroll
    for (int k = 0; k < rounds; k++)
      if (lane + 32 * k < num_splits) {
        const float weight = exp2_approx(sums[k].x - row_max);
        weights[(lane + 32 * k) * kRows + row] = weight;
        row_sum = fmaf(weight, sums[k].y, row_sum);
      }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) row_sum += __shfl_xor_sync(~0u, row_sum, step);
    if (lane == 0) {
      row_sums[row] = row_sum;
      if (HAS_ROW_TABLE) row_sums[kRowMaxima + row] = row_max;
    }
  }
}

// Every num_groups-th split of four elements of a row, from `first` on.
DEVICE float4 add_splits(const AttentionArgs& args, const QueryRows& rows, const float* source, const float* weights,
                         int row, int first, int num_groups) {
  const int num_splits = splits_of(args, rows);
  constexpr int kAtOnce = 16;  // splits whose outputs are loaded before one is used
  float4 total = make_float4(0, 0, 0, 0);
#pragma unroll 1
  for (int split = first; split < num_splits; split += kAtOnce * num_groups) {
    float4 outputs[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; n++)
      outputs[n] = __ldcg(
          reinterpret_cast<const float4*>(source + min(split + n * num_groups, num_splits - 1) * (kRows * V_HEAD_DIM)));
#pragma unroll
    for (int n = 0; n < kAtOnce; n++) {
      const int index = split + n * num_groups;
      add_weighted(total, index < num_splits ? weights[index * kRows + row] : 0.0f, outputs[n]);
    }
  }
  return total;
}

// The parts of all splits to the output.
DEVICE void merge_splits(const AttentionArgs& args, const QueryRows& rows, const Thread& thread, i64 part, u8* memory) {
  float* weights = reinterpret_cast<float*>(memory);          // (num_splits, kRows)
  float* row_sums = weights + splits_of(args, rows) * kRows;  // (kRows,)
  float* row_maxima = row_sums + kRowMaxima;                  // (kRows,)
  weigh_splits(args, rows, thread, part, weights, row_sums);
  __syncthreads();
  // Few rows leave threads without an element: groups of threads then take every num_groups-th split.
  const int elements = rows.num_rows * kQuads;
  const int num_groups = max(min(kThreads / elements, 8), 1), width = num_groups > 1 ? elements : kThreads;
  float4* sums_of_groups = reinterpret_cast<float4*>(row_maxima + kRows);  // (num_groups, elements), if more than one
  const int group = min(static_cast<int>(threadIdx.x) / width, num_groups);
  for (int i = threadIdx.x - group * width; i < elements && group < num_groups; i += width) {
    const int row = i / kQuads, d = i % kQuads * 4;
    const float* source = args.partial + (part * kRows + row) * V_HEAD_DIM + d;
    const float4 total = add_splits(args, rows, source, weights, row, group, num_groups);
    if (num_groups == 1)
      finish_row(args, rows, row, d, total, row_maxima[row], row_sums[row]);
    else
      sums_of_groups[group * elements + i] = total;
  }
  if (num_groups == 1) return;
  __syncthreads();
  if (threadIdx.x < elements) {
    float4 total = make_float4(0, 0, 0, 0);
    for (int n = 0; n < num_groups; n++) {
      const float4 sum = sums_of_groups[n * elements + threadIdx.x];
      total.x += sum.x, total.y += sum.y, total.z += sum.z, total.w += sum.w;
    }
    const int row = threadIdx.x / kQuads;
    finish_row(args, rows, row, threadIdx.x % kQuads * 4, total, row_maxima[row], row_sums[row]);
  }
}
