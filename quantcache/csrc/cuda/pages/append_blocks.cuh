// append_blocks: new tokens of many sequences into blocks of a pool, and pages that are full closed in place, bit for
// bit as reference.quantize_key_pages and quantize_value_pages. BlockTable says what lies where; states have 16 bits.
//
// A closed page takes the first block of an open one, where its exact keys were, and the page behind it the block of
// the exact values. So one CTA does what touches the open page of a head, one after the other; pages behind are
// anybody's.
// Traffic: the new tokens read and written once, in the model's dtype or as codes; an open page that fills is read once
// more. Launch: (CTAs that share a sequence's new pages, num_kv_heads, sequences) of kStoreThreads.

#include "pages/store.cuh"

struct AppendBlocksArgs {
  const void* states[2];  // keys and values of all sequences side by side, (num_kv_heads, tokens, width)
  i64 stride[2][2];       // head, token
  BlockTable block_table;
};
static_assert(sizeof(AppendBlocksArgs) == 96, "as backends/cuda/blocks.py packs it");

// The new tokens of a sequence and a head, and the page that they begin in.
struct NewTokens {
  int sequence, kv_head;
  int first, count;  // among those of all sequences
  int page, open;    // closed pages before, and tokens in the open one
};

DEVICE i64 new_start(const AppendBlocksArgs& args, const NewTokens& tokens, int which, int token) {
  return tokens.kv_head * args.stride[which][0] + (tokens.first + token) * args.stride[which][1];
}

// `count` new tokens from `token` on into the open page whose first block is the page-th, from place `slot` on.
template <int kWidth>
DEVICE void copy_exact(const AppendBlocksArgs& args, const NewTokens& tokens, int which, int token, int count, int page,
                       int slot) {
  constexpr int row = kWidth / 4;
  const BlockTable& table = args.block_table;
  Four* target = reinterpret_cast<Four*>(table.chunk_of(table.block_of(tokens.sequence, page + which), tokens.kv_head));
  const Four* source = static_cast<const Four*>(args.states[which]) + new_start(args, tokens, which, token) / 4;
  const i64 step = args.stride[which][1] / 4;
  for (int i = threadIdx.x; i < count * row; i += kStoreThreads)
    target[slot * row + i] = source[i / row * step + i % row];
}
DEVICE void copy_exact(const AppendBlocksArgs& args, const NewTokens& tokens, int token, int count, int page,
                       int slot) {
  copy_exact<HEAD_DIM>(args, tokens, 0, token, count, page, slot);
  copy_exact<V_HEAD_DIM>(args, tokens, 1, token, count, page, slot);
}

// Closes the page-th page, of the exact tokens there or, where is_open is false, of new tokens. The keys go first:
// their exact ones lie where codes of values come.
DEVICE void close_page(const AppendBlocksArgs& args, const NewTokens& tokens, int page, bool is_open) {
  const BlockTable& table = args.block_table;
  i8* chunk = table.chunk_of(table.block_of(tokens.sequence, page), tokens.kv_head);
  StoreArgs store;
  store.qdata[0] = chunk, store.metadata[0] = reinterpret_cast<u32*>(chunk + BlockTable::kKeyMetadata);
  store.qdata[1] = chunk + BlockTable::kValues;
  store.metadata[1] = reinterpret_cast<u32*>(chunk + BlockTable::kValueMetadata);
  i64 start[2] = {0, 0};
  if (is_open) {
    store.states[0] = chunk, store.stride[0][2] = HEAD_DIM;
    store.states[1] = table.chunk_of(table.block_of(tokens.sequence, page + 1), tokens.kv_head);
    store.stride[1][2] = V_HEAD_DIM;
  } else {
#pragma unroll
    for (int which = 0; which < 2; which++) {
      store.states[which] = args.states[which], store.stride[which][2] = args.stride[which][1];
      start[which] = new_start(args, tokens, which, (page - tokens.page) * kPageSize - tokens.open);
    }
  }
  store_keys(store, 0, start[0]);
  __syncthreads();
  store_values(store, 0, start[1]);
  __syncthreads();
}

extern "C" __global__ void __launch_bounds__(kStoreThreads)
    append_blocks(const __grid_constant__ AppendBlocksArgs args) {
  const BlockTable& table = args.block_table;
  NewTokens tokens;
  tokens.sequence = blockIdx.z, tokens.kv_head = blockIdx.y;
  tokens.first = table.new_starts[tokens.sequence], tokens.count = table.new_tokens(tokens.sequence);
  if (tokens.count <= 0) return;
  const int before = table.tokens(tokens.sequence) - tokens.count;
  tokens.page = before / kPageSize, tokens.open = before % kPageSize;
  const int closing = (tokens.open + tokens.count) / kPageSize, rest = (tokens.open + tokens.count) % kPageSize;
  const int own = tokens.open ? min(closing, 2) : 0;  // pages of the first CTA

  if (blockIdx.x == 0) {
    if (tokens.open) {
      copy_exact(args, tokens, 0, min(tokens.count, kPageSize - tokens.open), tokens.page, tokens.open);
      __syncthreads();
    }
#pragma unroll 1
    for (int page = 0; page < own; page++) close_page(args, tokens, tokens.page + page, page == 0);
    if (rest && (closing || !tokens.open))
      copy_exact(args, tokens, closing * kPageSize - tokens.open, rest, tokens.page + closing, 0);
  }
#pragma unroll 1
  for (int page = own + blockIdx.x; page < closing; page += gridDim.x)
    close_page(args, tokens, tokens.page + page, false);
}
