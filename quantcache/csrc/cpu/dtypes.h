// Metadata, and rows of float32, bfloat16 and float16 to float32 and back. float32 to the others rounds half to even.
#pragma once

#include "plan.h"
#include "simd.h"

namespace {

QC_INLINE VecU load_halves(const uint16_t* p) {
  VecHalf v;
  __builtin_memcpy(&v, p, sizeof v);
  return widen(v);
}
QC_INLINE void store_halves(uint16_t* p, VecU v) {
  VecHalf halves = narrow_halves(v);
  __builtin_memcpy(p, &halves, sizeof halves);
}

QC_INLINE VecU choose(VecI mask, VecU yes, VecU no) { return mask ? yes : no; }

// float16 bits, zero extended, as float32. Placing them 13 bits up leaves the exponent 112 too small, subnormals
// included, so one exact product restores it; only inf and NaN need their exponent set.
QC_INLINE Vec from_float16(VecU bits) {
  VecU sign = (bits & 0x8000u) << 16, rest = (bits & 0x7FFFu) << 13;
  Vec scaled = as_float(rest) * 0x1p112f;
  VecU special = rest | 0x7F800000u;
  return as_float(choose(rest >= 0x0F800000u, special, as_words(scaled)) | sign);
}

QC_INLINE VecU to_bfloat16(Vec v) {
  VecU bits = as_words(v);
  VecU rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return choose(v == v, rounded, VecU{} + 0x7FC0u);
}

// Below 2^-14 float16 has a fixed step of 2^-24, which adding 0.5 (whose step that is) rounds to; above, the rounding
// is that of the integer that drops 13 bits. 65520 is where rounding reaches inf.
QC_INLINE VecU to_float16(Vec v) {
  VecU sign = (as_words(v) >> 16) & 0x8000u;
  Vec size = magnitude(v);
  VecU bits = as_words(size);
  VecU subnormal = as_words(size + 0.5f) - 0x3F000000u;
  VecU normal = (bits + 0xFFFu + ((bits >> 13) & 1u) - (112u << 23)) >> 13;
  VecU result = choose(size < splat(0x1p-14f), subnormal, normal);
  result = choose(size >= splat(65520.0f), VecU{} + 0x7C00u, result);
  result = choose(v == v, result, VecU{} + 0x7E00u);
  return result | sign;
}

template <Dtype dtype>
QC_INLINE Vec load_as_float(const void* p, int64_t i) {
  if (dtype == kFloat32) return load(static_cast<const float*>(p) + i);
  VecU bits = load_halves(static_cast<const uint16_t*>(p) + i);
  return dtype == kBFloat16 ? as_float(bits << 16) : from_float16(bits);
}

template <Dtype dtype>
QC_INLINE void store_from_float(void* p, int64_t i, Vec v) {
  if (dtype == kFloat32) return store(static_cast<float*>(p) + i, v);
  store_halves(static_cast<uint16_t*>(p) + i, dtype == kBFloat16 ? to_bfloat16(v) : to_float16(v));
}

constexpr int64_t element_size(Dtype dtype) { return dtype == kFloat32 ? 4 : 2; }

// `width` elements of `source` as float32; zeros up to `padded`, a multiple of kLanes.
template <Dtype dtype>
QC_INLINE void read_row(const void* source, int64_t width, float* row, int64_t padded) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) store(row + i, load_as_float<dtype>(source, i));
  for (; i < padded; i += kLanes) {
    alignas(64) char rest[kVectorBytes] = {};
    if (i < width)
      __builtin_memcpy(rest, static_cast<const char*>(source) + i * element_size(dtype),
                       (width - i) * element_size(dtype));
    store(row + i, load_as_float<dtype>(rest, 0));
  }
}

// The first `width` of a row of float32 that is readable to the next multiple of kLanes, rounded to `dtype`.
template <Dtype dtype>
QC_INLINE void write_row(const float* row, int64_t width, void* target) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) store_from_float<dtype>(target, i, load(row + i));
  if (i == width) return;
  alignas(64) char rest[kVectorBytes];
  store_from_float<dtype>(rest, 0, load(row + i));
  __builtin_memcpy(static_cast<char*>(target) + i * element_size(dtype), rest, (width - i) * element_size(dtype));
}

static void read_any_row(Dtype dtype, const void* source, int64_t width, float* row, int64_t padded) {
  if (dtype == kFloat32) return read_row<kFloat32>(source, width, row, padded);
  if (dtype == kBFloat16) return read_row<kBFloat16>(source, width, row, padded);
  read_row<kFloat16>(source, width, row, padded);
}

static void write_any_row(Dtype dtype, const float* row, int64_t width, void* target) {
  if (dtype == kFloat32) return write_row<kFloat32>(row, width, target);
  if (dtype == kBFloat16) return write_row<kBFloat16>(row, width, target);
  write_row<kFloat16>(row, width, target);
}

QC_INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Scales and zero points of `count` pairs, padded with zeros to kWidthStep.
static void unpack_metadata(const uint32_t* pairs, int64_t count, float* scale, float* zero_point) {
  for (int64_t i = 0; i < count; i += kLanes) {
    uint32_t rest[kLanes] = {};
    if (i + kLanes > count) __builtin_memcpy(rest, pairs + i, (count - i) * sizeof(uint32_t));
    VecU pair = load_words(i + kLanes > count ? rest : pairs + i);
    store(scale + i, metadata_scale(pair));
    store(zero_point + i, metadata_zero_point(pair));
  }
  for (int64_t i = round_up(count, kLanes); i < round_up(count, kWidthStep); ++i) scale[i] = zero_point[i] = 0;
}

}  // namespace
