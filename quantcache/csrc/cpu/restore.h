// restore_block: 64 tokens of a page, or up to 64 of the tail, of one head to dense rows, as reference.restore_*_pages.
// Traffic: head_dim * (size of an element + 1) bytes a token of a page, and the metadata.
#pragma once

#include "dtypes.h"
#include "plan.h"

namespace {

// Largest finite number of the dtype.
QC_INLINE float largest(Dtype dtype) {
  return dtype == kFloat16 ? 65504.0f : dtype == kBFloat16 ? 0x1.FEp127f : 0x1.FFFFFEp127f;
}

// Codes to states: (code - zero_point) * scale, kept finite unless the scale is NaN.
QC_INLINE Vec restored(Vec codes, Vec scale, Vec zero_point, float limit) {
  Vec states = (codes - zero_point) * scale;
  states = select(states > limit, splat(limit), states);
  return select(states < -limit, splat(-limit), states);
}

template <Dtype dtype, bool kIsKey>
static void restore_page(const RestoreArgs& args, const int8_t* qdata, const uint32_t* metadata, char* target,
                         float* scratch) {
  int64_t head_dim = args.head_dim, width = round_up(head_dim, kWidthStep);
  float *scale = scratch, *zero_point = scratch + width, *row = scratch + 2 * width;
  if (kIsKey) unpack_metadata(metadata, head_dim, scale, zero_point);
  for (int64_t token = 0; token < kPageSize; ++token) {
    const int8_t* codes = qdata + token * head_dim;
    VecU pair = VecU{} + (kIsKey ? 0 : metadata[token]);
    Vec token_scale = metadata_scale(pair), token_zero = metadata_zero_point(pair);
    auto states_at = [&](int64_t d, const int8_t* from) {
      return restored(load_codes(from), kIsKey ? load(scale + d) : token_scale,
                      kIsKey ? load(zero_point + d) : token_zero, largest(dtype));
    };
    char* to = target + token * head_dim * element_size(dtype);
    int64_t d = 0;
    for (; d + kLanes <= head_dim; d += kLanes) store_from_float<dtype>(to, d, states_at(d, codes + d));
    if (d == head_dim) continue;
    int8_t rest[kLanes] = {};
    __builtin_memcpy(rest, codes + d, head_dim - d);
    store(row, states_at(d, rest));
    write_row<dtype>(row, head_dim - d, to + d * element_size(dtype));
  }
}

template <Dtype dtype>
static void restore_typed(const RestoreArgs& args, const int8_t* qdata, const uint32_t* metadata, char* target,
                          float* scratch) {
  if (args.is_key)
    restore_page<dtype, true>(args, qdata, metadata, target, scratch);
  else
    restore_page<dtype, false>(args, qdata, metadata, target, scratch);
}

static void restore_block(const RestoreArgs& args, int64_t block, int64_t head, float* scratch) {
  Dtype dtype = static_cast<Dtype>(args.dtype);
  int64_t num_pages = 0, batch = head / args.num_kv_heads, kv_head = head % args.num_kv_heads;
  const SegmentArgs* found = nullptr;
  int64_t page = 0;
  for (int64_t i = 0; i < args.num_segments; ++i) {
    const SegmentArgs& segment = args.segments[i];
    if (block >= num_pages && block < num_pages + segment.num_pages) {
      found = &segment;
      page = block - num_pages;
    }
    num_pages += segment.num_pages;
  }
  int64_t size = element_size(dtype), row_size = args.head_dim * size;
  int64_t total = num_pages * kPageSize + args.tail_len;
  char* target = static_cast<char*>(args.output) + (head * total + block * kPageSize) * row_size;
  if (!found) {
    int64_t first = (block - num_pages) * kPageSize;
    for (int64_t token = first; token < args.tail_len && token < first + kPageSize; ++token) {
      int64_t offset = batch * args.tail_stride[0] + kv_head * args.tail_stride[1] + token * args.tail_stride[2];
      __builtin_memcpy(target + (token - first) * row_size, static_cast<const char*>(args.tail) + offset * size,
                       row_size);
    }
    return;
  }
  int64_t index = (page * found->rows + stored_row(args.row_table, batch, block)) * args.num_kv_heads + kv_head;
  const int8_t* qdata = (args.is_key ? found->key_qdata : found->value_qdata) + index * kPageSize * args.head_dim;
  const uint32_t* metadata =
      args.is_key ? found->key_metadata + index * args.head_dim : found->value_metadata + index * kPageSize;
  if (dtype == kFloat32) return restore_typed<kFloat32>(args, qdata, metadata, target, scratch);
  if (dtype == kBFloat16) return restore_typed<kBFloat16>(args, qdata, metadata, target, scratch);
  restore_typed<kFloat16>(args, qdata, metadata, target, scratch);
}

}  // namespace
