// What the macros of a build say, and what follows from them.

#include "common/types.cuh"

constexpr int kStoreThreads = HEAD_DIM * 2 > 256 ? HEAD_DIM * 2 : 256;
constexpr int kThreads = 256;
