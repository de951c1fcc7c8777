// Scales and zero points of the tiles, prepared kGroup tiles at a time by a warp each.
//
// A key is scale[d] * (code[d] - zero_point[d]). The product of a query with the second part is one number for a row
// and page: an MMA of the query with the vectors scale[d] * zero_point[d] of kGroup tiles, each as two 16-bit floats.

#include "prefill/convert.cuh"

constexpr float kLackFactor = 2048.0f;  // what the leading 11 bits lack is kept times this

// A lane copies what it will itself prepare.
DEVICE void copy_metadata(const Memory& memory, int first, int queued) {
  const int lane = threadIdx.x & 31;
  for (int job = maker() / 32; job < kGroup; job += kMakers) {
    if (first + job >= queued) return;
    const Tile& tile = memory.shared->queue[(first + job) % kQueue];
    if (!tile.is_page()) continue;
    const u32 target = shared_address(memory.shared->metadata[job]);
    for (int i = lane; i < HEAD_DIM / 4; i += 32) copy_async(target + 16 * i, tile.key_metadata + 4 * i);
    if (lane < TILE_KEYS / 4) copy_async(target + 4 * HEAD_DIM + 16 * lane, tile.value_metadata + 4 * lane);
  }
}

DEVICE void store_two_pairs(u32 address, u32 a, u32 b) {
  asm volatile("st.shared.v2.u32 [%0], {%1,%2};" ::"r"(address), "r"(a), "r"(b) : "memory");
}

DEVICE void prepare_keys(const Memory& memory, bool is_page, u32 words, int slot) {
  Shared& shared = *memory.shared;
  const int lane = threadIdx.x & 31;
  constexpr int fours = (HEAD_DIM / 4 + 31) / 32;
  uint4 four[fours];
  u32 widest = 0;
  float largest = 0.0f;
#pragma unroll
  for (int k = 0; k < fours; k++) {
    const int i = lane + 32 * k;
    four[k] = make_uint4(0, 0, 0, 0);
    if (is_page && i < HEAD_DIM / 4) four[k] = load_shared_16(words + 16 * i);
    const u32 word[4] = {four[k].x, four[k].y, four[k].z, four[k].w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const u32 bits = word[j] << 16;
      widest = max(widest, bits < 0x7F800000u ? bits : 0u);
      largest = fmaxf(largest, fabsf(scale_of(word[j]) * zero_point_of(word[j])));
    }
  }
  widest = __reduce_max_sync(~0u, widest);
  largest = __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(largest)));
  const int exponent = min(exponent_of(__uint_as_float(widest), -100), 110);
  const int offset_exponent = min(exponent_of(largest, -100), 110);
  const float grow = power_of_two(kScaleExponent - exponent), offset_grow = power_of_two(13 - offset_exponent);
  if (lane == 0) {
    // A converted key is code * scale * grow * 2^-24.
    shared.key_factor[slot] = is_page ? power_of_two(exponent + 24 - kScaleExponent) : shared.tail_factor[0];
    shared.offset_factor[slot] = power_of_two(offset_exponent - 13);
  }
  const u32 leading = shared_address(shared.key_offset[slot / kGroup]) + 2 * (slot % kGroup) * kKeyPitch;
#pragma unroll
  for (int k = 0; k < fours; k++) {
    const int i = lane + 32 * k;
    if (i >= HEAD_DIM / 4) break;
    const u32 word[4] = {four[k].x, four[k].y, four[k].z, four[k].w};
    u32 scales[2], high[2], low[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      scales[j] = pack_half2(scale_of(word[2 * j]) * grow, scale_of(word[2 * j + 1]) * grow);
      const float x = scale_of(word[2 * j]) * zero_point_of(word[2 * j]) * offset_grow;
      const float y = scale_of(word[2 * j + 1]) * zero_point_of(word[2 * j + 1]) * offset_grow;
      high[j] = pack_half2(x, y);
      low[j] = pack_half2((x - half_low(high[j])) * kLackFactor, (y - half_high(high[j])) * kLackFactor);
    }
    store_two_pairs(shared_address(shared.key_scale[slot]) + 8 * i, scales[0], scales[1]);
    const u32 place = place_of<kKeyChunks>(i / 2) * 16 + i % 2 * 8;
    store_two_pairs(leading + place, high[0], high[1]);
    store_two_pairs(leading + kKeyPitch + place, low[0], low[1]);
  }
}

DEVICE void prepare_values(const Memory& memory, bool is_page, u32 words, int slot) {
  Shared& shared = *memory.shared;
  const int lane = threadIdx.x & 31;
  u32 widest = 0;
  if (lane < TILE_KEYS / 4) {
    const float tail = shared.tail_factor[1];
    uint4 four = make_uint4(0, 0, 0, 0);
    if (is_page) four = load_shared_16(words + 4 * HEAD_DIM + 16 * lane);
    const u32 word[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float scale = is_page ? scale_of(word[j]) : tail;
      const u32 bits = __float_as_uint(scale);
      widest = max(widest, bits < 0x7F800000u ? bits : 0u);
      shared.values[slot][4 * lane + j][0] = scale;
      shared.values[slot][4 * lane + j][1] = scale * zero_point_of(word[j]);
    }
  }
  widest = __reduce_max_sync(~0u, widest);
  if (lane == 0) shared.widest[slot] = __uint_as_float(widest);
}

// The tables of the kGroup tiles from `first` on, of which copies have arrived.
DEVICE void prepare_group(const Memory& memory, int first, int queued) {
  for (int job = maker() / 32; job < kGroup; job += kMakers) {
    const int slot = (first + job) % kSlots;
    const bool is_page = first + job < queued && memory.shared->queue[(first + job) % kQueue].is_page();
    const u32 words = shared_address(memory.shared->metadata[job]);
    prepare_keys(memory, is_page, words, slot);
    prepare_values(memory, is_page, words, slot);
  }
}
