// Drives the CPU kernels under the sanitizers: every buffer is an allocation of exactly its size, so that a read or
// write past its end is reported. Prints "ok" and returns 0 if nothing was.

#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "interface.h"

extern "C" int quantcache_attention(const AttentionArgs*);
extern "C" int quantcache_store(const StoreArgs*);
extern "C" int quantcache_restore(const RestoreArgs*);
extern "C" int quantcache_use_isa(const char*);

namespace {

template <typename T>
std::unique_ptr<T[]> buffer(int64_t size) {
  return std::unique_ptr<T[]>(new T[static_cast<size_t>(size)]());
}

// Small numbers whose bits are finite in every dtype.
std::unique_ptr<char[]> states(int64_t elements, int64_t dtype) {
  auto made = buffer<char>(elements * (dtype == kFloat32 ? 4 : 2));
  for (int64_t i = 0; i < elements; ++i) {
    float value = static_cast<float>(i * 7919 % 256) / 64 - 2;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    uint16_t half = dtype == kBFloat16 ? static_cast<uint16_t>(bits >> 16) : static_cast<uint16_t>(0x3C00 + i % 64);
    if (dtype == kFloat32) std::memcpy(&made[static_cast<size_t>(i * 4)], &value, 4);
    else std::memcpy(&made[static_cast<size_t>(i * 2)], &half, 2);
  }
  return made;
}

int run(int64_t dtype, int64_t head_dim, int64_t v_head_dim, int64_t group, int64_t query_len, int64_t pages,
        int64_t tail_len, int64_t threads) {
  const int64_t batch = 2, heads = 2, per_page = batch * heads * kPageSize;
  auto key = states(per_page * pages * head_dim, dtype), value = states(per_page * pages * v_head_dim, dtype);
  auto key_qdata = buffer<int8_t>(per_page * pages * head_dim);
  auto value_qdata = buffer<int8_t>(per_page * pages * v_head_dim);
  auto key_metadata = buffer<uint32_t>(batch * heads * pages * head_dim);
  auto value_metadata = buffer<uint32_t>(per_page * pages);
  const int64_t tokens = pages * kPageSize;
  StoreArgs store{threads, dtype, 1, pages, batch, heads, head_dim, key.get(),
                  {heads * tokens * head_dim, tokens * head_dim, head_dim}, key_qdata.get(), key_metadata.get()};
  int failed = quantcache_store(&store);
  store = {threads, dtype, 0, pages, batch, heads, v_head_dim, value.get(),
           {heads * tokens * v_head_dim, tokens * v_head_dim, v_head_dim}, value_qdata.get(), value_metadata.get()};
  failed |= quantcache_store(&store);

  SegmentArgs segment{key_qdata.get(), key_metadata.get(), value_qdata.get(), value_metadata.get(), pages, batch, 0, 0};
  auto key_tail = states(batch * heads * tail_len * head_dim, dtype);
  auto value_tail = states(batch * heads * tail_len * v_head_dim, dtype);
  auto query = states(batch * heads * group * query_len * head_dim, dtype);
  const int64_t size = dtype == kFloat32 ? 4 : 2, kv_len = tokens + tail_len;
  auto output = buffer<char>(batch * query_len * heads * group * v_head_dim * size);
  auto mask = buffer<uint8_t>(batch * kv_len);
  for (int64_t i = 0; i < batch * kv_len; ++i) mask[static_cast<size_t>(i)] = i % 5 != 0;
  auto sinks = buffer<float>(heads * group);
  AttentionArgs args{};
  args.num_threads = threads, args.dtype = dtype, args.batch = batch, args.num_q_heads = heads * group;
  args.num_kv_heads = heads, args.query_len = query_len, args.head_dim = head_dim, args.v_head_dim = v_head_dim;
  args.segments = &segment, args.num_segments = pages ? 1 : 0, args.query = query.get();
  const int64_t query_stride[] = {heads * group * query_len * head_dim, query_len * head_dim, head_dim};
  const int64_t key_stride[] = {heads * tail_len * head_dim, tail_len * head_dim, head_dim};
  const int64_t value_stride[] = {heads * tail_len * v_head_dim, tail_len * v_head_dim, v_head_dim};
  std::memcpy(args.query_stride, query_stride, sizeof query_stride);
  std::memcpy(args.key_tail_stride, key_stride, sizeof key_stride);
  std::memcpy(args.value_tail_stride, value_stride, sizeof value_stride);
  args.key_tail = key_tail.get(), args.value_tail = value_tail.get(), args.tail_len = tail_len;
  args.is_causal = 1, args.softmax_scale = 0.1, args.output = output.get();
  failed |= quantcache_attention(&args);
  args.attn_mask = mask.get(), args.mask_dtype = kBool, args.mask_stride[0] = kv_len, args.mask_stride[3] = 1;
  args.window = 70, args.softcap = 3, args.sinks = sinks.get();
  failed |= quantcache_attention(&args);
  // Neighbours that share pages, other ones from page to page.
  auto rows = buffer<int32_t>(batch * pages);
  for (int64_t i = 0; i < batch * pages; ++i) rows[static_cast<size_t>(i)] = int32_t((i / pages + i % 2) / 2);
  RowTableArgs table{rows.get(), pages};
  args.row_table = table;
  failed |= quantcache_attention(&args);
  args.attn_mask = nullptr, args.window = 0;
  failed |= quantcache_attention(&args);

  auto dense = buffer<char>(batch * heads * kv_len * head_dim * size);
  RestoreArgs restore{threads, dtype, 1, batch, heads, head_dim, &segment, pages ? 1 : 0, table, key_tail.get(),
                      tail_len, {key_stride[0], key_stride[1], key_stride[2]}, dense.get()};
  return failed | quantcache_restore(&restore);
}

}  // namespace

int main() {
  int failed = 0, sets = 0;
  for (const char* isa : {"avx512", "avx2", "portable"}) {
    if (quantcache_use_isa(isa)) continue;
    ++sets;
    for (int64_t dtype : {kFloat32, kBFloat16, kFloat16}) {
      failed |= run(dtype, 64, 64, 4, 1, 3, 33, 2);
      failed |= run(dtype, 20, 13, 3, 2, 1, 70, 1);
      failed |= run(dtype, 80, 96, 1, 5, 9, 1, 3);
      failed |= run(dtype, 16, 16, 2, 3, 0, 5, 2);
      failed |= run(dtype, 1, 1, 1, 1, 2, 0, 1);
    }
  }
  if (!failed) std::printf("ok: %d instruction sets\n", sets);
  return failed;
}
