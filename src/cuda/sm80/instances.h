// The table of a pass's instances: found by type and head dim.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <span>
#include <string>

#include "core/dtype.h"
#include "cuda/common/device.h"
#include "flash_dmattn/tensor_view.h"

namespace flash_dmattn::cuda::sm80 {

template <typename Run>
struct Instance {
  DType dtype;
  int head_dim;              // the largest it takes
  std::size_t shared_bytes;  // the most that one of its kernels needs
  Run run;
};

// The first instance for the type whose head dim is large enough; null if there is none. Tables ascend in
// head dim.
template <typename Run>
const Instance<Run>* find(std::span<const Instance<Run>> instances, DType dtype, std::int64_t head_dim) {
  for (const Instance<Run>& instance : instances) {
    if (instance.dtype == dtype && head_dim <= instance.head_dim) return &instance;
  }
  return nullptr;
}

template <typename Run>
std::string why_not(std::span<const Instance<Run>> instances, const TensorView& query, int device) {
  if (query.dtype != DType::kBFloat16 && query.dtype != DType::kFloat16) {
    return std::string("takes bfloat16 and float16, got ") + dtype_name(query.dtype);
  }
  const std::int64_t head_dim = query.shape[query.rank - 1];
  const Instance<Run>* instance = find(instances, query.dtype, head_dim);
  if (instance == nullptr) {
    return "takes head dims up to " + std::to_string(instances.back().head_dim) + ", got " +
           std::to_string(head_dim);
  }
  const int limit = device_properties(device).max_shared_bytes;
  if (instance->shared_bytes > static_cast<std::size_t>(limit)) {
    return "needs " + std::to_string(instance->shared_bytes) + " bytes of shared memory, this GPU has " +
           std::to_string(limit);
  }
  return "";
}

}  // namespace flash_dmattn::cuda::sm80
