// What every kernel here needs of the machine: NVRTC gets no headers, so the few PTX instructions are spelt out.
// Built once for each head_dim and kind of call, see backends/cuda/plan.py for the macros.

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

// Element types of queries, tails, masks and outputs; the numbers are those of backends/cuda/launch.py.
enum : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kBool = 3 };

// Pages `first` to the first of the next entry, allocated at once; see Segment in store/segments.py. The last entry has
// only `first`.
struct Segment {
  const i8* key_qdata;        // (pages, batch, num_kv_heads, 64, HEAD_DIM)
  const u32* key_metadata;    // (pages, batch, num_kv_heads, HEAD_DIM), scale | zero_point << 16
  const i8* value_qdata;      // (pages, batch, num_kv_heads, 64, V_HEAD_DIM)
  const u32* value_metadata;  // (pages, batch, num_kv_heads, 64)
  i64 first;
};
