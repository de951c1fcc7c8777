// The functions that quantcache/backends/cpu/__init__.py calls, and the choice of the instruction set.
// Every one returns 0, or 1 when there is no memory for its scratch; arguments are checked by the caller.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>

#include "plan.h"
#include "threads.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "quantcache: metadata pairs are read as little-endian words."
#endif

#define QC_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct Isa {
  const char* name;
  const Kernels* kernels;
  bool (*runs_here)();
};

// Widest first; the last runs everywhere.
#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
const Isa kIsas[] = {{"avx512", &kAvx512Kernels, has_avx512},
                     {"avx2", &kAvx2Kernels, has_avx2},
                     {"portable", &kPortableKernels, [] { return true; }}};
#else
const Isa kIsas[] = {{"portable", &kPortableKernels, [] { return true; }}};
#endif

std::atomic<const Isa*> current_isa{nullptr};

const Isa& isa() {
  const Isa* chosen = current_isa.load(std::memory_order_acquire);
  if (chosen) return *chosen;
  chosen = kIsas;
  while (!chosen->runs_here()) ++chosen;
  current_isa.store(chosen, std::memory_order_release);
  return *chosen;
}

// Memory of the calling thread, kept between calls: what the allocator returns to the system at every call would have
// to be mapped and zeroed again. More than this is given back at once.
constexpr int64_t kKeptFloats = int64_t{1} << 20;

class Workspace {
 public:
  explicit Workspace(int64_t floats) {
    static thread_local std::unique_ptr<float[]> kept;
    static thread_local int64_t kept_size = 0;
    if (floats > kKeptFloats) {
      own_.reset(new (std::nothrow) float[static_cast<size_t>(floats)]);
      data_ = own_.get();
      return;
    }
    if (floats > kept_size) {
      kept.reset(new (std::nothrow) float[static_cast<size_t>(floats)]);
      kept_size = kept ? floats : 0;
    }
    data_ = kept.get();
  }
  // 64-byte aligned, which every use has left 16 floats for.
  float* data() const {
    auto address = reinterpret_cast<uintptr_t>(data_);
    return data_ ? reinterpret_cast<float*>((address + 63) / 64 * 64) : nullptr;
  }

 private:
  std::unique_ptr<float[]> own_;
  float* data_;
};

constexpr int64_t kAlignFloats = 16;

int64_t aligned(int64_t floats) { return (floats + kAlignFloats - 1) / kAlignFloats * kAlignFloats; }

// Blocks of a task at least: its partial is written and read once more.
constexpr int64_t kMinTaskBlocks = 4;
// Blocks for 4 query rows that a thread must get to be woken: about 30 us of work.
constexpr int64_t kMinThreadBlocks = 32;
// Tasks for each thread: enough to even out a core that something else slows down.
constexpr int64_t kTasksPerThread = 8;

// Query floats of one KV head in a pass; with their output they stay in a core's second cache.
constexpr int64_t kPassFloats = int64_t{1} << 16;

// Query rows of a task that reads all keys: enough to convert each page for, and few enough that they and what each
// thread has of them are even. With their output they stay in a core's second cache.
constexpr int64_t kMinTaskRows = 128, kMaxTaskRows = 256;

struct AttentionJob {
  AttentionPlan plan;
  std::atomic<int64_t>* left;  // (num_bands * num_kv_heads,): parts not done
  float* scratch;
  int64_t scratch_stride;
};

void attention_task(void* context, int64_t task, int64_t worker) {
  AttentionJob& job = *static_cast<AttentionJob*>(context);
  int64_t head = task / job.plan.num_splits, split = task % job.plan.num_splits;
  float* scratch = job.scratch + worker * job.scratch_stride;
  isa().kernels->attend(job.plan, head, split, scratch);
  // Whoever finishes the last part adds up all of them, in order: the result does not depend on who was last.
  if (job.left[head].fetch_sub(1, std::memory_order_acq_rel) == 1) isa().kernels->merge(job.plan, head, scratch);
}

bool share_a_page(const RowTableArgs& table, int64_t sequence, int64_t other, int64_t first, int64_t end) {
  for (int64_t page = first; page < end; ++page)
    if (stored_row(table, sequence, page) == stored_row(table, other, page)) return true;
  return false;
}

// Cuts the batch into bands, no longer than a pass has room for; bands (batch,), returns how many there are.
int64_t find_bands(const AttentionPlan& plan, Band* bands) {
  const AttentionArgs& args = *plan.args;
  int64_t wider = plan.width > plan.v_width ? plan.width : plan.v_width;
  int64_t longest = kPassFloats / (plan.rows * wider), count = 0;
  int64_t end = plan.end_block < plan.num_pages ? plan.end_block : plan.num_pages;
  for (int64_t sequence = 0; sequence < args.batch; ++sequence) {
    if (sequence && bands[count - 1].count < longest &&
        share_a_page(args.row_table, sequence - 1, sequence, plan.first_block, end))
      ++bands[count - 1].count;
    else
      bands[count++] = {sequence, 1};
  }
  return count;
}

// bands (batch,): scratch for them where there is a row table.
AttentionPlan plan_attention(const AttentionArgs& args, int64_t first_query, int64_t num_queries, Band* bands) {
  AttentionPlan plan{};
  plan.args = &args;
  plan.group = args.num_q_heads / args.num_kv_heads;
  plan.first_query = first_query;
  plan.num_queries = num_queries;
  plan.rows = plan.group * num_queries;
  plan.width = aligned(args.head_dim);
  plan.v_width = aligned(args.v_head_dim);
  for (int64_t i = 0; i < args.num_segments; ++i) plan.num_pages += args.segments[i].num_pages;
  plan.kv_len = plan.num_pages * kPageSize + args.tail_len;
  int64_t position = plan.kv_len - args.query_len + first_query;
  int64_t first = args.window ? position - args.window + 1 : 0;
  int64_t end = args.is_causal ? position + num_queries : plan.kv_len;
  plan.end_block = end > 0 ? (end + kPageSize - 1) / kPageSize : 0;
  plan.first_block = (first > 0 ? first : 0) / kPageSize;
  if (plan.first_block > plan.end_block) plan.first_block = plan.end_block;
  plan.bands = bands;
  plan.num_bands = bands ? find_bands(plan, bands) : args.batch;
  int64_t longest = 1;
  for (int64_t i = 0; bands && i < plan.num_bands; ++i) longest = bands[i].count > longest ? bands[i].count : longest;
  int64_t padding = longest > 1 ? 2 * (kRowTile - 1) : kRowTile - 1;
  plan.padded_rows = (longest * plan.rows + padding) / kRowTile * kRowTile;
  int64_t heads = plan.num_bands * args.num_kv_heads, blocks = plan.end_block - plan.first_block;
  int64_t wanted = heads ? (args.num_threads * kTasksPerThread + heads - 1) / heads : 1;
  int64_t most = blocks / kMinTaskBlocks > 1 ? blocks / kMinTaskBlocks : 1;
  plan.num_splits = args.num_threads == 1 ? 1 : wanted < most ? wanted : most;
  plan.partial_size = aligned(plan.padded_rows * (3 + plan.v_width));
  plan.head_stride = plan.num_splits * plan.partial_size;
  return plan;
}

template <typename Args>
struct BlockJob {
  const Args* args;
  int64_t heads, scratch_stride;
  float* scratch;
};

void store_task(void* context, int64_t task, int64_t worker) {
  auto& job = *static_cast<BlockJob<StoreArgs>*>(context);
  isa().kernels->store_page(*job.args, task / job.heads, task % job.heads, job.scratch + worker * job.scratch_stride);
}

void restore_task(void* context, int64_t task, int64_t worker) {
  auto& job = *static_cast<BlockJob<RestoreArgs>*>(context);
  isa().kernels->restore_block(*job.args, task / job.heads, task % job.heads,
                               job.scratch + worker * job.scratch_stride);
}

// All tasks of a job, at least two for each thread.
template <typename Args>
int run_blocks(BlockJob<Args> job, int64_t tasks, TaskFunction run) {
  int64_t most = job.args->num_threads, threads = std::max<int64_t>(std::min(most, tasks / 2), 1);
  Workspace workspace(threads * job.scratch_stride + kAlignFloats);
  job.scratch = workspace.data();
  if (!job.scratch) return 1;
  run_tasks(most, threads, tasks, run, &job);
  return 0;
}

// Queries from `first_query` on, all in one pass over the pages.
int attend_queries(const AttentionArgs& args, int64_t first_query, int64_t num_queries) {
  std::unique_ptr<Band[]> bands(args.row_table.rows ? new (std::nothrow) Band[static_cast<size_t>(args.batch)]
                                                    : nullptr);
  if (args.row_table.rows && !bands) return 1;
  AttentionJob job{plan_attention(args, first_query, num_queries, bands.get()), nullptr, nullptr, 0};
  AttentionPlan& plan = job.plan;
  int64_t heads = plan.num_bands * args.num_kv_heads, tasks = heads * plan.num_splits;
  int64_t worth = heads * (plan.end_block - plan.first_block) * (plan.padded_rows / kRowTile) / kMinThreadBlocks;
  int64_t threads = args.num_threads < worth ? args.num_threads : worth > 1 ? worth : 1;
  job.scratch_stride = aligned(scratch_size(plan));
  int64_t counters = aligned(heads * 2);
  static_assert(sizeof(std::atomic<int64_t>) == 2 * sizeof(float), "a counter takes two floats");
  Workspace workspace(tasks * plan.partial_size + threads * job.scratch_stride + counters + kAlignFloats);
  float* memory = workspace.data();
  if (!memory) return 1;
  job.left = reinterpret_cast<std::atomic<int64_t>*>(memory);
  for (int64_t i = 0; i < heads; ++i) new (job.left + i) std::atomic<int64_t>(plan.num_splits);
  plan.partials = memory + counters;
  job.scratch = plan.partials + tasks * plan.partial_size;
  run_tasks(args.num_threads, threads, tasks, attention_task, &job);
  return 0;
}

struct PassesJob {
  const AttentionPlan* plans;
  int64_t num_passes, most_heads;  // of a pass
  float* scratch;
  int64_t scratch_stride;
};

// All keys for the queries of one pass and one KV head: nothing is left to be merged with what other threads found.
void pass_task(void* context, int64_t task, int64_t worker) {
  const PassesJob& job = *static_cast<PassesJob*>(context);
  int64_t head = task % job.most_heads;
  AttentionPlan plan = job.plans[job.num_passes - 1 - task / job.most_heads];  // the longest first
  if (head >= plan.num_bands * plan.args->num_kv_heads) return;
  plan.partials = job.scratch + worker * job.scratch_stride;
  plan.head_stride = 0;
  plan.num_splits = 1;
  float* scratch = plan.partials + plan.partial_size;
  isa().kernels->attend(plan, head, 0, scratch);
  isa().kernels->merge(plan, head, scratch);
}

// In how many passes of alike numbers of queries threads can share a call without dividing keys; 0 if that are too few.
int64_t count_passes(const AttentionArgs& args) {
  int64_t heads = args.batch * args.num_kv_heads, rows = args.num_q_heads / args.num_kv_heads * args.query_len;
  if (rows < 2 * kMinTaskRows) return 0;
  int64_t wanted = (args.num_threads * kTasksPerThread + heads - 1) / heads, each = rows / wanted;
  each = each < kMinTaskRows ? kMinTaskRows : each > kMaxTaskRows ? kMaxTaskRows : each;
  int64_t passes = (rows + each - 1) / each;
  if (passes > args.query_len) passes = args.query_len;
  return args.num_threads == 1 || passes * heads >= 2 * args.num_threads ? passes : 0;
}

int attend_in_passes(const AttentionArgs& args, int64_t passes) {
  std::unique_ptr<AttentionPlan[]> plans(new (std::nothrow) AttentionPlan[static_cast<size_t>(passes)]);
  std::unique_ptr<Band[]> bands(args.row_table.rows ? new (std::nothrow) Band[static_cast<size_t>(passes * args.batch)]
                                                    : nullptr);
  if (!plans || (args.row_table.rows && !bands)) return 1;
  PassesJob job{plans.get(), passes, args.batch * args.num_kv_heads, nullptr, 0};
  for (int64_t pass = 0; pass < passes; ++pass) {
    int64_t first = args.query_len * pass / passes, end = args.query_len * (pass + 1) / passes;
    plans[pass] = plan_attention(args, first, end - first, bands ? bands.get() + pass * args.batch : nullptr);
    int64_t size = aligned(scratch_size(plans[pass])) + plans[pass].partial_size;
    job.scratch_stride = size > job.scratch_stride ? size : job.scratch_stride;
  }
  int64_t tasks = passes * job.most_heads, threads = args.num_threads < tasks ? args.num_threads : tasks;
  Workspace workspace(threads * job.scratch_stride + kAlignFloats);
  job.scratch = workspace.data();
  if (!job.scratch) return 1;
  run_tasks(args.num_threads, threads, tasks, pass_task, &job);
  return 0;
}

}  // namespace

QC_EXPORT const char* quantcache_isa() { return isa().name; }

// 0, or 1 if this processor or this build does not have the instruction set `name`. Not while a call is running.
QC_EXPORT int quantcache_use_isa(const char* name) {
  for (const Isa& isa : kIsas)
    if (!std::strcmp(name, isa.name) && isa.runs_here()) {
      current_isa.store(&isa, std::memory_order_release);
      return 0;
    }
  return 1;
}

// See attention of store/reads.py.
QC_EXPORT int quantcache_attention(const AttentionArgs* args) {
  if (int64_t passes = count_passes(*args)) return attend_in_passes(*args, passes);
  int64_t group = args->num_q_heads / args->num_kv_heads;
  int64_t width = aligned(args->v_head_dim > args->head_dim ? args->v_head_dim : args->head_dim);
  int64_t most = kPassFloats / (group * width) > 1 ? kPassFloats / (group * width) : 1;
  for (int64_t query = 0; query < args->query_len; query += most) {
    int64_t count = args->query_len - query < most ? args->query_len - query : most;
    if (attend_queries(*args, query, count)) return 1;
  }
  return 0;
}

// Keys or values of store_pages of store/writes.py.
QC_EXPORT int quantcache_store(const StoreArgs* args) {
  BlockJob<StoreArgs> job{args, args->batch * args->num_kv_heads, kPageSize * aligned(args->head_dim) + 4 * kPageSize,
                          nullptr};
  return run_blocks(job, args->num_pages * job.heads, store_task);
}

// See restore of store/reads.py.
QC_EXPORT int quantcache_restore(const RestoreArgs* args) {
  BlockJob<RestoreArgs> job{args, args->batch * args->num_kv_heads, 3 * aligned(args->head_dim), nullptr};
  int64_t blocks = (args->tail_len + kPageSize - 1) / kPageSize;
  for (int64_t i = 0; i < args->num_segments; ++i) blocks += args->segments[i].num_pages;
  return run_blocks(job, blocks * job.heads, restore_task);
}
