// What one attention call has worked out before its threads start; the same for every instruction set.
#pragma once

#include "interface.h"

constexpr int64_t kRowTile = 4;      // query rows that share every loaded key and value
constexpr int64_t kPlaceFloats = 8;  // floats that a RowPlace takes, so that what lies behind a tile's stays aligned
constexpr int64_t kWidthStep = 16;   // rows of scratch are padded to the widest vector

// Neighbouring sequences of the batch that share pages: a task reads each page once for all that read it.
struct Band {
  int64_t first, count;
};

struct AttentionPlan {
  const AttentionArgs* args;
  const Band* bands;  // null: every sequence is one
  int64_t num_bands;
  int64_t group;                     // query heads per KV head
  int64_t first_query, num_queries;  // the queries of this pass
  int64_t rows;                      // group * num_queries of a sequence: row r is head r / num_queries of the group,
                                     // query first_query + r % num_queries; those of a band lie one behind the other
  int64_t padded_rows;               // of the longest band, so that a tile may begin at its last row
  int64_t width;                     // head_dim, to kWidthStep
  int64_t v_width;                   // v_head_dim, to kWidthStep
  int64_t num_pages, kv_len;
  int64_t first_block, end_block;  // blocks of 64 tokens that some row may see; the tail starts a block
  int64_t num_splits;              // parts the blocks are divided in
  int64_t partial_size;            // floats of a Partial: output, row_max, row_sum, value_offset
  int64_t head_stride;             // floats from the partials of a head to those of the next
  float* partials;                 // (num_bands * num_kv_heads, num_splits, partial_size)
};

static inline Band band_of(const AttentionPlan& plan, int64_t head) {
  int64_t index = head / plan.args->num_kv_heads;
  return plan.bands ? plan.bands[index] : Band{index, 1};
}

// The stored row that a sequence reads a page from.
static inline int64_t stored_row(const RowTableArgs& table, int64_t sequence, int64_t page) {
  return table.rows ? table.rows[sequence * table.stride + page] : sequence;
}

// Floats of scratch for one thread.
static inline int64_t scratch_size(const AttentionPlan& plan) {
  int64_t wider = plan.width > plan.v_width ? plan.width : plan.v_width;
  return plan.padded_rows * kPlaceFloats                      // places of rows
         + plan.padded_rows * plan.width                      // query
         + (kRowTile + 2) * plan.width                        // folded query, key scale, key zero point
         + kPageSize * plan.width + kPageSize * plan.v_width  // tail tile, or two pages of padded codes or of floats
         + kPageSize * kRowTile                               // scores, then weights
         + 2 * (kPageSize + kWidthStep)                       // value scale, value zero point
         + wider;                                             // an output row
}

struct Kernels {
  // Part `split` of the blocks for KV head `head` of num_bands * num_kv_heads: fills its partial.
  void (*attend)(const AttentionPlan& plan, int64_t head, int64_t split, float* scratch);
  // All partials of `head`, in order, to its output rows.
  void (*merge)(const AttentionPlan& plan, int64_t head, float* scratch);
  // One page of one head; scratch of 64 * (head_dim to kWidthStep) + 256 floats.
  void (*store_page)(const StoreArgs& args, int64_t page, int64_t head, float* scratch);
  // Up to 64 tokens of one head, block by block; scratch of 3 * (head_dim to kWidthStep) floats.
  void (*restore_block)(const RestoreArgs& args, int64_t block, int64_t head, float* scratch);
};

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels, kAvx512Kernels;
#endif
