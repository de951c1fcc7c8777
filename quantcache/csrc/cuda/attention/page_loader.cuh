// Copies of pages to a warp's ring of stages.

#include "attention/args.cuh"
#include "common/memory.cuh"

constexpr int kStepsPerPage = kPageSize / KSTEP;

constexpr int kStageBytes = KSTEP * (DK + DV) + 4 * DK + 4 * KSTEP;

// Where 16-byte chunk `chunk` of row `row` lies in a tile of rows of `chunks`: eight rows at one chunk in eight banks.
template <int chunks>
DEVICE u32 tile_offset(int row, int chunk) {
  constexpr int shift = chunks % 8 == 0 ? 0 : chunks % 4 == 0 ? 1 : 2;
  constexpr int bits = chunks % 8 == 0 ? 7 : chunks % 4 == 0 ? 3 : chunks % 2 == 0 ? 1 : 0;
  return row * (16 * chunks) + ((chunk ^ ((row >> shift) & bits)) << 4);
}

// Walks pages and copies them, KSTEP keys at a time, by one warp.
struct PageCopier {
  const Segment* segments;
  Segment segment;
  i64 end;  // first page behind the segment
  int index;

  DEVICE void open(const Args& args, int page) {
    segments = args.segments;
    if (args.num_segments == 1) {
      segment = args.only;
      end = 0x7FFFFFFF;
      return;
    }
    const int lane = threadIdx.x & 31;
    int count = 0;  // segments that start at or before the page
#pragma unroll 1
    for (int first = 0; first < args.num_segments; first += 32)
      count += __popc(__ballot_sync(~0u, first + lane < args.num_segments && segments[first + lane].first <= page));
    use(max(count - 1, 0));
  }
  DEVICE void use(int i) {
    index = i;
    segment = segments[i];
    end = segments[i + 1].first;
  }
  DEVICE void copy(u32 stage, int page, int step, int heads, int head) {
    while (page >= end) use(index + 1);
    const i64 place = (page - segment.first) * heads + head;
    const int lane = threadIdx.x & 31;
    const i8* keys = segment.key_qdata + (place * kPageSize + step * KSTEP) * DK;
    const i8* values = segment.value_qdata + (place * kPageSize + step * KSTEP) * DV;
#pragma unroll
    for (int first = 0; first < KSTEP * kKeyChunks; first += 32) {
      int i = first + lane;
      if (KSTEP * kKeyChunks % 32 == 0 || i < KSTEP * kKeyChunks)
        copy_async(stage + tile_offset<kKeyChunks>(i / kKeyChunks, i % kKeyChunks), keys + 16 * i);
    }
    stage += KSTEP * DK;
#pragma unroll
    for (int first = 0; first < KSTEP * kValueChunks; first += 32) {
      int i = first + lane;
      if (KSTEP * kValueChunks % 32 == 0 || i < KSTEP * kValueChunks)
        copy_async(stage + tile_offset<kValueChunks>(i / kValueChunks, i % kValueChunks), values + 16 * i);
    }
    stage += KSTEP * DV;
    if (step == 0)
      for (int i = lane; i < DK / 4; i += 32) copy_async(stage + 16 * i, segment.key_metadata + place * DK + 4 * i);
    stage += 4 * DK;
    if (lane < KSTEP / 4)
      copy_async(stage + 16 * lane, segment.value_metadata + place * kPageSize + step * KSTEP + 4 * lane);
  }
};

// The pages `page`, `page` + WARPS, ... of which there are `count`, copied STAGES - 1 steps ahead.
struct Walk {
  u32 seen;
  int page, step, left;
  DEVICE void start(u32 pages, int first, int count) {
    seen = pages, page = first, step = 0, left = (MASK ? __popc(pages) : count) * kStepsPerPage;
    if (MASK && left) settle();
  }
  DEVICE void settle() {
    int skipped = __ffs(seen) - 1;
    page += skipped * WARPS;
    seen >>= skipped;
  }
  DEVICE void advance() {
    left--;
    if (++step < kStepsPerPage) return;
    step = 0;
    page += WARPS;
    if (MASK && left) {
      seen >>= 1;
      settle();
    }
  }
};
