#include "threads.h"

#include <atomic>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <dlfcn.h>
#endif

#if defined(__GLIBC__) && defined(__x86_64__)
// glibc 2.34 gave dlsym a new version when it moved it, and keeps the old one for good. With that a library that was
// built on a new system is loaded by older ones, too, as a wheel for manylinux_2_28 must be.
__asm__(".symver dlsym,dlsym@GLIBC_2.2.5");
#endif

namespace {

struct Team {
  TaskFunction run;
  void* context;
  int64_t num_workers, num_tasks;
  std::atomic<int64_t> next_task{0}, next_worker{0};
};

void work(void* data) {
  Team& team = *static_cast<Team*>(data);
  int64_t worker = team.next_worker.fetch_add(1, std::memory_order_relaxed);
  if (worker >= team.num_workers) return;
  for (;;) {
    int64_t task = team.next_task.fetch_add(1, std::memory_order_relaxed);
    if (task >= team.num_tasks) return;
    team.run(team.context, task, worker);
  }
}

// The OpenMP runtime that torch has loaded: its threads are waiting already, and a second pool would fight them for
// the cores. Found by name, so that neither an OpenMP compiler nor the right copy of the library is needed to build.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

Parallel find_parallel() {
#if defined(_WIN32)
  return nullptr;
#else
  return reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#endif
}

}  // namespace

void run_tasks(int64_t team_size, int64_t num_workers, int64_t num_tasks, TaskFunction run, void* context) {
  Team team;
  team.run = run;
  team.context = context;
  team.num_workers = num_workers < num_tasks ? num_workers : num_tasks;
  team.num_tasks = num_tasks;
  if (team.num_workers <= 1) {
    team.num_workers = 1;
    return work(&team);
  }
  static const Parallel parallel = find_parallel();
  if (parallel) return parallel(work, &team, static_cast<unsigned>(team_size), 0);
  std::vector<std::thread> threads;
  threads.reserve(static_cast<size_t>(team.num_workers - 1));
  for (int64_t i = 1; i < team.num_workers; ++i) threads.emplace_back(work, &team);
  work(&team);
  for (std::thread& thread : threads) thread.join();
}
