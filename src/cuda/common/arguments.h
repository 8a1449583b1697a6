// From the public arguments to what kernels take. Arguments are validated before.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <string>

#include "core/layout.h"
#include "cuda/common/device.h"
#include "cuda/common/geometry.cuh"
#include "flash_dmattn/attention.h"

namespace flash_dmattn::cuda {

inline const int* cu_seqlens_data(const TensorView& cu_seqlens) {
  return cu_seqlens.present() ? static_cast<const int*>(cu_seqlens.data) : nullptr;
}

// Args: ForwardArgs or BackwardArgs.
template <typename Args>
Geometry make_geometry(const Args& args) {
  const bool packed = args.cu_seqlens_k.present();
  const int row_axis = packed ? 0 : 1;
  Geometry geometry;
  geometry.cu_seqlens_q = cu_seqlens_data(args.cu_seqlens_q);
  geometry.cu_seqlens_k = cu_seqlens_data(args.cu_seqlens_k);
  geometry.num_sequences = static_cast<int>(packed ? args.cu_seqlens_k.shape[0] - 1 : args.query.shape[0]);
  geometry.seqlen_q = static_cast<int>(args.query.shape[row_axis]);
  geometry.seqlen_k = static_cast<int>(args.key.shape[row_axis]);
  geometry.heads_q = static_cast<int>(args.query.shape[row_axis + 1]);
  geometry.heads_kv = static_cast<int>(args.key.shape[row_axis + 1]);
  return geometry;
}

// Of a plan of bits.
inline Geometry make_geometry(const PlanArgs& args) {
  const Layout layout = dense_layout(args);
  Geometry geometry;
  geometry.num_sequences = static_cast<int>(layout.num_sequences);
  geometry.seqlen_q = static_cast<int>(layout.max_seqlen_q);
  geometry.seqlen_k = static_cast<int>(layout.max_seqlen_k);
  geometry.heads_q = static_cast<int>(layout.heads_q);
  geometry.heads_kv = static_cast<int>(layout.heads_kv);
  return geometry;
}

template <typename Element>
RowsTensor<Element> rows_tensor(const TensorView& view) {
  if (!view.present()) return {};
  const auto& stride = view.stride;
  Element* data = static_cast<Element*>(view.data);
  if (view.rank == 3) return {data, 0, stride[0], stride[1]};
  return {data, stride[0], stride[1], stride[2]};
}

// One number per key.
template <typename Element>
VectorTensor<Element> key_tensor(const TensorView& view) {
  if (!view.present()) return {};
  const auto& stride = view.stride;
  Element* data = static_cast<Element*>(view.data);
  if (view.rank == 2) return {data, 0, stride[1], stride[0]};
  return {data, stride[0], stride[1], stride[2]};
}

// One number per query row and query head.
template <typename Element>
VectorTensor<Element> query_tensor(const TensorView& view) {
  if (!view.present()) return {};
  const auto& stride = view.stride;
  Element* data = static_cast<Element*>(view.data);
  if (view.rank == 2) return {data, 0, stride[0], stride[1]};
  return {data, stride[0], stride[1], stride[2]};
}

// Why this build's kernels do not run on the target, or "".
inline std::string device_why_not(const Target& target) {
  if (target.device_type != DeviceType::kCuda) return "takes tensors in the memory of a CUDA device";
  const DeviceProperties properties = device_properties(target.device_index);
  if (properties.status != cudaSuccess) {
    return "CUDA device " + std::to_string(target.device_index) + ": " +
           cudaGetErrorString(properties.status);
  }
  if (properties.compute_capability < 80) {
    return "needs compute capability 8.0 or higher, this GPU has " +
           std::to_string(properties.compute_capability / 10) + "." +
           std::to_string(properties.compute_capability % 10);
  }
  return "";
}

inline Status device_status(const char* function, cudaError_t error) {
  if (error == cudaSuccess) return {};
  return Status::device_error(std::string("flash_dmattn::") + function +
                              ": CUDA: " + cudaGetErrorString(error));
}

}  // namespace flash_dmattn::cuda
