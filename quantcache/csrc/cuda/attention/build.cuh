// What the macros of a build say, and what follows from them.

#include "common/types.cuh"

constexpr int kThreads = 32 * WARPS;
constexpr int kRows = 8 * ROW_TILES;
constexpr int kKeyChunks = HEAD_DIM / 16, kValueChunks = V_HEAD_DIM / 16;

constexpr int kTiles = KEY_STEP / 16;

// Where a thread is in its CTA. g and t are its row and column in a fragment of an MMA; PTX calls them groupID and
// threadID_in_group.
struct Thread {
  int lane, warp, g, t;
};
DEVICE Thread this_thread() {
  Thread thread;
  thread.lane = threadIdx.x & 31, thread.warp = threadIdx.x >> 5;
  thread.g = thread.lane >> 2, thread.t = thread.lane & 3;
  return thread;
}
