// Copies of pages to a warp's ring of stages.

#include "attention/args.cuh"
#include "common/memory.cuh"

constexpr int kStepsPerPage = kPageSize / KEY_STEP;

constexpr int kStageBytes = KEY_STEP * (HEAD_DIM + V_HEAD_DIM) + 4 * HEAD_DIM + 4 * KEY_STEP;

// Where 16-byte chunk `chunk` of row `row` lies in a tile of rows of `chunks`: eight rows at one chunk in eight banks.
template <int chunks>
DEVICE u32 tile_offset(int row, int chunk) {
  constexpr int shift = chunks % 8 == 0 ? 0 : chunks % 4 == 0 ? 1 : 2;
  constexpr int bits = chunks % 8 == 0 ? 7 : chunks % 4 == 0 ? 3 : chunks % 2 == 0 ? 1 : 0;
  return row * (16 * chunks) + ((chunk ^ ((row >> shift) & bits)) << 4);
}

// Walks pages and copies them, KEY_STEP keys at a time, by one warp.
struct PageLoader {
  const Segment* segments;
  Segment segment;
  i64 end;  // first page behind the segment
  int index;

  DEVICE void open(const AttentionArgs& args, int page) {
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
  DEVICE void load(u32 stage, int page, int step, int heads, int head) {
    while (page >= end) use(index + 1);
    const i64 place = (page - segment.first) * heads + head;
    const int lane = threadIdx.x & 31;
    const i8* keys = segment.key_qdata + (place * kPageSize + step * KEY_STEP) * HEAD_DIM;
    const i8* values = segment.value_qdata + (place * kPageSize + step * KEY_STEP) * V_HEAD_DIM;
#pragma unroll
    for (int first = 0; first < KEY_STEP * kKeyChunks; first += 32) {
      int i = first + lane;
      if (KEY_STEP * kKeyChunks % 32 == 0 || i < KEY_STEP * kKeyChunks)
        copy_async(stage + tile_offset<kKeyChunks>(i / kKeyChunks, i % kKeyChunks), keys + 16 * i);
    }
    stage += KEY_STEP * HEAD_DIM;
#pragma unroll
    for (int first = 0; first < KEY_STEP * kValueChunks; first += 32) {
      int i = first + lane;
      if (KEY_STEP * kValueChunks % 32 == 0 || i < KEY_STEP * kValueChunks)
        copy_async(stage + tile_offset<kValueChunks>(i / kValueChunks, i % kValueChunks), values + 16 * i);
    }
    stage += KEY_STEP * V_HEAD_DIM;
    if (step == 0)
      for (int i = lane; i < HEAD_DIM / 4; i += 32)
        copy_async(stage + 16 * i, segment.key_metadata + place * HEAD_DIM + 4 * i);
    stage += 4 * HEAD_DIM;
    if (lane < KEY_STEP / 4)
      copy_async(stage + 16 * lane, segment.value_metadata + place * kPageSize + step * KEY_STEP + 4 * lane);
  }
};

// The pages `page`, `page` + WARPS, ... of which there are `count`, copied STAGES - 1 steps ahead.
struct PageWalk {
  u32 seen;
  int page, step, left;
  DEVICE void start(u32 pages, int first, int count) {
    seen = pages, page = first, step = 0, left = (HAS_MASK ? __popc(pages) : count) * kStepsPerPage;
    if (HAS_MASK && left) settle();
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
    if (HAS_MASK && left) {
      seen >>= 1;
      settle();
    }
  }
};
