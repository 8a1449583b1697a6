#pragma once

#include "emulator/cub_common.h"

namespace cub {

struct DeviceScan {
  template <typename In, typename Out, typename Count>
  static cudaError_t ExclusiveSum(void* scratch, std::size_t& bytes, In in, Out out, Count count,
                                  cudaStream_t stream = nullptr) {
    using T = std::remove_cvref_t<decltype(*in)>;
    return ExclusiveScan(scratch, bytes, in, out, emulator::Add{}, T{}, count, stream);
  }
  template <typename In, typename Out, typename Count>
  static cudaError_t InclusiveSum(void* scratch, std::size_t& bytes, In in, Out out, Count count,
                                  cudaStream_t stream = nullptr) {
    return InclusiveScan(scratch, bytes, in, out, emulator::Add{}, count, stream);
  }
  template <typename In, typename Out, typename Op, typename T, typename Count>
  static cudaError_t ExclusiveScan(void* scratch, std::size_t& bytes, In in, Out out, Op op, T initial,
                                   Count count, cudaStream_t = nullptr) {
    if (emulator::measures(scratch, bytes, static_cast<std::size_t>(count))) return cudaSuccess;
    T total = initial;
    for (Count i = 0; i < count; ++i) {
      const T before = total;
      total = op(total, in[i]);
      out[i] = before;
    }
    return cudaSuccess;
  }
  template <typename In, typename Out, typename Op, typename Count>
  static cudaError_t InclusiveScan(void* scratch, std::size_t& bytes, In in, Out out, Op op, Count count,
                                   cudaStream_t = nullptr) {
    if (emulator::measures(scratch, bytes, static_cast<std::size_t>(count))) return cudaSuccess;
    if (count == 0) return cudaSuccess;
    auto total = in[0];
    out[0] = total;
    for (Count i = 1; i < count; ++i) out[i] = total = op(total, in[i]);
    return cudaSuccess;
  }
};

}  // namespace cub
