// Which pages the sequences of a CTA share, where SHARES_PAGES.
//
// Neighbours whose entries of the row table are equal read one page. A run of two or more of them has its tiles attended
// to by all rows of the CTA, those of others hidden: a page is loaded and converted once for a run. What a sequence reads
// alone, and the tail, the kernel for few query rows attends to; it asks the table the same question (see PageWindow in
// attention/page_loader.cuh) and merges what was found here.

#include "prefill/tiles.cuh"

#if SHARES_PAGES
constexpr int kMaxSequences = 64;  // of a CTA, a bit each
static_assert(kQueue - kAhead >= kMaxSequences / 2 * kTilesPerPage, "the queue has room for the runs of a page");

// A bit for each sequence of the CTA: whether it reads the row of a page that the one before it reads.
DEVICE u64 joined_sequences(const PrefillArgs& args, const QueryRows& rows, int page) {
  constexpr int kAtOnce = 16;  // entries that are loaded before one is used
  u64 joined = 0;
  int before = args.row_table.row_of(rows.batch, page);
#pragma unroll 1
  for (int first = 1; first < rows.num_sequences; first += kAtOnce) {
    int row[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; n++)
      row[n] = args.row_table.row_of(rows.batch + min(first + n, rows.num_sequences - 1), page);
#pragma unroll
    for (int n = 0; n < kAtOnce; n++) {
      if (first + n < rows.num_sequences) joined |= static_cast<u64>(row[n] == before) << (first + n);
      before = row[n];
    }
  }
  return joined;
}

// The sequences of the run that begins at the lowest of the bits `first`.
DEVICE u64 run_of(u64 joined, u64 first) {
  first &= -first;
  // Adding to the joined bits behind it carries through them to the first that is not joined.
  const u64 behind = joined & ~(first | (first - 1));
  return first | (behind & ~(behind + (first << 1)));
}

// Bits of the sequences that see a page, and of those that do not see all of it.
DEVICE void look_at_sequences(const PrefillArgs& args, const QueryRows& rows, int page, u64& seen, u64& partly) {
  const int count = HAS_MASK && args.block_stride[0] ? rows.num_sequences : 1;
  if (count == 1) {  // all alike
    const u8 found = look_at_block(args, rows, page, rows.batch);
    seen = found & kSeen ? ~0ull : 0, partly = found & kPartly ? ~0ull : 0;
    return;
  }
  seen = partly = 0;
#pragma unroll 8
  for (int n = 0; n < count; n++) {
    const u64 found = look_at_block(args, rows, page, rows.batch + n);
    seen |= (found & kSeen ? 1ull : 0ull) << n, partly |= (found & kPartly ? 1ull : 0ull) << n;
  }
}

// See fill_queue of prefill/tiles.cuh. A turn takes as many pages as the queue has room for, and one at least.
DEVICE void fill_queue(const PrefillArgs& args, const QueryRows& rows, const BlockRange& range, Shared& shared,
                       int attended) {
  const int lane = threadIdx.x & 31, rows_each = args.group * args.query_len;
  int next = shared.next_block, queued = shared.filled;
#pragma unroll 1
  while (next < range.end && queued - attended <= kAhead) {
    const int page = next + lane * args.num_splits;
    u64 joined = 0, runs = 0, seen = ~0ull, partly = ~0ull;  // of runs a bit for the first sequence
    if (page < range.end) {
      joined = joined_sequences(args, rows, page);
      look_at_sequences(args, rows, page, seen, partly);
      for (u64 left = ~joined & joined >> 1; left; left &= left - 1)
        if (seen & run_of(joined, left)) runs |= left & -left;
    }
    const int count = __popcll(runs) * kTilesPerPage;
    int through = count;  // tiles of this page and those before
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(~0u, through, step);
      if (lane >= step) through += before;
    }
    const bool fits = through <= kQueue - (queued - attended);
    const int pages = __popc(__ballot_sync(~0u, fits));
    if (fits && runs) {
      const Segment segment = segment_of(args, page);
      int index = queued + through - count;
      for (u64 left = runs; left; left &= left - 1) {
        const u64 run = run_of(joined, left);
        const int first = __ffsll(run) - 1, length = __popcll(run);
        const int row = args.row_table.row_of(rows.batch + first, page);
        Tile tile = {};
        point_to(tile, segment, place_of(segment, page, row, args.num_kv_heads, rows.kv_head));
        tile.is_partly = length < rows.num_sequences || (partly & run) != 0;
        tile.first_row = first * rows_each, tile.end_row = (first + length) * rows_each;
        put_tiles(shared, tile, page, index, kTilesPerPage, true);
        index += kTilesPerPage;
      }
    }
    queued += __shfl_sync(~0u, through, pages - 1);
    next += pages * args.num_splits;
  }
  give_notice(shared, attended, queued, next);
}
#endif
