// Attention of up to a few dozen query rows per KV head over int8 pages and an exact tail.
//
// Operands are swapped: S^T = K Q^T with the keys as the M of mma.m16n8k16, so that four query rows cost eight and not
// sixteen. Bytes become 16-bit floats by one byte permute for two (1024 + code + 128), and that bias is taken out where
// it is free: for keys in the accumulator's first value, for values by one subtraction of a pair.
//
// Keys of a page: K[t][d] = scale[d] * (code[t][d] - zero_point[d]). The scale goes into the query, once for a page; the
// zero points make one number for a query row and page. Values: V[t][d] = scale[t] * (code[t][d] - zero_point[t]). The
// scale goes into the probability; the zero points make one running sum for a query row.
//
// A warp takes every WARPS-th page of the CTA's range through copies of its own and waits for nobody else. Warps are
// merged at the end, splits by the last CTA to arrive.
//
// Macros: HEAD_DIM, V_HEAD_DIM (head_dims), DTYPE (of query and tail), ROW_TILES (tiles of 8 query rows), WARPS, KEY_STEP (keys a step), STAGES,
// HAS_MASK (0 or 1), HAS_SOFTCAP (0 or 1).

#include "attention/page_tile.cuh"
#include "attention/tail_tile.cuh"

// Where 128 registers are enough, sixteen warps a processor. Reading masks takes more, and would cost CTAs without a
// bound; they get what as many CTAs leave them as shared memory has room for.
constexpr int kRoom = 233472 / (kQueryBytes + WARPS * STAGES * kStageBytes + 1024);  // of 9.0; elsewhere there is less
constexpr int kMostBlocks = HAS_MASK && kRoom < 16 / WARPS ? kRoom : 16 / WARPS;
constexpr int kMinBlocks =
    ROW_TILES == 1 && DTYPE != kFloat32 && HEAD_DIM <= 128 && V_HEAD_DIM <= 128 && kMostBlocks > 0 ? kMostBlocks : 1;

extern "C" __global__ void __launch_bounds__(kThreads, kMinBlocks)
    attention(const __grid_constant__ AttentionArgs args) {
  extern __shared__ __align__(128) u8 memory[];
  __shared__ u32 is_last;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int split = blockIdx.x, row_tiles = gridDim.y / args.num_kv_heads;
  const int row_tile = blockIdx.y % row_tiles;
  const int num_pages = args.lengths ? args.lengths[0] : args.num_pages;

  QueryRows rows;
  rows.batch = blockIdx.z, rows.kv_head = blockIdx.y / row_tiles, rows.query_len = args.query_len;
  rows.first_row = row_tile * kRows;
  rows.num_rows = min(kRows, args.group * args.query_len - rows.first_row);
  rows.kv_len = num_pages * kPageSize + (args.lengths ? args.lengths[1] : args.tail_len);

  // The range of pages, without what lies before every query's window.
  const int position = rows.kv_len - rows.query_len;  // of the first query
  const int low = args.window ? max(position - args.window + 1, 0) / kPageSize : 0;
  const int pages_each = (max(num_pages - low, 0) + args.page_splits - 1) / args.page_splits;
  const int start = low + split * pages_each, first_page = start + warp;
  const int end = split < args.page_splits ? min(start + pages_each, num_pages) : 0;
  int num_here = max((end - first_page + WARPS - 1) / WARPS, 0);
  // The warps that have a page less take the tail's first keys.
  const int tail_place = (warp - max(end - start, 0)) & (WARPS - 1);

  const u32 query = shared_address(memory);
  copy_query(args, rows, query);
  commit_copies();
  if (split == args.num_splits - 1) {
    const int tail_len = rows.kv_len - num_pages * kPageSize;
    prefetch_tail<HEAD_DIM>(args.key_tail,
                            rows.batch * args.key_tail_stride[0] + rows.kv_head * args.key_tail_stride[1],
                            args.key_tail_stride[2], tail_len, 16 * tail_place);
    prefetch_tail<V_HEAD_DIM>(args.value_tail,
                              rows.batch * args.value_tail_stride[0] + rows.kv_head * args.value_tail_stride[1],
                              args.value_tail_stride[2], tail_len, 16 * tail_place);
  }

  const u32 stages = query + kQueryBytes + warp * STAGES * kStageBytes;
  const int heads = args.batch * args.num_kv_heads, head = rows.batch * args.num_kv_heads + rows.kv_head;

  PageLoader loader;
  if (num_here) loader.open(args, first_page);
  u32 seen, partly;
  int now = HAS_MASK ? min(num_here, kWindowPages) : num_here;
  int page = first_page;
  scan_masks(args, rows, page, now, seen, partly);
  PageWalk loading;
  loading.start(seen, page, now);
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {
    if (loading.left) {
      loader.load(stages + s * kStageBytes, loading.page, loading.step, heads, head);
      loading.advance();
    }
    commit_copies();
  }

  if (args.num_new && split == args.num_splits - 1) {
    // Row tiles of one head write the same bytes, each before it reads them.
    const int num_old = args.tail_len - args.num_new;
    write_new<HEAD_DIM>(args, rows, 0, args.key_tail, args.key_tail_stride, num_old);
    write_new<V_HEAD_DIM>(args, rows, 1, args.value_tail, args.value_tail_stride, num_old);
  }

  OnlineSoftmax softmax;
  softmax.value_factor = 1.0f;
#pragma unroll
  for (int i = 0; i < ROW_TILES; i++) {
#pragma unroll
    for (int j = 0; j < 2; j++) {
      softmax.row_max[i][j] = kLowest;
      softmax.row_sum[i][j] = softmax.value_offset[i][j] = 0.0f;
      int row = 8 * i + 2 * t + j;
      if (args.sinks && split == 0 && warp == 0 && row < rows.num_rows) {
        // A sink is one more key without a value; of the lanes that share a row the first counts it.
        float sink = args.sinks[rows.kv_head * args.group + head_of(rows, rows.first_row + row)] * kLog2e;
        softmax.row_max[i][j] = fmaxf(sink, kLowest);
        softmax.row_sum[i][j] = g == 0 ? exp2_approx(sink - softmax.row_max[i][j]) : 0.0f;
      }
    }
#pragma unroll
    for (int c = 0; c < kValueChunks; c++)
#pragma unroll
      for (int j = 0; j < 4; j++) softmax.output[i][c][j] = 0.0f;
  }
  wait_for_copies<STAGES - 1>();  // of the query
  __syncthreads();
  if (split == args.num_splits - 1) attend_tail(args, rows, softmax, query, tail_place);

  int stage = 0;
  PageQuery scaled;
  for (;;) {
    PageWalk attending;
    attending.start(seen, page, now);
#pragma unroll 1
    while (attending.left) {
      wait_for_copies<STAGES - 2>();
      __syncwarp();
      if (loading.left) {
        int next = stage + STAGES - 1;
        loader.load(stages + (next < STAGES ? next : next - STAGES) * kStageBytes, loading.page, loading.step, heads,
                    head);
        loading.advance();
      }
      commit_copies();
      const u32 here = stages + stage * kStageBytes;
      if (attending.step == 0) scale_query(args, scaled, query, here + KEY_STEP * (HEAD_DIM + V_HEAD_DIM));
      const int first_key = attending.page * kPageSize;
      bool hides = (args.is_causal && first_key + kPageSize - 1 > position) ||
                   (args.window && first_key + args.window <= rows.kv_len - 1);
      if (HAS_MASK) hides |= partly >> ((attending.page - page) / WARPS) & 1;
      attend_step(args, rows, softmax, scaled, here, first_key + attending.step * KEY_STEP, hides);
      attending.advance();
      stage = stage + 1 < STAGES ? stage + 1 : 0;
    }
    if (!HAS_MASK) break;
    num_here -= now;
    if (num_here <= 0) break;
    page += now * WARPS;
    now = min(num_here, kWindowPages);
    scan_masks(args, rows, page, now, seen, partly);
    loading.start(seen, page, now);
    // No copy is under way; the stages are free once every lane has read the last one.
    __syncwarp();
    for (int s = 0; s < STAGES - 1; s++) {
      int next = stage + s;
      if (loading.left) {
        loader.load(stages + (next < STAGES ? next : next - STAGES) * kStageBytes, loading.page, loading.step, heads,
                    head);
        loading.advance();
      }
      commit_copies();
    }
  }
  wait_for_copies<0>();
  __syncthreads();

  // Each warp's output and sums meet in shared memory, where the query and the stages were.
  float* outputs = reinterpret_cast<float*>(memory);   // (WARPS, kRows, V_HEAD_DIM)
  float* sums = outputs + WARPS * kRows * V_HEAD_DIM;  // (WARPS, kRows, 2)
#pragma unroll
  for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      float sum = softmax.row_sum[i][j], offset = softmax.value_offset[i][j];
#pragma unroll
      for (int step = 4; step < 32; step *= 2) {
        sum += __shfl_xor_sync(~0u, sum, step);
        offset += __shfl_xor_sync(~0u, offset, step);
      }
      const int row = warp * kRows + 8 * i + 2 * t + j;
      if (g == 0) {
        sums[2 * row] = softmax.row_max[i][j];
        sums[2 * row + 1] = sum;
      }
      const float shrink = 1.0f / softmax.value_factor;
#pragma unroll
      for (int c = 0; c < kValueChunks; c++) {
        float2 pair = {softmax.output[i][c][j] * shrink - offset, softmax.output[i][c][j + 2] * shrink - offset};
        *reinterpret_cast<float2*>(outputs + row * V_HEAD_DIM + 16 * c + 2 * g) = pair;
      }
    }
  __syncthreads();

  const i64 tile = (static_cast<i64>(head) * row_tiles + row_tile) * args.num_splits;
  auto write = [&](int row, int d, float4 x, float sum) {
    const float share = sum == 0.0f ? 0.0f : 1.0f / sum;
    const int index = rows.first_row + row;
    const i64 token = static_cast<i64>(rows.batch) * rows.query_len + query_of(rows, index);
    const i64 place = ((token * args.num_kv_heads + rows.kv_head) * args.group + head_of(rows, index)) * V_HEAD_DIM + d;
    if (DTYPE == kFloat32) {
      *reinterpret_cast<float4*>(static_cast<float*>(args.output) + place) =
          make_float4(x.x * share, x.y * share, x.z * share, x.w * share);
    } else {
      uint2 words;
      words.x = DTYPE == kBFloat16 ? pack_bfloat2(x.x * share, x.y * share) : pack_half2(x.x * share, x.y * share);
      words.y = DTYPE == kBFloat16 ? pack_bfloat2(x.z * share, x.w * share) : pack_half2(x.z * share, x.w * share);
      *reinterpret_cast<uint2*>(static_cast<u16*>(args.output) + place) = words;
    }
  };
  for (int i = threadIdx.x; i < rows.num_rows * (V_HEAD_DIM / 4); i += kThreads) {
    const int row = i / (V_HEAD_DIM / 4), d = i % (V_HEAD_DIM / 4) * 4;
    float row_max = kLowest, row_sum = 0.0f;
    float4 x = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int w = 0; w < WARPS; w++) row_max = fmaxf(row_max, sums[2 * (w * kRows + row)]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float weight = exp2_approx(sums[2 * (w * kRows + row)] - row_max);
      const float4 y = *reinterpret_cast<const float4*>(outputs + (w * kRows + row) * V_HEAD_DIM + d);
      row_sum = fmaf(weight, sums[2 * (w * kRows + row) + 1], row_sum);
      x.x = fmaf(weight, y.x, x.x), x.y = fmaf(weight, y.y, x.y);
      x.z = fmaf(weight, y.z, x.z), x.w = fmaf(weight, y.w, x.w);
    }
    if (args.num_splits == 1) {
      write(row, d, x, row_sum);
      continue;
    }
    const i64 place = (tile + split) * kRows + row;
    *reinterpret_cast<float4*>(args.partial + place * V_HEAD_DIM + d) = x;
    if (d == 0) *reinterpret_cast<float2*>(args.partial_sums + 2 * place) = make_float2(row_max, row_sum);
  }
  if (args.num_splits == 1) return;

  // The last CTA of a head's splits to arrive merges them.
  __syncthreads();
  if (threadIdx.x == 0) is_last = arrives_last(args.counters + head * row_tiles + row_tile, args.num_splits);
  __syncthreads();
  if (!is_last) return;

  float* weights = reinterpret_cast<float*>(memory);  // (num_splits, num_rows)
  float* totals = weights + args.num_splits * kRows;  // (num_rows,)
  for (int row = warp; row < rows.num_rows; row += WARPS) {
    constexpr int rounds = 4;  // of 32 splits, all loaded before one is used
    float2 pair[rounds];
    float row_max = kLowest, row_sum = 0.0f;
#pragma unroll
    for (int k = 0; k < rounds; k++) {
      const int s = min(lane + 32 * k, args.num_splits - 1);
      pair[k] = __ldcg(reinterpret_cast<const float2*>(args.partial_sums + 2 * ((tile + s) * kRows + row)));
    }
#pragma unroll
    for (int k = 0; k < rounds; k++) row_max = fmaxf(row_max, pair[k].x);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) row_max = fmaxf(row_max, __shfl_xor_sync(~0u, row_max, step));
#pragma unroll
    for (int k = 0; k < rounds; k++)
      if (lane + 32 * k < args.num_splits) {
        const float weight = exp2_approx(pair[k].x - row_max);
        weights[(lane + 32 * k) * kRows + row] = weight;
        row_sum = fmaf(weight, pair[k].y, row_sum);
      }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) row_sum += __shfl_xor_sync(~0u, row_sum, step);
    if (lane == 0) totals[row] = row_sum;
  }
  __syncthreads();
  // Few rows leave threads without an element: groups of threads then take every num_groups-th split.
  const int elements = rows.num_rows * (V_HEAD_DIM / 4);
  const int num_groups = max(min(kThreads / elements, 8), 1), width = num_groups > 1 ? elements : kThreads;
  constexpr int kAtOnce = 16;  // splits whose outputs are loaded before one is used
  float4* sums_of_groups = reinterpret_cast<float4*>(totals + kRows);  // (num_groups, elements), if more than one
  const int group = min(static_cast<int>(threadIdx.x) / width, num_groups);
  for (int i = threadIdx.x - group * width; i < elements && group < num_groups; i += width) {
    const int row = i / (V_HEAD_DIM / 4), d = i % (V_HEAD_DIM / 4) * 4;
    float4 x = make_float4(0, 0, 0, 0);
    const float* source = args.partial + (tile * kRows + row) * V_HEAD_DIM + d;
#pragma unroll 1
    for (int s = group; s < args.num_splits; s += kAtOnce * num_groups) {
      float4 y[kAtOnce];
#pragma unroll
      for (int n = 0; n < kAtOnce; n++)
        y[n] = __ldcg(reinterpret_cast<const float4*>(source + min(s + n * num_groups, args.num_splits - 1) *
                                                                   (kRows * V_HEAD_DIM)));
#pragma unroll
      for (int n = 0; n < kAtOnce; n++) {
        const int index = s + n * num_groups;
        const float weight = index < args.num_splits ? weights[index * kRows + row] : 0.0f;
        x.x = fmaf(weight, y[n].x, x.x), x.y = fmaf(weight, y[n].y, x.y);
        x.z = fmaf(weight, y[n].z, x.z), x.w = fmaf(weight, y[n].w, x.w);
      }
    }
    if (num_groups == 1)
      write(row, d, x, totals[row]);
    else
      sums_of_groups[group * elements + i] = x;
  }
  if (num_groups == 1) return;
  __syncthreads();
  if (threadIdx.x < elements) {
    float4 x = make_float4(0, 0, 0, 0);
    for (int n = 0; n < num_groups; n++) {
      const float4 y = sums_of_groups[n * elements + threadIdx.x];
      x.x += y.x, x.y += y.y, x.z += y.z, x.w += y.w;
    }
    const int row = threadIdx.x / (V_HEAD_DIM / 4);
    write(row, threadIdx.x % (V_HEAD_DIM / 4) * 4, x, totals[row]);
  }
}
