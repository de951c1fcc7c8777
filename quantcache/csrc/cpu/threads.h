// run_tasks(team_size, num_workers, num_tasks, run): run(task, worker) for every task, each once, on up to num_workers
// threads; worker, below num_workers, tells those threads apart. Tasks are handed out one by one, so a thread that
// others slow down takes fewer. What a task computes must not depend on its worker.
//
// `team_size` is the number of threads that torch uses, all of which are woken for more than one worker: GNU's OpenMP ends
// the threads that a smaller team leaves over, and the next operation of torch would start them again.
#pragma once

#include <cstdint>

using TaskFunction = void (*)(void* context, int64_t task, int64_t worker);
void run_tasks(int64_t team_size, int64_t num_workers, int64_t num_tasks, TaskFunction run, void* context);
