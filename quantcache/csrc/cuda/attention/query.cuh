// The query's rows in shared memory.

#include "attention/args.cuh"
#include "common/floats.cuh"
#include "common/memory.cuh"

constexpr int kQuerySize = DTYPE == kFloat32 ? 4 : 2;
// Rows are an odd number of 16 elements apart: the eight rows that a warp reads at once then lie in different banks.
constexpr int kQueryPitch = (HEAD_DIM + (kKeyChunks % 2 == 0 ? 16 : 0)) * kQuerySize;
constexpr int kQueryBytes = kRows * kQueryPitch;
static_assert(kQueryBytes % 16 == 0, "the ring behind it takes copies of 16 bytes");

// Four consecutive elements as they are stored.
#if DTYPE == 0
using Four = uint4;
#else
using Four = uint2;
#endif

// Four consecutive elements of a row of the query in shared memory, as they are stored.
struct Quad {
  u32 word[kQuerySize];  // pairs of 16-bit floats, or floats
};
DEVICE Quad load_query(u32 address) {
  Quad quad;
#if DTYPE == 0
  uint4 x = load_shared_16(address);
  quad.word[0] = x.x, quad.word[1] = x.y, quad.word[2] = x.z, quad.word[3] = x.w;
#else
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(quad.word[0]), "=r"(quad.word[1]) : "r"(address));
#endif
  return quad;
}
DEVICE void to_floats(const Quad& quad, float (&x)[4]) {
#if DTYPE == 0
  for (int j = 0; j < 4; j++) x[j] = __uint_as_float(quad.word[j]);
#else
  for (int j = 0; j < 2; j++) {
    x[2 * j] = DTYPE == kBFloat16 ? bfloat_low(quad.word[j]) : half_low(quad.word[j]);
    x[2 * j + 1] = DTYPE == kBFloat16 ? bfloat_high(quad.word[j]) : half_high(quad.word[j]);
  }
#endif
}

// Copies the query's rows to shared memory; those that are only padding become zero. The copies come before those of
// pages, behind which they would wait.
DEVICE void copy_query(const AttentionArgs& args, const QueryRows& rows, u32 target) {
  constexpr int pieces = HEAD_DIM / 4;  // of four elements
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * pieces; i += kThreads) {
    const int row = i / pieces, index = rows.first_row + min(row, rows.num_rows - 1);
    const i64 start = rows.batch * args.query_stride[0] +
                      (rows.kv_head * args.group + head_of(rows, index)) * args.query_stride[1] +
                      query_of(rows, index) * args.query_stride[2];
    const Four* source = static_cast<const Four*>(args.query) + start / 4 + i % pieces;
    copy_async_or_zero<sizeof(Four)>(target + row * kQueryPitch + i % pieces * sizeof(Four), source,
                                     row < rows.num_rows);
  }
}
