// A tensor as the library sees it: a pointer, a type, a shape and strides. It owns nothing.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>

namespace flash_dmattn {

// kBool: one byte, 0 is false and all else true.
enum class DType : std::uint8_t { kFloat64, kFloat32, kFloat16, kBFloat16, kInt32, kBool };

inline constexpr int kMaxRank = 4;

struct TensorView {
  void* data = nullptr;  // inputs are only read, although the pointer is not const
  DType dtype = DType::kFloat32;
  int rank = 0;  // 0: the tensor is absent
  std::array<std::int64_t, kMaxRank> shape{};
  std::array<std::int64_t, kMaxRank> stride{};  // in elements; 0 repeats, negative runs backwards

  bool present() const { return rank != 0; }

  std::int64_t num_elements() const {
    std::int64_t count = 1;
    for (int axis = 0; axis < rank; ++axis) count *= shape[axis];
    return count;
  }
};

// A view of contiguous memory in row-major order. At most kMaxRank axes; more make the view absent.
inline TensorView contiguous_view(void* data, DType dtype, std::initializer_list<std::int64_t> shape) {
  TensorView view;
  if (shape.size() > kMaxRank) return view;
  view.data = data;
  view.dtype = dtype;
  for (std::int64_t size : shape) view.shape[view.rank++] = size;
  std::uint64_t stride = 1;  // unsigned: wraps for shapes beyond any memory, which every function refuses
  for (int axis = view.rank - 1; axis >= 0; --axis) {
    view.stride[axis] = static_cast<std::int64_t>(stride);
    stride *= static_cast<std::uint64_t>(view.shape[axis]);
  }
  return view;
}

inline TensorView contiguous_view(const void* data, DType dtype, std::initializer_list<std::int64_t> shape) {
  return contiguous_view(const_cast<void*>(data), dtype, shape);
}

}  // namespace flash_dmattn
