// The cut of a workspace into arrays, each on a cache line of its own. One function describes the cut and
// serves both to measure a workspace (null memory) and to use it, so that the two cannot disagree:
//
//   Buffers cut(Arena& arena, std::size_t n) {
//     return {.scores = arena.take<float>(n), .keys = arena.take<std::int32_t>(n)};
//   }
#pragma once

#include <cstddef>
#include <cstdint>

#include "flash_dmattn/target.h"

namespace flash_dmattn {

inline constexpr std::size_t kWorkspaceAlignment = 64;

class Arena {
 public:
  Arena() = default;  // measures
  explicit Arena(const Workspace& workspace)
      : base_(align(reinterpret_cast<std::uintptr_t>(workspace.data))) {}

  // Uninitialised memory for `copies` times `count` elements; null while measuring.
  template <typename T>
  T* take(std::size_t count, std::size_t copies = 1) {
    const std::uintptr_t begin = base_ + used_;
    std::size_t bytes;
    if (__builtin_mul_overflow(count, sizeof(T), &bytes) || __builtin_mul_overflow(bytes, copies, &bytes) ||
        bytes > kMostBytes - used_) {
      used_ = kMostBytes;
    } else {
      used_ += align(bytes);
    }
    return base_ == 0 ? nullptr : reinterpret_cast<T*>(begin);
  }

  static constexpr std::size_t align(std::size_t value) {
    return (value + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
  }

  // Bytes of a workspace that holds what was taken, wherever it begins.
  std::size_t bytes() const { return used_ == 0 ? 0 : used_ + kWorkspaceAlignment - 1; }

 private:
  // What no workspace has. Repeated inputs (strides of 0) may describe tensors of any size, and what is
  // measured for them must not wrap around to little.
  static constexpr std::size_t kMostBytes = std::size_t{1} << 62;

  std::uintptr_t base_ = 0;
  std::size_t used_ = 0;
};

}  // namespace flash_dmattn
