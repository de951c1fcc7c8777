// Attention to the tiles of a CTA by mma.sync: a tile after the other.

#include "prefill/weights.cuh"

// Products of the query with the offsets of a group's keys, for the warp's rows.
DEVICE void multiply_offsets(const Memory& memory, int group) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, first_row = (threadIdx.x >> 5) * kWarpRows;
  const u32 query = memory.query + (first_row + (lane & 15)) * kKeyPitch + (lane >> 4) * 16;
  const u32 offsets = shared_address(memory.shared->key_offset[group]) + (lane & 7) * kKeyPitch + (lane >> 3 & 1) * 16;
#pragma unroll
  for (int i = 0; i < ROW_TILES; i++) {
    float product[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
    for (int c = 0; c < kKeyChunks; c++) {
      u32 a[4], b[4];
      load_matrices(a, query + 16 * i * kKeyPitch + 32 * c);
      load_two_matrices(b, offsets + 32 * c);
      mma_half(product, a, b[0], b[1]);
    }
#pragma unroll
    for (int h = 0; h < 2; h++)
      memory.shared->row_offset[first_row + 16 * i + 8 * h + g][t] =
          fmaf(product[2 * h + 1], 1.0f / kLackFactor, product[2 * h]);
  }
  __syncwarp();
}

// Makes the tile after the one attended to, one piece at a time.
struct Following {
  int slot;
  u32 keys, values;
};

DEVICE void multiply_keys(const Memory& memory, Scores& scores, u32 keys, const Following& following) {
  const int lane = threadIdx.x & 31, first_row = (threadIdx.x >> 5) * kWarpRows;
  const u32 query = memory.query + (first_row + (lane & 15)) * kKeyPitch + (lane >> 4) * 16;
  keys += ((lane & 7) + (lane >> 4) * 8) * kKeyPitch + (lane >> 3 & 1) * 16;
#pragma unroll
  for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
    for (int n = 0; n < kKeyBlocks; n++)
#pragma unroll
      for (int j = 0; j < 4; j++) scores[i][n][j] = 0.0f;
#pragma unroll
  for (int c = 0; c < kKeyChunks; c++) {
    u32 a[ROW_TILES][4];
#pragma unroll
    for (int i = 0; i < ROW_TILES; i++) load_matrices(a[i], query + 16 * i * kKeyPitch + 32 * c);
#pragma unroll
    for (int n = 0; n < kKeyBlocks; n += 2) {
      u32 b[4];
      load_matrices(b, keys + 8 * n * kKeyPitch + 32 * c);
#pragma unroll
      for (int i = 0; i < ROW_TILES; i++) {
        mma_half(scores[i][n], a[i], b[0], b[1]);
        mma_half(scores[i][n + 1], a[i], b[2], b[3]);
      }
    }
    if (BUFFERS > 1) {
#pragma unroll
      for (int number = 0; number < kKeyPieces; number++)
        if (c == number * kKeyChunks / kKeyPieces) convert_keys(memory, number, following.slot, following.keys);
    }
  }
}

DEVICE void multiply_values(const Memory& memory, OnlineSoftmax& softmax, const Weights& weights, u32 values,
                            const Following& following) {
  const int lane = threadIdx.x & 31;
  values += (lane & 15) * kValuePitch + (lane >> 4) * 16;
#pragma unroll
  for (int n = 0; n < 2 * kValueChunks; n += 2) {
#pragma unroll
    for (int c = 0; c < kKeyBlocks / 2; c++) {
      u32 b[4];
      load_matrices_transposed(b, values + 16 * c * kValuePitch + 16 * n);
#pragma unroll
      for (int i = 0; i < ROW_TILES; i++) {
        mma_half(softmax.output[i][n], weights[i][c], b[0], b[1]);
        mma_half(softmax.output[i][n + 1], weights[i][c], b[2], b[3]);
      }
    }
    if (BUFFERS > 1) {
#pragma unroll
      for (int number = 0; number < kValuePieces; number++)
        if (n / 2 == number * kValueChunks / kValuePieces) convert_values(memory, number, following.values);
    }
  }
}

// Attends to a tile that has been converted; what follows it is converted on the way.
DEVICE void attend_tile(const PrefillArgs& args, const QueryRows& rows, const Memory& memory, OnlineSoftmax& softmax,
                        int number, u32 keys, u32 values, const Following& following) {
  Scores scores;
  multiply_keys(memory, scores, keys, following);
  Rescale rescale = weigh(args, rows, memory, softmax, scores, number);
  Weights weights;
  fit_value_factor(memory, softmax, number % kSlots, rescale);
  scale_weights(memory, softmax, scores, number % kSlots, weights);
  rescale_output(softmax, rescale);
  multiply_values(memory, softmax, weights, values, following);
}

DEVICE void attend_tiles(const PrefillArgs& args, const QueryRows& rows, const BlockRange& range, const Memory& memory,
                         OnlineSoftmax& softmax, int queued) {
  Shared& shared = *memory.shared;
  const int warp = threadIdx.x >> 5;

  // Converts all of a tile, or, where `is_tail_only`, what the products could not convert on their way.
  auto convert = [&](int number, u32 keys, u32 values, bool is_tail_only) {
    if (number >= queued) return;
    const Tile& tile = shared.queue[number % kQueue];
    if (!tile.is_page()) {
      convert_tail_keys(args, rows, memory, tile.first_key, keys);
      convert_tail_values(args, rows, memory, tile.first_key, values);
    } else if (!is_tail_only) {
      KeyCodes key_codes;
      load_key_codes(memory, key_codes);
      convert_all_keys(memory, key_codes, number % kSlots, keys);
      ValueCodes value_codes;
      load_value_codes(memory, value_codes);
      convert_all_values(value_codes, values);
    }
  };
  auto copy = [&](int number) {
    if (number < queued) {
      copy_keys(memory, number), copy_values(memory, number);
    }
    commit_copies();
  };
  copy_metadata(memory, 0, queued);
  copy(0);
  wait_for_copies<0>();
  prepare_group(memory, 0, queued);
  copy_metadata(memory, kGroup, queued);
  commit_copies();
  __syncthreads();
  if (BUFFERS > 1) {
    convert(0, memory.keys, memory.values, false);
    copy(1);
  }

#pragma unroll 1
  for (int number = 0; number < queued; number++) {
    __syncthreads();  // this tile is converted, and nobody reads the one before it any more
    queued = shared.queued[number % kTurns];
    const int slot = number % kSlots, other = BUFFERS > 1 ? (number + 1) & 1 : 0,
              current = BUFFERS > 1 ? number & 1 : 0;
    wait_for_copies<0>();
    if (BUFFERS == 1) {
      convert(number, memory.keys, memory.values, false);
      copy(number + 1);
      __syncthreads();
    }
    if (number % kGroup == 0) {
      prepare_group(memory, number + kGroup, queued);
      multiply_offsets(memory, slot / kGroup);
    }
    const Following following = {(number + 1) % kSlots, memory.keys + other * kKeyTileBytes,
                                 memory.values + other * kValueTileBytes};
    attend_tile(args, rows, memory, softmax, number, memory.keys + current * kKeyTileBytes,
                memory.values + current * kValueTileBytes, following);
    if (BUFFERS > 1) {
      convert(number + 1, following.keys, following.values, true);
      copy(number + 2);
    }
    if (number % kGroup == 0) {
      copy_metadata(memory, number + 2 * kGroup, queued);
      commit_copies();
    }
    if (warp == 0) fill_queue(args, rows, range, shared, number);
  }
}
