// The affine map of a group of elements, and their codes.

#include "pages/elements.cuh"

// scheme.py explains the numbers.
constexpr float kQMin = -128.0f, kMinScale = 0x1p-120f;
constexpr int kMaxSteps = 254, kMaxAbsSteps = 32512;

// Range of a warp's elements. Floats in the order of integers can be reduced in one instruction; a NaN made canonical
// is the largest, so that the maximum shows it.
DEVICE Range warp_range(const Range& range) {
  auto ordered = [](float x) {
    const int bits = __float_as_int(x);
    return bits ^ (bits >> 31 & 0x7FFFFFFF);
  };
  const int low = __reduce_min_sync(~0u, ordered(range.low)), high = __reduce_max_sync(~0u, ordered(range.high));
  return {__int_as_float(low ^ (low >> 31 & 0x7FFFFFFF)), __int_as_float(high ^ (high >> 31 & 0x7FFFFFFF))};
}

constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds, and leaves the integer in the low bits

// x / kDivisor as IEEE has it: a product, and one step of Newton with the exact remainder (Markstein). Quotients below
// kMinScale may be off.
template <int kDivisor>
DEVICE float divided(float x) {
  constexpr float inverse = 1.0f / kDivisor;
  const float quotient = __fmul_rn(x, inverse);
  return fmaf(fmaf(-quotient, static_cast<float>(kDivisor), x), inverse, quotient);
}

// The affine map of a group.
struct Affine {
  float inverse, zero_point;
  float correction;  // of float32 the scale, else what the inverse lacks

  // The range is finite.
  static DEVICE Affine of(const Range& range, u32& metadata) {
    const float largest = fmaxf(fabsf(range.low), fabsf(range.high));
    // Divided before they are subtracted: the range of a float32 group can exceed float32.
    const float spread = __fsub_rn(divided<kMaxSteps>(range.high), divided<kMaxSteps>(range.low));
    const float wanted = fmaxf(fmaxf(spread, divided<kMaxAbsSteps>(largest)), kMinScale);
    const float scale = __uint_as_float((__float_as_uint(wanted) + 0xFFFFu) & 0xFFFF0000u);
    Affine map = {reciprocal_approx(scale), 0.0f, scale};
    if (DTYPE != kFloat32) map.correction = fmaf(-scale, map.inverse, 1.0f) * map.inverse;
    map.zero_point = kQMin - (map.steps(range.low) - kRounder);
    metadata = __float_as_uint(scale) >> 16 | static_cast<u32>(static_cast<int>(map.zero_point)) << 16;
    return map;
  }
  // kRounder and x in steps of the scale, rounded as the exact quotient would be, a tie to even.
  DEVICE float steps(float x) const {
#if DTYPE == 0
    // The product with the inverse finds the nearest multiple or its neighbour; the remainder, which is exact, tells.
    const float scale = correction;
    float rounded = fmaf(x, inverse, kRounder);
    const float remainder = fmaf(kRounder - rounded, scale, x), excess = fabsf(remainder) - 0.5f * scale;
    if (excess >= 0.0f && (excess > 0.0f || (__float_as_uint(rounded) & 1))) rounded += copysignf(1.0f, remainder);
    return rounded;
#else
    // A quotient of a 16-bit float and a scale, which has 8 bits, is a tie, or further from one than this product errs.
    return __fadd_rn(fmaf(x, inverse, __fmul_rn(x, correction)), kRounder);
#endif
  }
  // In the lowest byte.
  DEVICE u32 code(float x) const { return __float_as_uint(__fadd_rn(steps(x), zero_point)); }
};

DEVICE u32 pack_codes(u32 a, u32 b, u32 c, u32 d) { return prmt(prmt(a, b, 0x0040), prmt(c, d, 0x0040), 0x5410); }

DEVICE u32 codes_of(const Four& v, const Affine (&map)[4]) {
  float x[4];
  to_floats(v, x);
  return pack_codes(map[0].code(x[0]), map[1].code(x[1]), map[2].code(x[2]), map[3].code(x[3]));
}
