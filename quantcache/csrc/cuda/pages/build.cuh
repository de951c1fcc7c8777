// What the macros of a build say, and what follows from them.

#include "common/types.cuh"

constexpr int kStoreThreads = DK * 2 > 256 ? DK * 2 : 256;
constexpr int kThreads = 256;
