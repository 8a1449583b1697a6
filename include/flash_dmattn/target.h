// Where and how a call runs. The library owns no thread: the caller lends its own through ParallelFor.
#pragma once

#include <cstddef>

namespace flash_dmattn {

// Runs body(state, worker) once for every worker in [0, num_workers) and returns when all have returned. The
// calls may run at the same time or one after the other, on any threads: results do not depend on it, bit for
// bit.
struct ParallelFor {
  using Body = void (*)(void* state, int worker);

  int num_workers = 1;  // workspaces grow with it; the results do not depend on it
  void* context = nullptr;
  void (*run)(void* context, int num_workers, Body body, void* state) = run_in_turn;

  static void run_in_turn(void* /*context*/, int num_workers, Body body, void* state) {
    for (int worker = 0; worker < num_workers; ++worker) body(state, worker);
  }
};

struct Target {
  ParallelFor parallel_for;
};

// Memory lent for one call: at least workspace_bytes(args, target) bytes. Its contents need no
// initialisation.
struct Workspace {
  void* data = nullptr;
  std::size_t bytes = 0;
};

}  // namespace flash_dmattn
