// Between PyTorch's stable ABI and the library: tensors to views, statuses to exceptions; threads, stream and
// memory lent.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "flash_dmattn/attention.h"

// In PyTorch's CUDA library. A build of PyTorch without CUDA leaves it null, and never asks for a stream.
extern "C" [[gnu::weak]] AOTITorchError aoti_torch_get_current_cuda_stream(std::int32_t device_index,
                                                                           void** stream);

namespace flash_dmattn::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Device;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Shape = torch::headeronly::IntHeaderOnlyArrayRef;

// PyTorch turns it into a RuntimeError. STD_TORCH_CHECK would put this file's path before the message.
[[noreturn]] inline void fail(const char* function, const char* argument, const std::string& what) {
  throw std::runtime_error(std::string("flash_dmattn::") + function + ": " + argument + ": " + what);
}

inline void check(const Status& status) {
  if (!status.ok()) throw std::runtime_error(status.message);
}

inline std::optional<DType> dtype_of(ScalarType type) {
  switch (type) {
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
    case ScalarType::Bool:
    case ScalarType::Byte:
      return DType::kBool;
    default:
      return std::nullopt;
  }
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

inline Target target_on(const Device& device) {
#if FLASH_DMATTN_EMULATED  // the emulator's CUDA device is the CPU
  return {.device_type = DeviceType::kCuda};
#endif
  if (device.type() != torch::headeronly::DeviceType::CUDA) return cpu_target();
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device.index(), &stream));
  return {.device_type = DeviceType::kCuda, .device_index = device.index(), .stream = stream};
}

// One call of an operator: where its tensors lie, and the copies that live as long as it does. `argument`
// names a tensor in an error.
class Call {
 public:
  Call(const char* function, const Tensor& tensor)
      : function_(function), device_(tensor.device()), target_(target_on(device_)) {}

  const Target& target() const { return target_; }

  TensorView view(const Tensor& tensor, const char* argument) const {
    if (tensor.dim() < 1 || tensor.dim() > kMaxRank) {
      fail(function_, argument,
           "got " + std::to_string(tensor.dim()) + " dimensions, expected 1 to " + std::to_string(kMaxRank));
    }
    if (tensor.device() != device_) {
      fail(function_, argument,
           "got a tensor on " + name_of(tensor.device()) + ", expected " + name_of(device_) +
               ", where the first tensor is");
    }
    const std::optional<DType> dtype = dtype_of(tensor.scalar_type());
    if (!dtype.has_value()) {
      fail(function_, argument,
           std::string("got dtype ") + torch::headeronly::toString(tensor.scalar_type()) +
               ", expected float64, float32, float16, bfloat16, int32 for expiry, plan and cu_seqlens, "
               "or bool for mask");
    }
    TensorView view{.data = const_cast<void*>(tensor.const_data_ptr()),
                    .dtype = *dtype,
                    .rank = static_cast<int>(tensor.dim())};
    const Shape sizes = tensor.sizes(), strides = tensor.strides();
    std::copy(sizes.begin(), sizes.end(), view.shape.begin());
    std::copy(strides.begin(), strides.end(), view.stride.begin());
    return view;
  }

  TensorView view(const OptionalTensor& tensor, const char* argument) const {
    return tensor.has_value() ? view(*tensor, argument) : TensorView{};
  }

  // Offsets of packed sequences: without gaps for the CUDA kernels.
  TensorView offsets(const OptionalTensor& tensor, const char* argument) {
    if (!tensor.has_value() || !on_cuda() || tensor->is_contiguous()) return view(tensor, argument);
    copies_.push_back(torch::stable::contiguous(*tensor));
    return view(copies_.back(), argument);
  }

  // Rows of query, key, value or one of their gradients: copied where the CUDA kernels could not load them in
  // vectors.
  TensorView rows(const Tensor& tensor, const char* argument) {
    const TensorView direct = view(tensor, argument);
    if (!on_cuda() || loads_in_vectors(direct)) return without_idle_strides(direct);
    copies_.push_back(empty_rows(tensor.sizes(), tensor.scalar_type()));
    torch::stable::copy_(copies_.back(), tensor);
    return without_idle_strides(view(copies_.back(), argument));
  }

  // torch::stable::empty looks the operator up by name each time, which takes about a microsecond. On
  // the CPU the short cut would pass by torch.utils.deterministic.fill_uninitialized_memory.
  Tensor empty(Shape shape, ScalarType dtype) const {
    if (device_.type() == torch::headeronly::DeviceType::CPU) {
      return torch::stable::empty(shape, dtype, std::nullopt, device_);
    }
    std::vector<std::int64_t> strides(shape.size());
    std::int64_t stride = 1;
    for (std::size_t axis = shape.size(); axis-- > 0;) {
      strides[axis] = stride;
      stride *= std::max<std::int64_t>(shape[axis], 1);
    }
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        static_cast<std::int64_t>(shape.size()), shape.data(), strides.data(),
        torch::stable::detail::to<std::int32_t>(torch::stable::detail::from(dtype)),
        torch::stable::detail::to<std::int32_t>(torch::stable::detail::from(device_.type())), device_.index(),
        &handle));
    return Tensor(handle);
  }

  // Memory for rows: each begins where the CUDA kernels can store vectors, so there may be gaps between them.
  Tensor empty_rows(Shape shape, ScalarType dtype) const {
    if (!has_gaps(shape, dtype)) return empty(shape, dtype);
    std::vector<std::int64_t> padded(shape.begin(), shape.end());
    const std::int64_t unit = vector_elements(dtype_of(dtype));
    padded.back() = (padded.back() + unit - 1) / unit * unit;
    Tensor memory = empty(padded, dtype);
    return torch::stable::narrow(memory, memory.dim() - 1, 0, shape[shape.size() - 1]);
  }

  // What the operator returns of rows that were computed: no gaps.
  Tensor finished(const Tensor& rows) const {
    if (!has_gaps(rows.sizes(), rows.scalar_type())) return rows;
    Tensor dense = empty(rows.sizes(), rows.scalar_type());
    return torch::stable::copy_(dense, rows);
  }

  // Runs one pass with a workspace from PyTorch's allocator.
  template <class Args>
  void run(Status (*pass)(const Args&, const Target&, const Workspace&), const Args& args) const {
    const std::size_t bytes = workspace_bytes(args, target_);
    if (bytes == 0) return check(pass(args, target_, {}));
    Tensor memory = empty({static_cast<std::int64_t>(bytes)}, ScalarType::Byte);
    check(pass(args, target_, {memory.mutable_data_ptr(), bytes}));
  }

 private:
  static constexpr std::int64_t kVectorBytes = 16;

  bool on_cuda() const { return target_.device_type == DeviceType::kCuda; }

  static std::int64_t vector_elements(std::optional<DType> dtype) {
    if (dtype == DType::kFloat16 || dtype == DType::kBFloat16) return kVectorBytes / 2;
    return kVectorBytes / (dtype == DType::kFloat64 ? 8 : 4);
  }

  bool has_gaps(Shape shape, ScalarType dtype) const {
    return on_cuda() && !shape.empty() && shape[shape.size() - 1] % vector_elements(dtype_of(dtype)) != 0;
  }

  static bool loads_in_vectors(const TensorView& rows) {
    bool aligned = reinterpret_cast<std::uintptr_t>(rows.data) % kVectorBytes == 0;
    for (int axis = 0; axis < rows.rank; ++axis) {
      if (rows.shape[axis] <= 1) continue;
      aligned &= axis == rows.rank - 1 ? rows.stride[axis] == 1
                                       : rows.stride[axis] % vector_elements(rows.dtype) == 0;
    }
    return aligned;
  }

  // The stride of an axis of one element is never used, and may be anything.
  static TensorView without_idle_strides(TensorView rows) {
    for (int axis = 0; axis < rows.rank; ++axis) {
      if (rows.shape[axis] <= 1) rows.stride[axis] = axis == rows.rank - 1 ? 1 : 0;
    }
    return rows;
  }

  static std::string name_of(const Device& device) {
    if (device.type() == torch::headeronly::DeviceType::CUDA) return "cuda:" + std::to_string(device.index());
    return device.type() == torch::headeronly::DeviceType::CPU ? "cpu" : "another device";
  }

  const char* function_;
  Device device_;
  Target target_;
  std::vector<Tensor> copies_;
};

}  // namespace flash_dmattn::bindings
