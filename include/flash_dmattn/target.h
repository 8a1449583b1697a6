// Where and how a call runs. The library owns no thread and no stream: the caller lends its own.
#pragma once

#include <cstddef>
#include <cstdint>

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

enum class DeviceType : std::uint8_t { kCpu, kCuda };

struct Target {
  ParallelFor parallel_for{};  // CPU
  DeviceType device_type = DeviceType::kCpu;
  int device_index = 0;    // CUDA: as the CUDA runtime counts
  void* stream = nullptr;  // CUDA: the cudaStream_t that the work is queued on
};

// Memory lent for one call, on the target's device: at least workspace_bytes(args, target) bytes. Its
// contents need no initialisation. On a CUDA device it is used until the queued work is done.
struct Workspace {
  void* data = nullptr;
  std::size_t bytes = 0;
};

}  // namespace flash_dmattn
