// The kernels for every GPU from compute capability 8.0 on, instances per type and head dim 64, 128 or
// 256; other head dims are padded with zeros inside. A table per pass says which instances exist, and answers
// both "does it run?" and the run (instances.h).
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "core/workspace.h"
#include "cuda/common/geometry.cuh"
#include "cuda/common/plan.cuh"
#include "cuda/sm80/params.h"
#include "flash_dmattn/attention.h"

namespace flash_dmattn::cuda::sm80 {

// Why no instance takes the type and head dim on this device, or "".
std::string forward_why_not(const ForwardArgs& args, int device);
std::string backward_why_not(const BackwardArgs& args, int device);

cudaError_t forward(const ForwardArgs& args, const PlanView& plan, int device, cudaStream_t stream);

// Memory for the backward beside the plan.
struct BackwardBuffers {
  RowStats* stats = nullptr;
  int heads_per_wave = 0;    // partial sums are kept for so many kv heads at a time
  int max_partial_rows = 0;  // in a wave
  int* partial_rows = nullptr;
  float* partials = nullptr;
  void* scan = nullptr;
  std::size_t scan_bytes = 0;
};

BackwardBuffers cut_backward(Arena& arena, const BackwardArgs& args, const PlanView& plan, int device);
cudaError_t backward(const BackwardArgs& args, const PlanView& plan, const BackwardBuffers& buffers,
                     int device, cudaStream_t stream);

}  // namespace flash_dmattn::cuda::sm80
