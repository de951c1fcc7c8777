// What a CTA keeps in shared memory besides the query and converted tiles.

#include "prefill/args.cuh"

// Tiles that are known; two CTAs of a processor, with head_dims of 128, have no room for more than 48.
constexpr int kQueue = (AT_ONCE == 1 ? 64 : 48) * kTilesPerPage;
constexpr int kGroup = 4;           // tiles whose metadata is prepared together: two columns of an MMA for each
constexpr int kSlots = 2 * kGroup;  // tiles whose metadata is kept
constexpr int kTurns = 8;           // of the loop, whose numbers of tiles are kept
constexpr int kNotice = 2;          // turns after which all use a number
constexpr int kAhead = 16;          // of those that are ahead at least, but for the last ones
static_assert(kAhead > 3 * kGroup + kNotice, "metadata is copied for up to the third group");

// A tile of keys that some row of the CTA sees.
struct Tile {
  const i8* key_qdata;        // (TILE_KEYS, HEAD_DIM); null of the tail, which there is none of where SHARES_PAGES
  const i8* value_qdata;      // (TILE_KEYS, V_HEAD_DIM)
  const u32* key_metadata;    // (HEAD_DIM,)
  const u32* value_metadata;  // (TILE_KEYS,)
#if SHARES_PAGES
  int first_key;
  u8 is_partly;           // see below
  u8 first_row, end_row;  // of the sequences that read it
#else
  int first_key, is_partly;  // seen by some rows only, or some of its keys
#endif
  DEVICE bool is_page() const { return SHARES_PAGES || key_qdata != nullptr; }
};

static_assert(sizeof(Tile) == 40, "as Shape.shared_bytes of backends/cuda/prefill.py");

struct Shared {
  Tile queue[kQueue];
  int queued[kTurns];    // tiles put into the queue so far, as each turn of the loop may know
  int filled;            // the same, as the warp knows that puts them there
  int next_block;        // to look at
  float tail_factor[2];  // the tail's keys and values, converted, times this are what they were
  u32 tail_largest[2];   // bits of the largest magnitude, while it is being found
  // By slot of a tile.
  float key_factor[kSlots], offset_factor[kSlots], widest[kSlots];
  __align__(16) float values[kSlots][TILE_KEYS][2];  // scale, and scale times zero point
  __align__(16) u16 key_scale[kSlots][HEAD_DIM];     // 16-bit floats
  // Offsets of a group's keys as the rows of a matrix like a tile: of each tile the leading bits, and what they lack.
  __align__(16) u8 key_offset[2][2 * kGroup * kKeyPitch];
  __align__(16) float row_offset[kRows][kGroup];  // the query's product with them
  float row_factor[kRows];                        // the query as converted times this is what it was
  // Each thread's own copies on their way.
  __align__(16) u32 metadata[kGroup][HEAD_DIM + TILE_KEYS];
};

constexpr int kMakerThreads = 32 * kMakers;
constexpr int kKeyPieces = (TILE_KEYS * kKeyChunks + kMakerThreads - 1) / kMakerThreads;  // of 16 codes, of a thread
constexpr int kValuePieces = (TILE_KEYS * kValueChunks + kMakerThreads - 1) / kMakerThreads;
constexpr int kQueryBytes = WARPGROUP ? (kKeyChunks + 3) / 4 * 128 * kRows : kRows * kKeyPitch;
constexpr int kKeyTileBytes = kTileBytes<kKeyChunks>, kValueTileBytes = kTileBytes<kValueChunks>;
static_assert(WARPGROUP == 0 || kQueryBytes % 1024 == 0, "panels begin at a multiple of 1024");
constexpr int kCodeBytes = 16 * kMakerThreads * (kKeyPieces + kValuePieces);

// Addresses in shared memory.
struct Memory {
  u32 query, keys, values, codes;  // BUFFERS of the tiles
  Shared* shared;

  DEVICE explicit Memory(u8* memory) {
    query = static_cast<u32>(__cvta_generic_to_shared(memory));
    keys = query + kQueryBytes;
    values = keys + BUFFERS * kKeyTileBytes;
    codes = values + BUFFERS * kValueTileBytes;
    shared = reinterpret_cast<Shared*>(memory + kQueryBytes + BUFFERS * (kKeyTileBytes + kValueTileBytes) + kCodeBytes);
  }
};
