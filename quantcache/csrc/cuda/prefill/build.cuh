// The macros of a prefill kernel, and what follows from them.
//   ROW_TILES    tiles of 16 query rows that a warp holds
//   WARPS        of a CTA with query rows, each its own
//   TILE_KEYS    keys attended to at once, a page or half of one
//   BUFFERS      converted tiles in shared memory: with two the next is converted between the products of the current
//   WARPGROUP    whether products are those of common/warpgroup.cuh, of sm_90a alone (0 or 1): of one row tile then, with
//                two buffers, and four further warps that convert, or eight where kMakers says so
//   AT_ONCE      CTAs that a processor of 9.0 shall hold at once (1 or 2): two of up to 64 query rows and 128 channels
//   HAS_MASK     whether there is a mask (0 or 1)
//   HAS_SOFTCAP  whether logits are capped (0 or 1)
//   SHARES_PAGES whether a CTA has the rows of neighbouring sequences, and attends to the pages that some of them share and
//                to nothing else: see prefill/shared_pages.cuh (0 or 1)
//   HAS_BLOCK_TABLE  whether sequences of any length, with two queries or more each, read blocks of a pool (0 or 1);
//                then there is neither a mask nor a row table
//   SHARED_BYTES of a CTA, as the host counts them
// Letters in these files: g and t as in common/matrices.cuh; and the loop indices i (tile of 16 query rows), h (the
// upper or the lower eight rows of such a tile), n (eight keys, or eight channels of the output), j (element that a lane
// holds of a tile), c (16 channels of a key, or 16 keys).

#include "common/types.cuh"

static_assert(DTYPE == kBFloat16 || DTYPE == kFloat16, "tensor cores");
static_assert(ROW_TILES == 1 || ROW_TILES == 2, "more would not fit in registers");
static_assert(WARPS == 2 || WARPS == 4 || WARPS == 8 || (WARPGROUP && WARPS == 12), "metadata is divided among makers");
static_assert(TILE_KEYS == 32 || TILE_KEYS == 64, "parts of a page");
static_assert(BUFFERS == 1 || BUFFERS == 2, "the tile attended to, and the next");
static_assert(WARPGROUP == 0 || (WARPS % 4 == 0 && ROW_TILES == 1 && BUFFERS == 2), "warpgroups");
static_assert(AT_ONCE == 1 || (AT_ONCE == 2 && WARPGROUP && WARPS == 4), "registers for two are those of 512 threads");
static_assert((HAS_MASK == 0 || HAS_MASK == 1) && (HAS_SOFTCAP == 0 || HAS_SOFTCAP == 1), "a yes or a no");
static_assert(HAS_BLOCK_TABLE == 0 || HAS_BLOCK_TABLE == 1, "a yes or a no");
static_assert(!HAS_BLOCK_TABLE || !(HAS_MASK || HAS_ROW_TABLE), "what serving asks for");
static_assert(SHARES_PAGES == 0 || (SHARES_PAGES == 1 && HAS_ROW_TABLE), "a yes or a no; a table says what is shared");

constexpr int kRowThreads = 32 * WARPS;             // that have query rows
constexpr int kFirstMaker = WARPGROUP ? WARPS : 0;  // warp of those that make tiles
// Such warps. A turn is hardly shorter than theirs; the registers of eight are those that 128 channels of output leave.
constexpr int kMakers = WARPGROUP && !(WARPS == 8 && TILE_KEYS == kPageSize) ? 4 : WARPS;
constexpr int kThreads = kRowThreads + (WARPGROUP ? 32 * kMakers : 0);
// Of a thread, in warpgroups: what 65536 leave those with query rows, or half as many where two CTAs have them.
constexpr int kMakerRegisters = WARPS == 12 ? 80 : 72;
constexpr int kRowRegisters = WARPS == 12 ? 144 : kMakers == 8 || AT_ONCE == 2 ? 184 : WARPS == 8 ? 216 : 240;
constexpr int kWarpRows = 16 * ROW_TILES, kRows = WARPS * kWarpRows;
constexpr int kKeyChunks = HEAD_DIM / 16, kValueChunks = V_HEAD_DIM / 16;
constexpr int kTilesPerPage = kPageSize / TILE_KEYS;
// Few rows wait for memory: where SHARES_PAGES a tile is brought to the L2 cache so many turns of the loop before.
constexpr int kFetched = 8;
constexpr int kKeyBlocks = TILE_KEYS / 8;  // of eight keys

// Rows in shared memory are an odd number of 16 bytes apart: the eight that are read at once lie in different banks.
constexpr int kKeyPitch = 2 * HEAD_DIM + 16, kValuePitch = 2 * V_HEAD_DIM + 16;
// Tiles for the instructions of warpgroups have panels of 128 bytes instead, see common/warpgroup.cuh.
constexpr int kPanelBytes = 128 * TILE_KEYS;
template <int kChunks>
constexpr int kTileBytes = WARPGROUP ? (kChunks + 3) / 4 * kPanelBytes : TILE_KEYS * (32 * kChunks + 16);
// Where 16 bytes of a row of a tile lie.
template <int kChunks>
DEVICE u32 tile_offset(u32 row, u32 place) {
  if (WARPGROUP) return place / 8 * kPanelBytes + row * 128 + ((place ^ row) & 7) * 16;
  return row * (32 * kChunks + 16) + place * 16;
}

// Where 16 bytes of a row of the query lie.
DEVICE u32 query_offset(int row, int place) {
  if (WARPGROUP) return place / 8 * (128 * kRows) + row * 128 + ((place ^ row) & 7) * 16;
  return row * kKeyPitch + place * 16;
}

// Channels are kept in another order: of every 16 the first eight, then of every 16 the other eight. A thread then
// writes the 16 that it converts as two pieces whose neighbours its neighbours write, without bank conflicts.
template <int kChunks>
DEVICE int place_of(int piece) {  // of eight channels
  return (piece & 1) * kChunks + (piece >> 1);
}
// The first channel of the piece at a place.
template <int kChunks>
DEVICE int channel_at(int place) {
  return place < kChunks ? 16 * place : 16 * (place - kChunks) + 8;
}
