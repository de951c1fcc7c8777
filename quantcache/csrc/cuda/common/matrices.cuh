// The tensor cores' instructions, and loads of their operands from shared memory.

#include "common/types.cuh"

// How a warp holds a matrix: with g = lane / 4 and t = lane % 4, PTX's groupID and threadID_in_group,
//   A (16 x 16 of 16-bit floats): registers 0..3 are the rows g, g + 8, g, g + 8 and the columns 2 t, 2 t + 1, from the
//     third on 8 further;
//   B (16 x 8): registers b0, b1 are the rows 2 t, 2 t + 1 and 8 further, of the column g;
//   D (16 x 8 of floats): 0 and 1 are the row g, 2 and 3 the row g + 8, of the columns 2 t and 2 t + 1.

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
  u32 result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(x));
  return result;
}
DEVICE void load_matrices(u32 (&result)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
               : "r"(address));
}
DEVICE void load_matrices_transposed(u32 (&result)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
               : "r"(address));
}
DEVICE void load_two_matrices(u32 (&result)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(result[0]), "=r"(result[1])
               : "r"(address));
}
DEVICE void load_two_matrices_transposed(u32 (&result)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(result[0]), "=r"(result[1])
               : "r"(address));
}
