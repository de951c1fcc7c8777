// Vectors of the width the file is compiled for, in the vector extension that GCC and Clang share: 16 floats with
// AVX-512, 8 with AVX2, 4 elsewhere. Everything here and in the files that include this lies in an unnamed namespace:
// the linker must never merge a function of one instruction set with that of another.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#define QC_INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLanes = kVectorBytes / 4;

typedef float Vec __attribute__((vector_size(kVectorBytes)));
typedef int32_t VecI __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VecU __attribute__((vector_size(kVectorBytes)));
typedef uint16_t VecHalf __attribute__((vector_size(kVectorBytes / 2)));
typedef int8_t VecCode __attribute__((vector_size(kLanes)));
typedef int8_t Bytes16 __attribute__((vector_size(16)));

#if defined(__clang__)
#define QC_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#define QC_SHUFFLE_BYTES(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define QC_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, VecI{__VA_ARGS__})
#define QC_SHUFFLE_BYTES(a, b, ...) __builtin_shuffle(a, b, Bytes16{__VA_ARGS__})
#endif

constexpr float kInfinity = __builtin_inff();

// Minus zero, which changes no number: a compiler has to carry out the addition of zero, for the sake of -0.
QC_INLINE Vec splat(float x) { return x - Vec{}; }

QC_INLINE Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
QC_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
QC_INLINE VecU load_words(const uint32_t* p) {
  VecU v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
QC_INLINE void store_words(uint32_t* p, VecU v) { __builtin_memcpy(p, &v, sizeof v); }

QC_INLINE Vec as_float(VecI v) { return (Vec)v; }
QC_INLINE Vec as_float(VecU v) { return (Vec)v; }
QC_INLINE VecU as_words(Vec v) { return (VecU)v; }
QC_INLINE Vec to_float(VecI v) { return __builtin_convertvector(v, Vec); }
QC_INLINE VecI to_int(Vec v) { return __builtin_convertvector(v, VecI); }

QC_INLINE Vec select(VecI mask, Vec yes, Vec no) { return mask ? yes : no; }
// The second argument where either is NaN, as maxps and minps have it.
#if defined(__AVX512F__)
QC_INLINE Vec larger(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }
QC_INLINE Vec smaller(Vec a, Vec b) { return (Vec)_mm512_min_ps((__m512)a, (__m512)b); }
QC_INLINE bool any_at_least(Vec a, Vec b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ); }
#elif defined(__AVX2__)
QC_INLINE Vec larger(Vec a, Vec b) { return (Vec)_mm256_max_ps((__m256)a, (__m256)b); }
QC_INLINE Vec smaller(Vec a, Vec b) { return (Vec)_mm256_min_ps((__m256)a, (__m256)b); }
QC_INLINE bool any_at_least(Vec a, Vec b) { return _mm256_movemask_ps((__m256)(VecI)(a >= b)); }
#else
QC_INLINE Vec larger(Vec a, Vec b) { return select(a > b, a, b); }
QC_INLINE Vec smaller(Vec a, Vec b) { return select(a < b, a, b); }
QC_INLINE bool any_at_least(Vec a, Vec b) {
  VecI at_least = a >= b;
  return (at_least[0] | at_least[1] | at_least[2] | at_least[3]) != 0;
}
#endif
QC_INLINE Vec magnitude(Vec v) { return as_float(as_words(v) & 0x7FFFFFFFu); }

// Conversions between widths come as intrinsics: GCC takes __builtin_convertvector apart into scalars here.
#if defined(__AVX512F__)
QC_INLINE VecI widen(VecCode v) { return (VecI)_mm512_cvtepi8_epi32((__m128i)v); }
QC_INLINE VecU widen(VecHalf v) { return (VecU)_mm512_cvtepu16_epi32((__m256i)v); }
QC_INLINE VecCode narrow_codes(VecI v) { return (VecCode)_mm512_cvtepi32_epi8((__m512i)v); }
QC_INLINE VecHalf narrow_halves(VecU v) { return (VecHalf)_mm512_cvtepi32_epi16((__m512i)v); }
#elif defined(__AVX2__)
QC_INLINE VecI widen(VecCode v) {
  int64_t bytes;
  __builtin_memcpy(&bytes, &v, sizeof bytes);
  return (VecI)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bytes));
}
QC_INLINE VecU widen(VecHalf v) { return (VecU)_mm256_cvtepu16_epi32((__m128i)v); }
QC_INLINE VecCode narrow_codes(VecI v) {
  __m128i words = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  int64_t bytes = _mm_cvtsi128_si64(_mm_packs_epi16(words, words));
  VecCode codes;
  __builtin_memcpy(&codes, &bytes, sizeof codes);
  return codes;
}
QC_INLINE VecHalf narrow_halves(VecU v) {
  return (VecHalf)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
}
#else
typedef int16_t Words8 __attribute__((vector_size(16)));
// Each byte four times, by interleaving twice, which SSE2 has; the sign then comes by shifting.
QC_INLINE VecI widen(VecCode v) {
  int32_t word;
  __builtin_memcpy(&word, &v, sizeof word);
  Bytes16 b = (Bytes16)VecI{word, 0, 0, 0};
  Words8 w = (Words8)QC_SHUFFLE_BYTES(b, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#if defined(__clang__)
  return (VecI)__builtin_shufflevector(w, w, 0, 8, 1, 9, 2, 10, 3, 11) >> 24;
#else
  return (VecI)__builtin_shuffle(w, w, Words8{0, 8, 1, 9, 2, 10, 3, 11}) >> 24;
#endif
}
QC_INLINE VecU widen(VecHalf v) { return __builtin_convertvector(v, VecU); }
QC_INLINE VecCode narrow_codes(VecI v) { return __builtin_convertvector(v, VecCode); }
QC_INLINE VecHalf narrow_halves(VecU v) { return __builtin_convertvector(v, VecHalf); }
#endif

QC_INLINE Bytes16 load_bytes(const int8_t* p) {
  Bytes16 bytes;
  __builtin_memcpy(&bytes, p, sizeof bytes);
  return bytes;
}
#define QC_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define QC_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31

// Byte i of row j becomes byte j of row i, by interleaving the halves of 16 rows four times.
QC_INLINE void transpose_bytes(Bytes16* rows) {
#pragma GCC unroll 4
  for (int step = 0; step < 4; ++step) {
    Bytes16 mixed[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      mixed[2 * i] = QC_SHUFFLE_BYTES(rows[i], rows[i + 8], QC_LOW);
      mixed[2 * i + 1] = QC_SHUFFLE_BYTES(rows[i], rows[i + 8], QC_HIGH);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) rows[i] = mixed[i];
  }
}
#undef QC_LOW
#undef QC_HIGH

// Int8 codes, or floats, as floats.
QC_INLINE Vec load_codes(const int8_t* p) {
  VecCode codes;
  __builtin_memcpy(&codes, p, sizeof codes);
  return to_float(widen(codes));
}
QC_INLINE Vec load_codes(const float* p) { return load(p); }
QC_INLINE void store_codes(int8_t* p, VecI v) {
  VecCode codes = narrow_codes(v);
  __builtin_memcpy(p, &codes, sizeof codes);
}

// The two words of the metadata; a bfloat16 is the upper half of a float32.
QC_INLINE Vec metadata_scale(VecU pair) { return as_float(pair << 16); }
QC_INLINE Vec metadata_zero_point(VecU pair) { return to_float((VecI)pair >> 16); }

// Round half to even; |v| must be below 2^22.
QC_INLINE Vec round_even(Vec v) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: the sum has no fraction bits left
  return (v + magic) - magic;
}

// e^r - 1 for |r| <= ln(2) / 2, by its series: the first term left out is below 2^-25 of the result.
QC_INLINE Vec expm1_reduced(Vec r) {
  Vec p = splat(1.0f / 5040) * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  return p * (r * r) + r;
}

struct Reduced {
  Vec remainder, power;  // x = n * ln(2) + remainder, power = 2^n
};

// For x from -87.3 to 88: n is an exponent of a normal float. ln(2) comes in two parts; n times the first is exact.
QC_INLINE Reduced reduce_exponent(Vec x) {
  Vec n = round_even(x * 1.44269504088896341f);
  Vec remainder = (x - n * 0.693359375f) + n * 2.12194440054690583e-4f;
  VecI bits = (to_int(n) + 127) << 23;
  return {remainder, as_float(bits)};
}

// e^x for x <= 0, within 2 ulp; zero below -87.3, where the result would lose bits; NaN stays NaN.
QC_INLINE Vec exp_negative(Vec x) {
  const Vec lowest = splat(-87.3f);
  Reduced reduced = reduce_exponent(larger(lowest, x));  // in this order NaN goes through
  Vec e = reduced.power * expm1_reduced(reduced.remainder) + reduced.power;
  return select(x < lowest, Vec{}, e);
}

// tanh(x) = t / (t + 2) with t = e^(2|x|) - 1, which is accurate near zero too. Past 10 it is 1 in float32.
QC_INLINE Vec tanh_vec(Vec x) {
  Vec twice = 2.0f * smaller(magnitude(x), splat(10.0f));
  Reduced reduced = reduce_exponent(twice);
  Vec t = reduced.power * expm1_reduced(reduced.remainder) + (reduced.power - 1.0f);
  Vec result = t / (t + 2.0f);
  VecU sign = as_words(x) & 0x80000000u;
  return select(x == x, as_float(as_words(result) | sign), x);
}

// Each element of a group of 4 lanes reduced over the groups: lane i of the result depends on the lanes i % 4.
template <typename Combine>
QC_INLINE Vec across_groups(Vec v, [[maybe_unused]] Combine combine) {
#if defined(__AVX512F__)
  v = combine(v, QC_SHUFFLE(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  v = combine(v, QC_SHUFFLE(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
#elif defined(__AVX2__)
  v = combine(v, QC_SHUFFLE(v, v, 4, 5, 6, 7, 0, 1, 2, 3));
#endif
  return v;
}

// All lanes reduced to one.
template <typename Combine>
QC_INLINE float across_lanes(Vec v, Combine combine) {
  v = across_groups(v, combine);
#if defined(__AVX512F__)
  v = combine(v, QC_SHUFFLE(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  v = combine(v, QC_SHUFFLE(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
#elif defined(__AVX2__)
  v = combine(v, QC_SHUFFLE(v, v, 2, 3, 0, 1, 6, 7, 4, 5));
  v = combine(v, QC_SHUFFLE(v, v, 1, 0, 3, 2, 5, 4, 7, 6));
#else
  v = combine(v, QC_SHUFFLE(v, v, 2, 3, 0, 1));
  v = combine(v, QC_SHUFFLE(v, v, 1, 0, 3, 2));
#endif
  return v[0];
}

QC_INLINE Vec add(Vec a, Vec b) { return a + b; }

}  // namespace
