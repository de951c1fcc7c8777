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
// Macros: DK, DV (head_dims), DTYPE (of query and tail), NT (tiles of 8 query rows), WARPS, KSTEP (keys a step), STAGES,
// MASK (0 or 1), SOFTCAP (0 or 1).

#include "common.cuh"

constexpr int kThreads = 32 * WARPS;
constexpr int kRows = 8 * NT;
constexpr int kKeyChunks = DK / 16, kValueChunks = DV / 16;
constexpr int kStepsPerPage = kPageSize / KSTEP;
constexpr int kTiles = KSTEP / 16;
constexpr int kStageBytes = KSTEP * (DK + DV) + 4 * DK + 4 * KSTEP;
constexpr int kQuerySize = DTYPE == kFloat32 ? 4 : 2;
// Rows are an odd number of 16 elements apart: the eight rows that a warp reads at once then lie in different banks.
constexpr int kQueryPitch = (DK + (kKeyChunks % 2 == 0 ? 16 : 0)) * kQuerySize;
constexpr int kQueryBytes = kRows * kQueryPitch;
constexpr int kWindowPages = 32;   // pages whose masks are looked at together
constexpr float kLowest = -1e30f;  // below every logit, and still a number
// Additive masks count as no lower than this, so that a row of nothing but the lowest is uniform.
[[maybe_unused]] constexpr float kLowestMask = -6e29f;

constexpr u32 kMagic = 0x64646464u;  // the high byte of 1024..1279 as 16-bit floats
constexpr u32 kBias = 0x64806480u;   // 1152 = 1024 + 128, a pair
constexpr u32 kMinusBias = 0xE480E480u;

struct Args {
  const void* query;        // (batch, num_kv_heads * group, query_len, DK)
  void* output;             // (batch, query_len, num_kv_heads * group, DV), contiguous
  const Segment* segments;  // num_segments + 1, not read if there is one
  void* key_tail;           // (batch, num_kv_heads, tail_len or more, DK); written where there are new tokens
  void* value_tail;
  const void* mask;     // (batch, heads, query_len, kv_len), strides of 0 where it is broadcast
  const float* sinks;   // (num_kv_heads * group,) or null
  const int* lengths;   // pages and tail_len in device memory, or null for the two below
  float* partial;       // (batch, num_kv_heads, row tiles, splits, kRows, DV)
  float* partial_sums;  // (..., kRows, 2): largest logit and sum of weights
  u32* counters;        // (batch, num_kv_heads, row tiles), zero before and after
  i64 query_stride[3], key_tail_stride[3], value_tail_stride[3], mask_stride[4];
  int num_kv_heads, group, query_len, num_pages, tail_len, num_segments;
  int page_splits, num_splits, is_causal, window, mask_dtype, batch;
  float softmax_scale, softcap;
  Segment only;               // the one segment, if there is one: a table in memory costs its latency
  const void* new_states[2];  // keys and values of the last num_new tokens of the tail, which are not there yet
  i64 new_stride[2][3];
  int num_new;
};

// Where 16-byte chunk `chunk` of row `row` lies in a tile of rows of `chunks`: eight rows at one chunk in eight banks.
template <int chunks>
DEVICE u32 tile_offset(int row, int chunk) {
  constexpr int shift = chunks % 8 == 0 ? 0 : chunks % 4 == 0 ? 1 : 2;
  constexpr int bits = chunks % 8 == 0 ? 7 : chunks % 4 == 0 ? 3 : chunks % 2 == 0 ? 1 : 0;
  return row * (16 * chunks) + ((chunk ^ ((row >> shift) & bits)) << 4);
}

template <int chunks>
DEVICE void load_tile(u32 (&r)[4], u32 tile, int row, int half, int chunk, bool transposed) {
  if (chunk + 1 < chunks) {
    u32 address = tile + tile_offset<chunks>(row, chunk + half);
    transposed ? load_matrices_transposed(r, address) : load_matrices(r, address);
  } else {
    u32 address = tile + tile_offset<chunks>(row, chunk);
    transposed ? load_two_matrices_transposed(r, address) : load_two_matrices(r, address);
  }
}

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

struct Block {
  int batch, kv_head, first_row, num_rows, query_len, kv_len;
};

// Head and query of a row, rows of a head side by side.
DEVICE int query_of(const Block& block, int row) { return block.query_len == 1 ? 0 : row % block.query_len; }
DEVICE int head_of(const Block& block, int row) { return block.query_len == 1 ? row : row / block.query_len; }

// Where the mask of a query row begins, in elements.
DEVICE i64 mask_start(const Args& args, const Block& block, int row) {
  return block.batch * args.mask_stride[0] + (block.kv_head * args.group + head_of(block, row)) * args.mask_stride[1] +
         query_of(block, row) * args.mask_stride[2];
}

// Sets the scores (log2 units) of hidden keys to -inf and adds additive masks. Every element is loaded before one is
// used, and a place that does not exist reads one that does.
template <int tiles>
DEVICE void hide(const Args& args, const Block& block, float (&scores)[tiles][NT][4], int first_key) {
  const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
#pragma unroll
  for (int i = 0; i < NT; i++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int row = 8 * i + 2 * t + j, last = block.num_rows - 1;
      const int index = block.first_row + min(row, last);
      const int position = block.kv_len - block.query_len + query_of(block, index);
      const int highest = row > last ? -1 : args.is_causal ? position : block.kv_len - 1;
      const int lowest = args.window ? position - args.window + 1 : 0;
#if MASK
      const i64 start = mask_start(args, block, index);
      float added[tiles][2];
      if (args.mask_dtype == kBool) {
        u8 seen[tiles][2];
#pragma unroll
        for (int a = 0; a < tiles; a++)
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const int key = min(first_key + 16 * a + g + 8 * h, block.kv_len - 1);
            seen[a][h] = static_cast<const u8*>(args.mask)[start + key * args.mask_stride[3]];
          }
#pragma unroll
        for (int a = 0; a < tiles; a++)
#pragma unroll
          for (int h = 0; h < 2; h++) added[a][h] = seen[a][h] ? 0.0f : -infinity();
      } else {
#pragma unroll
        for (int a = 0; a < tiles; a++)
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const int key = min(first_key + 16 * a + g + 8 * h, block.kv_len - 1);
            const float x = load_element(args.mask, args.mask_dtype, start + key * args.mask_stride[3]);
            added[a][h] = x == -infinity() ? x : fmaxf(x, kLowestMask) * kLog2e;
          }
      }
#endif
#pragma unroll
      for (int a = 0; a < tiles; a++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int key = first_key + 16 * a + g + 8 * h;
          float& score = scores[a][i][2 * h + j];
#if MASK
          // Not the sum with -inf, which a NaN would survive.
          score = added[a][h] == -infinity() ? -infinity() : score + added[a][h];
#endif
          if (key < lowest || key > highest) score = -infinity();
        }
    }
}

// A logit times softmax_scale, in units of log2.
DEVICE float capped(const Args& args, float logit) {
#if SOFTCAP
  return args.softcap * kLog2e * tanh_exact(logit / args.softcap);
#else
  return logit;
#endif
}
DEVICE float score_scale(const Args& args) { return SOFTCAP ? args.softmax_scale : args.softmax_scale * kLog2e; }

// Four consecutive elements as they are stored.
#if DTYPE == 0
using Four = uint4;
#else
using Four = uint2;
#endif

// Four consecutive elements of a row of the query in shared memory, as they are stored.
struct Quad {
  u32 word[kQuerySize];  // pairs of 16-bit floats, or floats
};
DEVICE Quad load_query(u32 address) {
  Quad quad;
#if DTYPE == 0
  uint4 x = load_shared_16(address);
  quad.word[0] = x.x, quad.word[1] = x.y, quad.word[2] = x.z, quad.word[3] = x.w;
#else
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(quad.word[0]), "=r"(quad.word[1]) : "r"(address));
#endif
  return quad;
}
DEVICE void to_floats(const Quad& quad, float (&x)[4]) {
#if DTYPE == 0
  for (int j = 0; j < 4; j++) x[j] = __uint_as_float(quad.word[j]);
#else
  for (int j = 0; j < 2; j++) {
    x[2 * j] = DTYPE == kBFloat16 ? bfloat_low(quad.word[j]) : half_low(quad.word[j]);
    x[2 * j + 1] = DTYPE == kBFloat16 ? bfloat_high(quad.word[j]) : half_high(quad.word[j]);
  }
#endif
}

// A pair of floats as one or two pairs of 16-bit floats whose sum is it: all of float32's range, twice bfloat16's bits.
constexpr int kTerms = DTYPE == kFloat32 ? 2 : 1;
DEVICE void split_pair(float low, float high, u32& first, u32& second) {
  first = pack_bfloat2(low, high);
  second = pack_bfloat2(low - bfloat_low(first), high - bfloat_high(first));
}
DEVICE void mma_exact(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  if (DTYPE == kFloat16)
    mma_half(d, a, b0, b1);
  else
    mma_bfloat(d, a, b0, b1);
}

// Copies the query's rows to shared memory; those that are only padding become zero. The copies come before those of
// pages, behind which they would wait.
DEVICE void copy_query(const Args& args, const Block& block, u32 target) {
  constexpr int pieces = DK / 4;  // of four elements
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * pieces; i += kThreads) {
    const int row = i / pieces, index = block.first_row + min(row, block.num_rows - 1);
    const i64 start = block.batch * args.query_stride[0] +
                      (block.kv_head * args.group + head_of(block, index)) * args.query_stride[1] +
                      query_of(block, index) * args.query_stride[2];
    const Four* source = static_cast<const Four*>(args.query) + start / 4 + i % pieces;
    copy_async_or_zero<sizeof(Four)>(target + row * kQueryPitch + i % pieces * sizeof(Four), source,
                                     row < block.num_rows);
  }
}

// Brings the rows of the tail that a warp reads first nearer, 128 bytes a lane.
template <int D>
DEVICE void prefetch_tail(const void* tail, i64 start, i64 step, int tail_len, int first_key) {
  constexpr int lines = (D * kQuerySize + 127) / 128;
  for (int i = threadIdx.x & 31; i < 16 * lines; i += 32) {
    const int key = first_key + i / lines;
    if (key < tail_len) {
      const char* line = static_cast<const char*>(tail) + (start + key * step) * kQuerySize + i % lines * 128;
      asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
    }
  }
}

// 16 keys of the tail and their values, as a lane uses them. Where registers allow, all are loaded before one is used:
// their latency is long behind the first pages' copies, and this way there is one.
constexpr bool kLoadsTailAtOnce = DTYPE != kFloat32 && !MASK && KSTEP > 16 && NT == 1 && DK <= 128 && DV <= 128;
struct TailTile {
  u32 keys[kKeyChunks][2][2], values[kValueChunks][4];
};

// The exact tail, 16 keys at a time, straight from memory: it is short, and its loads overlap the first pages' copies.
// `place` is the warp's among those that share it.
DEVICE void attend_tail(const Args& args, const Block& block, Rows& rows, u32 query, int place) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int first_key = block.kv_len - (args.lengths ? args.lengths[1] : args.tail_len);
  const int tail_len = block.kv_len - first_key;
  constexpr int words = kQuerySize;  // 32-bit words of four elements
  const u32* key_tail = static_cast<const u32*>(args.key_tail) +
                        (block.batch * args.key_tail_stride[0] + block.kv_head * args.key_tail_stride[1]) * words / 4 +
                        t * words;
  const u32* value_tail =
      static_cast<const u32*>(args.value_tail) +
      (block.batch * args.value_tail_stride[0] + block.kv_head * args.value_tail_stride[1]) * words / 4 + g * words / 2;
  const i64 key_step = args.key_tail_stride[2] * words / 4, value_step = args.value_tail_stride[2] * words / 4;
#pragma unroll 1
  for (int start = 16 * place; start < tail_len; start += 16 * WARPS) {
    // Keys behind the last one are hidden, so what is read for them is the last one. Elements 16 c + 4 t.. of the keys
    // g and g + 8, and 16 c + 2 g.. of the values 2 t, 2 t + 1, 2 t + 8 and 2 t + 9.
    const u32* keys_at[2];
    const u32* values_at[4];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      keys_at[h] = key_tail + min(start + g + 8 * h, tail_len - 1) * key_step;
      values_at[2 * h] = value_tail + min(start + 2 * t + 8 * h, tail_len - 1) * value_step;
      values_at[2 * h + 1] = value_tail + min(start + 2 * t + 8 * h + 1, tail_len - 1) * value_step;
    }
    TailTile loaded;
    if constexpr (kLoadsTailAtOnce) {
#pragma unroll
      for (int c = 0; c < kKeyChunks; c++)
#pragma unroll
        for (int h = 0; h < 2; h++) load_now(loaded.keys[c][h], keys_at[h] + 4 * c * words);
#pragma unroll
      for (int c = 0; c < kValueChunks; c++)
#pragma unroll
        for (int n = 0; n < 4; n++) load_now(loaded.values[c][n], values_at[n] + 4 * c * words);
    }
    float scores[1][NT][4];
#pragma unroll
    for (int i = 0; i < NT; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) scores[0][i][j] = 0.0f;
#pragma unroll
    for (int c = 0; c < kKeyChunks; c++) {
      u32 word[2][words];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const u32* source = kLoadsTailAtOnce ? loaded.keys[c][h] : keys_at[h] + 4 * c * words;
#pragma unroll
        for (int j = 0; j < words; j++) word[h][j] = source[j];
      }
#pragma unroll
      for (int i = 0; i < NT; i++) {
        Quad quad = load_query(query + (8 * i + g) * kQueryPitch + (16 * c + 4 * t) * kQuerySize);
#if DTYPE == 0
        u32 k0[4], k1[4], q0[2], q1[2];
        for (int j = 0; j < 2; j++) {
          for (int h = 0; h < 2; h++)
            split_pair(__uint_as_float(word[h][2 * j]), __uint_as_float(word[h][2 * j + 1]), k0[2 * j + h],
                       k1[2 * j + h]);
          split_pair(__uint_as_float(quad.word[2 * j]), __uint_as_float(quad.word[2 * j + 1]), q0[j], q1[j]);
        }
        mma_bfloat(scores[0][i], k0, q0[0], q0[1]);
        mma_bfloat(scores[0][i], k1, q0[0], q0[1]);
        mma_bfloat(scores[0][i], k0, q1[0], q1[1]);
#else
        u32 keys[4] = {word[0][0], word[1][0], word[0][1], word[1][1]};
        mma_exact(scores[0][i], keys, quad.word[0], quad.word[1]);
#endif
      }
    }
#pragma unroll
    for (int i = 0; i < NT; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) scores[0][i][j] = capped(args, scores[0][i][j] * score_scale(args));
    hide<1>(args, block, scores, first_key + start);
    softmax_step<1>(rows, scores);
    // bfloat16 has too few bits for a weight; two of them have enough.
    constexpr int weight_terms = DTYPE == kFloat16 ? 1 : 2;
    u32 weights[NT][weight_terms][2];
#pragma unroll
    for (int i = 0; i < NT; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float low = scores[0][i][2 * half], high = scores[0][i][2 * half + 1];
        u32 first, second = 0;
        if (DTYPE == kFloat16)
          first = pack_half2(low, high);
        else
          split_pair(low, high, first, second);
        weights[i][0][half] = transpose8x8(first);
        if (weight_terms == 2) weights[i][weight_terms - 1][half] = transpose8x8(second);
      }
#pragma unroll
    for (int c = 0; c < kValueChunks; c++) {
      u32 values[kTerms][4];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const u32* x = kLoadsTailAtOnce ? &loaded.values[c][2 * half] : values_at[2 * half] + 4 * c * words;
        const u32* y = kLoadsTailAtOnce ? &loaded.values[c][2 * half + 1] : values_at[2 * half + 1] + 4 * c * words;
#if DTYPE == 0
        split_pair(__uint_as_float(x[0]), __uint_as_float(y[0]), values[0][2 * half], values[kTerms - 1][2 * half]);
        split_pair(__uint_as_float(x[1]), __uint_as_float(y[1]), values[0][2 * half + 1],
                   values[kTerms - 1][2 * half + 1]);
#else
        values[0][2 * half] = prmt(x[0], y[0], 0x5410);
        values[0][2 * half + 1] = prmt(x[0], y[0], 0x7632);
#endif
      }
#pragma unroll
      for (int i = 0; i < NT; i++)
#pragma unroll
        for (int w = 0; w < weight_terms; w++)
#pragma unroll
          for (int v = 0; v < kTerms; v++)
            if (w + v < 2) mma_exact(rows.output[i][c], values[v], weights[i][w][0], weights[i][w][1]);
    }
  }
}

// Writes the new tokens behind the others of the tail.
template <int D>
DEVICE void write_new(const Args& args, const Block& block, int which, void* tail, const i64* tail_stride,
                      int num_old) {
  constexpr int pieces = D / 4;  // of four elements
  const i64* stride = args.new_stride[which];
  const i64 from = block.batch * stride[0] + block.kv_head * stride[1];
  const i64 to = block.batch * tail_stride[0] + block.kv_head * tail_stride[1] + num_old * tail_stride[2];
#pragma unroll 1
  for (int i = threadIdx.x; i < args.num_new * pieces; i += kThreads) {
    const int token = i / pieces, channel = i % pieces * 4;
    static_cast<Four*>(tail)[(to + token * tail_stride[2] + channel) / 4] =
        static_cast<const Four*>(args.new_states[which])[(from + token * stride[2] + channel) / 4];
  }
}

// The query as the MMA wants it for one page: times the page's channel scales, as 16-bit floats.
struct PageQuery {
  u32 pair[NT][kKeyChunks][2];
  float bias[NT][2];    // -1152 times the sum of the query so scaled, for the rows 2 t and 2 t + 1
  float factor[NT][2];  // what a logit so found is multiplied by
  float offset[NT][2];  // and what is then subtracted
};

DEVICE void scale_query(const Args& args, PageQuery& scaled, u32 query, u32 metadata) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int i = 0; i < NT; i++) {
    float product[kKeyChunks][4];
    float largest = 0.0f, offset = 0.0f;
    u32 row = query + (8 * i + g) * kQueryPitch + 4 * t * kQuerySize;
#pragma unroll
    for (int c = 0; c < kKeyChunks; c++) {
      uint4 m = load_shared_16(metadata + (16 * c + 4 * t) * 4);
      u32 words[4] = {m.x, m.y, m.z, m.w};
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

// KSTEP keys of a page that lie in shared memory.
DEVICE void attend_step(const Args& args, const Block& block, Rows& rows, const PageQuery& scaled, u32 stage,
                        int first_key, bool hides) {
  const int lane = threadIdx.x & 31, g = lane >> 2;
  const u32 values = stage + KSTEP * DK, value_metadata = values + KSTEP * DV + 4 * DK;
  const int tile_row = lane & 15, half = lane >> 4;
  float scores[kTiles][NT][4];
#pragma unroll
  for (int a = 0; a < kTiles; a++) {
#pragma unroll
    for (int i = 0; i < NT; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) scores[a][i][j] = scaled.bias[i][j & 1];
#pragma unroll
    for (int c = 0; c < kKeyChunks; c += 2) {
      u32 r[4];
      load_tile<kKeyChunks>(r, stage, 16 * a + tile_row, half, c, false);
#pragma unroll
      for (int n = 0; n < 2; n++) {
        if (c + n >= kKeyChunks) continue;
        u32 low = r[2 * n] ^ 0x80808080u, high = r[2 * n + 1] ^ 0x80808080u;
        u32 keys[4] = {prmt(low, kMagic, 0x4140), prmt(high, kMagic, 0x4140), prmt(low, kMagic, 0x4342),
                       prmt(high, kMagic, 0x4342)};
#pragma unroll
        for (int i = 0; i < NT; i++) mma_half(scores[a][i], keys, scaled.pair[i][c + n][0], scaled.pair[i][c + n][1]);
      }
    }
#pragma unroll
    for (int i = 0; i < NT; i++)
#pragma unroll
      for (int j = 0; j < 4; j++)
        scores[a][i][j] = capped(args, fmaf(scores[a][i][j], scaled.factor[i][j & 1], -scaled.offset[i][j & 1]));
  }
  if (hides) hide<kTiles>(args, block, scores, first_key);
  softmax_step<kTiles>(rows, scores);

  u32 word[kTiles][2];
  u32 widest = 0;
#pragma unroll
  for (int a = 0; a < kTiles; a++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      word[a][h] = load_shared_4(value_metadata + (16 * a + 8 * h + g) * 4);
      u32 bits = word[a][h] << 16;
      widest = max(widest, bits < 0x7F800000u ? bits : 0u);
    }
  widest = __reduce_max_sync(~0u, widest);
  if (!(__uint_as_float(widest) * rows.value_factor <= 16384.0f) || rows.value_factor == 1.0f) {
    // The largest scale becomes 8192..16384; the first page also lifts the factor of 1 that the tail has used.
    u32 exponent = min(max(widest >> 23, 100u), 250u);
    float factor = __uint_as_float((267u - exponent) << 23);
    float change = factor / rows.value_factor;
    rows.value_factor = factor;
#pragma unroll
    for (int i = 0; i < NT; i++)
#pragma unroll
      for (int c = 0; c < kValueChunks; c++)
#pragma unroll
        for (int j = 0; j < 4; j++) rows.output[i][c][j] *= change;
  }
  u32 weights[kTiles][NT][2];
#pragma unroll
  for (int a = 0; a < kTiles; a++) {
    float scale[2], product[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float x = scale_of(word[a][h]);
      scale[h] = x * rows.value_factor;
      product[h] = x * zero_point_of(word[a][h]);
    }
#pragma unroll
    for (int i = 0; i < NT; i++) {
#pragma unroll
      for (int j = 0; j < 2; j++)
        rows.offset[i][j] = fmaf(scores[a][i][j], product[0], fmaf(scores[a][i][j + 2], product[1], rows.offset[i][j]));
      weights[a][i][0] = transpose8x8(pack_half2(scores[a][i][0] * scale[0], scores[a][i][1] * scale[0]));
      weights[a][i][1] = transpose8x8(pack_half2(scores[a][i][2] * scale[1], scores[a][i][3] * scale[1]));
    }
  }
#pragma unroll
  for (int c = 0; c < kValueChunks; c += 2)
#pragma unroll
    for (int a = 0; a < kTiles; a++) {
      u32 r[4];
      load_tile<kValueChunks>(r, values, 16 * a + tile_row, half, c, true);
#pragma unroll
      for (int n = 0; n < 2; n++) {
        if (c + n >= kValueChunks) continue;
        u32 low = r[2 * n] ^ 0x80808080u, high = r[2 * n + 1] ^ 0x80808080u;
        u32 tile[4] = {sub_half2(prmt(low, kMagic, 0x4240), kBias), sub_half2(prmt(low, kMagic, 0x4341), kBias),
                       sub_half2(prmt(high, kMagic, 0x4240), kBias), sub_half2(prmt(high, kMagic, 0x4341), kBias)};
#pragma unroll
        for (int i = 0; i < NT; i++) mma_half(rows.output[i][c + n], tile, weights[a][i][0], weights[a][i][1]);
      }
    }
}

// Walks pages and copies them, KSTEP keys at a time, by one warp.
struct PageCopier {
  const Segment* segments;
  Segment segment;
  i64 end;  // first page behind the segment
  int index;

  DEVICE void open(const Args& args, int page) {
    segments = args.segments;
    if (args.num_segments == 1) {
      segment = args.only;
      end = 0x7FFFFFFF;
      return;
    }
    const int lane = threadIdx.x & 31;
    int count = 0;  // segments that start at or before the page
#pragma unroll 1
    for (int first = 0; first < args.num_segments; first += 32)
      count += __popc(__ballot_sync(~0u, first + lane < args.num_segments && segments[first + lane].first <= page));
    use(max(count - 1, 0));
  }
  DEVICE void use(int i) {
    index = i;
    segment = segments[i];
    end = segments[i + 1].first;
  }
  DEVICE void copy(u32 stage, int page, int step, int heads, int head) {
    while (page >= end) use(index + 1);
    const i64 place = (page - segment.first) * heads + head;
    const int lane = threadIdx.x & 31;
    const i8* keys = segment.key_qdata + (place * kPageSize + step * KSTEP) * DK;
    const i8* values = segment.value_qdata + (place * kPageSize + step * KSTEP) * DV;
#pragma unroll
    for (int first = 0; first < KSTEP * kKeyChunks; first += 32) {
      int i = first + lane;
      if (KSTEP * kKeyChunks % 32 == 0 || i < KSTEP * kKeyChunks)
        copy_async(stage + tile_offset<kKeyChunks>(i / kKeyChunks, i % kKeyChunks), keys + 16 * i);
    }
    stage += KSTEP * DK;
#pragma unroll
    for (int first = 0; first < KSTEP * kValueChunks; first += 32) {
      int i = first + lane;
      if (KSTEP * kValueChunks % 32 == 0 || i < KSTEP * kValueChunks)
        copy_async(stage + tile_offset<kValueChunks>(i / kValueChunks, i % kValueChunks), values + 16 * i);
    }
    stage += KSTEP * DV;
    if (step == 0)
      for (int i = lane; i < DK / 4; i += 32) copy_async(stage + 16 * i, segment.key_metadata + place * DK + 4 * i);
    stage += 4 * DK;
    if (lane < KSTEP / 4)
      copy_async(stage + 16 * lane, segment.value_metadata + place * kPageSize + step * KSTEP + 4 * lane);
  }
};

// Which of `count` pages, WARPS apart, any row sees, and of which some row does not see all.
DEVICE void look_at_masks(const Args& args, const Block& block, int page, int count, u32& seen, u32& partly) {
  seen = partly = 0;
#if MASK
  const int lane = threadIdx.x & 31;
  const bool by_head = args.mask_stride[1] != 0, by_query = args.mask_stride[2] != 0;
  // Rows whose masks are those of the row before are left out.
  auto differs = [&](int row) { return row == block.first_row || by_query || (by_head && query_of(block, row) == 0); };
  const int last_row = block.first_row + block.num_rows;

  const i64 strides = args.mask_stride[0] | args.mask_stride[1] | args.mask_stride[2];
  if (args.mask_dtype == kBool && args.mask_stride[3] == 1 && ((reinterpret_cast<i64>(args.mask) | strides) & 7) == 0) {
    // Eight keys a lane and eight lanes a page: two loads bring eight pages.
    constexpr u64 ones = 0x0101010101010101u;
    const int slot = lane >> 3;
    if (lane < count) {  // what the loop will wait for, eight pages at a time
      const u8* keys = static_cast<const u8*>(args.mask) + mask_start(args, block, block.first_row);
      asm volatile("prefetch.global.L2 [%0];" ::"l"(keys + (page + lane * WARPS) * kPageSize));
    }
    for (int first = 0; first < count; first += 8) {
      u64 any[2] = {0, 0}, all[2] = {ones, ones};
      for (int row = block.first_row; row < last_row; row++) {
        if (!differs(row)) continue;
        const u8* keys = static_cast<const u8*>(args.mask) + mask_start(args, block, row) + 8 * (lane & 7);
#pragma unroll
        for (int k = 0; k < 2; k++) {
          const int i = min(first + 4 * k + slot, count - 1);
          const u64 x = *reinterpret_cast<const u64*>(keys + (page + i * WARPS) * kPageSize);
          any[k] |= x, all[k] &= x;
        }
      }
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const u32 has = __ballot_sync(~0u, any[k] != 0), lacks = __ballot_sync(~0u, all[k] != ones);
#pragma unroll
        for (int s = 0; s < 4; s++) {
          const int i = first + 4 * k + s;
          if (i < count && has >> 8 * s & 0xFF) seen |= 1u << i;
          if (i < count && lacks >> 8 * s & 0xFF) partly |= 1u << i;
        }
      }
    }
    return;
  }
  constexpr int at_once = 2;  // more would take registers from the loop over the pages
  for (int first = 0; first < count; first += at_once) {
    bool any[at_once], all[at_once];
    for (int i = 0; i < at_once; i++) any[i] = false, all[i] = true;
    for (int row = block.first_row; row < last_row; row++) {
      if (!differs(row)) continue;
      const i64 start = mask_start(args, block, row);
#pragma unroll
      for (int i = 0; i < at_once; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int key = (page + min(first + i, count - 1) * WARPS) * kPageSize + lane + 32 * h;
          const i64 index = start + key * args.mask_stride[3];
          if (args.mask_dtype == kBool) {
            const bool x = static_cast<const u8*>(args.mask)[index];
            any[i] |= x, all[i] &= x;
          } else {
            const float x = load_element(args.mask, args.mask_dtype, index);
            any[i] |= x != -infinity(), all[i] &= x == 0.0f;
          }
        }
    }
#pragma unroll
    for (int i = 0; i < at_once; i++) {
      const bool is_page = first + i < count;
      if (__any_sync(~0u, any[i]) && is_page) seen |= 1u << (first + i);
      if (!__all_sync(~0u, all[i]) && is_page) partly |= 1u << (first + i);
    }
  }
#else
  seen = count == 32 ? ~0u : (1u << count) - 1;
#endif
}

// The pages `page`, `page` + WARPS, ... of which there are `count`, copied STAGES - 1 steps ahead.
struct Walk {
  u32 seen;
  int page, step, left;
  DEVICE void start(u32 pages, int first, int count) {
    seen = pages, page = first, step = 0, left = (MASK ? __popc(pages) : count) * kStepsPerPage;
    if (MASK && left) settle();
  }
  DEVICE void settle() {
    int skipped = __ffs(seen) - 1;
    page += skipped * WARPS;
    seen >>= skipped;
  }
  DEVICE void advance() {
    left--;
    if (++step < kStepsPerPage) return;
    step = 0;
    page += WARPS;
    if (MASK && left) {
      seen >>= 1;
      settle();
    }
  }
};

// Where 128 registers are enough, sixteen warps a processor. Reading masks takes more, and would cost CTAs without a
// bound; they get what as many CTAs leave them as shared memory has room for.
constexpr int kRoom = 233472 / (kQueryBytes + WARPS * STAGES * kStageBytes + 1024);  // of 9.0; elsewhere there is less
constexpr int kMostBlocks = MASK && kRoom < 16 / WARPS ? kRoom : 16 / WARPS;
constexpr int kMinBlocks = NT == 1 && DTYPE != kFloat32 && DK <= 128 && DV <= 128 && kMostBlocks > 0 ? kMostBlocks : 1;

extern "C" __global__ void __launch_bounds__(kThreads, kMinBlocks) attention(const __grid_constant__ Args args) {
  extern __shared__ __align__(128) u8 memory[];
  __shared__ u32 is_last;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int split = blockIdx.x, row_tiles = gridDim.y / args.num_kv_heads;
  const int row_tile = blockIdx.y % row_tiles;
  const int num_pages = args.lengths ? args.lengths[0] : args.num_pages;

  Block block;
  block.batch = blockIdx.z, block.kv_head = blockIdx.y / row_tiles, block.query_len = args.query_len;
  block.first_row = row_tile * kRows;
  block.num_rows = min(kRows, args.group * args.query_len - block.first_row);
  block.kv_len = num_pages * kPageSize + (args.lengths ? args.lengths[1] : args.tail_len);

  // The range of pages, without what lies before every query's window.
  const int position = block.kv_len - block.query_len;  // of the first query
  const int low = args.window ? max(position - args.window + 1, 0) / kPageSize : 0;
  const int pages_each = (max(num_pages - low, 0) + args.page_splits - 1) / args.page_splits;
  const int start = low + split * pages_each, first_page = start + warp;
  const int end = split < args.page_splits ? min(start + pages_each, num_pages) : 0;
  int num_here = max((end - first_page + WARPS - 1) / WARPS, 0);
  // The warps that have a page less take the tail's first keys.
  const int tail_place = (warp - max(end - start, 0)) & (WARPS - 1);

  const u32 query = shared_address(memory);
  copy_query(args, block, query);
  commit_copies();
  if (split == args.num_splits - 1) {
    const int tail_len = block.kv_len - num_pages * kPageSize;
    prefetch_tail<DK>(args.key_tail, block.batch * args.key_tail_stride[0] + block.kv_head * args.key_tail_stride[1],
                      args.key_tail_stride[2], tail_len, 16 * tail_place);
    prefetch_tail<DV>(args.value_tail,
                      block.batch * args.value_tail_stride[0] + block.kv_head * args.value_tail_stride[1],
                      args.value_tail_stride[2], tail_len, 16 * tail_place);
  }

  const u32 stages = query + kQueryBytes + warp * STAGES * kStageBytes;
  const int heads = args.batch * args.num_kv_heads, head = block.batch * args.num_kv_heads + block.kv_head;

  PageCopier copier;
  if (num_here) copier.open(args, first_page);
  u32 seen, partly;
  int now = MASK ? min(num_here, kWindowPages) : num_here;
  int page = first_page;
  look_at_masks(args, block, page, now, seen, partly);
  Walk copied;
  copied.start(seen, page, now);
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {
    if (copied.left) {
      copier.copy(stages + s * kStageBytes, copied.page, copied.step, heads, head);
      copied.advance();
    }
    commit_copies();
  }

  if (args.num_new && split == args.num_splits - 1) {
    // Row tiles of one head write the same bytes, each before it reads them.
    const int num_old = args.tail_len - args.num_new;
    write_new<DK>(args, block, 0, args.key_tail, args.key_tail_stride, num_old);
    write_new<DV>(args, block, 1, args.value_tail, args.value_tail_stride, num_old);
  }

  Rows rows;
  rows.value_factor = 1.0f;
#pragma unroll
  for (int i = 0; i < NT; i++) {
#pragma unroll
    for (int j = 0; j < 2; j++) {
      rows.highest[i][j] = kLowest;
      rows.sum[i][j] = rows.offset[i][j] = 0.0f;
      int row = 8 * i + 2 * t + j;
      if (args.sinks && split == 0 && warp == 0 && row < block.num_rows) {
        // A sink is one more key without a value; of the lanes that share a row the first counts it.
        float sink = args.sinks[block.kv_head * args.group + head_of(block, block.first_row + row)] * kLog2e;
        rows.highest[i][j] = fmaxf(sink, kLowest);
        rows.sum[i][j] = g == 0 ? exp2_approx(sink - rows.highest[i][j]) : 0.0f;
      }
    }
#pragma unroll
    for (int c = 0; c < kValueChunks; c++)
#pragma unroll
      for (int j = 0; j < 4; j++) rows.output[i][c][j] = 0.0f;
  }
  wait_for_copies<STAGES - 1>();  // of the query
  __syncthreads();
  if (split == args.num_splits - 1) attend_tail(args, block, rows, query, tail_place);

  int stage = 0;
  PageQuery scaled;
  for (;;) {
    Walk attended;
    attended.start(seen, page, now);
#pragma unroll 1
    while (attended.left) {
      wait_for_copies<STAGES - 2>();
      __syncwarp();
      if (copied.left) {
        int next = stage + STAGES - 1;
        copier.copy(stages + (next < STAGES ? next : next - STAGES) * kStageBytes, copied.page, copied.step, heads,
                    head);
        copied.advance();
      }
      commit_copies();
      const u32 here = stages + stage * kStageBytes;
      if (attended.step == 0) scale_query(args, scaled, query, here + KSTEP * (DK + DV));
      const int first_key = attended.page * kPageSize;
      bool hides = (args.is_causal && first_key + kPageSize - 1 > position) ||
                   (args.window && first_key + args.window <= block.kv_len - 1);
      if (MASK) hides |= partly >> ((attended.page - page) / WARPS) & 1;
      attend_step(args, block, rows, scaled, here, first_key + attended.step * KSTEP, hides);
      attended.advance();
      stage = stage + 1 < STAGES ? stage + 1 : 0;
    }
    if (!MASK) break;
    num_here -= now;
    if (num_here <= 0) break;
    page += now * WARPS;
    now = min(num_here, kWindowPages);
    look_at_masks(args, block, page, now, seen, partly);
    copied.start(seen, page, now);
    // No copy is under way; the stages are free once every lane has read the last one.
    __syncwarp();
    for (int s = 0; s < STAGES - 1; s++) {
      int next = stage + s;
      if (copied.left) {
        copier.copy(stages + (next < STAGES ? next : next - STAGES) * kStageBytes, copied.page, copied.step, heads,
                    head);
        copied.advance();
      }
      commit_copies();
    }
  }
  wait_for_copies<0>();
  __syncthreads();

  // Each warp's output and sums meet in shared memory, where the query and the stages were.
  float* outputs = reinterpret_cast<float*>(memory);  // (WARPS, kRows, DV)
  float* sums = outputs + WARPS * kRows * DV;         // (WARPS, kRows, 2)
#pragma unroll
  for (int i = 0; i < NT; i++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      float sum = rows.sum[i][j], offset = rows.offset[i][j];
#pragma unroll
      for (int step = 4; step < 32; step *= 2) {
        sum += __shfl_xor_sync(~0u, sum, step);
        offset += __shfl_xor_sync(~0u, offset, step);
      }
      const int row = warp * kRows + 8 * i + 2 * t + j;
      if (g == 0) {
        sums[2 * row] = rows.highest[i][j];
        sums[2 * row + 1] = sum;
      }
      const float shrink = 1.0f / rows.value_factor;
#pragma unroll
      for (int c = 0; c < kValueChunks; c++) {
        float2 pair = {rows.output[i][c][j] * shrink - offset, rows.output[i][c][j + 2] * shrink - offset};
        *reinterpret_cast<float2*>(outputs + row * DV + 16 * c + 2 * g) = pair;
      }
    }
  __syncthreads();

  const i64 tile = (static_cast<i64>(head) * row_tiles + row_tile) * args.num_splits;
  auto write = [&](int row, int d, float4 x, float sum) {
    const float share = sum == 0.0f ? 0.0f : 1.0f / sum;
    const int index = block.first_row + row;
    const i64 token = static_cast<i64>(block.batch) * block.query_len + query_of(block, index);
    const i64 place = ((token * args.num_kv_heads + block.kv_head) * args.group + head_of(block, index)) * DV + d;
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
  for (int i = threadIdx.x; i < block.num_rows * (DV / 4); i += kThreads) {
    const int row = i / (DV / 4), d = i % (DV / 4) * 4;
    float highest = kLowest, sum = 0.0f;
    float4 x = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int w = 0; w < WARPS; w++) highest = fmaxf(highest, sums[2 * (w * kRows + row)]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float weight = exp2_approx(sums[2 * (w * kRows + row)] - highest);
      const float4 y = *reinterpret_cast<const float4*>(outputs + (w * kRows + row) * DV + d);
      sum = fmaf(weight, sums[2 * (w * kRows + row) + 1], sum);
      x.x = fmaf(weight, y.x, x.x), x.y = fmaf(weight, y.y, x.y);
      x.z = fmaf(weight, y.z, x.z), x.w = fmaf(weight, y.w, x.w);
    }
    if (args.num_splits == 1) {
      write(row, d, x, sum);
      continue;
    }
    const i64 place = (tile + split) * kRows + row;
    *reinterpret_cast<float4*>(args.partial + place * DV + d) = x;
    if (d == 0) *reinterpret_cast<float2*>(args.partial_sums + 2 * place) = make_float2(highest, sum);
  }
  if (args.num_splits == 1) return;

  // The last CTA of a head's splits to arrive merges them.
  __syncthreads();
  if (threadIdx.x == 0) is_last = arrives_last(args.counters + head * row_tiles + row_tile, args.num_splits);
  __syncthreads();
  if (!is_last) return;

  float* weights = reinterpret_cast<float*>(memory);  // (num_splits, num_rows)
  float* totals = weights + args.num_splits * kRows;  // (num_rows,)
  for (int row = warp; row < block.num_rows; row += WARPS) {
    constexpr int rounds = 4;  // of 32 splits, all loaded before one is used
    float2 pair[rounds];
    float highest = kLowest, sum = 0.0f;
#pragma unroll
    for (int k = 0; k < rounds; k++) {
      const int s = min(lane + 32 * k, args.num_splits - 1);
      pair[k] = __ldcg(reinterpret_cast<const float2*>(args.partial_sums + 2 * ((tile + s) * kRows + row)));
    }
#pragma unroll
    for (int k = 0; k < rounds; k++) highest = fmaxf(highest, pair[k].x);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, step));
#pragma unroll
    for (int k = 0; k < rounds; k++)
      if (lane + 32 * k < args.num_splits) {
        const float weight = exp2_approx(pair[k].x - highest);
        weights[(lane + 32 * k) * kRows + row] = weight;
        sum = fmaf(weight, pair[k].y, sum);
      }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (lane == 0) totals[row] = sum;
  }
  __syncthreads();
  // Few rows leave threads without an element: groups of threads then take every num_groups-th split.
  const int elements = block.num_rows * (DV / 4);
  const int num_groups = max(min(kThreads / elements, 8), 1), width = num_groups > 1 ? elements : kThreads;
  constexpr int kAtOnce = 16;  // splits whose outputs are loaded before one is used
  float4* sums_of_groups = reinterpret_cast<float4*>(totals + kRows);  // (num_groups, elements), if more than one
  const int group = min(static_cast<int>(threadIdx.x) / width, num_groups);
  for (int i = threadIdx.x - group * width; i < elements && group < num_groups; i += width) {
    const int row = i / (DV / 4), d = i % (DV / 4) * 4;
    float4 x = make_float4(0, 0, 0, 0);
    const float* source = args.partial + (tile * kRows + row) * DV + d;
#pragma unroll 1
    for (int s = group; s < args.num_splits; s += kAtOnce * num_groups) {
      float4 y[kAtOnce];
#pragma unroll
      for (int n = 0; n < kAtOnce; n++)
        y[n] = __ldcg(
            reinterpret_cast<const float4*>(source + min(s + n * num_groups, args.num_splits - 1) * (kRows * DV)));
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
    const int row = threadIdx.x / (DV / 4);
    write(row, threadIdx.x % (DV / 4) * 4, x, totals[row]);
  }
}
