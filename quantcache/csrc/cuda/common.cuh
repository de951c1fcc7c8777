// What every kernel here needs of the machine: NVRTC gets no headers, so the few PTX instructions are spelt out.
// Built once for each head_dim and kind of call, see backends/cuda.py for the macros.
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
typedef unsigned short u16;
typedef short i16;
typedef signed char i8;
typedef unsigned char u8;

#define DEVICE __device__ __forceinline__

constexpr int kPageSize = 64;
constexpr float kLog2e = 1.44269504088896341f;

// Element types of queries, tails, masks and outputs; the numbers are those of backends/cuda.py.
enum : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kBool = 3 };

// Pages `first` to the first of the next entry, allocated at once; see pages.Segment. The last entry has only `first`.
struct Segment {
  const i8* key_qdata;        // (pages, batch, num_kv_heads, 64, DK)
  const u32* key_metadata;    // (pages, batch, num_kv_heads, DK), scale | zero_point << 16
  const i8* value_qdata;      // (pages, batch, num_kv_heads, 64, DV)
  const u32* value_metadata;  // (pages, batch, num_kv_heads, 64)
  i64 first;
};

DEVICE u32 prmt(u32 a, u32 b, u32 selector) {
  u32 r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
}
DEVICE u32 sub_half2(u32 a, u32 b) {
  u32 r;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
// Two floats as a pair of 16-bit floats, `low` in the low half.
DEVICE u32 pack_half2(float low, float high) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
DEVICE u32 pack_bfloat2(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
DEVICE float half_low(u32 pair) {
  float r;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(r) : "r"(pair));
  return r;
}
DEVICE float half_high(u32 pair) {
  float r;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(r) : "r"(pair));
  return r;
}
DEVICE float bfloat_low(u32 pair) { return __uint_as_float(pair << 16); }
DEVICE float bfloat_high(u32 pair) { return __uint_as_float(pair & 0xFFFF0000u); }

DEVICE float exp2_approx(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
// Within an ulp.
DEVICE float reciprocal_approx(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
DEVICE float tanh_exact(float x) {
  // 1 - 2 / (e^2x + 1), which loses nothing that matters to a logit bounded by softcap.
  return 1.0f - 2.0f / (exp2_approx(2.0f * kLog2e * x) + 1.0f);
}
DEVICE float infinity() { return __int_as_float(0x7F800000); }

// D += A B, A 16 x 16 (row), B 16 x 8 (column), float32 accumulators.
DEVICE void mma_half(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void mma_bfloat(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Transposes the 8 x 8 matrix of 16-bit elements that a warp holds, one pair a lane.
DEVICE u32 transpose8x8(u32 x) {
  u32 r;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(x));
  return r;
}
DEVICE void load_matrices(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
DEVICE void load_matrices_transposed(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
DEVICE void load_two_matrices(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(address));
}
DEVICE void load_two_matrices_transposed(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(address));
}
DEVICE u32 shared_address(const void* pointer) { return static_cast<u32>(__cvta_generic_to_shared(pointer)); }
DEVICE void copy_async(u32 shared, const void* global) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
// The same for 8 or 16 bytes that may lie anywhere in a line, or as many zeros; the address must exist either way.
template <int kBytes>
DEVICE void copy_async_or_zero(u32 shared, const void* global, bool is_copied) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared), "l"(global), "n"(kBytes),
               "r"(is_copied ? kBytes : 0)
               : "memory");
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
DEVICE uint4 load_shared_16(u32 address) {
  uint4 r;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "r"(address));
  return r;
}
DEVICE u32 load_shared_4(u32 address) {
  u32 r;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(r) : "r"(address));
  return r;
}

// Loads that are made where they are written, whatever registers that takes.
DEVICE void load_now(u32& x, const u32* source) {
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(x) : "l"(source) : "memory");
}
DEVICE void load_now(u32 (&x)[2], const u32* source) {
  asm volatile("ld.global.v2.u32 {%0,%1}, [%2];" : "=r"(x[0]), "=r"(x[1]) : "l"(source) : "memory");
}

// The two words of a group's metadata, see scheme.py.
DEVICE float scale_of(u32 metadata) { return bfloat_low(metadata); }
DEVICE float zero_point_of(u32 metadata) { return static_cast<float>(static_cast<i16>(metadata >> 16)); }

// Element `index` of memory of the given type.
DEVICE float load_element(const void* base, int dtype, i64 index) {
  if (dtype == kFloat32) return static_cast<const float*>(base)[index];
  u32 bits = static_cast<const u16*>(base)[index];
  return dtype == kBFloat16 ? bfloat_low(bits) : half_low(bits);
}
DEVICE void store_element(void* base, int dtype, i64 index, float x) {
  if (dtype == kFloat32)
    static_cast<float*>(base)[index] = x;
  else
    static_cast<u16*>(base)[index] = static_cast<u16>(dtype == kBFloat16 ? pack_bfloat2(x, 0) : pack_half2(x, 0));
}

// Whether this thread is the last of `total` to arrive at the counter, which wraps to zero by itself. What every thread
// has written before it arrives, the last one sees.
DEVICE bool arrives_last(u32* counter, u32 total) {
  u32 before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(total - 1u)
               : "memory");
  return before == total - 1u;
}
