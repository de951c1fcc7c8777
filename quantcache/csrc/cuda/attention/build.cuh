// The macros of an attention kernel, and what follows from them.
//   ROW_TILES    tiles of 8 query rows that a CTA holds
//   WARPS        of a CTA, each with pages of its own
//   KEY_STEP     keys copied and attended to at once
//   STAGES       steps in a warp's ring of copies
//   HAS_MASK     whether there is a mask (0 or 1)
//   HAS_SOFTCAP  whether logits are capped (0 or 1)
//   HAS_BLOCK_TABLE  whether sequences of any length, with one query each, read blocks of a pool (0 or 1); then there
//                is neither a mask nor a row table
//   FOLDS_GRID   whether there are more row tiles or sequences than a grid has room for side by side (0 or 1)
// Letters in these files: g and t as in common/matrices.cuh; and the loop indices i (tile of 8 query rows), j (query
// row or element that a lane holds of it), a (tile of 16 keys), h (half of such a tile), c (chunk of 16 elements of a
// row), k, n, s and w (said where they loop).

#include "common/types.cuh"

static_assert(ROW_TILES >= 1 && STAGES >= 2, "a CTA holds rows; a step is attended to while another is copied");
static_assert(WARPS >= 1 && WARPS <= 16 && (WARPS & (WARPS - 1)) == 0, "WARPS - 1 masks a warp's place at the tail");
static_assert(KEY_STEP > 0 && KEY_STEP % 16 == 0 && kPageSize % KEY_STEP == 0, "steps of whole MMAs fill a page");
static_assert((HAS_MASK == 0 || HAS_MASK == 1) && (HAS_SOFTCAP == 0 || HAS_SOFTCAP == 1), "a yes or a no");
static_assert(FOLDS_GRID == 0 || FOLDS_GRID == 1, "a yes or a no");
static_assert(HAS_BLOCK_TABLE == 0 || HAS_BLOCK_TABLE == 1, "a yes or a no");
static_assert(!HAS_BLOCK_TABLE || !(HAS_MASK || HAS_ROW_TABLE || FOLDS_GRID || DTYPE == kFloat32),
              "what serving asks for");

constexpr int kThreads = 32 * WARPS;
constexpr int kRows = 8 * ROW_TILES;
constexpr int kKeyChunks = HEAD_DIM / 16, kValueChunks = V_HEAD_DIM / 16;

constexpr int kTiles = KEY_STEP / 16;

// Whether a warp looks at what is known of its pages, kWindowPages at a time, before it loads them; and whether it may
// leave some out.
constexpr bool kSkipsPages = HAS_MASK || HAS_ROW_TABLE;
constexpr bool kLooksAhead = kSkipsPages || HAS_BLOCK_TABLE;

// Where a thread is in its CTA and, with g and t, in a fragment of an MMA.
struct Thread {
  int lane, warp, g, t;
};
DEVICE Thread this_thread() {
  Thread thread;
  thread.lane = threadIdx.x & 31, thread.warp = threadIdx.x >> 5;
  thread.g = thread.lane >> 2, thread.t = thread.lane & 3;
  return thread;
}
