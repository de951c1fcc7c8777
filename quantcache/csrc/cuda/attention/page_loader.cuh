// Copies of pages to a warp's ring of stages.

#include "attention/masks.cuh"
#include "common/memory.cuh"

constexpr int kStepsPerPage = kPageSize / KEY_STEP;
// A stage: codes of the keys, codes of the values, metadata of the keys (of a page's first step), metadata of the
// values.
constexpr int kStageBytes = KEY_STEP * (HEAD_DIM + V_HEAD_DIM) + 4 * HEAD_DIM + 4 * KEY_STEP;
static_assert(kStageBytes % 16 == 0, "stages take copies of 16 bytes");
static_assert(KEY_STEP / 4 <= 32, "a lane copies the metadata of four values");

// Where 16-byte chunk `chunk` of row `row` lies in a tile of rows of kChunks: eight rows at one chunk in eight banks.
template <int kChunks>
DEVICE u32 tile_offset(int row, int chunk) {
  constexpr int shift = kChunks % 8 == 0 ? 0 : kChunks % 4 == 0 ? 1 : 2;
  constexpr int bits = kChunks % 8 == 0 ? 7 : kChunks % 4 == 0 ? 3 : kChunks % 2 == 0 ? 1 : 0;
  return row * (16 * kChunks) + ((chunk ^ ((row >> shift) & bits)) << 4);
}

// Finds pages, one after the other, and copies them to stages, KEY_STEP keys at a time, by one warp.
struct PageLoader {
  const Segment* segments;
  Segment segment;
  i64 end;  // first page behind the segment
  int index;

  DEVICE void open(const AttentionArgs& args, int page) {
    if (HAS_BLOCK_TABLE) return;
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
  // Where a page of head `head` of `heads` lies; with a row table they are those of the row.
  DEVICE i64 find(int page, int row, int heads, int head) {
    while (page >= end) use(index + 1);
#if HAS_ROW_TABLE
    return place_of(segment, page, row, heads, head);
#else
    return (page - segment.first) * heads + head;
#endif
  }
  // `place` is not read with a block table, where `row` is a block.
  DEVICE void load(const AttentionArgs& args, u32 stage, i64 place, int step, int row, int head) {
#if HAS_BLOCK_TABLE
    segment = args.block_table.segment_of(row, head);
    place = 0;
#endif
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
    seen = pages, page = first, step = 0, left = (kSkipsPages ? __popc(pages) : count) * kStepsPerPage;
    if (kSkipsPages && left) settle();
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
    if (kSkipsPages && left) {
      seen >>= 1;
      settle();
    }
  }
};

// Pages of a warp that have been looked at: all, or kWindowPages at a time where there is something to look at.
struct PageWindow {
  int first, count;  // pages, WARPS apart
  int left;          // pages of the warp from `first` on
  u32 seen, partly;  // see scan_masks
  int row;           // stored, or a block, of the page that is as far behind the first as the lane says

  DEVICE void open(const AttentionArgs& args, const QueryRows& rows, const PageRange& range) {
    first = range.first, left = range.count;
    look(args, rows);
  }
  // Goes on to the next pages; false if there are none.
  DEVICE bool advance(const AttentionArgs& args, const QueryRows& rows) {
    left -= count;
    if (left <= 0) return false;
    first += count * WARPS;
    look(args, rows);
    return true;
  }
  DEVICE void look(const AttentionArgs& args, const QueryRows& rows) {
    count = kLooksAhead ? min(left, kWindowPages) : left;
#if HAS_BLOCK_TABLE
    const int lane = threadIdx.x & 31;
    row = 0;
    if (lane < count) row = args.block_table.block_of(rows.sequence, first + lane * WARPS);
#endif
#if HAS_ROW_TABLE
    const u32 all = count == 32 ? ~0u : (1u << count) - 1, own = all & ~find_rows(args, rows);
    seen = partly = 0;
    if (!own) return;
#endif
    scan_masks(args, rows, first, count, seen, partly);
#if HAS_ROW_TABLE
    seen &= own;
#endif
  }
#if HAS_ROW_TABLE
  // Which pages a neighbour shares, where those have been attended to: prefill/shared_pages.cuh tells them the same way.
  DEVICE u32 find_rows(const AttentionArgs& args, const QueryRows& rows) {
    const int lane = threadIdx.x & 31, place = rows.batch % args.sequences;
    const bool has_next = place + 1 < args.sequences && rows.batch + 1 < args.batch;
    int before = -1, next = -1;
    row = 0;
    if (lane < count) {
      const int page = first + lane * WARPS;
      row = args.row_table.row_of(rows.batch, page);
      if (place > 0) before = args.row_table.row_of(rows.batch - 1, page);
      if (has_next) next = args.row_table.row_of(rows.batch + 1, page);
    }
    return __ballot_sync(~0u, lane < count && (before == row || next == row));
  }
#endif
  DEVICE PageWalk walk() const {
    PageWalk walk;
    walk.start(seen, first, count);
    return walk;
  }
};

// A warp's STAGES stages in shared memory, loaded STAGES - 1 steps ahead of `stage`, which is attended to.
struct PageRing {
  u32 stages;
  int stage, heads, head;
  PageLoader loader;
  PageWalk loading;
  int first, row;  // see PageWindow
  u32 place;       // where the page lies that is loaded next, where HAS_ROW_TABLE

  DEVICE void open(const AttentionArgs& args, const QueryRows& rows, const PageRange& range, u32 memory) {
    stages = memory;
    stage = 0;
    heads = HAS_ROW_TABLE ? args.num_kv_heads : args.batch * args.num_kv_heads;
    head = HAS_ROW_TABLE || HAS_BLOCK_TABLE ? rows.kv_head : rows.head;
    if (range.count) loader.open(args, range.first);
  }
  // Starts to load the window's first steps. No copy may be under way.
  DEVICE void fill(const AttentionArgs& args, const PageWindow& window) {
    loading = window.walk();
    first = window.first, row = window.row;
    if (HAS_ROW_TABLE) find_place();
#pragma unroll
    for (int ahead = 0; ahead < STAGES - 1; ahead++) load_next(args, ahead);
  }
  // One group of copies, empty where nothing is left to load.
  DEVICE void load_next(const AttentionArgs& args, int ahead) {
    if (loading.left) {
      const int block = HAS_BLOCK_TABLE ? row_of_next() : 0;
      const i64 where = HAS_BLOCK_TABLE ? 0 : HAS_ROW_TABLE ? place : loader.find(loading.page, 0, heads, head);
      loader.load(args, address(ahead), where, loading.step, block, head);
      loading.advance();
      if (HAS_ROW_TABLE && loading.step == 0) find_place();
    }
    commit_copies();
  }
  DEVICE int row_of_next() const { return __shfl_sync(~0u, row, (loading.page - first) / WARPS); }
  // Found behind the copies of the page before, since those of this one must not wait for it.
  DEVICE void find_place() {
    if (loading.left) place = loader.find(loading.page, row_of_next(), heads, head);
  }
  DEVICE u32 address(int ahead) const {
    const int index = stage + ahead;
    return stages + (index < STAGES ? index : index - STAGES) * kStageBytes;
  }
  DEVICE u32 current() const { return stages + stage * kStageBytes; }
  DEVICE void advance() { stage = stage + 1 < STAGES ? stage + 1 : 0; }
};
