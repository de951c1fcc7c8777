// Tiles of keys and values as 16-bit floats in shared memory, from int8 pages and from the exact tail.
//
// A key's code as an unsigned byte is a 16-bit float of no more than 255 * 2^-24, so one multiplication and addition of
// a pair makes of it code * scale * 2^-24 without a rounding before the last. The scales are those of the page divided
// by a power of two. A value's code becomes a float as it is; its scale goes into the weight. Zero points go elsewhere,
// see metadata.cuh.

#include "prefill/query.cuh"
#include "prefill/shared_pages.cuh"
#include "prefill/tiles.cuh"

DEVICE u32 fma_half2(u32 a, u32 b, u32 c) {
  u32 result;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}
DEVICE u32 mul_half2(u32 a, u32 b) {
  u32 result;
  asm("mul.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

constexpr int kScaleExponent = 14;       // of a page's largest scale as it is multiplied with
constexpr u32 kMinusBias = 0x80808080u;  // -128 * 2^-24, a pair
constexpr u32 kMagic = 0x64646464u;      // the high byte of 1024..1279 as 16-bit floats
constexpr u32 kValueBias = 0x64806480u;  // 1152 = 1024 + 128, a pair

// Which of the threads that make tiles this one is.
DEVICE u32 maker() { return threadIdx.x - 32 * kFirstMaker; }

// Where a thread's piece of 16 codes is in a tile of rows of kChunks.
template <int kChunks>
struct Piece {
  u32 row, chunk;
  bool exists;
  DEVICE explicit Piece(int number) {
    const u32 index = number * kMakerThreads + maker();
    if (kMakerThreads % kChunks == 0)  // said so that all pieces of a thread are known to lie a constant apart
      row = number * (kMakerThreads / kChunks) + maker() / kChunks, chunk = maker() % kChunks;
    else
      row = index / kChunks, chunk = index % kChunks;
    exists = TILE_KEYS * kChunks % kMakerThreads == 0 || index < TILE_KEYS * kChunks;
  }
};
template <int kChunks>
DEVICE void store_piece(u32 tile, const Piece<kChunks>& piece, const u32 (&pairs)[8]) {
  if (piece.exists) {
    store_shared_16(tile + tile_offset<kChunks>(piece.row, piece.chunk),
                    make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
    store_shared_16(tile + tile_offset<kChunks>(piece.row, kChunks + piece.chunk),
                    make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]));
  }
}

// A thread copies what it will itself convert, so that it has nobody to wait for.
template <int kPieces, int kChunks>
DEVICE void copy_codes(u32 target, const i8* codes) {
  const u32 place = 16 * maker();
  codes += place, target += place;
#pragma unroll
  for (int number = 0; number < kPieces; number++)
    if (Piece<kChunks>(number).exists)
      copy_async(target + 16 * number * kMakerThreads, codes + 16 * number * kMakerThreads);
}
// Those of a tile, if it is of a page.
DEVICE void copy_keys(const Memory& memory, int number) {
  const Tile& tile = memory.shared->queue[number % kQueue];
  if (tile.is_page()) copy_codes<kKeyPieces, kKeyChunks>(memory.codes, tile.key_qdata);
}
DEVICE void copy_values(const Memory& memory, int number) {
  const Tile& tile = memory.shared->queue[number % kQueue];
  if (tile.is_page())
    copy_codes<kValuePieces, kValueChunks>(memory.codes + 16 * kMakerThreads * kKeyPieces, tile.value_qdata);
}

// The factors of 16 channels, and their products with the bias of the codes as unsigned bytes.
struct ChannelScales {
  u32 factor[8], bias[8];
  DEVICE ChannelScales(const Memory& memory, int slot, int chunk) {
    const u32 address = shared_address(memory.shared->key_scale[slot]) + 32 * chunk;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const uint4 four = load_shared_16(address + 16 * h);
      factor[4 * h] = four.x, factor[4 * h + 1] = four.y, factor[4 * h + 2] = four.z, factor[4 * h + 3] = four.w;
    }
#pragma unroll
    for (int j = 0; j < 8; j++) bias[j] = mul_half2(factor[j], kMinusBias);
  }
};
DEVICE void convert_keys(const Piece<kKeyChunks>& piece, const uint4& four, const ChannelScales& scales, u32 target) {
  const u32 codes[4] = {four.x ^ 0x80808080u, four.y ^ 0x80808080u, four.z ^ 0x80808080u, four.w ^ 0x80808080u};
  u32 pairs[8];
#pragma unroll
  for (int j = 0; j < 8; j++)
    pairs[j] = fma_half2(prmt(codes[j / 2], 0, j % 2 ? 0x4342 : 0x4140), scales.factor[j], scales.bias[j]);
  store_piece(target, piece, pairs);
}
DEVICE void convert_values(const Piece<kValueChunks>& piece, const uint4& four, u32 target) {
  const u32 codes[4] = {four.x ^ 0x80808080u, four.y ^ 0x80808080u, four.z ^ 0x80808080u, four.w ^ 0x80808080u};
  u32 pairs[8];
#pragma unroll
  for (int j = 0; j < 8; j++) pairs[j] = sub_half2(prmt(codes[j / 2], kMagic, j % 2 ? 0x4342 : 0x4140), kValueBias);
  store_piece(target, piece, pairs);
}
DEVICE uint4 key_codes(u32 codes, int number) {
  return load_shared_16(codes + 16 * (number * kMakerThreads + maker()));
}
DEVICE uint4 value_codes(u32 codes, int number) {
  return load_shared_16(codes + 16 * ((kKeyPieces + number) * kMakerThreads + maker()));
}
// One piece, where others follow later.
DEVICE void convert_keys(const Memory& memory, int number, int slot, u32 target) {
  const Piece<kKeyChunks> piece(number);
  const uint4 codes = key_codes(memory.codes, number);
  convert_keys(piece, codes, ChannelScales(memory, slot, piece.chunk), target);
}
DEVICE void convert_values(const Memory& memory, int number, u32 target) {
  convert_values(Piece<kValueChunks>(number), value_codes(memory.codes, number), target);
}
// All of a tile, of which a thread has its codes in registers: those of the next one may then be on their way.
using KeyCodes = uint4[kKeyPieces];
using ValueCodes = uint4[kValuePieces];
DEVICE void load_key_codes(const Memory& memory, KeyCodes& codes) {
#pragma unroll
  for (int i = 0; i < kKeyPieces; i++) codes[i] = key_codes(memory.codes, i);
}
DEVICE void load_value_codes(const Memory& memory, ValueCodes& codes) {
#pragma unroll
  for (int i = 0; i < kValuePieces; i++) codes[i] = value_codes(memory.codes, i);
}
DEVICE void convert_all_keys(const Memory& memory, const KeyCodes& codes, int slot, u32 target) {
  if constexpr (kMakerThreads % kKeyChunks == 0) {
    const ChannelScales scales(memory, slot, Piece<kKeyChunks>(0).chunk);  // the same of all pieces
#pragma unroll
    for (int i = 0; i < kKeyPieces; i++) convert_keys(Piece<kKeyChunks>(i), codes[i], scales, target);
  } else {
#pragma unroll
    for (int i = 0; i < kKeyPieces; i++) {
      const Piece<kKeyChunks> piece(i);
      convert_keys(piece, codes[i], ChannelScales(memory, slot, piece.chunk), target);
    }
  }
}
DEVICE void convert_all_values(const ValueCodes& codes, u32 target) {
#pragma unroll
  for (int i = 0; i < kValuePieces; i++) convert_values(Piece<kValueChunks>(i), codes[i], target);
}

// 16 elements of the tail as 16-bit floats times `factor`; zeros behind the last token.
template <int kPieces, int kChunks>
DEVICE void convert_tail(const void* tail, const OpenPage& open, i64 start, i64 step, int first, int tail_len,
                         float factor, u32 target) {
  constexpr int at_once = kPieces < 2 ? kPieces : 2;
#pragma unroll 1
  for (int number = 0; number < kPieces; number += at_once) {
    uint2 fours[at_once][4];  // all loaded before one is used
#pragma unroll
    for (int i = 0; i < at_once; i++) {
      const Piece<kChunks> piece(number + i);
      const bool exists = piece.row < TILE_KEYS && first + piece.row < tail_len;
#if HAS_BLOCK_TABLE
      const int token = first + piece.row;
      const u16* row = token < open.count ? open.states + token * 16 * kChunks
                                          : static_cast<const u16*>(tail) + start + (token - open.count) * step;
      const uint2* source = reinterpret_cast<const uint2*>(row + 16 * piece.chunk);
#else
      const uint2* source = reinterpret_cast<const uint2*>(static_cast<const u16*>(tail) + start +
                                                           (first + piece.row) * step + 16 * piece.chunk);
#endif
#pragma unroll
      for (int j = 0; j < 4; j++) fours[i][j] = exists ? source[j] : make_uint2(0, 0);
    }
#pragma unroll
    for (int i = 0; i < at_once; i++) {
      u32 pairs[8];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const uint2 four = fours[i][j];
        pairs[2 * j] = pack_half2(element_low(four.x) * factor, element_high(four.x) * factor);
        pairs[2 * j + 1] = pack_half2(element_low(four.y) * factor, element_high(four.y) * factor);
      }
      const Piece<kChunks> piece(number + i);
      if (piece.row < TILE_KEYS) store_piece(target, piece, pairs);
    }
  }
}
DEVICE void convert_tail_keys(const PrefillArgs& args, const QueryRows& rows, const Memory& memory, int first_key,
                              u32 target) {
  const int first_of_tail = rows.num_pages * kPageSize;
  convert_tail<kKeyPieces, kKeyChunks>(args.key_tail, open_page(args, rows, 0, first_key - first_of_tail),
                                       tail_start(rows, args.key_tail_stride), args.key_tail_stride[2],
                                       first_key - first_of_tail, rows.kv_len - first_of_tail,
                                       1.0f / memory.shared->tail_factor[0], target);
}
DEVICE void convert_tail_values(const PrefillArgs& args, const QueryRows& rows, const Memory& memory, int first_key,
                                u32 target) {
  const int first_of_tail = rows.num_pages * kPageSize;
  convert_tail<kValuePieces, kValueChunks>(args.value_tail, open_page(args, rows, 1, first_key - first_of_tail),
                                           tail_start(rows, args.value_tail_stride), args.value_tail_stride[2],
                                           first_key - first_of_tail, rows.kv_len - first_of_tail,
                                           1.0f / memory.shared->tail_factor[1], target);
}

// Bits of the largest finite magnitude of the tail's tokens `first` to `end`, of all threads together.
template <int kChunks>
DEVICE void find_largest(const void* tail, const OpenPage& open, i64 start, i64 step, int first, int end,
                         u32* largest) {
  u32 found = 0;
#pragma unroll 8
  for (int i = first * 4 * kChunks + threadIdx.x; i < end * 4 * kChunks; i += kThreads) {
#if HAS_BLOCK_TABLE
    const int token = i / (4 * kChunks);
    const u16* row = token < open.count ? open.states + token * 16 * kChunks
                                        : static_cast<const u16*>(tail) + start + (token - open.count) * step;
    const uint2 four = *reinterpret_cast<const uint2*>(row + i % (4 * kChunks) * 4);
#else
    const uint2 four = *reinterpret_cast<const uint2*>(static_cast<const u16*>(tail) + start +
                                                       i / (4 * kChunks) * step + i % (4 * kChunks) * 4);
#endif
    const float x[4] = {element_low(four.x), element_high(four.x), element_low(four.y), element_high(four.y)};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const u32 bits = __float_as_uint(x[j]) & 0x7FFFFFFFu;
      found = max(found, bits < 0x7F800000u ? bits : 0u);
    }
  }
  found = __reduce_max_sync(~0u, found);
  if ((threadIdx.x & 31) == 0) atomicMax(largest, found);
}
// The powers of two that bring the tail to the middle of the 16-bit floats, as late as a barrier after the last call of
// find_largest. One thread.
DEVICE void set_tail_factors(Shared& shared) {
  for (int which = 0; which < 2; which++)
    shared.tail_factor[which] =
        power_of_two(max(min(exponent_of(__uint_as_float(shared.tail_largest[which]), -100) - 13, 110), -110));
}
