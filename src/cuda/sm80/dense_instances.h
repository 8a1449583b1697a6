// The tables of the dense kernels: for each type and head dim one or more configurations, in order of
// preference.
#pragma once

#include <cstddef>
#include <span>
#include <string>

#include "core/dtype.h"
#include "cuda/common/device.h"
#include "cuda/sm80/dense_params.h"
#include "flash_dmattn/tensor_view.h"

namespace flash_dmattn::cuda::sm80 {

template <typename Run>
struct DenseInstance {
  DType dtype;
  int head_dim;  // the largest it takes
  int tile_m;    // rows of a tile; 0 where rows pass by
  int ctas_per_sm;
  std::size_t (*shared_bytes)(int bias_element_bytes);
  Run run;
};

template <typename Run>
struct DenseChoice {
  const DenseInstance<Run>* instance = nullptr;  // null: there is none
  bool staged = false;                           // the bias has room in shared memory
};

// Among the instances of the least head dim that is large enough: the first of which as many CTAs as its
// registers allow find room on a multiprocessor, else the first that fits. shared_limit: what a CTA can get.
template <typename Run>
const DenseInstance<Run>* first_that_fits(std::span<const DenseInstance<Run>> table, DType dtype,
                                          std::int64_t head_dim, int bias_element_bytes,
                                          std::size_t shared_limit) {
  constexpr std::size_t kReserved = 1024;  // of each CTA, by the system
  const DenseInstance<Run>* fitting = nullptr;
  int chosen_head_dim = 0;
  for (const DenseInstance<Run>& instance : table) {
    if (instance.dtype != dtype || head_dim > instance.head_dim) continue;
    if (chosen_head_dim != 0 && instance.head_dim != chosen_head_dim) break;
    chosen_head_dim = instance.head_dim;
    const std::size_t bytes = instance.shared_bytes(bias_element_bytes);
    if ((bytes + kReserved) * instance.ctas_per_sm <= shared_limit + kReserved) return &instance;
    if (fitting == nullptr && bytes <= shared_limit) fitting = &instance;
  }
  return fitting;
}

// bias_element_bytes: 0 where there is no bias, or none that can be copied in pieces of 16 bytes.
template <typename Run>
DenseChoice<Run> choose(std::span<const DenseInstance<Run>> table, DType dtype, std::int64_t head_dim,
                        int bias_element_bytes, std::size_t shared_limit) {
  const auto* instance = first_that_fits(table, dtype, head_dim, bias_element_bytes, shared_limit);
  if (instance != nullptr) return {instance, bias_element_bytes > 0};
  return {first_that_fits(table, dtype, head_dim, 0, shared_limit), false};
}

template <typename Run>
DenseChoice<Run> choose(std::span<const DenseInstance<Run>> table, const TensorView& query,
                        const PairTensor& bias, int device) {
  return choose(table, query.dtype, query.shape[query.rank - 1], bias.vectors ? bias.element_bytes() : 0,
                static_cast<std::size_t>(device_properties(device).max_shared_bytes));
}

template <typename Run>
std::string why_not(std::span<const DenseInstance<Run>> table, const TensorView& query, int device) {
  if (query.dtype != DType::kBFloat16 && query.dtype != DType::kFloat16) {
    return std::string("takes bfloat16 and float16, got ") + dtype_name(query.dtype);
  }
  const std::int64_t head_dim = query.shape[query.rank - 1];
  if (head_dim > table.back().head_dim) {
    return "takes head dims up to " + std::to_string(table.back().head_dim) + ", got " +
           std::to_string(head_dim);
  }
  const int limit = device_properties(device).max_shared_bytes;
  if (choose(table, query, {}, device).instance == nullptr) {
    return "needs more shared memory than the " + std::to_string(limit) + " bytes of this GPU";
  }
  return "";
}

}  // namespace flash_dmattn::cuda::sm80
