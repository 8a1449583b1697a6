// One head of a tensor whose element type is known only at run time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"
#include "core/layout.h"
#include "core/numeric.h"

namespace flash_dmattn::cpu {

struct Rows {
  std::byte* data = nullptr;
  std::int64_t row_bytes = 0;
  std::int64_t column_bytes = 0;
  DType dtype = DType::kFloat32;

  bool unit_stride() const { return column_bytes == static_cast<std::int64_t>(dtype_size(dtype)); }
  bool present() const { return data != nullptr; }
  std::byte* row(std::int64_t index) const { return data + index * row_bytes; }
  std::byte* at(std::int64_t row, std::int64_t column) const {
    return this->row(row) + column * column_bytes;
  }
};

// One element of any floating-point type.
template <class T>
T load_element(const void* src, DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return static_cast<T>(*static_cast<const double*>(src));
    case DType::kBFloat16:
      return bfloat16_to_float(*static_cast<const std::uint16_t*>(src));
    case DType::kFloat16:
      return float16_to_float(*static_cast<const std::uint16_t*>(src));
    default:
      return *static_cast<const float*>(src);
  }
}

template <class T>
void store_element(T value, DType dtype, void* dst) {
  switch (dtype) {
    case DType::kFloat64:
      *static_cast<double*>(dst) = value;
      break;
    case DType::kBFloat16:
      *static_cast<std::uint16_t*>(dst) = float_to_bfloat16(static_cast<float>(value));
      break;
    case DType::kFloat16:
      *static_cast<std::uint16_t*>(dst) = float_to_float16(static_cast<float>(value));
      break;
    default:
      *static_cast<float*>(dst) = static_cast<float>(value);
  }
}

// A matrix as Layout::q_rows and k_rows give it, with its strides turned into bytes.
template <class T>
Rows erase_type(const MatrixView<T>& matrix, DType dtype) {
  constexpr std::int64_t kBytes = sizeof(T);
  return {reinterpret_cast<std::byte*>(matrix.data), matrix.row_stride * kBytes,
          matrix.column_stride * kBytes, dtype};
}

inline Rows query_rows(const Layout& layout, const TensorView& tensor, const Sequence& sequence,
                       std::int64_t head) {
  switch (dtype_size(tensor.dtype)) {
    case 8:
      return erase_type(layout.q_rows<double>(tensor, sequence, head), tensor.dtype);
    case 4:
      return erase_type(layout.q_rows<float>(tensor, sequence, head), tensor.dtype);
    default:
      return erase_type(layout.q_rows<std::uint16_t>(tensor, sequence, head), tensor.dtype);
  }
}

inline Rows key_rows(const Layout& layout, const TensorView& tensor, const Sequence& sequence,
                     std::int64_t head) {
  switch (dtype_size(tensor.dtype)) {
    case 8:
      return erase_type(layout.k_rows<double>(tensor, sequence, head), tensor.dtype);
    case 4:
      return erase_type(layout.k_rows<float>(tensor, sequence, head), tensor.dtype);
    default:
      return erase_type(layout.k_rows<std::uint16_t>(tensor, sequence, head), tensor.dtype);
  }
}

// Of a mask or a dense bias: a row for each query row, a column for each key.
inline Rows dense_rows(const Layout& layout, const TensorView& tensor, const Sequence& sequence,
                       std::int64_t head) {
  switch (dtype_size(tensor.dtype)) {
    case 8:
      return erase_type(layout.dense_rows<double>(tensor, sequence, head), tensor.dtype);
    case 4:
      return erase_type(layout.dense_rows<float>(tensor, sequence, head), tensor.dtype);
    case 2:
      return erase_type(layout.dense_rows<std::uint16_t>(tensor, sequence, head), tensor.dtype);
    default:
      return erase_type(layout.dense_rows<std::uint8_t>(tensor, sequence, head), tensor.dtype);
  }
}

inline void fill_with_zeros(const TensorView& dense) {
  const auto& shape = dense.shape;
  const std::int64_t bytes = static_cast<std::int64_t>(dtype_size(dense.dtype));
  for (std::int64_t b = 0; b < shape[0]; ++b) {
    for (std::int64_t head = 0; head < shape[1]; ++head) {
      for (std::int64_t i = 0; i < shape[2]; ++i) {
        auto* row = static_cast<std::byte*>(dense.data) +
                    (b * dense.stride[0] + head * dense.stride[1] + i * dense.stride[2]) * bytes;
        for (std::int64_t j = 0; j < shape[3]; ++j)
          store_element(0.0, dense.dtype, row + j * dense.stride[3] * bytes);
      }
    }
  }
}

// One number per key of a bias or its gradient; absent where it is dense.
template <class T>
VectorView<T> key_only(const Layout& layout, const TensorView& bias, const Sequence& sequence,
                       std::int64_t kv_head) {
  return is_dense(bias) ? VectorView<T>{} : layout.per_key<T>(bias, sequence, kv_head);
}

}  // namespace flash_dmattn::cpu
