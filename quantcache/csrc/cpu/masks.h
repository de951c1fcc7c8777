// Masks on the scores of one tile: (64 tokens, 4 rows) starting at token `first`.
#pragma once

#include "plan.h"
#include "simd.h"

namespace {

// The keys that a row may see by position, first and last included. The last query sits on the last key.
struct Reach {
  int64_t first, last;
};

// What a row of a band sees, worked out once a task: divisions take as long as a tile's exponentials.
struct RowPlace {
  Reach reach;
  int64_t mask_start;  // element of args.attn_mask for the first key
};
static_assert(sizeof(RowPlace) <= kPlaceFloats * sizeof(float), "room for the place of a row");

static RowPlace place_row(const AttentionPlan& plan, int64_t head, int64_t row) {
  const AttentionArgs& args = *plan.args;
  int64_t own = row % plan.rows, query = plan.first_query + own % plan.num_queries;
  int64_t batch = band_of(plan, head).first + row / plan.rows;
  int64_t q_head = head % args.num_kv_heads * plan.group + own / plan.num_queries;
  int64_t position = plan.kv_len - args.query_len + query;
  int64_t first = args.window ? position - args.window + 1 : 0;
  return {{first > 0 ? first : 0, args.is_causal ? position : plan.kv_len - 1},
          batch * args.mask_stride[0] + q_head * args.mask_stride[1] + query * args.mask_stride[2]};
}

// Hides what lies outside reach[row]; also the rows of a partial block behind the last key.
static void hide_out_of_reach(float* scores, int64_t first, int64_t count, const Reach* reach) {
  for (int64_t row = 0; row < 4; ++row)
    for (int64_t token = 0; token < count; ++token)
      if (first + token < reach[row].first || first + token > reach[row].last) scores[token * 4 + row] = -kInfinity;
}

static bool all_true(const uint8_t* mask, int64_t stride, int64_t count) {
  if (stride == 0) return *mask;
  if (stride != 1 || count != kPageSize) return false;
  uint64_t words[kPageSize / 8], all = 0x0101010101010101u;
  __builtin_memcpy(words, mask, sizeof words);
  for (uint64_t word : words) all &= word;
  return all == 0x0101010101010101u;
}

static float half_as_float(Dtype dtype, uint16_t bits) {
  uint32_t rest = uint32_t(bits & 0x7FFF) << 13, sign = uint32_t(bits & 0x8000) << 16;
  if (dtype == kBFloat16) rest = uint32_t(bits & 0x7FFF) << 16;
  float value;
  __builtin_memcpy(&value, &rest, sizeof value);
  if (dtype == kFloat16) {
    value *= 0x1p112f;
    if (rest >= 0x0F800000u) value = rest & 0x007FE000u ? __builtin_nanf("") : kInfinity;
  }
  return sign ? -value : value;
}

// Applies args.attn_mask to `count` tokens of `num_rows` rows of a band.
static void apply_mask(const AttentionArgs& args, const RowPlace* places, int64_t num_rows, int64_t first,
                       int64_t count, float* scores) {
  Dtype dtype = static_cast<Dtype>(args.mask_dtype);
  int64_t stride = args.mask_stride[3], previous = -1;
  for (int64_t i = 0; i < num_rows; ++i) {
    int64_t start = places[i].mask_start + first * stride;
    if (dtype == kBool) {
      const uint8_t* mask = static_cast<const uint8_t*>(args.attn_mask) + start;
      if (start == previous || all_true(mask, stride, count)) {
        previous = start;
        continue;
      }
      for (int64_t token = 0; token < count; ++token)
        if (!mask[token * stride]) scores[token * 4 + i] = -kInfinity;
    } else if (dtype == kFloat32) {
      const float* mask = static_cast<const float*>(args.attn_mask) + start;
      for (int64_t token = 0; token < count; ++token) scores[token * 4 + i] += mask[token * stride];
    } else {
      const uint16_t* mask = static_cast<const uint16_t*>(args.attn_mask) + start;
      for (int64_t token = 0; token < count; ++token)
        scores[token * 4 + i] += half_as_float(dtype, mask[token * stride]);
    }
  }
}

}  // namespace
