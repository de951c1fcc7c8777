// Copies to shared memory, loads, and a counter that CTAs share.

#include "common/types.cuh"

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
  uint4 result;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(result.x), "=r"(result.y), "=r"(result.z), "=r"(result.w)
               : "r"(address));
  return result;
}
DEVICE u32 load_shared_4(u32 address) {
  u32 result;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(result) : "r"(address));
  return result;
}

// A barrier of its own for kThreadsThere threads.
template <int kThreadsThere>
DEVICE void wait_at_barrier(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kThreadsThere) : "memory");
}

// Loads that are made where they are written, whatever registers that takes.
DEVICE void load_now(u32& x, const u32* source) {
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(x) : "l"(source) : "memory");
}
DEVICE void load_now(u32 (&x)[2], const u32* source) {
  asm volatile("ld.global.v2.u32 {%0,%1}, [%2];" : "=r"(x[0]), "=r"(x[1]) : "l"(source) : "memory");
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
