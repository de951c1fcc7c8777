// The query's rows in shared memory, as 16-bit floats of a size that the tensor cores can take.

#include "common/floats.cuh"
#include "common/memory.cuh"
#include "prefill/shared.cuh"

DEVICE float element_low(u32 pair) { return DTYPE == kBFloat16 ? bfloat_low(pair) : half_low(pair); }
DEVICE float element_high(u32 pair) { return DTYPE == kBFloat16 ? bfloat_high(pair) : half_high(pair); }
DEVICE u32 pack_elements(float low, float high) {
  return DTYPE == kBFloat16 ? pack_bfloat2(low, high) : pack_half2(low, high);
}
DEVICE float power_of_two(int exponent) { return __int_as_float((exponent + 127) << 23); }  // of -126..127
// Of a positive finite number, and no less than `least`.
DEVICE int exponent_of(float x, int least) { return max(min((__float_as_int(x) >> 23) - 127, 127), least); }

DEVICE void store_shared_16(u32 address, const uint4& x) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}

// One row of the query as eight elements of each lane: divided by the power of two of its largest element.
template <int kLanes>
DEVICE void store_query_row(const Memory& memory, int row, int piece, const uint2 (&loaded)[2]) {
  const u32 word[4] = {loaded[0].x, loaded[0].y, loaded[1].x, loaded[1].y};
  float x[8], largest = 0.0f;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    x[2 * j] = element_low(word[j]), x[2 * j + 1] = element_high(word[j]);
    largest = fmaxf(largest, fmaxf(fabsf(x[2 * j]), fabsf(x[2 * j + 1])));
  }
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
  const int exponent = exponent_of(largest, -100);
  const float shrink = power_of_two(-min(exponent, 120));
  if (piece < HEAD_DIM / 8)
    store_shared_16(memory.query + query_offset(row, place_of<kKeyChunks>(piece)),
                    make_uint4(pack_half2(x[0] * shrink, x[1] * shrink), pack_half2(x[2] * shrink, x[3] * shrink),
                               pack_half2(x[4] * shrink, x[5] * shrink), pack_half2(x[6] * shrink, x[7] * shrink)));
  if (piece == 0) memory.shared->row_factor[row] = power_of_two(min(exponent, 120));
}

// Every warp brings its own rows, each divided by the power of two of its largest element. Rows that are only padding
// become zero.
DEVICE void load_query(const PrefillArgs& args, const QueryRows& rows, const Memory& memory) {
  constexpr int pieces = HEAD_DIM / 8;  // of eight elements
  constexpr int lanes = pieces <= 2 ? 2 : pieces <= 4 ? 4 : pieces <= 8 ? 8 : pieces <= 16 ? 16 : 32;  // of a row
  constexpr int rows_each = kWarpRows * lanes / 32;                                                    // of a lane
  constexpr int at_once = rows_each < 8 ? rows_each : 8;  // that are loaded before one is used
  const int lane = threadIdx.x & 31, piece = lane % lanes;
  const int first = (threadIdx.x >> 5) * kWarpRows + lane / lanes;
#pragma unroll 1
  for (int start = 0; start < rows_each; start += at_once) {
    uint2 loaded[at_once][2];
#pragma unroll
    for (int n = 0; n < at_once; n++) {
      // What does not exist reads what does, for without a branch one row's address is not found behind another's.
      const int row = first + (start + n) * (32 / lanes);
      const i64 place = query_start(args, rows, row_of(args, rows, row)) + 8 * min(piece, pieces - 1);
      const uint2* source = reinterpret_cast<const uint2*>(static_cast<const u16*>(args.query) + place);
#pragma unroll
      for (int j = 0; j < 2; j++) {
        loaded[n][j] = source[j];
        if (row >= rows.num_rows || piece >= pieces) loaded[n][j] = make_uint2(0, 0);
      }
    }
#pragma unroll
    for (int n = 0; n < at_once; n++)
      store_query_row<lanes>(memory, first + (start + n) * (32 / lanes), piece, loaded[n]);
  }
}
