// The kernels for Hopper (compute capability 9.0): a forward on packed keys. docs/kernels/sm90_forward.md
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "core/workspace.h"
#include "cuda/common/plan.cuh"
#include "cuda/sm90/packed_keys.cuh"
#include "flash_dmattn/attention.h"

namespace flash_dmattn::cuda::sm90 {

// Why no instance takes the call on this device, or "".
std::string forward_why_not(const ForwardArgs& args, int device);

// Memory for the forward beside the plan.
struct ForwardBuffers {
  PackedKeys packed;
  int heads_per_wave = 0;  // kv heads whose keys are packed at a time
};

ForwardBuffers cut_forward(Arena& arena, const ForwardArgs& args, const PlanView& plan);
cudaError_t forward(const ForwardArgs& args, const PlanView& plan, const ForwardBuffers& buffers, int device,
                    cudaStream_t stream);

}  // namespace flash_dmattn::cuda::sm90
