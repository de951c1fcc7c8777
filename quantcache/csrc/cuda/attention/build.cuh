// What the macros of a build say, and what follows from them.

#include "common/types.cuh"

constexpr int kThreads = 32 * WARPS;
constexpr int kRows = 8 * NT;
constexpr int kKeyChunks = DK / 16, kValueChunks = DV / 16;

constexpr int kTiles = KSTEP / 16;
