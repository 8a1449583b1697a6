// Tasks pulled by workers. Which worker runs a task is left to chance, so a task writes nothing but its own
// results and its worker's part of the workspace; then the results do not depend on the number of workers.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

#include "flash_dmattn/target.h"

namespace flash_dmattn {

// Calls task(index, worker) once for every index in [0, num_tasks), in ascending order as far as workers are
// free, with worker in [0, parallel_for.num_workers), and returns when all are done. Allocates nothing.
template <typename Task>
void for_each_task(const ParallelFor& parallel_for, std::int64_t num_tasks, Task&& task) {
  struct State {
    std::remove_reference_t<Task>* task;
    std::int64_t num_tasks;
    std::atomic<std::int64_t> next{0};
  };
  State state{&task, num_tasks};
  const auto body = [](void* opaque, int worker) {
    State& state = *static_cast<State*>(opaque);
    for (;;) {
      const std::int64_t index = state.next.fetch_add(1, std::memory_order_relaxed);
      if (index >= state.num_tasks) return;
      (*state.task)(index, worker);
    }
  };
  const auto num_workers = std::min<std::int64_t>(parallel_for.num_workers, num_tasks);
  if (num_workers == 1) {
    body(&state, 0);
  } else if (num_workers > 1) {
    parallel_for.run(parallel_for.context, static_cast<int>(num_workers), body, &state);
  }
}

}  // namespace flash_dmattn
