// Four elements at once, in the type of the states.

#include "common/floats.cuh"
#include "pages/build.cuh"

struct Range {
  float low, high;  // NaN if an element is
};
// Minimum and maximum that keep a NaN.
DEVICE float lower(float a, float b) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
DEVICE float higher(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// Four consecutive elements as they are stored.
#if DTYPE == 0
using Four = float4;
DEVICE void to_floats(const Four& v, float (&x)[4]) { x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w; }
DEVICE Four from_floats(const float (&x)[4]) { return make_float4(x[0], x[1], x[2], x[3]); }
DEVICE Four lower(const Four& a, const Four& b) {
  return make_float4(lower(a.x, b.x), lower(a.y, b.y), lower(a.z, b.z), lower(a.w, b.w));
}
DEVICE Four higher(const Four& a, const Four& b) {
  return make_float4(higher(a.x, b.x), higher(a.y, b.y), higher(a.z, b.z), higher(a.w, b.w));
}
#else
using Four = uint2;
DEVICE void to_floats(const Four& v, float (&x)[4]) {
  x[0] = DTYPE == kBFloat16 ? bfloat_low(v.x) : half_low(v.x);
  x[1] = DTYPE == kBFloat16 ? bfloat_high(v.x) : half_high(v.x);
  x[2] = DTYPE == kBFloat16 ? bfloat_low(v.y) : half_low(v.y);
  x[3] = DTYPE == kBFloat16 ? bfloat_high(v.y) : half_high(v.y);
}
DEVICE Four from_floats(const float (&x)[4]) {
  return DTYPE == kBFloat16 ? make_uint2(pack_bfloat2(x[0], x[1]), pack_bfloat2(x[2], x[3]))
                            : make_uint2(pack_half2(x[0], x[1]), pack_half2(x[2], x[3]));
}
#if DTYPE == 1
#define PAIR "bf16x2"
#else
#define PAIR "f16x2"
#endif
DEVICE u32 lower_pair(u32 a, u32 b) {
  u32 result;
  asm("min.NaN." PAIR " %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}
DEVICE u32 higher_pair(u32 a, u32 b) {
  u32 result;
  asm("max.NaN." PAIR " %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}
DEVICE Four lower(const Four& a, const Four& b) { return make_uint2(lower_pair(a.x, b.x), lower_pair(a.y, b.y)); }
DEVICE Four higher(const Four& a, const Four& b) { return make_uint2(higher_pair(a.x, b.x), higher_pair(a.y, b.y)); }
#endif

// What is not finite takes no part in a range, and is stored as its end: +inf as the high one, -inf and NaN as the low.
// Rare, so a page is first read as if there were none; a range of all elements shows by an end that is not finite.
DEVICE bool is_finite(float x) { return fabsf(x) < infinity(); }
DEVICE bool is_finite(const Range& range) { return is_finite(higher(fabsf(range.low), fabsf(range.high))); }

// Ranges of the finite elements of each of four channels; those of a channel that has none meet those of others as if
// they were not there.
struct FourRanges {
  Range of[4];
  DEVICE void open() {
    for (int j = 0; j < 4; j++) of[j] = {infinity(), -infinity()};
  }
  DEVICE void add(const Four& v) {
    float x[4];
    to_floats(v, x);
    for (int j = 0; j < 4; j++)
      if (is_finite(x[j])) of[j] = {fminf(of[j].low, x[j]), fmaxf(of[j].high, x[j])};
  }
};
// The range of a group that may have no finite element, which is all zeros then.
DEVICE Range or_zero(const Range& range) { return range.low <= range.high ? range : Range{0.0f, 0.0f}; }
// Elements brought into their ranges, exactly. Of a NaN and a number fmaxf takes the number.
DEVICE Four within(const Four& v, const FourRanges& ranges) {
  float x[4];
  to_floats(v, x);
  for (int j = 0; j < 4; j++) x[j] = fminf(fmaxf(x[j], ranges.of[j].low), ranges.of[j].high);
  return from_floats(x);
}
