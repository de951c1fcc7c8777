// Which tiles of keys a CTA attends to, found ahead by one warp.

#include "prefill/shared.cuh"

#if HAS_MASK
// Whether each of a block of queries sees some key by the mask, so that what is faint weighs nothing.
DEVICE bool all_sighted(const PrefillArgs& args, int sequence, int q_head, int query_block) {
  const i64 index = sequence * args.sighted_stride[0] + q_head * args.sighted_stride[1];
  return args.sighted[index + query_block * args.sighted_stride[2]] == ~0u;
}
#endif

// Whether any row of a sequence sees a block of keys, and whether some row does not see all of it.
DEVICE u8 look_at_block(const PrefillArgs& args, const QueryRows& rows, int block, int sequence) {
  const int first_key = block * kPageSize, last_key = first_key + kPageSize - 1;
  const int first_position = rows.position + rows.first_query, last_position = rows.position + rows.last_query;
  bool is_seen = true, is_partly = last_key >= rows.kv_len;
  if (args.is_causal) is_seen = first_key <= last_position, is_partly |= last_key > first_position;
  if (args.window) {
    is_seen &= last_key > first_position - args.window;
    is_partly |= first_key <= last_position - args.window;
  }
#if HAS_MASK
  bool any = false;
  const int first_head = args.block_stride[1] ? rows.first_row / args.query_len : 0;
  const int last_row = SHARES_PAGES ? args.group * args.query_len - 1 : rows.first_row + rows.num_rows - 1;
  const int last_head = args.block_stride[1] ? last_row / args.query_len : 0;
  const int first = args.block_stride[2] ? rows.first_query / kBlockQueries : 0;
  const int last = args.block_stride[2] ? rows.last_query / kBlockQueries : 0;
  for (int head = first_head; head <= last_head; head++) {
    const int q_head = rows.kv_head * args.group + head;
    const u8* found = args.blocks + sequence * args.block_stride[0] + q_head * args.block_stride[1] + block;
#pragma unroll 4
    for (int i = first; i <= last; i++) {
      const u8 x = found[i * args.block_stride[2]];
      any |= x & kSeen, is_partly |= (x & kPartly) != 0;
      if (x & kFaint) any |= !(args.sighted && all_sighted(args, sequence, q_head, i));
    }
  }
  is_seen &= any;
#endif
  return (is_seen ? kSeen : 0) | (is_partly ? kPartly : 0);
}

// Where a page lies.
DEVICE Segment segment_of(const PrefillArgs& args, int page) {
  const Segment* segments = args.segments ? args.segments : args.few;
  int low = 0, high = args.num_segments - 1;  // the last segment that begins at or before the page
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (segments[middle].first <= page)
      low = middle;
    else
      high = middle - 1;
  }
  return segments[low];
}

// Has a tile be that of a page's first keys.
DEVICE void point_to(Tile& tile, const Segment& segment, i64 place) {
  tile.key_qdata = segment.key_qdata + place * (kPageSize * HEAD_DIM);
  tile.value_qdata = segment.value_qdata + place * (kPageSize * V_HEAD_DIM);
  tile.key_metadata = segment.key_metadata + place * HEAD_DIM;
  tile.value_metadata = segment.value_metadata + place * kPageSize;
}

// Puts the first `count` tiles of a block into the queue, from `index` on; `tile` is the first one but for its keys.
DEVICE void put_tiles(Shared& shared, Tile& tile, int block, int index, int count, bool is_page) {
  for (int part = 0; part < count; part++) {
    tile.first_key = block * kPageSize + part * TILE_KEYS;
    shared.queue[(index + part) % kQueue] = tile;
    if (is_page) {
      tile.key_qdata += TILE_KEYS * HEAD_DIM, tile.value_qdata += TILE_KEYS * V_HEAD_DIM;
      tile.value_metadata += TILE_KEYS;
    }
  }
}

// Says to the turn kNotice after that of tile `attended` how many tiles the queue has had, and keeps what comes next. One
// warp; the others see it after a barrier.
DEVICE void give_notice(Shared& shared, int attended, int queued, int next) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
    shared.queued[(attended + kNotice) % kTurns] = queued;
    shared.filled = queued, shared.next_block = next;
  }
  __syncwarp();
}

#if !SHARES_PAGES
// Puts the tiles of further blocks into the queue, if fewer than kAhead are left from `attended` on, and gives notice of
// it. One warp.
DEVICE void fill_queue(const PrefillArgs& args, const QueryRows& rows, const BlockRange& range, Shared& shared,
                       int attended) {
  const int lane = threadIdx.x & 31;
  int next = shared.next_block, queued = shared.filled;
#pragma unroll 1
  while (next < range.end && queued - attended <= kAhead) {
    const int block = next + lane;
    const u8 found = block < range.end ? look_at_block(args, rows, block, rows.batch) : 0;
    int count = 0;  // tiles of this block
    if (found & kSeen) count = min(kTilesPerPage, (rows.kv_len - block * kPageSize + TILE_KEYS - 1) / TILE_KEYS);
    int before = 0;  // tiles of the blocks before
    const u32 one = __ballot_sync(~0u, count >= 1), two = __ballot_sync(~0u, count >= 2);
    const u32 lower = (1u << lane) - 1;
    before = __popc(one & lower) + __popc(two & lower);
    if (count) {
      Tile tile = {nullptr, nullptr, nullptr, nullptr, 0, (found & kPartly) != 0};
      if (block < rows.num_pages) {
#if HAS_BLOCK_TABLE
        const BlockTable& table = args.block_table;
        const Segment segment = table.segment_of(table.block_of(rows.sequence, block), rows.kv_head);
        const i64 place = 0;
#else
        const Segment segment = segment_of(args, block);
#if HAS_ROW_TABLE
        const i64 place =
            place_of(segment, block, args.row_table.row_of(rows.batch, block), args.num_kv_heads, rows.kv_head);
#else
        const i64 place = (block - segment.first) * args.batch * args.num_kv_heads + rows.head;
#endif
#endif
        point_to(tile, segment, place);
      }
      put_tiles(shared, tile, block, queued + before, count, block < rows.num_pages);
    }
    queued += __popc(one) + __popc(two);
    next += 32;
  }
  give_notice(shared, attended, queued, next);
}
#endif
