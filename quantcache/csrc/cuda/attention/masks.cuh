// Which keys a query row sees: of a tile, and of whole pages before they are loading.

#include "attention/args.cuh"
#include "common/floats.cuh"

constexpr int kWindowPages = 32;  // pages whose masks are looked at together, a bit of a word each
static_assert(kPageSize == 64,
              "scan_masks reads a page's masks as two keys of each lane, or eight keys of eight lanes");

// Additive masks count as no lower than this, so that a row of nothing but the lowest is uniform.
[[maybe_unused]] constexpr float kLowestMask = -6e29f;

// Sets the scores (log2 units) of hidden keys to -inf and adds additive masks. Every element is loaded before one is
// used, and a place that does not exist reads one that does.
template <int kKeyTiles>
DEVICE void hide_keys(const AttentionArgs& args, const QueryRows& rows, float (&scores)[kKeyTiles][ROW_TILES][4],
                      int first_key) {
  const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
#pragma unroll
  for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int row = 8 * i + 2 * t + j, last_row = rows.num_rows - 1;
      const int index = rows.first_row + min(row, last_row);
      const int position = rows.kv_len - rows.query_len + query_of(rows, index);
      const int last_key = row > last_row ? -1 : args.is_causal ? position : rows.kv_len - 1;
      const int earliest_key = args.window ? position - args.window + 1 : 0;
#if HAS_MASK
      const i64 start = mask_start(args, rows, index);
      float added[kKeyTiles][2];
      if (args.mask_dtype == kBool) {
        u8 seen[kKeyTiles][2];
#pragma unroll
        for (int a = 0; a < kKeyTiles; a++)
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const int key = min(first_key + 16 * a + g + 8 * h, rows.kv_len - 1);
            seen[a][h] = static_cast<const u8*>(args.mask)[start + key * args.mask_stride[3]];
          }
#pragma unroll
        for (int a = 0; a < kKeyTiles; a++)
#pragma unroll
          for (int h = 0; h < 2; h++) added[a][h] = seen[a][h] ? 0.0f : -infinity();
      } else {
#pragma unroll
        for (int a = 0; a < kKeyTiles; a++)
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const int key = min(first_key + 16 * a + g + 8 * h, rows.kv_len - 1);
            const float x = load_element(args.mask, args.mask_dtype, start + key * args.mask_stride[3]);
            added[a][h] = x == -infinity() ? x : fmaxf(x, kLowestMask) * kLog2e;
          }
      }
#endif
#pragma unroll
      for (int a = 0; a < kKeyTiles; a++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int key = first_key + 16 * a + g + 8 * h;
          float& score = scores[a][i][2 * h + j];
#if HAS_MASK
          // Not the sum with -inf, which a NaN would survive.
          score = added[a][h] == -infinity() ? -infinity() : score + added[a][h];
#endif
          if (key < earliest_key || key > last_key) score = -infinity();
        }
    }
}

// Which of `count` pages, WARPS apart, any row sees, and of which some row does not see all.
DEVICE void scan_masks(const AttentionArgs& args, const QueryRows& rows, int page, int count, u32& seen, u32& partly) {
  seen = partly = 0;
#if HAS_MASK
  const int lane = threadIdx.x & 31;
  const bool by_head = args.mask_stride[1] != 0, by_query = args.mask_stride[2] != 0;
  // Rows whose masks are those of the row before are left out.
  auto differs = [&](int row) { return row == rows.first_row || by_query || (by_head && query_of(rows, row) == 0); };
  const int end_row = rows.first_row + rows.num_rows;

  const i64 strides = args.mask_stride[0] | args.mask_stride[1] | args.mask_stride[2];
  if (args.mask_dtype == kBool && args.mask_stride[3] == 1 && ((reinterpret_cast<i64>(args.mask) | strides) & 7) == 0) {
    // Eight keys a lane and eight lanes a page: two loads bring eight pages.
    constexpr u64 ones = 0x0101010101010101u;
    const int slot = lane >> 3;
    if (lane < count) {  // what the loop will wait for, eight pages at a time
      const u8* keys = static_cast<const u8*>(args.mask) + mask_start(args, rows, rows.first_row);
      asm volatile("prefetch.global.L2 [%0];" ::"l"(keys + (page + lane * WARPS) * kPageSize));
    }
    for (int first = 0; first < count; first += 8) {
      u64 any[2] = {0, 0}, all[2] = {ones, ones};
      for (int row = rows.first_row; row < end_row; row++) {
        if (!differs(row)) continue;
        const u8* keys = static_cast<const u8*>(args.mask) + mask_start(args, rows, row) + 8 * (lane & 7);
#pragma unroll
        for (int k = 0; k < 2; k++) {
          const int i = min(first + 4 * k + slot, count - 1);
          const u64 x = *reinterpret_cast<const u64*>(keys + (page + i * WARPS) * kPageSize);
          any[k] |= x, all[k] &= x;
        }
      }
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const u32 has = __ballot_sync(~0u, any[k] != 0), lacks = __ballot_sync(~0u, all[k] != ones);
#pragma unroll
        for (int s = 0; s < 4; s++) {
          const int i = first + 4 * k + s;
          if (i < count && has >> 8 * s & 0xFF) seen |= 1u << i;
          if (i < count && lacks >> 8 * s & 0xFF) partly |= 1u << i;
        }
      }
    }
    return;
  }
  constexpr int at_once = 2;  // more would take registers from the loop over the pages
  for (int first = 0; first < count; first += at_once) {
    bool any[at_once], all[at_once];
    for (int i = 0; i < at_once; i++) any[i] = false, all[i] = true;
    for (int row = rows.first_row; row < end_row; row++) {
      if (!differs(row)) continue;
      const i64 start = mask_start(args, rows, row);
#pragma unroll
      for (int i = 0; i < at_once; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int key = (page + min(first + i, count - 1) * WARPS) * kPageSize + lane + 32 * h;
          const i64 index = start + key * args.mask_stride[3];
          if (args.mask_dtype == kBool) {
            const bool x = static_cast<const u8*>(args.mask)[index];
            any[i] |= x, all[i] &= x;
          } else {
            const float x = load_element(args.mask, args.mask_dtype, index);
            any[i] |= x != -infinity(), all[i] &= x == 0.0f;
          }
        }
    }
#pragma unroll
    for (int i = 0; i < at_once; i++) {
      const bool is_page = first + i < count;
      if (__any_sync(~0u, any[i]) && is_page) seen |= 1u << (first + i);
      if (!__all_sync(~0u, all[i]) && is_page) partly |= 1u << (first + i);
    }
  }
#else
  seen = count == 32 ? ~0u : (1u << count) - 1;
#endif
}
