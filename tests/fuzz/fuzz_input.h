// What the fuzz targets share. A target turns bytes into a call of the C interface and aborts where a promise
// is broken; libFuzzer or driver.cpp brings the bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <string>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace flash_dmattn::testing {

inline void require(bool condition, const std::string& what) {
  if (condition) return;
  std::fprintf(stderr, "fuzz: %s\n", what.c_str());
  std::abort();
}

// Decisions read from the input; zeros when it is used up, so that every input means something.
class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}

  template <typename T>
  T take() {
    T value{};
    const std::size_t bytes = std::min(sizeof(T), size_ - place_);
    if (bytes > 0) std::memcpy(&value, data_ + place_, bytes);
    place_ += bytes;
    return value;
  }

  // 0 to count - 1, count at most 256.
  int below(int count) { return take<std::uint8_t>() % count; }
  bool chance(int of_256) { return take<std::uint8_t>() >= 256 - of_256; }  // false at the input's end

  template <typename T>
  T pick(std::initializer_list<T> values) {
    return values.begin()[below(static_cast<int>(values.size()))];
  }

  std::size_t left() const { return size_ - place_; }

  // A number like those at which checks break.
  std::int64_t number() {
    const int kind = below(16);
    if (kind < 4) return take<std::int8_t>();
    if (kind < 6) return take<std::int64_t>();
    if (kind < 8) return take<std::int32_t>();
    constexpr std::int64_t k31 = std::int64_t{1} << 31, k56 = std::int64_t{1} << 56;
    return pick<std::int64_t>(
        {0, 1, -1, k31 - 1, k31, -k31, 2 * k31, k56, k56 - 1, -k56, INT64_MAX, INT64_MIN});
  }

 private:
  const std::uint8_t* data_;
  std::size_t size_;
  std::size_t place_ = 0;
};

}  // namespace flash_dmattn::testing
