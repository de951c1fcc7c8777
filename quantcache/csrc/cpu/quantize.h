// store_page: 64 tokens of one head to int8 codes and metadata, bit for bit as reference.quantize does it.
// Traffic: head_dim * (size of an element + 1) bytes a token, and the metadata. Division and rounding are IEEE:
// no fast-math here. Contracting to FMA changes nothing, since steps * half (16 by 8 bits) is exact in float32.
#pragma once

#include "dtypes.h"
#include "plan.h"

namespace {

// scheme.py explains the numbers.
constexpr int kQMin = -128;
constexpr float kMaxSteps = 254, kMaxAbsSteps = 32512, kMinScale = 0x1p-120f;
constexpr int64_t kTokensAhead = 16;  // what hides the latency of memory

QC_INLINE Vec nearest_step(Vec states, Vec scale) {
  Vec half = 0.5f * scale, quarter = 0.25f * scale;
  Vec steps = round_even(states / scale);
  Vec remainder = 0.5f * states - steps * half;
  return steps + select(remainder > quarter, splat(1), Vec{}) - select(remainder < -quarter, splat(1), Vec{});
}

struct Affine {
  Vec scale, zero_point;
  VecU pair;
};

// The map of groups from `low` to `high`, which are finite.
QC_INLINE Affine affine_of(Vec low, Vec high) {
  // Divided before they are subtracted: the range of a float32 group can exceed float32.
  Vec spread = high / kMaxSteps - low / kMaxSteps;
  Vec floor = larger(magnitude(low), magnitude(high)) / kMaxAbsSteps;
  Vec wanted = larger(larger(spread, floor), splat(kMinScale));
  Vec scale = as_float((as_words(wanted) + 0xFFFFu) & 0xFFFF0000u);
  // The lowest state has the lowest step: equal steps of unequal states are ties of the same pair of integers.
  Vec zero_point = float(kQMin) - nearest_step(low, scale);
  return {scale, zero_point, (as_words(scale) >> 16) | ((VecU)to_int(zero_point) << 16)};
}

// What quantising a vector of states needs of its affine map.
struct Quantizer {
  Vec scale, zero_point, inverse, half, quarter;
  Quantizer(Vec scale, Vec zero_point)
      : scale(scale),
        zero_point(zero_point),
        inverse(1.0f / scale),
        half(0.5f * scale),
        quarter(0.25f * scale) {}
};

// The nearest multiple is unique unless there is a tie, so where the remainder is below half a scale the product with
// the inverse has found what the division finds, at a third of the cost. Ties and misses are divided.
QC_INLINE VecI codes_of(const Quantizer& map, Vec states) {
  Vec steps = round_even(states * map.inverse);
  Vec remainder = 0.5f * states - steps * map.half;
  if (__builtin_expect(any_at_least(magnitude(remainder), map.quarter), 0)) steps = nearest_step(states, map.scale);
  return to_int(steps + map.zero_point);
}

QC_INLINE VecU wider(VecU a, VecU b) { return a > b ? a : b; }

// `widest` holds the largest bits of a lane's magnitudes; compared as floats NaN would be lost.
QC_INLINE bool is_any_not_finite(VecU widest) {
  const VecU infinity = as_words(splat(kInfinity));
  return any_at_least(as_float(widest < infinity ? widest : infinity), splat(kInfinity));
}

// For states of which not all are finite, `count` vectors that lie `step` apart: the range of the finite ones, for each
// lane or, of a row, for all lanes. The others are moved to it: +inf to its end, -inf and NaN to its beginning.
template <bool kIsRow>
static __attribute__((noinline)) void saturate(float* states, int64_t count, int64_t step, Vec& low, Vec& high) {
  low = splat(kInfinity), high = splat(-kInfinity);
  for (int64_t i = 0; i < count; ++i) {
    Vec x = load(states + i * step);
    VecI is_finite = magnitude(x) < splat(kInfinity);
    low = smaller(select(is_finite, x, low), low);
    high = larger(select(is_finite, x, high), high);
  }
  if (kIsRow) low = splat(across_lanes(low, smaller)), high = splat(across_lanes(high, larger));
  VecI has_finite = low <= high;
  low = select(has_finite, low, Vec{}), high = select(has_finite, high, Vec{});
  // Of larger and smaller the second argument counts where the first is NaN.
  for (int64_t i = 0; i < count; ++i) store(states + i * step, smaller(larger(load(states + i * step), low), high));
}

// One vector of channels, tokens `width` apart: codes and pairs of `used` of its lanes.
static void store_key_channels(float* tile, int64_t width, int64_t head_dim, int64_t used, int8_t* qdata,
                               uint32_t* metadata) {
  Vec low = load(tile), high = low;
  VecU widest{};
  for (int64_t token = 0; token < kPageSize; ++token) {
    Vec states = load(tile + token * width);
    low = smaller(states, low);
    high = larger(states, high);
    widest = wider(widest, as_words(magnitude(states)));
  }
  if (__builtin_expect(is_any_not_finite(widest), 0)) saturate<false>(tile, kPageSize, width, low, high);
  Affine affine = affine_of(low, high);
  alignas(64) uint32_t pairs[kLanes];
  store_words(pairs, affine.pair);
  __builtin_memcpy(metadata, pairs, used * sizeof(uint32_t));
  const Quantizer map(affine.scale, affine.zero_point);
#pragma GCC unroll 2
  for (int64_t token = 0; token < kPageSize; ++token) {
    VecI codes = codes_of(map, load(tile + token * width));
    if (used == kLanes) {
      store_codes(qdata + token * head_dim, codes);
      continue;
    }
    int8_t rest[kLanes];
    store_codes(rest, codes);
    __builtin_memcpy(qdata + token * head_dim, rest, used);
  }
}

// kLanes tokens: each has its own scale. tile is (kLanes, width); padding repeats a state of the token.
static void store_value_tokens(float* tile, int64_t width, int64_t head_dim, int8_t* qdata, uint32_t* metadata) {
  alignas(64) float low[kLanes], high[kLanes], scale[kLanes], zero_point[kLanes];
  for (int64_t token = 0; token < kLanes; ++token) {
    float* row = tile + token * width;
    Vec lows = load(row), highs = lows;
    VecU widest{};
    for (int64_t d = 0; d < width; d += kLanes) {
      Vec states = load(row + d);
      lows = smaller(states, lows);
      highs = larger(states, highs);
      widest = wider(widest, as_words(magnitude(states)));
    }
    if (__builtin_expect(is_any_not_finite(widest), 0)) saturate<true>(row, width / kLanes, kLanes, lows, highs);
    low[token] = across_lanes(lows, smaller);
    high[token] = across_lanes(highs, larger);
  }
  Affine affine = affine_of(load(low), load(high));
  store_words(metadata, affine.pair);
  store(scale, affine.scale);
  store(zero_point, affine.zero_point);
  for (int64_t token = 0; token < kLanes; ++token) {
    const float* row = tile + token * width;
    const Quantizer map(splat(scale[token]), splat(zero_point[token]));
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      VecI codes = codes_of(map, load(row + d));
      if (d + kLanes <= head_dim) {
        store_codes(qdata + token * head_dim + d, codes);
        continue;
      }
      int8_t rest[kLanes];
      store_codes(rest, codes);
      __builtin_memcpy(qdata + token * head_dim + d, rest, head_dim - d);
    }
  }
}

// Where the states of one page of one head begin.
static const char* page_states(const StoreArgs& args, int64_t page, int64_t head) {
  int64_t batch = head / args.num_kv_heads, kv_head = head % args.num_kv_heads;
  int64_t start = batch * args.stride[0] + kv_head * args.stride[1] + page * kPageSize * args.stride[2];
  return static_cast<const char*>(args.states) + start * element_size(static_cast<Dtype>(args.dtype));
}

static void store_page(const StoreArgs& args, int64_t page, int64_t head, float* tile) {
  Dtype dtype = static_cast<Dtype>(args.dtype);
  int64_t width = round_up(args.head_dim, kWidthStep);
  const char* states = page_states(args, page, head);
  int64_t step = args.stride[2] * element_size(dtype), row_size = args.head_dim * element_size(dtype);
  // Tokens of a transposed view lie far apart, where the hardware does not guess ahead: a page's first tokens are
  // fetched while the page before it is worked on, its later ones and the lines it writes while it is read.
  int64_t heads = args.batch * args.num_kv_heads, task = page * heads + head + 1;
  const char* next = task < args.num_pages * heads ? page_states(args, task / heads, task % heads) : nullptr;
  auto fetch_next = [&](int64_t token, int64_t count) {
    for (int64_t end = token + count; next && token < end && token < kPageSize; ++token)
      for (int64_t i = 0; i < row_size; i += 64) __builtin_prefetch(next + token * step + i);
  };
  int8_t* written = args.qdata + (page * heads + head) * kPageSize * args.head_dim;
  for (int64_t token = 0; token < kPageSize; ++token) {
    for (int64_t i = 0; i < row_size && token + kTokensAhead < kPageSize; i += 64)
      __builtin_prefetch(states + (token + kTokensAhead) * step + i);
    for (int64_t i = 0; i < args.head_dim; i += 64) __builtin_prefetch(written + token * args.head_dim + i, 1);
    float* row = tile + token * width;
    read_any_row(dtype, states + token * step, args.head_dim, row, width);
    for (int64_t d = args.head_dim; d < width; ++d) row[d] = row[0];
  }
  int64_t index = page * args.batch * args.num_kv_heads + head;
  int8_t* qdata = args.qdata + index * kPageSize * args.head_dim;
  if (args.is_key) {
    uint32_t* metadata = args.metadata + index * args.head_dim;
    for (int64_t d = 0, each = kPageSize * kLanes / width; d < args.head_dim; d += kLanes) {
      fetch_next(d / kLanes * each, each);
      store_key_channels(tile + d, width, args.head_dim, args.head_dim - d < kLanes ? args.head_dim - d : kLanes,
                         qdata + d, metadata + d);
    }
  } else {
    uint32_t* metadata = args.metadata + index * kPageSize;
    for (int64_t token = 0; token < kPageSize; token += kLanes) {
      fetch_next(token, kLanes);
      store_value_tokens(tile + token * width, width, args.head_dim, qdata + token * args.head_dim, metadata + token);
    }
  }
}

}  // namespace
