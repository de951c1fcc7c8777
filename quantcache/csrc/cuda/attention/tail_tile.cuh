// Attention to the exact tail, and what a launch adds to it.

#include "attention/masks.cuh"
#include "attention/query.cuh"
#include "attention/softmax.cuh"
#include "common/matrices.cuh"

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

template <int kHeadDim>
DEVICE void prefetch_rows(const void* tail, i64 start, i64 step, int tail_len, int first_key) {
  constexpr int lines = (kHeadDim * kQuerySize + 127) / 128;
  for (int i = threadIdx.x & 31; i < 16 * lines; i += 32) {
    const int key = first_key + i / lines;
    if (key < tail_len) {
      const char* line = static_cast<const char*>(tail) + (start + key * step) * kQuerySize + i % lines * 128;
      asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
    }
  }
}

#if HAS_BLOCK_TABLE
// Where the exact tokens of an open page begin, the keys' or the values'; there is at least one.
DEVICE const void* open_page(const AttentionArgs& args, const QueryRows& rows, int which) {
  const BlockTable& table = args.block_table;
  return table.chunk_of(table.block_of(rows.sequence, rows.num_pages + which), rows.kv_head);
}
#endif

// Brings the rows of the tail that a warp reads first nearer, 128 bytes a lane.
DEVICE void prefetch_tail(const AttentionArgs& args, const QueryRows& rows, int place) {
  const int tail_len = rows.kv_len - rows.num_pages * kPageSize;
#if HAS_BLOCK_TABLE
  if (tail_len > 1) {
    prefetch_rows<HEAD_DIM>(open_page(args, rows, 0), 0, HEAD_DIM, tail_len - 1, 16 * place);
    prefetch_rows<V_HEAD_DIM>(open_page(args, rows, 1), 0, V_HEAD_DIM, tail_len - 1, 16 * place);
  }
  return;
#endif
  prefetch_rows<HEAD_DIM>(args.key_tail, rows.batch * args.key_tail_stride[0] + rows.kv_head * args.key_tail_stride[1],
                          args.key_tail_stride[2], tail_len, 16 * place);
  prefetch_rows<V_HEAD_DIM>(args.value_tail,
                            rows.batch * args.value_tail_stride[0] + rows.kv_head * args.value_tail_stride[1],
                            args.value_tail_stride[2], tail_len, 16 * place);
}

// 16 keys of the tail and their values, as a lane uses them. Where registers allow, all are loaded before one is used:
// their latency is long behind the first pages' copies, and this way there is one.
constexpr bool kLoadsTailAtOnce =
    DTYPE != kFloat32 && !HAS_MASK && KEY_STEP > 16 && ROW_TILES == 1 && HEAD_DIM <= 128 && V_HEAD_DIM <= 128;
struct TailTile {
  u32 keys[kKeyChunks][2][2], values[kValueChunks][4];
};

// The exact tail, 16 keys at a time, straight from memory: it is short, and its loads overlap the first pages' copies.
// `place` is the warp's among those that share it.
DEVICE void attend_tail(const AttentionArgs& args, const QueryRows& rows, OnlineSoftmax& softmax, u32 query,
                        int place) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#if HAS_BLOCK_TABLE
  const int first_key = rows.num_pages * kPageSize;
#else
  const int first_key = rows.kv_len - (args.lengths ? args.lengths[1] : args.tail_len);
#endif
  const int tail_len = rows.kv_len - first_key;
  constexpr int words = kQuerySize;  // 32-bit words of four elements
  const u32* key_tail = static_cast<const u32*>(args.key_tail) +
                        (rows.batch * args.key_tail_stride[0] + rows.kv_head * args.key_tail_stride[1]) * words / 4 +
                        t * words;
  const u32* value_tail =
      static_cast<const u32*>(args.value_tail) +
      (rows.batch * args.value_tail_stride[0] + rows.kv_head * args.value_tail_stride[1]) * words / 4 + g * words / 2;
#if HAS_BLOCK_TABLE
  // The last token is the new one.
  const u32 *open_keys = key_tail, *open_values = value_tail;
  if (tail_len > 1) {
    open_keys = static_cast<const u32*>(open_page(args, rows, 0)) + t * words;
    open_values = static_cast<const u32*>(open_page(args, rows, 1)) + g * words / 2;
  }
  auto key_at = [&](int i) { return i == tail_len - 1 ? key_tail : open_keys + i * (HEAD_DIM * words / 4); };
  auto value_at = [&](int i) { return i == tail_len - 1 ? value_tail : open_values + i * (V_HEAD_DIM * words / 4); };
#else
  const i64 key_step = args.key_tail_stride[2] * words / 4, value_step = args.value_tail_stride[2] * words / 4;
  auto key_at = [&](int i) { return key_tail + i * key_step; };
  auto value_at = [&](int i) { return value_tail + i * value_step; };
#endif
#pragma unroll 1
  for (int start = 16 * place; start < tail_len; start += 16 * WARPS) {
    // Keys behind the last one are hidden, so what is read for them is the last one. Elements 16 c + 4 t.. of the keys
    // g and g + 8, and 16 c + 2 g.. of the values 2 t, 2 t + 1, 2 t + 8 and 2 t + 9.
    const u32* keys_at[2];
    const u32* values_at[4];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      keys_at[h] = key_at(min(start + g + 8 * h, tail_len - 1));
      values_at[2 * h] = value_at(min(start + 2 * t + 8 * h, tail_len - 1));
      values_at[2 * h + 1] = value_at(min(start + 2 * t + 8 * h + 1, tail_len - 1));
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
    float scores[1][ROW_TILES][4];
#pragma unroll
    for (int i = 0; i < ROW_TILES; i++)
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
      for (int i = 0; i < ROW_TILES; i++) {
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
    for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) scores[0][i][j] = softcapped(args, scores[0][i][j] * score_scale(args));
    hide_keys<1>(args, rows, scores, first_key + start);
    softmax_step<1>(softmax, scores);
    // bfloat16 has too few bits for a weight; two of them have enough.
    constexpr int weight_terms = DTYPE == kFloat16 ? 1 : 2;
    u32 weights[ROW_TILES][weight_terms][2];
#pragma unroll
    for (int i = 0; i < ROW_TILES; i++)
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
      for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
        for (int w = 0; w < weight_terms; w++)
#pragma unroll
          for (int v = 0; v < kTerms; v++)
            if (w + v < 2) mma_exact(softmax.output[i][c], values[v], weights[i][w][0], weights[i][w][1]);
    }
  }
}

// Writes the new tokens behind the others of the tail.
template <int kHeadDim>
DEVICE void write_new(const AttentionArgs& args, const QueryRows& rows, int which, void* tail, const i64* tail_stride,
                      int num_old) {
  constexpr int pieces = kHeadDim / 4;  // of four elements
  const i64* stride = args.new_stride[which];
  const i64 from = rows.batch * stride[0] + rows.kv_head * stride[1];
  const i64 to = rows.batch * tail_stride[0] + rows.kv_head * tail_stride[1] + num_old * tail_stride[2];
#pragma unroll 1
  for (int i = threadIdx.x; i < args.num_new * pieces; i += kThreads) {
    const int token = i / pieces, channel = i % pieces * 4;
    static_cast<Four*>(tail)[(to + token * tail_stride[2] + channel) / 4] =
        static_cast<const Four*>(args.new_states[which])[(from + token * stride[2] + channel) / 4];
  }
}

// Row tiles of one head write the same bytes, each before it reads them.
DEVICE void write_new_tokens(const AttentionArgs& args, const QueryRows& rows) {
  const int num_old = args.tail_len - args.num_new;
  write_new<HEAD_DIM>(args, rows, 0, args.key_tail, args.key_tail_stride, num_old);
  write_new<V_HEAD_DIM>(args, rows, 1, args.value_tail, args.value_tail_stride, num_old);
}
