// What the C++ suites share: tensors of any type and strides between guard bands, workers on real threads,
// and calls whose workspace is poisoned and guarded.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "core/dtype.h"
#include "core/numeric.h"
#include "flash_dmattn/attention.h"

namespace flash_dmattn::testing {

using Index = std::vector<std::int64_t>;

// How a tensor lies in memory. kPermuted swaps the sequence and head axes, as [B, H, S, D] viewed as [B, S,
// H, D]; kGaps leaves unused elements between all others; kReversed has negative strides only.
enum class Strides { kContiguous, kPermuted, kGaps, kReversed };

class Tensor {
 public:
  Tensor() = default;

  // aligned: the first element lies at a multiple of 16 bytes.
  Tensor(DType dtype, const Index& shape, Strides strides = Strides::kContiguous, bool aligned = false)
      : shape_(shape) {
    view_.dtype = dtype;
    view_.rank = static_cast<int>(shape.size());
    Index order(shape.size());  // axes, innermost last
    for (std::size_t axis = 0; axis < shape.size(); ++axis) order[axis] = static_cast<std::int64_t>(axis);
    if (strides == Strides::kPermuted && shape.size() >= 2) {
      const std::size_t first = shape.size() == 4 ? 1 : 0;
      std::swap(order[first], order[first + 1]);
    }
    std::int64_t step = strides == Strides::kGaps ? 2 : 1;
    for (std::size_t i = order.size(); i-- > 0;) {
      const auto axis = static_cast<std::size_t>(order[i]);
      view_.shape[axis] = shape[axis];
      view_.stride[axis] = step;
      step = step * std::max<std::int64_t>(shape[axis], 1) + (strides == Strides::kGaps ? 3 : 0);
    }
    const std::int64_t guard = aligned ? kAlignedGuard : kGuard;
    std::int64_t first_element = guard;
    if (strides == Strides::kReversed) {
      first_element += step - 1;
      for (std::size_t axis = 0; axis < shape.size(); ++axis) view_.stride[axis] *= -1;
    }
    bytes_.assign(static_cast<std::size_t>(step + 2 * guard) * item(), kFill);
    view_.data = bytes_.data() + static_cast<std::size_t>(first_element) * item();
  }

  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  Tensor(Tensor&&) = default;
  Tensor& operator=(Tensor&&) = default;

  const TensorView& view() const { return view_; }
  const Index& shape() const { return shape_; }
  const std::vector<unsigned char>& bytes() const { return bytes_; }

  double get(const Index& index) const {
    const void* element = address(index);
    switch (view_.dtype) {
      case DType::kFloat64:
        return load<double>(element);
      case DType::kFloat32:
        return load<float>(element);
      case DType::kFloat16:
        return float16_to_float(load<std::uint16_t>(element));
      case DType::kBFloat16:
        return bfloat16_to_float(load<std::uint16_t>(element));
      case DType::kInt32:
        return load<std::int32_t>(element);
      case DType::kBool:
        return load<std::uint8_t>(element);
    }
    return 0;
  }

  void set(const Index& index, double value) {
    void* element = address(index);
    const auto narrow = static_cast<float>(value);
    switch (view_.dtype) {
      case DType::kFloat64:
        return store(element, value);
      case DType::kFloat32:
        return store(element, narrow);
      case DType::kFloat16:
        return store(element, float_to_float16(narrow));
      case DType::kBFloat16:
        return store(element, float_to_bfloat16(narrow));
      case DType::kInt32:
        return store(element, static_cast<std::int32_t>(value));
      case DType::kBool:
        return store(element, static_cast<std::uint8_t>(value));
    }
  }

  // Calls visit(index) for every element in row-major order.
  void for_each(const std::function<void(const Index&)>& visit) const {
    if (view_.num_elements() == 0) return;
    Index index(shape_.size(), 0);
    for (;;) {
      visit(index);
      std::size_t axis = shape_.size();
      while (axis > 0 && ++index[axis - 1] == shape_[axis - 1]) index[--axis] = 0;
      if (axis == 0) return;
    }
  }

  void fill(const std::function<double()>& next) {
    for_each([&](const Index& index) { set(index, next()); });
  }

  // The elements, without what lies between them.
  std::vector<unsigned char> elements() const {
    std::vector<unsigned char> result;
    for_each([&](const Index& index) {
      const auto* element = static_cast<const unsigned char*>(address(index));
      result.insert(result.end(), element, element + item());
    });
    return result;
  }

  // Whether the guard bands and the gaps between elements are as they were made.
  bool surroundings_untouched() const {
    std::vector<bool> is_element(bytes_.size(), false);
    for_each([&](const Index& index) {
      const auto first =
          static_cast<std::size_t>(static_cast<const unsigned char*>(address(index)) - bytes_.data());
      for (std::size_t i = 0; i < item(); ++i) is_element[first + i] = true;
    });
    for (std::size_t i = 0; i < bytes_.size(); ++i) {
      if (!is_element[i] && bytes_[i] != kFill) return false;
    }
    return true;
  }

 private:
  // All ones: NaN in every floating type, -1 in int32, true in bool.
  static constexpr unsigned char kFill = 0xff;
  // Odd, so that tensors are aligned to their element and to nothing wider.
  static constexpr std::int64_t kGuard = 37;
  static constexpr std::int64_t kAlignedGuard = 64;

  template <typename T>
  static T load(const void* element) {
    T value;
    std::memcpy(&value, element, sizeof(T));
    return value;
  }
  template <typename T>
  static void store(void* element, T value) {
    std::memcpy(element, &value, sizeof(T));
  }

  std::size_t item() const { return dtype_size(view_.dtype); }

  void* address(const Index& index) const {
    std::int64_t offset = 0;
    for (std::size_t axis = 0; axis < index.size(); ++axis) offset += index[axis] * view_.stride[axis];
    return static_cast<unsigned char*>(view_.data) + offset * static_cast<std::int64_t>(item());
  }

  TensorView view_;
  Index shape_;
  std::vector<unsigned char> bytes_;
};

class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}

  double normal() { return normal_(engine_); }
  bool chance(double probability) { return std::uniform_real_distribution<>()(engine_) < probability; }
  std::int64_t between(std::int64_t low, std::int64_t high) {  // both included
    return std::uniform_int_distribution<std::int64_t>(low, high)(engine_);
  }
  template <typename T>
  T pick(std::initializer_list<T> values) {
    return values.begin()[between(0, static_cast<std::int64_t>(values.size()) - 1)];
  }

 private:
  std::mt19937_64 engine_;
  std::normal_distribution<> normal_;
};

// One thread per worker.
inline Target threads(int num_workers) {
  const auto run = [](void*, int count, ParallelFor::Body body, void* state) {
    std::vector<std::thread> pool;
    for (int worker = 0; worker < count; ++worker) pool.emplace_back(body, state, worker);
    for (std::thread& thread : pool) thread.join();
  };
  return {.parallel_for = {.num_workers = num_workers, .context = nullptr, .run = run}};
}

// What a workspace holds before the call, repeated: NaN and a large number, in every floating type.
enum class Poison : std::uint32_t { kNaN = 0xffffffffu, kLarge = 0x7149f2cau /* 1e30f; 1e238 in pairs */ };

// Runs select, forward or backward in a workspace of exactly the size it asked for, aligned to nothing.
template <typename Args>
void run(Status (*function)(const Args&, const Target&, const Workspace&), const Args& args,
         const Target& target = {}, Poison poison = Poison::kNaN) {
  constexpr std::size_t kGuard = 256;
  const std::size_t bytes = workspace_bytes(args, target);
  std::vector<std::uint32_t> memory((bytes + 2 * kGuard) / 4 + 1, static_cast<std::uint32_t>(poison));
  const std::vector<std::uint32_t> before = memory;
  auto* begin = reinterpret_cast<unsigned char*>(memory.data()) + kGuard - 3;
  const Status status = function(args, target, {.data = begin, .bytes = bytes});
  EXPECT_EQ(status.message, "");
  EXPECT_EQ(status.code, StatusCode::kOk);
  const auto* now = reinterpret_cast<const unsigned char*>(memory.data());
  const auto* then = reinterpret_cast<const unsigned char*>(before.data());
  EXPECT_EQ(std::memcmp(now, then, kGuard - 3), 0) << "written before the workspace";
  const std::size_t end = kGuard - 3 + bytes;
  EXPECT_EQ(std::memcmp(now + end, then + end, memory.size() * 4 - end), 0) << "written behind the workspace";
}

}  // namespace flash_dmattn::testing
