// Zeros in a tensor of any strides.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/dtype.h"
#include "cuda/common/launch.h"
#include "flash_dmattn/tensor_view.h"

namespace flash_dmattn::cuda {

struct ZeroParams {
  unsigned char* data;
  std::int64_t num_elements;
  std::int64_t shape[4], stride[4];
  int element_bytes;
};

constexpr int kZeroThreads = 128;

inline __global__ void __launch_bounds__(kZeroThreads)
    zero_kernel(const __grid_constant__ ZeroParams params) {
  std::int64_t element = std::int64_t{blockIdx.x} * kZeroThreads + threadIdx.x;
  if (element >= params.num_elements) return;
  std::int64_t offset = 0;
  for (int axis = 3; axis >= 0; --axis) {
    offset += element % params.shape[axis] * params.stride[axis];
    element /= params.shape[axis];
  }
  for (int byte = 0; byte < params.element_bytes; ++byte)
    params.data[offset * params.element_bytes + byte] = 0;
}

inline cudaError_t fill_with_zeros(const TensorView& view, cudaStream_t stream) {
  if (!view.present() || view.num_elements() == 0) return cudaSuccess;
  ZeroParams params = {.data = static_cast<unsigned char*>(view.data),
                       .num_elements = view.num_elements(),
                       .shape = {1, 1, 1, 1},
                       .stride = {},
                       .element_bytes = static_cast<int>(dtype_size(view.dtype))};
  for (int axis = 0; axis < view.rank; ++axis) {
    params.shape[axis] = view.shape[axis];
    params.stride[axis] = view.stride[axis];
  }
  const std::int64_t ctas = (params.num_elements + kZeroThreads - 1) / kZeroThreads;
  return launch(zero_kernel, {static_cast<unsigned>(ctas), kZeroThreads, 0, stream}, params);
}

}  // namespace flash_dmattn::cuda
