// What the macros of a build say, and what follows from them.

#include "common/types.cuh"

constexpr int kThreads = 32 * WARPS;
constexpr int kRows = 8 * ROW_TILES;
constexpr int kKeyChunks = HEAD_DIM / 16, kValueChunks = V_HEAD_DIM / 16;

constexpr int kTiles = KEY_STEP / 16;
