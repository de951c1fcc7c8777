// attend: attention of the query rows of one KV head to a run of blocks (pages, then the tail in blocks of 64), of one
// sequence or of a band of them that share pages.
//   restored key = scale_d * (code - zero_d), a scale per channel: folded into the query once a page,
//     score = sum_d (q_d * scale_d) * code_d  -  sum_d (q_d * scale_d) * zero_d
//   restored value = scale_t * (code - zero_t), a scale per token: folded into the weight,
//     output_d = sum_t (p_t * scale_t) * code_td  -  sum_t (p_t * scale_t) * zero_t
// Traffic: each page is read once, 2 * 64 * head_dim bytes and its metadata, whatever the number of rows in the group
// and of neighbouring sequences that read it; for many rows it is made floats once, which stay in a core's second cache.
// All arithmetic is float32. A hidden token has the weight zero even if its page is broken.
#pragma once

#include "dtypes.h"
#include "masks.h"
#include "plan.h"
#include "products.h"

namespace {

struct Scratch {
  RowPlace* places;  // (padded_rows,)
  float *query, *folded, *key_scale, *key_zero, *key_tile, *value_tile, *scores, *value_scale, *value_zero, *output_row;
  Scratch(const AttentionPlan& plan, float* p) {
    auto take = [&p](int64_t n) {
      float* taken = p;
      p += n;
      return taken;
    };
    places = reinterpret_cast<RowPlace*>(take(plan.padded_rows * kPlaceFloats));
    query = take(plan.padded_rows * plan.width);
    folded = take(kRowTile * plan.width);
    key_scale = take(plan.width);
    key_zero = take(plan.width);
    key_tile = take(kPageSize * plan.width);
    value_tile = take(kPageSize * plan.v_width);
    scores = take(kPageSize * kRowTile);
    value_scale = take(kPageSize + kWidthStep);
    value_zero = take(kPageSize + kWidthStep);
    output_row = p;
  }
};

// The online softmax of one split of a KV head, for all rows: output (padded_rows, v_width) is not normalised, and
// value_offset is what the values' zero points take away from each of its elements.
struct Partial {
  float *row_max, *row_sum, *value_offset, *output;
  Partial(const AttentionPlan& plan, int64_t head, int64_t split) {
    output = plan.partials + head * plan.head_stride + split * plan.partial_size;
    row_max = output + plan.padded_rows * plan.v_width;
    row_sum = row_max + plan.padded_rows;
    value_offset = row_sum + plan.padded_rows;
  }
};

// Query rows from which on a page is made floats once for all of them: SSE2 takes as long to convert as to multiply, the
// others do both at once, and win what sums across lanes take.
constexpr int64_t kWorthConverting = (kLanes == 4 ? 2 : 4) * kRowTile;

// What a block of tokens is made of: int8 codes of a page as they are stored; the same as floats, keys (width, 64); or
// the tail, restored.
enum Form { kCodes, kConverted, kExact };

template <Form>
struct CodeOf {
  typedef float type;
};
template <>
struct CodeOf<kCodes> {
  typedef int8_t type;
};

// 64 tokens or fewer from token `first` on.
template <Form form>
struct Block {
  const typename CodeOf<form>::type *keys, *values;
  int64_t key_stride, value_stride, first, count;
  const int8_t *own_values, *next_keys, *next_values;  // to be fetched ahead, or null
};

QC_INLINE Vec repeat4(const float* p) {
  Vec v = {p[0], p[1], p[2], p[3]};
#if defined(__AVX512F__)
  v = QC_SHUFFLE(v, v, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
#elif defined(__AVX2__)
  v = QC_SHUFFLE(v, v, 0, 1, 2, 3, 0, 1, 2, 3);
#endif
  return v;
}

QC_INLINE void store4(float* p, Vec v) { __builtin_memcpy(p, &v, 4 * sizeof(float)); }

// One number per token to the 4 rows of each token of a vector.
QC_INLINE Vec spread4(const float* p) {
  Vec v = load(p);
#if defined(__AVX512F__)
  return QC_SHUFFLE(v, v, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
#elif defined(__AVX2__)
  return QC_SHUFFLE(v, v, 0, 0, 0, 0, 1, 1, 1, 1);
#else
  return QC_SHUFFLE(v, v, 0, 0, 0, 0);
#endif
}

// folded (4, width) = query * key_scale, and bias (4,) = sum_d folded * key_zero.
static void fold_query(const float* query, const Scratch& scratch, int64_t width, float* bias) {
  Vec sums[4] = {};
  for (int64_t d = 0; d < width; d += kLanes) {
    Vec scale = load(scratch.key_scale + d), zero = load(scratch.key_zero + d);
#pragma GCC unroll 4
    for (int row = 0; row < 4; ++row) {
      Vec folded = load(query + row * width + d) * scale;
      store(scratch.folded + row * width + d, folded);
      sums[row] += folded * zero;
    }
  }
  store4(bias, across_groups(sum_groups(sums[0], sums[1], sums[2], sums[3]), add));
}

// A step of the online softmax: turns scores (64, 4) into weights, in place, and moves row_max, row_sum and
// value_offset of the 4 rows on; rescale (4,) is what the output so far is to be multiplied by.
template <bool kIsPage>
static void softmax_step(const Scratch& scratch, int64_t count, Partial state, int64_t row, float* rescale) {
  Vec tile_max = splat(-kInfinity);
  for (int64_t i = 0; i < count * 4; i += kLanes) tile_max = larger(load(scratch.scores + i), tile_max);
  Vec old_max = repeat4(state.row_max + row);
  Vec new_max = larger(across_groups(tile_max, larger), old_max);
  // Rows that have seen nothing keep the row_max -inf; any finite base gives their tokens weights of zero.
  Vec base = select(new_max == splat(-kInfinity), Vec{}, new_max);
  Vec change = exp_negative(old_max - base);
  Vec row_sum{}, value_offset{};
  for (int64_t i = 0; i < count * 4; i += kLanes) {
    Vec score = load(scratch.scores + i);
    Vec weight = exp_negative(score - base);
    row_sum += weight;
    if (kIsPage) {
      weight = select(score == splat(-kInfinity), Vec{}, weight * spread4(scratch.value_scale + i / 4));
      value_offset += weight * spread4(scratch.value_zero + i / 4);
    }
    store(scratch.scores + i, weight);
  }
  store4(state.row_max + row, new_max);
  store4(state.row_sum + row, repeat4(state.row_sum + row) * change + across_groups(row_sum, add));
  store4(state.value_offset + row, repeat4(state.value_offset + row) * change + across_groups(value_offset, add));
  store4(rescale, change);
}

// What the rows of a tile that are not attended for hold, which may be other sequences' rows: kept over softmax_step.
template <int kRows>
struct KeptRows {
  static constexpr int kKept = kRowTile - kRows;
  Partial state;
  int64_t row;
  float kept[3][kKept ? kKept : 1];
  KeptRows(Partial state, int64_t row) : state(state), row(row + kRows) { copy(true); }
  ~KeptRows() { copy(false); }
  void copy(bool out) {
    float* parts[3] = {state.row_max + row, state.row_sum + row, state.value_offset + row};
    for (int part = 0; part < 3; ++part)
      for (int i = 0; i < kKept; ++i) (out ? kept[part][i] : parts[part][i]) = out ? parts[part][i] : kept[part][i];
  }
};

// The rows `row` to row + kRows of a band, or to row + 4 where kRows is 4, in tile number `tile` of the block.
template <int kRows, Form form>
static void attend_rows(const AttentionPlan& plan, const Block<form>& block, int64_t head, int64_t row, int64_t tile,
                        const Scratch& scratch, Partial state) {
  constexpr bool kIsPage = form != kExact;
  const AttentionArgs& args = *plan.args;
  const RowPlace* places = scratch.places + row;
  Reach reach[kRowTile];
  bool is_seen = false, is_whole = block.count == kPageSize;
  for (int64_t i = 0; i < kRowTile; ++i) {
    reach[i] = places[i < kRows ? i : kRows - 1].reach;
    is_seen |= reach[i].first < block.first + block.count && reach[i].last >= block.first;
    is_whole &= reach[i].first <= block.first && reach[i].last >= block.first + block.count - 1;
  }
  if (!is_seen) return;

  const float* query = scratch.query + row * plan.width;
  alignas(16) float bias[4] = {}, rescale[4];
  if (kIsPage) {
    fold_query(query, scratch, plan.width, bias);
    query = scratch.folded;
  }
  if constexpr (form == kConverted)
    score_page<kRows>(query, plan.width, block.keys, bias, scratch.scores);
  else
    score_tokens<kRows>(query, plan.width, block.keys, block.key_stride, block.count, scratch.scores,
                        tile == 0 ? block.own_values : nullptr, block.value_stride);
  int64_t count = round_up(block.count, 4);
  Vec biases = form == kCodes ? repeat4(bias) : Vec{}, cap = splat(float(args.softcap));
  if (form == kCodes || args.softcap)
    for (int64_t i = 0; i < count * 4; i += kLanes) {
      Vec score = load(scratch.scores + i) - biases;
      store(scratch.scores + i, args.softcap ? cap * tanh_vec(score / cap) : score);
    }
  if (!is_whole) hide_out_of_reach(scratch.scores, block.first, count, reach);
  if (args.attn_mask) apply_mask(args, places, kRows, block.first, block.count, scratch.scores);
  {
    KeptRows<kRows> kept(state, row);
    softmax_step<kIsPage>(scratch, count, state, row, rescale);
  }
  add_values<kRows>(scratch.scores, rescale, block.values, block.value_stride, block.count,
                    state.output + row * plan.v_width, plan.v_width,
                    tile == 0   ? block.next_keys
                    : tile == 1 ? block.next_values
                                : nullptr);
}

// A block for the sequences `begin` to `end` of a band.
template <Form form>
static void attend_block(const AttentionPlan& plan, const Block<form>& block, int64_t head, int64_t begin, int64_t end,
                         const Scratch& scratch, Partial state) {
  for (int64_t row = begin * plan.rows, tile = 0; row < end * plan.rows; row += kRowTile, ++tile) {
    int64_t rows = end * plan.rows - row;
    if (rows >= 4)
      attend_rows<4>(plan, block, head, row, tile, scratch, state);
    else if (rows == 3)
      attend_rows<3>(plan, block, head, row, tile, scratch, state);
    else if (rows == 2)
      attend_rows<2>(plan, block, head, row, tile, scratch, state);
    else
      attend_rows<1>(plan, block, head, row, tile, scratch, state);
  }
}

}  // namespace
