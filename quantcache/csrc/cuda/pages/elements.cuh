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
