// Types, and the macros that every program here is built with; NVRTC gets no headers. One build for each head_dim and
// kind of call: backends/cuda/plan.py and pages.py define the macros.
//   HEAD_DIM, V_HEAD_DIM  elements of a key and of a value
//   DTYPE                 of queries, tails and outputs, a number of the enum below
//   HAS_ROW_TABLE         whether sequences read rows of pages that a table names, not their own (0 or 1)

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
typedef unsigned short u16;
typedef short i16;
typedef signed char i8;
typedef unsigned char u8;

#define DEVICE __device__ __forceinline__

constexpr int kPageSize = 64;
constexpr float kLog2e = 1.44269504088896341f;

// Element types of queries, tails, masks and outputs; the numbers are those of backends/cuda/launch.py.
enum : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kBool = 3 };

static_assert(DTYPE == kFloat32 || DTYPE == kBFloat16 || DTYPE == kFloat16, "states are floats");
static_assert(HEAD_DIM > 0 && HEAD_DIM % 16 == 0 && HEAD_DIM <= 256, "HEAD_DIM in steps of an MMA, up to 256");
static_assert(V_HEAD_DIM > 0 && V_HEAD_DIM % 16 == 0 && V_HEAD_DIM <= 256, "V_HEAD_DIM in steps of an MMA, up to 256");
static_assert(sizeof(i64) == 8 && sizeof(u32) == 4 && sizeof(u16) == 2 && sizeof(void*) == 8, "as the host packs");

static_assert(HAS_ROW_TABLE == 0 || HAS_ROW_TABLE == 1, "a yes or a no");

// Pages `first` to the first of the next entry, allocated at once; see Segment in store/segments.py. The last entry has
// only `first`. Without a row table there are as many rows as sequences.
struct Segment {
  const i8* key_qdata;        // (pages, rows, num_kv_heads, 64, HEAD_DIM)
  const u32* key_metadata;    // (pages, rows, num_kv_heads, HEAD_DIM), scale | zero_point << 16
  const i8* value_qdata;      // (pages, rows, num_kv_heads, 64, V_HEAD_DIM)
  const u32* value_metadata;  // (pages, rows, num_kv_heads, 64)
#if HAS_ROW_TABLE
  int first, rows;
#else
  i64 first;
#endif
};
static_assert(sizeof(Segment) == 40, "five words of a row of SegmentTable in backends/cuda/pages.py");

// Which row of its segment each sequence reads a page from.
struct RowTable {
  const int* rows;  // (batch, pages or more), or null where HAS_ROW_TABLE is 0
  i64 stride;       // from a sequence to the next
  DEVICE int row_of(int batch, int page) const { return rows[batch * stride + page]; }
};

// The pages of one layer in a pool that sequences share. A page has a chunk for each KV head, see backends/blocks.py.
// Of a sequence of n tokens, n / 64 pages are closed; the others are exact, a head's keys (64, HEAD_DIM) where its
// chunk of the next block begins, and its values (64, V_HEAD_DIM) where that of the block behind begins.
struct BlockTable {
  i8* pages;              // of block 0
  i64 block_bytes;        // from a block to the next
  const int* blocks;      // (sequences, blocks or more); those that a sequence has not got are not read
  i64 stride;             // from a sequence to the next
  const int* new_starts;  // (sequences + 1,): where the new tokens of a sequence begin among those of all
  const int* starts;      // (sequences + 1,), whose differences are the tokens of a sequence, the new ones included

  // Of a chunk: where its parts begin, and how many bytes it has.
  static constexpr int kKeyMetadata = kPageSize * HEAD_DIM, kValues = kKeyMetadata + 4 * HEAD_DIM;
  static constexpr int kValueMetadata = kValues + kPageSize * V_HEAD_DIM, kChunkBytes = kValueMetadata + 4 * kPageSize;

  DEVICE int block_of(int sequence, int page) const { return blocks[sequence * stride + page]; }
  DEVICE i8* chunk_of(int block, int kv_head) const { return pages + block * block_bytes + kv_head * kChunkBytes; }
  // A chunk as a segment of one page of one head.
  DEVICE Segment segment_of(int block, int kv_head) const {
    const i8* chunk = chunk_of(block, kv_head);
    return {chunk, reinterpret_cast<const u32*>(chunk + kKeyMetadata), chunk + kValues,
            reinterpret_cast<const u32*>(chunk + kValueMetadata), 0};
  }
  DEVICE int new_tokens(int sequence) const { return new_starts[sequence + 1] - new_starts[sequence]; }
  DEVICE int tokens(int sequence) const { return starts[sequence + 1] - starts[sequence]; }
};
static_assert(sizeof(BlockTable) == 48, "as backends/cuda/blocks.py packs it");

#if HAS_ROW_TABLE
// Where a page of a KV head lies in its segment, in pages of one head: of 2 KiB or more, so 32 bits count them.
DEVICE i64 place_of(const Segment& segment, int page, int row, int num_kv_heads, int kv_head) {
  return (static_cast<u32>(page - segment.first) * segment.rows + row) * num_kv_heads + kv_head;
}
#endif
