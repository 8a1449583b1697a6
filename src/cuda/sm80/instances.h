// The tables of the passes: for each type and head dim one or more configurations, in order of preference,
// and the choice among them by the shared memory of the device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "cuda/common/device.h"
#include "flash_dmattn/tensor_view.h"

namespace flash_dmattn::cuda::sm80 {

struct Configuration {
  DType dtype;
  int head_dim;     // the largest it takes
  int tile_m;       // rows of a tile; 0 where rows pass by
  int threads;      // of a CTA
  int ctas_per_sm;  // that registers allow
  // Of a CTA with room for a dense bias of elements of so many bytes; 0: without.
  std::size_t (*shared_bytes)(int bias_element_bytes);
};

template <typename Run>
struct Instance : Configuration {
  Run run;
};

template <typename Config>
std::size_t shared_bytes(int bias_element_bytes) {
  if constexpr (requires { Config::shared_bytes(bias_element_bytes); }) {
    return Config::shared_bytes(bias_element_bytes);
  } else {
    return sizeof(typename Config::SharedMemory);
  }
}

template <typename Config>
constexpr Configuration configuration(DType dtype, int tile_m) {
  return {dtype, Config::kHeadDim, tile_m, Config::kThreads, Config::kCtasPerSm, shared_bytes<Config>};
}

// T: a Configuration or an Instance.
template <typename T>
struct Choice {
  const T* instance = nullptr;  // null: there is none
  bool staged = false;          // the bias has room in shared memory
};

// Among the instances of the least head dim that is large enough: the first of which as many CTAs as its
// registers allow find room on a multiprocessor, else the first that fits. shared_limit: what a CTA can get.
template <typename T>
const T* first_that_fits(std::span<const T> table, DType dtype, std::int64_t head_dim, int bias_element_bytes,
                         std::size_t shared_limit) {
  constexpr std::size_t kReserved = 1024;  // of each CTA, by the system
  const T* fitting = nullptr;
  int chosen_head_dim = 0;
  for (const T& instance : table) {
    if (instance.dtype != dtype || head_dim > instance.head_dim) continue;
    if (chosen_head_dim != 0 && instance.head_dim != chosen_head_dim) break;
    chosen_head_dim = instance.head_dim;
    const std::size_t bytes = instance.shared_bytes(bias_element_bytes);
    if ((bytes + kReserved) * instance.ctas_per_sm <= shared_limit + kReserved) return &instance;
    if (fitting == nullptr && bytes <= shared_limit) fitting = &instance;
  }
  return fitting;
}

// bias_element_bytes: 0 where there is no dense bias, or none that can be copied in pieces of 16 bytes.
template <typename T>
Choice<T> choose(std::span<const T> table, DType dtype, std::int64_t head_dim, int bias_element_bytes,
                 std::size_t shared_limit) {
  const T* instance = first_that_fits(table, dtype, head_dim, bias_element_bytes, shared_limit);
  if (instance != nullptr) return {instance, bias_element_bytes > 0};
  return {first_that_fits(table, dtype, head_dim, 0, shared_limit), false};
}

template <typename T>
Choice<T> choose(std::span<const T> table, const TensorView& query, int device, int bias_element_bytes = 0) {
  return choose(table, query.dtype, query.shape[query.rank - 1], bias_element_bytes,
                static_cast<std::size_t>(device_properties(device).max_shared_bytes));
}

template <typename T>
std::string why_not(std::span<const T> table, const TensorView& query, int device) {
  if (query.dtype != DType::kBFloat16 && query.dtype != DType::kFloat16) {
    return std::string("takes bfloat16 and float16, got ") + dtype_name(query.dtype);
  }
  const std::int64_t head_dim = query.shape[query.rank - 1];
  if (head_dim > table.back().head_dim) {
    return "takes head dims up to " + std::to_string(table.back().head_dim) + ", got " +
           std::to_string(head_dim);
  }
  if (choose(table, query, device).instance == nullptr) {
    return "needs more shared memory than the " + std::to_string(device_properties(device).max_shared_bytes) +
           " bytes of this GPU";
  }
  return "";
}

// A table without what runs, for tests.
struct NamedTable {
  const char* name;
  std::vector<Configuration> configurations;
};

template <typename T>
NamedTable named(const char* name, std::span<const T> table) {
  return {name, {table.begin(), table.end()}};
}

// Of each source file that has tables.
std::vector<NamedTable> forward_tables();
std::vector<NamedTable> backward_tables();
std::vector<NamedTable> decode_tables();
std::vector<NamedTable> dense_forward_tables();
std::vector<NamedTable> dense_backward_tables();
std::vector<NamedTable> dense_bias_grad_tables();

}  // namespace flash_dmattn::cuda::sm80
