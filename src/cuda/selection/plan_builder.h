// Builds the plan (cuda/common/plan.cuh) of one call.
#pragma once

#include <cuda_runtime.h>

#include "core/workspace.h"
#include "cuda/common/geometry.cuh"
#include "cuda/common/plan.cuh"
#include "flash_dmattn/tensor_view.h"

namespace flash_dmattn::cuda {

struct PlanInputs {
  Geometry geometry;  // heads_q is not read
  bool causal = true;
  VectorTensor<const int> expiry;       // absent: Sk for every key
  VectorTensor<const void> score;       // absent: old keys are ordered by expiry instead
  DType score_dtype = DType::kFloat32;  // float32, bfloat16 or float16
  VectorTensor<const float> bias;       // a key with bias -inf is in no list
  std::int64_t keep_window = 0;         // 0: expiry is the caller's own, and the plan chooses L
};

// The arrays of the plan, cut from `arena`: the memory that PlanArgs::plan describes, or a part of a
// workspace.
PlanView cut_plan(Arena& arena, const PlanInputs& inputs);

// Bytes that the building needs beside the plan.
std::size_t plan_scratch_bytes(const PlanInputs& inputs);

// Queues the building. scratch: plan_scratch_bytes(inputs) bytes, 16-byte aligned, free again when the queued
// work is done.
cudaError_t build_plan(const PlanInputs& inputs, const PlanView& plan, void* scratch, cudaStream_t stream);

}  // namespace flash_dmattn::cuda
