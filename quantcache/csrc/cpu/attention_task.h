// The tasks of attention: where pages and tail lie, and the one softmax over all parts.
#pragma once

#include "attention.h"

namespace {

// query (padded_rows, width) = softmax_scale * query as float32; rows that do not exist are zero.
static void read_query(const AttentionPlan& plan, int64_t head, float* query) {
  const AttentionArgs& args = *plan.args;
  Dtype dtype = static_cast<Dtype>(args.dtype);
  int64_t first_q_head = head % args.num_kv_heads * plan.group;
  Band band = band_of(plan, head);
  const char* states = static_cast<const char*>(args.query);
  for (int64_t row = 0; row < plan.padded_rows; ++row) {
    float* target = query + row * plan.width;
    if (row >= band.count * plan.rows) {
      __builtin_memset(target, 0, plan.width * sizeof(float));
      continue;
    }
    int64_t own = row % plan.rows;
    int64_t offset = (band.first + row / plan.rows) * args.query_stride[0] +
                     (first_q_head + own / plan.num_queries) * args.query_stride[1] +
                     (plan.first_query + own % plan.num_queries) * args.query_stride[2];
    read_any_row(dtype, states + offset * element_size(dtype), args.head_dim, target, plan.width);
    for (int64_t d = 0; d < plan.width; d += kLanes) store(target + d, load(target + d) * float(args.softmax_scale));
  }
}

// Codes in rows of `width`: as they are where head_dim is that already, else a copy padded with zeros.
static const int8_t* padded_codes(const int8_t* codes, int64_t head_dim, int64_t width, float* tile) {
  if (head_dim == width) return codes;
  int8_t* padded = reinterpret_cast<int8_t*>(tile);
  for (int64_t token = 0; token < kPageSize; ++token) {
    __builtin_memcpy(padded + token * width, codes + token * head_dim, head_dim);
    __builtin_memset(padded + token * width + head_dim, 0, width - head_dim);
  }
  return padded;
}

// The keys of a page, (64, head_dim), as floats (width, 64).
static void convert_keys(const int8_t* codes, int64_t head_dim, int64_t width, float* tile) {
  for (int64_t token = 0; token < kPageSize; token += 16)
    for (int64_t d = 0; d < width; d += 16) {
      Bytes16 rows[16];
      for (int i = 0; i < 16; ++i) {
        const int8_t* row = codes + (token + i) * head_dim + d;
        int8_t rest[16] = {};
        if (d + 16 > head_dim) __builtin_memcpy(rest, row, head_dim - d);
        rows[i] = load_bytes(d + 16 > head_dim ? rest : row);
      }
      transpose_bytes(rows);
      for (int i = 0; i < 16; ++i) {
        int8_t channel[16];
        __builtin_memcpy(channel, rows + i, sizeof channel);
        for (int t = 0; t < 16; t += kLanes) store(tile + (d + i) * kPageSize + token + t, load_codes(channel + t));
      }
    }
}

// The values of a page, (64, head_dim), as floats (64, width).
static void convert_values(const int8_t* codes, int64_t head_dim, int64_t width, float* tile) {
  int64_t whole = head_dim / kLanes * kLanes;
  for (int64_t token = 0; token < kPageSize; ++token, codes += head_dim, tile += width) {
    for (int64_t d = 0; d < whole; d += kLanes) store(tile + d, load_codes(codes + d));
    for (int64_t d = whole; d < width; d += kLanes) {
      int8_t rest[kLanes] = {};
      if (d < head_dim) __builtin_memcpy(rest, codes + d, head_dim - d);
      store(tile + d, load_codes(rest));
    }
  }
}

// The page of a segment that starts with page `start` of the layer, of one head and for a sequence.
static SegmentArgs page_of(const AttentionPlan& plan, const SegmentArgs& segment, int64_t start, int64_t page,
                           int64_t sequence, int64_t head) {
  const AttentionArgs& args = *plan.args;
  int64_t row = stored_row(args.row_table, sequence, page), kv_head = head % args.num_kv_heads;
  if (segment.chunk_bytes) {
    int64_t offset = row * segment.block_bytes + kv_head * segment.chunk_bytes;
    return {segment.key_qdata + offset,
            segment.key_metadata + offset / 4,
            segment.value_qdata + offset,
            segment.value_metadata + offset / 4,
            1,
            1,
            0,
            0};
  }
  int64_t index = ((page - start) * segment.rows + row) * args.num_kv_heads + kv_head;
  return {segment.key_qdata + index * kPageSize * args.head_dim,
          segment.key_metadata + index * args.head_dim,
          segment.value_qdata + index * kPageSize * args.v_head_dim,
          segment.value_metadata + index * kPageSize,
          1,
          1,
          0,
          0};
}

// The page `page` of the layer for the sequences `begin` to `end` of a band, which read it from one row.
static void attend_page(const AttentionPlan& plan, const SegmentArgs& segment, int64_t start, int64_t page,
                        int64_t head, int64_t begin, int64_t end, const Scratch& scratch, Partial state) {
  const AttentionArgs& args = *plan.args;
  int64_t sequence = band_of(plan, head).first + begin;
  const SegmentArgs own = page_of(plan, segment, start, page, sequence, head);
  unpack_metadata(own.key_metadata, args.head_dim, scratch.key_scale, scratch.key_zero);
  unpack_metadata(own.value_metadata, kPageSize, scratch.value_scale, scratch.value_zero);
  const int8_t *next_keys = nullptr, *next_values = nullptr;
  if (page + 1 < start + segment.num_pages) {
    const SegmentArgs next = page_of(plan, segment, start, page + 1, sequence, head);
    next_keys = next.key_qdata;
    next_values = next.value_qdata;
  }
  int64_t first = page * kPageSize;
  if ((end - begin) * plan.rows >= kWorthConverting) {
    convert_keys(own.key_qdata, args.head_dim, plan.width, scratch.key_tile);
    convert_values(own.value_qdata, args.v_head_dim, plan.v_width, scratch.value_tile);
    Block<kConverted> block{scratch.key_tile, scratch.value_tile, kPageSize,  plan.v_width, first, kPageSize,
                            nullptr,          next_keys,          next_values};
    attend_block(plan, block, head, begin, end, scratch, state);
    return;
  }
  Block<kCodes> block{padded_codes(own.key_qdata, args.head_dim, plan.width, scratch.key_tile),
                      padded_codes(own.value_qdata, args.v_head_dim, plan.v_width, scratch.value_tile),
                      plan.width,
                      plan.v_width,
                      first,
                      kPageSize,
                      own.value_qdata,
                      next_keys,
                      nullptr};
  attend_block(plan, block, head, begin, end, scratch, state);
}

// The tail from token `first` of the layer on, for the sequence `member` of a band.
static void attend_tail(const AttentionPlan& plan, int64_t first, int64_t head, int64_t member, const Scratch& scratch,
                        Partial state) {
  const AttentionArgs& args = *plan.args;
  Dtype dtype = static_cast<Dtype>(args.dtype);
  int64_t batch = band_of(plan, head).first + member, kv_head = head % args.num_kv_heads;
  int64_t start = first - plan.num_pages * kPageSize;
  int64_t count = args.tail_len - start < kPageSize ? args.tail_len - start : kPageSize;
  auto read = [&](const void* states, const int64_t* stride, int64_t head_dim, int64_t width, float* tile) {
    for (int64_t token = 0; token < count; ++token) {
      int64_t offset = batch * stride[0] + kv_head * stride[1] + (start + token) * stride[2];
      read_any_row(dtype, static_cast<const char*>(states) + offset * element_size(dtype), head_dim,
                   tile + token * width, width);
    }
  };
  read(args.key_tail, args.key_tail_stride, args.head_dim, plan.width, scratch.key_tile);
  read(args.value_tail, args.value_tail_stride, args.v_head_dim, plan.v_width, scratch.value_tile);
  Block<kExact> block{scratch.key_tile, scratch.value_tile, plan.width, plan.v_width, first, count, nullptr, nullptr,
                      nullptr};
  attend_block(plan, block, head, member, member + 1, scratch, state);
}

static void attend(const AttentionPlan& plan, int64_t head, int64_t split, float* memory) {
  const AttentionArgs& args = *plan.args;
  Scratch scratch(plan, memory);
  Partial state(plan, head, split);
  for (int64_t row = 0; row < plan.padded_rows; ++row) {
    state.row_max[row] = -kInfinity;
    state.row_sum[row] = state.value_offset[row] = 0;
  }
  __builtin_memset(state.output, 0, plan.padded_rows * plan.v_width * sizeof(float));
  read_query(plan, head, scratch.query);
  int64_t rows = band_of(plan, head).count * plan.rows;
  for (int64_t row = 0; row < rows; ++row) scratch.places[row] = place_row(plan, head, row);

  int64_t num_blocks = plan.end_block - plan.first_block;
  int64_t block = plan.first_block + num_blocks * split / plan.num_splits;
  int64_t end = plan.first_block + num_blocks * (split + 1) / plan.num_splits;
  const SegmentArgs* segment = args.segments;
  int64_t segment_start = 0;
  Band band = band_of(plan, head);
  for (; block < end && block < plan.num_pages; ++block) {
    while (block >= segment_start + segment->num_pages) segment_start += segment++->num_pages;
    for (int64_t member = 0, next; member < band.count; member = next) {
      int64_t row = stored_row(args.row_table, band.first + member, block);
      next = member + 1;
      while (next < band.count && stored_row(args.row_table, band.first + next, block) == row) ++next;
      attend_page(plan, *segment, segment_start, block, head, member, next, scratch, state);
    }
  }
  for (; block < end; ++block)
    for (int64_t member = 0; member < band.count; ++member)
      attend_tail(plan, block * kPageSize, head, member, scratch, state);
}

// The partials of all splits, in order, and the sink to the output rows.
static void merge(const AttentionPlan& plan, int64_t head, float* memory) {
  const AttentionArgs& args = *plan.args;
  float* output = Scratch(plan, memory).output_row;
  Dtype dtype = static_cast<Dtype>(args.dtype);
  int64_t first_q_head = head % args.num_kv_heads * plan.group;
  Band band = band_of(plan, head);
  for (int64_t row = 0; row < band.count * plan.rows; ++row) {
    int64_t batch = band.first + row / plan.rows, own = row % plan.rows;
    int64_t q_head = first_q_head + own / plan.num_queries, query = plan.first_query + own % plan.num_queries;
    float row_max = args.sinks ? args.sinks[q_head] : -kInfinity;
    for (int64_t split = 0; split < plan.num_splits; ++split) {
      float other = Partial(plan, head, split).row_max[row];
      row_max = other > row_max ? other : row_max;
    }
    float base = row_max == -kInfinity ? 0.0f : row_max;
    float row_sum = args.sinks ? __builtin_expf(args.sinks[q_head] - base) : 0.0f;
    __builtin_memset(output, 0, plan.v_width * sizeof(float));
    for (int64_t split = 0; split < plan.num_splits; ++split) {
      Partial part(plan, head, split);
      float share = __builtin_expf(part.row_max[row] - base);
      row_sum += share * part.row_sum[row];
      const float* part_output = part.output + row * plan.v_width;
      for (int64_t d = 0; d < plan.v_width; d += kLanes)
        store(output + d, load(output + d) + (load(part_output + d) - part.value_offset[row]) * share);
    }
    Vec divisor = splat(row_sum == 0 ? 1.0f : row_sum);
    for (int64_t d = 0; d < plan.v_width; d += kLanes) store(output + d, load(output + d) / divisor);
    int64_t place = (batch * args.query_len + query) * args.num_q_heads + q_head;
    write_any_row(dtype, output, args.v_head_dim,
                  static_cast<char*>(args.output) + place * args.v_head_dim * element_size(dtype));
  }
}

}  // namespace
