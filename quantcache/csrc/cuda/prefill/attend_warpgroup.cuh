// Attention to the tiles of a CTA by the instructions of warpgroups: while the tensor cores multiply, the other units
// convert what comes next and turn products into weights.

#include "prefill/weights.cuh"

#if WARPGROUP
#include "common/warpgroup.cuh"

// The query's rows of a warp as operands A, where registers are enough; wider ones stay in shared memory.
constexpr bool kKeepsQuery = HEAD_DIM <= 128;
using QueryRegisters = u32[kKeyChunks][4];
DEVICE void load_query_chunk(const Memory& memory, int c, u32 (&a)[4]) {
  const int lane = threadIdx.x & 31, row = (threadIdx.x >> 5) * kWarpRows + (lane & 15);
  load_matrices(a, memory.query + query_offset(row, 2 * c + (lane >> 4)));
}
DEVICE void load_query_registers(const Memory& memory, QueryRegisters& query) {
#pragma unroll
  for (int c = 0; c < kKeyChunks; c++) load_query_chunk(memory, c, query[c]);
}

// See multiply_offsets.
DEVICE void multiply_offsets(const Memory& memory, const QueryRegisters& query, int group) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, first_row = (threadIdx.x >> 5) * kWarpRows;
  const u32 offsets = shared_address(memory.shared->key_offset[group]) + (lane & 7) * kKeyPitch + (lane >> 3 & 1) * 16;
  float product[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int c = 0; c < kKeyChunks; c++) {
    u32 b[4];
    load_two_matrices(b, offsets + 32 * c);
    if constexpr (kKeepsQuery) {
      mma_half(product, query[c], b[0], b[1]);
    } else {
      u32 a[4];
      load_query_chunk(memory, c, a);
      mma_half(product, a, b[0], b[1]);
    }
  }
#pragma unroll
  for (int h = 0; h < 2; h++)
    memory.shared->row_offset[first_row + 8 * h + g][t] = fmaf(product[2 * h + 1], 1.0f / kLackFactor, product[2 * h]);
  __syncwarp();
}

DEVICE void start_scores(const Memory& memory, Scores& scores, const QueryRegisters& query, u32 keys) {
  const u32 first_row = threadIdx.x / 128 * 64;
#pragma unroll
  for (int c = 0; c < kKeyChunks; c++) {
    const u64 b = describe(keys + c / 4 * kPanelBytes + c % 4 * 32, 16);
    if constexpr (kKeepsQuery)
      multiply<false, kKeyBlocks>(scores[0], query[c], b, c > 0);
    else
      multiply_shared<kKeyBlocks>(
          scores[0], describe(memory.query + c / 4 * (128 * kRows) + first_row * 128 + c % 4 * 32, 16), b, c > 0);
  }
}

// A panel of the output's channels from `first` on, of eight blocks or what is left.
template <int kFirst>
DEVICE void start_outputs(OnlineSoftmax& softmax, const Weights& weights, u32 values) {
  if constexpr (kFirst < 2 * kValueChunks) {
    constexpr int blocks = 2 * kValueChunks - kFirst < 8 ? 2 * kValueChunks - kFirst : 8;
#pragma unroll
    for (int c = 0; c < kKeyBlocks / 2; c++)
      multiply<true, blocks>(&softmax.output[0][kFirst], weights[0][c],
                             describe(values + kFirst / 8 * kPanelBytes + c * 2048, 16), true);
    start_outputs<kFirst + 8>(softmax, weights, values);
  }
}

// Brings a tile's codes to the L2 cache, a line for each thread or two.
DEVICE void fetch_tile(const Memory& memory, int number, int queued) {
  if (number >= queued) return;
  constexpr u32 key_lines = TILE_KEYS * HEAD_DIM / 128, lines = key_lines + TILE_KEYS * V_HEAD_DIM / 128;
  const Tile& tile = memory.shared->queue[number % kQueue];
#pragma unroll
  for (u32 first = 0; first < lines; first += kMakerThreads) {
    const u32 line = first + maker();
    if (line >= lines) break;
    const i8* codes = line < key_lines ? tile.key_qdata + 128 * line : tile.value_qdata + 128 * (line - key_lines);
    asm volatile("prefetch.global.L2 [%0];" ::"l"(codes));
  }
}

// Where a tile is made.
DEVICE u32 keys_of(const Memory& memory, int number) { return memory.keys + (number & 1) * kKeyTileBytes; }
DEVICE u32 values_of(const Memory& memory, int number) { return memory.values + (number & 1) * kValueTileBytes; }

// The loop of warps that make tiles. In the turn of tile `number` they make the keys of the tile behind the next and the
// next tile's values, while the others attend to the next tile's keys and to this tile's values; the first two turns are
// theirs alone. Where SHARES_PAGES a turn waits for codes: those of the tile behind are on their way as soon as those
// before are in registers. Elsewhere that is 3 % slower (an H200) than copies that begin once both are made.
DEVICE void make_tiles(const PrefillArgs& args, const QueryRows& rows, const BlockRange& range, const Memory& memory,
                       int queued) {
  Shared& shared = *memory.shared;
  constexpr bool is_early = SHARES_PAGES;
  auto copy = [&](int keys, int values) {
    if (keys < queued) copy_keys(memory, keys);
    if (values < queued) copy_values(memory, values);
    commit_copies();
  };
  auto make_keys = [&](int number) {
    const Tile& tile = shared.queue[number % kQueue];
    const u32 target = memory.keys + (number & 1) * kKeyTileBytes;
    const bool exists = number < queued, is_page = exists && tile.is_page();
    KeyCodes codes;
    if (is_page) load_key_codes(memory, codes);
    if (is_early) copy(number + 1, queued);
    if (is_page)
      convert_all_keys(memory, codes, number % kSlots, target);
    else if (exists)
      convert_tail_keys(args, rows, memory, tile.first_key, target);
  };
  auto make_values = [&](int number) {
    const Tile& tile = shared.queue[number % kQueue];
    const u32 target = memory.values + (number & 1) * kValueTileBytes;
    const bool exists = number >= 0 && number < queued, is_page = exists && tile.is_page();
    ValueCodes codes;
    if (is_page) load_value_codes(memory, codes);
    if (is_early) copy(queued, number + 1);
    if (is_page)
      convert_all_values(codes, target);
    else if (exists)
      convert_tail_values(args, rows, memory, tile.first_key, target);
  };

  copy_metadata(memory, 0, queued);
  copy(0, queued);
  if (SHARES_PAGES)
    for (int number = 0; number < kFetched - 2; number++) fetch_tile(memory, number, queued);
  wait_for_copies<0>();
  prepare_group(memory, 0, queued);
  copy_metadata(memory, kGroup, queued);  // arrives with the keys that are copied next, as further ones
  wait_at_barrier<kMakerThreads>(1);
#pragma unroll 1
  for (int number = -2; number + 1 < queued; number++) {
    if (number > -2) wait_at_barrier<kThreads>(0);
    if (number >= 0) queued = shared.queued[number % kTurns];
    if (SHARES_PAGES) fetch_tile(memory, number + kFetched, queued);
    wait_for_copies<is_early ? 1 : 0>();  // the keys' codes; early ones of the values are behind them
    make_keys(number + 2);
    if (is_early) wait_for_copies<1>();
    make_values(number + 1);
    if (!is_early) copy(number + 3, number + 2);
    if (number >= 0) {
      if (number % kGroup == 0) {
        prepare_group(memory, number + kGroup, queued);
        copy_metadata(memory, number + 2 * kGroup, queued);
        if (!is_early) commit_copies();
      }
      if (maker() / 32 == kMakers - 1) fill_queue(args, rows, range, shared, number);
    }
    show_to_tensor_cores();
  }
  wait_at_barrier<kThreads>(0);
}

// What a thread with query rows has at hand.
struct Attending {
  QueryRegisters query;
  Scores scores;
  Weights weights;
};

// The first tile's scores.
DEVICE void start_attending(const Memory& memory, Attending& now) {
  if (kKeepsQuery) load_query_registers(memory, now.query);
  show_to_tensor_cores();  // the rows in shared memory
  wait_at_barrier<kThreads>(0);
  multiply_offsets(memory, now.query, 0);
  begin_multiplying();
  start_scores(memory, now.scores, now.query, keys_of(memory, 0));
  commit_products();
  wait_for_products<0>();
  settle(now.scores[0]);
}

// Puts the next tile's scores and this tile's outputs on their way.
DEVICE void start_products(const Memory& memory, OnlineSoftmax& softmax, Attending& now, int number, int& queued) {
  settle(now.weights[0]);
  begin_multiplying();
  start_scores(memory, now.scores, now.query, keys_of(memory, number + 1));
  commit_products();
  start_outputs<0>(softmax, now.weights, values_of(memory, number));
  commit_products();
  queued = memory.shared->queued[number % kTurns];
  if (number % kGroup == kGroup - 1) multiply_offsets(memory, now.query, (number + 1) % kSlots / kGroup);
}

DEVICE void finish_outputs(const Memory& memory, OnlineSoftmax& softmax, Attending& now, int number) {
  settle(now.weights[0]);
  begin_multiplying();
  start_outputs<0>(softmax, now.weights, values_of(memory, number));
  commit_products();
  wait_for_products<0>();
  settle(softmax.output[0]);
}

// The loop of the warps that have query rows. Of two warpgroups one multiplies while the other weighs what it has
// multiplied before: the first in the first half of a turn, the second in the second half.
DEVICE void multiply_then_weigh(const PrefillArgs& args, const QueryRows& rows, const Memory& memory,
                                OnlineSoftmax& softmax, int queued) {
  Attending now;
  start_attending(memory, now);
  Rescale rescale = weigh(args, rows, memory, softmax, now.scores, 0);
  fit_value_factor(memory, softmax, 0, rescale);
  scale_weights(memory, softmax, now.scores, 0, now.weights);

  int number = 0;
#pragma unroll 1
  for (; number + 1 < queued; number++) {
    // The next tile's keys and this tile's values are made, and nobody reads those before them any more.
    wait_at_barrier<kThreads>(0);
    start_products(memory, softmax, now, number, queued);
    wait_for_products<1>();
    settle(now.scores[0]);
    rescale = weigh(args, rows, memory, softmax, now.scores, number + 1);
    const int slot = (number + 1) % kSlots;
    // The branch in there keeps the wait behind the exponentials, beside which the tensor cores multiply; where there are
    // two warpgroups these do so for each other.
    if (SHARES_PAGES) fit_value_factor(memory, softmax, slot, rescale);
    wait_for_products<0>();
    settle(softmax.output[0]), settle(now.scores[0]);
    if (!SHARES_PAGES) fit_value_factor(memory, softmax, slot, rescale);
    scale_weights(memory, softmax, now.scores, slot, now.weights);
    rescale_output(softmax, rescale);
  }
  wait_at_barrier<kThreads>(0);
  finish_outputs(memory, softmax, now, number);
}

DEVICE void weigh_then_multiply(const PrefillArgs& args, const QueryRows& rows, const Memory& memory,
                                OnlineSoftmax& softmax, int queued) {
  Attending now;
  start_attending(memory, now);
#pragma unroll 1
  for (int number = 0;; number++) {
    wait_at_barrier<kThreads>(0);
    Rescale rescale = weigh(args, rows, memory, softmax, now.scores, number);
    const int slot = number % kSlots;
    fit_value_factor(memory, softmax, slot, rescale);
    scale_weights(memory, softmax, now.scores, slot, now.weights);
    rescale_output(softmax, rescale);
    if (number + 1 >= queued) {
      finish_outputs(memory, softmax, now, number);
      return;
    }
    start_products(memory, softmax, now, number, queued);
    wait_for_products<0>();
    settle(softmax.output[0]), settle(now.scores[0]);
  }
}

DEVICE void attend_in_turns(const PrefillArgs& args, const QueryRows& rows, const Memory& memory,
                            OnlineSoftmax& softmax, int queued) {
  constexpr bool alternate = kRowThreads > 128 && V_HEAD_DIM <= 128;  // more would not fit in registers
  if (alternate && threadIdx.x / 128 % 2 == 1)
    weigh_then_multiply(args, rows, memory, softmax, queued);
  else
    multiply_then_weigh(args, rows, memory, softmax, queued);
}
#endif
