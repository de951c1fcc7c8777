// What follows from the macros for the kernels of pages; backends/cuda/pages.py launches as many threads.

#include "common/types.cuh"

constexpr int kStoreThreads = HEAD_DIM * 2 > 256 ? HEAD_DIM * 2 : 256;
constexpr int kThreads = 256;
