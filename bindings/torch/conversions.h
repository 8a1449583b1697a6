// Between PyTorch's stable ABI and the library: tensors to views, statuses to exceptions, threads and memory
// lent.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

#include "flash_dmattn/attention.h"

namespace flash_dmattn::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// PyTorch turns it into a RuntimeError. STD_TORCH_CHECK would put this file's path before the message.
[[noreturn]] inline void fail(const char* function, const char* argument, const std::string& what) {
  throw std::runtime_error(std::string("flash_dmattn::") + function + ": " + argument + ": " + what);
}

// `argument` and `function` name the tensor in an error.
inline DType dtype_of(const Tensor& tensor, const char* function, const char* argument) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Int:
      return DType::kInt32;
    default:
      fail(function, argument,
           std::string("got dtype ") + torch::headeronly::toString(tensor.scalar_type()) +
               ", expected float64, float32, float16, bfloat16, or int32 for expiry and "
               "cu_seqlens");
  }
}

inline TensorView view_of(const Tensor& tensor, const char* function, const char* argument) {
  TensorView view;
  if (tensor.dim() < 1 || tensor.dim() > kMaxRank) {
    fail(function, argument,
         "got " + std::to_string(tensor.dim()) + " dimensions, expected 1 to " + std::to_string(kMaxRank));
  }
  view.data = const_cast<void*>(tensor.const_data_ptr());
  view.dtype = dtype_of(tensor, function, argument);
  view.rank = static_cast<int>(tensor.dim());
  for (int axis = 0; axis < view.rank; ++axis) {
    view.shape[axis] = tensor.size(axis);
    view.stride[axis] = tensor.stride(axis);
  }
  return view;
}

inline TensorView view_of(const std::optional<Tensor>& tensor, const char* function, const char* argument) {
  return tensor.has_value() ? view_of(*tensor, function, argument) : TensorView{};
}

inline void check(const Status& status) {
  if (!status.ok()) throw std::runtime_error(status.message);
}

// PyTorch's own threads: the library brings none.
inline Target cpu_target() {
  const auto run = [](void* /*context*/, int num_workers, ParallelFor::Body body, void* state) {
    torch::stable::parallel_for(0, num_workers, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t worker = begin; worker < end; ++worker) body(state, static_cast<int>(worker));
    });
  };
  return {.parallel_for = {.num_workers = static_cast<int>(torch::stable::get_num_threads()), .run = run}};
}

inline Tensor empty_cpu(torch::headeronly::IntHeaderOnlyArrayRef shape, ScalarType dtype) {
  return torch::stable::empty(shape, dtype, std::nullopt,
                              torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

// Runs one pass with a workspace from PyTorch's allocator.
template <class Args>
void run_on_cpu(Status (*pass)(const Args&, const Target&, const Workspace&), const Args& args) {
  const Target target = cpu_target();
  const std::int64_t bytes = static_cast<std::int64_t>(workspace_bytes(args, target));
  Tensor memory = empty_cpu({bytes}, ScalarType::Byte);
  check(pass(args, target, {memory.mutable_data_ptr(), static_cast<std::size_t>(bytes)}));
}

}  // namespace flash_dmattn::bindings
