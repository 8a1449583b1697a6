// The check at the door. A call with wrong arguments is refused with one message that names the function, the
// argument, what it got and what is accepted; kernels trust what passes.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>

#include "flash_dmattn/attention.h"

namespace flash_dmattn {

inline constexpr std::initializer_list<DType> kFloatingTypes = {DType::kFloat64, DType::kFloat32,
                                                                DType::kBFloat16, DType::kFloat16};

// What is wrong with the arguments of a call, or "".
std::string validate(const SelectArgs& args, const Target& target);
std::string validate(const PlanArgs& args, const Target& target);
std::string validate(const ForwardArgs& args, const Target& target);
std::string validate(const BackwardArgs& args, const Target& target);

// An axis as documents name it, and the size it must have; kAnySize: whatever is there.
inline constexpr std::int64_t kAnySize = -1;
struct Axis {
  const char* symbol;
  std::int64_t size = kAnySize;
  bool broadcasts = false;     // a size of 1 will do, too
  std::int64_t shared = size;  // and so will this one

  bool takes(std::int64_t got) const {
    return size == kAnySize || got == size || (broadcasts && (got == 1 || got == shared));
  }
};

// Collects the first thing that is wrong. A check that follows a failed one does nothing, except that `input`
// and `output` return whether everything was right so far: only then may the shape be read.
class Validator {
 public:
  Validator(const char* function, const Target& target)
      : function_(function), on_cpu_(target.device_type == DeviceType::kCpu) {}

  bool ok() const { return message_.empty(); }
  const std::string& message() const { return message_; }

  void fail(std::string_view argument, std::string_view got, std::string_view expected);
  // For texts that are at hand. Others are composed behind an `if` that fails: a valid call composes none, so
  // that it needs no memory.
  void require(bool condition, std::string_view argument, std::string_view got, std::string_view expected) {
    if (!condition) fail(argument, got, expected);
  }

  using DTypes = std::initializer_list<DType>;
  using Axes = std::initializer_list<Axis>;

  // The tensor is there and has this type, shape, and memory that can be read.
  bool input(const char* name, const TensorView& tensor, DTypes dtypes, Axes axes);
  // The same, and each element has memory of its own, which no tensor checked before shares.
  bool output(const char* name, const TensorView& tensor, DTypes dtypes, Axes axes);
  // An input whose elements follow each other without gaps.
  bool contiguous(const char* name, const TensorView& tensor, DTypes dtypes, Axes axes);
  // Offsets of packed sequences: int32, from 0 to total without a step down. Values are read on the CPU
  // alone.
  bool cu_seqlens(const char* name, const TensorView& tensor, const char* total_symbol, std::int64_t total);
  void target(const Target& target);
  bool can_read_values() const { return on_cpu_; }

 private:
  void check_type_and_shape(const char* name, const TensorView& tensor, DTypes dtypes, Axes axes);
  void check_memory(const char* name, const TensorView& tensor);
  void check_writable(const char* name, const TensorView& tensor);
  void remember(const char* name, const TensorView& tensor);

  struct Seen {
    const char* name;
    const void* data;
  };
  const char* function_;
  bool on_cpu_;
  std::string message_;
  std::array<Seen, 18> seen_{};  // the non-empty tensors checked so far; backward has the most, 18
  int num_seen_ = 0;
};

}  // namespace flash_dmattn
