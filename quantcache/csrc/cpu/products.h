// The two products of attention for a tile of 4 query rows: scores = query . keys and output += weights . values.
// Scores and weights lie as (token, row). A loaded vector of codes is converted once and used by all rows of the tile;
// a page for many tiles is converted before, for all of them, and its keys lie as (channel, token) then. int8 dot
// products (VNNI) would need the query cut into three int8 parts to keep float32 accuracy, bfloat16 ones (vdpbf16ps)
// into three bfloat16 parts: 21 and 11 products an instruction against 16 of the plain FMA, and VNNI then needs
// transposed keys. So FMA it is.
#pragma once

#include "plan.h"
#include "simd.h"

namespace {

constexpr int kTokenTile = kLanes / 4;
constexpr int64_t kCacheLine = 64;

// Lane i of each group of 4: the sum over the group of vector i.
QC_INLINE Vec sum_groups(Vec a, Vec b, Vec c, Vec d) {
#if defined(__AVX512F__)
#define QC_LOW 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29
#define QC_HIGH 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31
#elif defined(__AVX2__)
#define QC_LOW 0, 8, 1, 9, 4, 12, 5, 13
#define QC_HIGH 2, 10, 3, 11, 6, 14, 7, 15
#else
#define QC_LOW 0, 4, 1, 5
#define QC_HIGH 2, 6, 3, 7
#endif
  Vec ac = QC_SHUFFLE(a, c, QC_LOW) + QC_SHUFFLE(a, c, QC_HIGH);
  Vec bd = QC_SHUFFLE(b, d, QC_LOW) + QC_SHUFFLE(b, d, QC_HIGH);
  return QC_SHUFFLE(ac, bd, QC_LOW) + QC_SHUFFLE(ac, bd, QC_HIGH);
#undef QC_LOW
#undef QC_HIGH
}

// Group i of the result: the sum over the groups of tokens[i].
QC_INLINE Vec sum_across(const Vec* tokens) {
#if defined(__AVX512F__)
#define QC_LOW 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define QC_HIGH 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
  Vec low = QC_SHUFFLE(tokens[0], tokens[1], QC_LOW) + QC_SHUFFLE(tokens[0], tokens[1], QC_HIGH);
  Vec high = QC_SHUFFLE(tokens[2], tokens[3], QC_LOW) + QC_SHUFFLE(tokens[2], tokens[3], QC_HIGH);
#undef QC_LOW
#undef QC_HIGH
  return QC_SHUFFLE(low, high, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         QC_SHUFFLE(low, high, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
#elif defined(__AVX2__)
  return QC_SHUFFLE(tokens[0], tokens[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         QC_SHUFFLE(tokens[0], tokens[1], 4, 5, 6, 7, 12, 13, 14, 15);
#else
  return tokens[0];
#endif
}

// Asks for the bytes of the next product while this one computes: pages are too short for the hardware to guess ahead.
QC_INLINE void fetch_ahead(const int8_t* ahead, int64_t start, int64_t size) {
  for (int64_t i = 0; ahead && i < size; i += kCacheLine) __builtin_prefetch(ahead + start + i);
}

// scores (64, 4) = query (kRows, width) . keys (count, stride), for count rounded up to 4; rows past kRows get zeros.
// ahead: (count, ahead_stride) codes that come next, or null.
template <int kRows, typename Code>
static void score_tokens(const float* query, int64_t width, const Code* keys, int64_t stride, int64_t count,
                         float* scores, const int8_t* ahead, int64_t ahead_stride) {
  for (int64_t token = 0; token < count; token += kTokenTile) {
    const Code* tile = keys + token * stride;
    fetch_ahead(ahead, token * ahead_stride, kTokenTile * ahead_stride);
    Vec sums[kTokenTile][4] = {};
    for (int64_t d = 0; d < width; d += kLanes) {
      Vec part[kRows];
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) part[row] = load(query + row * width + d);
#pragma GCC unroll 4
      for (int t = 0; t < kTokenTile; ++t) {
        Vec key = load_codes(tile + t * stride + d);
#pragma GCC unroll 4
        for (int row = 0; row < kRows; ++row) sums[t][row] += part[row] * key;
      }
    }
    Vec tokens[kTokenTile];
#pragma GCC unroll 4
    for (int t = 0; t < kTokenTile; ++t) tokens[t] = sum_groups(sums[t][0], sums[t][1], sums[t][2], sums[t][3]);
    store(scores + token * 4, sum_across(tokens));
  }
}

// Lanes of four rows to four vectors of a group per token: lane 4 * t + i of the result is lane t of row i.
QC_INLINE void interleave_rows(const Vec* rows, Vec* tokens) {
#if defined(__AVX512F__)
#define QC_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define QC_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define QC_LOW_PAIRS 0, 1, 16, 17, 2, 3, 18, 19, 4, 5, 20, 21, 6, 7, 22, 23
#define QC_HIGH_PAIRS 8, 9, 24, 25, 10, 11, 26, 27, 12, 13, 28, 29, 14, 15, 30, 31
#elif defined(__AVX2__)
#define QC_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define QC_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#define QC_LOW_PAIRS 0, 1, 8, 9, 2, 3, 10, 11
#define QC_HIGH_PAIRS 4, 5, 12, 13, 6, 7, 14, 15
#else
#define QC_LOW 0, 4, 1, 5
#define QC_HIGH 2, 6, 3, 7
#define QC_LOW_PAIRS 0, 1, 4, 5
#define QC_HIGH_PAIRS 2, 3, 6, 7
#endif
  Vec low01 = QC_SHUFFLE(rows[0], rows[1], QC_LOW), high01 = QC_SHUFFLE(rows[0], rows[1], QC_HIGH);
  Vec low23 = QC_SHUFFLE(rows[2], rows[3], QC_LOW), high23 = QC_SHUFFLE(rows[2], rows[3], QC_HIGH);
  tokens[0] = QC_SHUFFLE(low01, low23, QC_LOW_PAIRS);
  tokens[1] = QC_SHUFFLE(low01, low23, QC_HIGH_PAIRS);
  tokens[2] = QC_SHUFFLE(high01, high23, QC_LOW_PAIRS);
  tokens[3] = QC_SHUFFLE(high01, high23, QC_HIGH_PAIRS);
#undef QC_LOW
#undef QC_HIGH
#undef QC_LOW_PAIRS
#undef QC_HIGH_PAIRS
}

// scores (64, 4) = query (kRows, width) . keys (width, 64), a page's, - bias (4,); rows past kRows get zeros. No sum goes
// across lanes.
template <int kRows>
static void score_page(const float* query, int64_t width, const float* keys, const float* bias, float* scores) {
  constexpr int kVectors = kLanes == 16 ? 4 : 2;  // what 32 or 16 registers hold for 4 rows
  for (int64_t token = 0; token < kPageSize; token += kVectors * kLanes) {
    Vec sums[kVectors][4] = {};
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) sums[v][row] = splat(-bias[row]);
    for (int64_t d = 0; d < width; ++d) {
      Vec key[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) key[v] = load(keys + d * kPageSize + token + v * kLanes);
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) {
        Vec part = splat(query[row * width + d]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[v][row] += part * key[v];
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Vec tokens[4];
      interleave_rows(sums[v], tokens);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) store(scores + (token + v * kLanes) * 4 + i * kLanes, tokens[i]);
    }
  }
}

// output (kRows, kColumns vectors of a row of v_width) = rescale * output + weights . values.
template <int kRows, int kColumns, typename Code>
QC_INLINE void add_columns(const float* weights, const float* rescale, const Code* values, int64_t stride,
                           int64_t count, float* output, int64_t v_width, const int8_t* ahead) {
  Vec total[kRows][kColumns];
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) total[row][c] = load(output + row * v_width + c * kLanes) * rescale[row];
  for (int64_t token = 0; token < count; ++token) {
    fetch_ahead(ahead, token * kColumns * kLanes, kColumns * kLanes);
    Vec codes[kColumns];
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) codes[c] = load_codes(values + token * stride + c * kLanes);
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      Vec weight = splat(weights[token * 4 + row]);
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) total[row][c] += weight * codes[c];
    }
  }
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) store(output + row * v_width + c * kLanes, total[row][c]);
}

// output (kRows, v_width) = rescale (kRows,) * output + weights (count, 4) . values (count, stride).
// ahead: count * v_width codes that come next, or null.
template <int kRows, typename Code>
static void add_values(const float* weights, const float* rescale, const Code* values, int64_t stride, int64_t count,
                       float* output, int64_t v_width, const int8_t* ahead) {
  constexpr int kColumns = kLanes == 16 ? 4 : 2;  // what 32 or 16 registers hold for 4 rows
  int64_t d = 0;
  for (; d + kColumns * kLanes <= v_width; d += kColumns * kLanes)
    add_columns<kRows, kColumns>(weights, rescale, values + d, stride, count, output + d, v_width,
                                 ahead ? ahead + d * count : nullptr);
  for (; d < v_width; d += kLanes)
    add_columns<kRows, 1>(weights, rescale, values + d, stride, count, output + d, v_width, nullptr);
}

}  // namespace
