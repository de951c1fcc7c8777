// Bytes and 16-bit floats in words, and the few functions of a float that no operator has.

#include "common/types.cuh"

DEVICE u32 prmt(u32 a, u32 b, u32 selector) {
  u32 result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
  return result;
}
// a / b without the many instructions that a division of integers takes; 0 <= a < 2^20.
DEVICE int quotient(int a, int b) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(static_cast<float>(b)));
  // Errors are below 0.2 / b there, and a quotient and a half b-th is 0.5 / b away from the next.
  return static_cast<int>((a + 0.5f) * inverse);
}
DEVICE u32 sub_half2(u32 a, u32 b) {
  u32 result;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}
// Two floats as a pair of 16-bit floats, `low` in the low half.
DEVICE u32 pack_half2(float low, float high) {
  u32 result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}
DEVICE u32 pack_bfloat2(float low, float high) {
  u32 result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}
DEVICE float half_low(u32 pair) {
  float result;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(result) : "r"(pair));
  return result;
}
DEVICE float half_high(u32 pair) {
  float result;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(result) : "r"(pair));
  return result;
}
DEVICE float bfloat_low(u32 pair) { return __uint_as_float(pair << 16); }
DEVICE float bfloat_high(u32 pair) { return __uint_as_float(pair & 0xFFFF0000u); }

DEVICE float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
// Within an ulp.
DEVICE float reciprocal_approx(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
DEVICE float tanh_exact(float x) {
  // 1 - 2 / (e^2x + 1), which loses nothing that matters to a logit bounded by softcap.
  return 1.0f - 2.0f / (exp2_approx(2.0f * kLog2e * x) + 1.0f);
}
DEVICE float infinity() { return __int_as_float(0x7F800000); }

// The two words of a group's metadata, see scheme.py.
DEVICE float scale_of(u32 metadata) { return bfloat_low(metadata); }
DEVICE float zero_point_of(u32 metadata) { return static_cast<float>(static_cast<i16>(metadata >> 16)); }

// Element `index` of memory of the given type.
DEVICE float load_element(const void* base, int dtype, i64 index) {
  if (dtype == kFloat32) return static_cast<const float*>(base)[index];
  u32 bits = static_cast<const u16*>(base)[index];
  return dtype == kBFloat16 ? bfloat_low(bits) : half_low(bits);
}
