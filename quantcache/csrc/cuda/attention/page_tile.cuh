// Attention to the keys of one stage.

#include "attention/masks.cuh"
#include "attention/page_loader.cuh"
#include "attention/page_query.cuh"
#include "attention/softmax.cuh"

// The 16 rows from `row` on (a lane says one) of the chunks `chunk` and, where there is one, `chunk` + 1 of a tile, as
// the operand A.
template <int kChunks>
DEVICE void load_tile(u32 (&result)[4], u32 tile, int row, int half, int chunk, bool transposed) {
  if (chunk + 1 < kChunks) {
    u32 address = tile + tile_offset<kChunks>(row, chunk + half);
    transposed ? load_matrices_transposed(result, address) : load_matrices(result, address);
  } else {
    u32 address = tile + tile_offset<kChunks>(row, chunk);
    transposed ? load_two_matrices_transposed(result, address) : load_two_matrices(result, address);
  }
}

// KEY_STEP keys of a page that lie in shared memory.
DEVICE void attend_step(const AttentionArgs& args, const QueryRows& rows, OnlineSoftmax& softmax,
                        const PageQuery& scaled, u32 stage, int first_key, bool hides) {
  const int lane = threadIdx.x & 31, g = lane >> 2;
  const u32 values = stage + KEY_STEP * HEAD_DIM, value_metadata = values + KEY_STEP * V_HEAD_DIM + 4 * HEAD_DIM;
  const int tile_row = lane & 15, half = lane >> 4;
  float scores[kTiles][ROW_TILES][4];
#pragma unroll
  for (int a = 0; a < kTiles; a++) {
#pragma unroll
    for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) scores[a][i][j] = scaled.bias[i][j & 1];
#pragma unroll
    for (int c = 0; c < kKeyChunks; c += 2) {
      u32 codes[4];
      load_tile<kKeyChunks>(codes, stage, 16 * a + tile_row, half, c, false);
#pragma unroll
      for (int n = 0; n < 2; n++) {
        if (c + n >= kKeyChunks) continue;
        u32 low = codes[2 * n] ^ 0x80808080u, high = codes[2 * n + 1] ^ 0x80808080u;
        u32 keys[4] = {prmt(low, kMagic, 0x4140), prmt(high, kMagic, 0x4140), prmt(low, kMagic, 0x4342),
                       prmt(high, kMagic, 0x4342)};
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++)
          mma_half(scores[a][i], keys, scaled.pair[i][c + n][0], scaled.pair[i][c + n][1]);
      }
    }
#pragma unroll
    for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
      for (int j = 0; j < 4; j++)
        scores[a][i][j] = softcapped(args, fmaf(scores[a][i][j], scaled.factor[i][j & 1], -scaled.offset[i][j & 1]));
  }
  if (hides) hide_keys<kTiles>(args, rows, scores, first_key);
  softmax_step<kTiles>(softmax, scores);

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
  if (!(__uint_as_float(widest) * softmax.value_factor <= 16384.0f) || softmax.value_factor == 1.0f) {
    // The largest scale becomes 8192..16384; the first page also lifts the factor of 1 that the tail has used.
    u32 exponent = min(max(widest >> 23, 100u), 250u);
    float factor = __uint_as_float((267u - exponent) << 23);
    float change = factor / softmax.value_factor;
    softmax.value_factor = factor;
#pragma unroll
    for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
      for (int c = 0; c < kValueChunks; c++)
#pragma unroll
        for (int j = 0; j < 4; j++) softmax.output[i][c][j] *= change;
  }
  u32 weights[kTiles][ROW_TILES][2];
#pragma unroll
  for (int a = 0; a < kTiles; a++) {
    float scale[2], product[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float x = scale_of(word[a][h]);
      scale[h] = x * softmax.value_factor;
      product[h] = x * zero_point_of(word[a][h]);
    }
#pragma unroll
    for (int i = 0; i < ROW_TILES; i++) {
#pragma unroll
      for (int j = 0; j < 2; j++)
        softmax.value_offset[i][j] =
            fmaf(scores[a][i][j], product[0], fmaf(scores[a][i][j + 2], product[1], softmax.value_offset[i][j]));
      weights[a][i][0] = transpose8x8(pack_half2(scores[a][i][0] * scale[0], scores[a][i][1] * scale[0]));
      weights[a][i][1] = transpose8x8(pack_half2(scores[a][i][2] * scale[1], scores[a][i][3] * scale[1]));
    }
  }
#pragma unroll
  for (int c = 0; c < kValueChunks; c += 2)
#pragma unroll
    for (int a = 0; a < kTiles; a++) {
      u32 codes[4];
      load_tile<kValueChunks>(codes, values, 16 * a + tile_row, half, c, true);
#pragma unroll
      for (int n = 0; n < 2; n++) {
        if (c + n >= kValueChunks) continue;
        u32 low = codes[2 * n] ^ 0x80808080u, high = codes[2 * n + 1] ^ 0x80808080u;
        u32 tile[4] = {sub_half2(prmt(low, kMagic, 0x4240), kBias), sub_half2(prmt(low, kMagic, 0x4341), kBias),
                       sub_half2(prmt(high, kMagic, 0x4240), kBias), sub_half2(prmt(high, kMagic, 0x4341), kBias)};
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++)
          mma_half(softmax.output[i][c + n], tile, weights[a][i][0], weights[a][i][1]);
      }
    }
}

// A warp's pages, while the ring loads what comes next.
DEVICE void attend_pages(const AttentionArgs& args, const QueryRows& rows, OnlineSoftmax& softmax, u32 query,
                         PageRing& ring, PageWindow& window) {
  PageQuery scaled;
  for (;;) {
    PageWalk attending = window.walk();
#pragma unroll 1
    while (attending.left) {
      wait_for_copies<STAGES - 2>();
      __syncwarp();
      ring.load_next(args, STAGES - 1);
      const u32 stage = ring.current();
      if (attending.step == 0) scale_query(args, scaled, query, stage + KEY_STEP * (HEAD_DIM + V_HEAD_DIM));
      const int first_key = attending.page * kPageSize;
      bool hides = (args.is_causal && first_key + kPageSize - 1 > rows.position) ||
                   (args.window && first_key + args.window <= rows.kv_len - 1);
      if (HAS_MASK) hides |= window.partly >> ((attending.page - window.first) / WARPS) & 1;
      attend_step(args, rows, softmax, scaled, stage, first_key + attending.step * KEY_STEP, hides);
      attending.advance();
      ring.advance();
    }
    if (!kLooksAhead || !window.advance(args, rows)) return;
    // The stages are free once every lane has read the last one.
    __syncwarp();
    ring.fill(args, window);
  }
}
