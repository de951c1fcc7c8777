// run_tasks(num_threads, num_tasks, run): run(task, worker) for every task, each once, on up to num_threads threads;
// worker, below num_threads, tells those threads apart. Tasks are handed out one by one, so a thread that others
// slow down takes fewer. What a task computes must not depend on its worker.
#pragma once

#include <cstdint>

using TaskFunction = void (*)(void* context, int64_t task, int64_t worker);
void run_tasks(int64_t num_threads, int64_t num_tasks, TaskFunction run, void* context);
