// What the primitives of emulator's <cub/...> share. Every block-wide primitive is one rendezvous: the last
// thread to arrive computes the results of all. It costs its real temporary storage or more, and takes the
// same care of it (see enter_storage).
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

namespace cub {

struct NullType {};

}  // namespace cub

namespace emulator {

template <std::size_t kBytes>
struct alignas(16) TempStorage {
  unsigned char bytes[kBytes];
};

struct Add {
  template <typename T>
  T operator()(const T& a, const T& b) const {
    return static_cast<T>(a + b);
  }
};

// A value that means nothing.
template <typename T>
T undefined() {
  T value;
  std::memset(static_cast<void*>(&value), kPoison, sizeof(T));
  return value;
}

// compute(Peers<Exchange>) for a CTA of kThreads threads.
template <int kThreads, typename Storage, typename Exchange, typename Compute>
void block_primitive(const char* what, const Site& site, Storage& storage, Exchange& mine,
                     Compute&& compute) {
  if (blockDim.x != kThreads) fail("%s of %d threads in a CTA of %u", what, kThreads, blockDim.x);
  enter_storage(&storage, sizeof(storage), what, site);
  block_collective(what, site, mine, compute);
  leave_storage(&storage, sizeof(storage));
}

// Bits in the order of their values; -0 and +0 are equal.
template <typename Key>
auto radix_bits(Key key) {
  if constexpr (std::is_floating_point_v<Key>) {
    using Bits = std::conditional_t<sizeof(Key) == 4, std::uint32_t, std::uint64_t>;
    constexpr Bits kSign = Bits{1} << (8 * sizeof(Bits) - 1);
    auto bits = std::bit_cast<Bits>(key);
    if (bits == kSign) bits = 0;
    return (bits & kSign) != 0 ? static_cast<Bits>(~bits) : static_cast<Bits>(bits | kSign);
  } else {
    using Bits = std::make_unsigned_t<Key>;
    constexpr Bits kFlip = std::is_signed_v<Key> ? Bits{1} << (8 * sizeof(Bits) - 1) : Bits{0};
    return static_cast<Bits>(static_cast<Bits>(key) ^ kFlip);
  }
}

template <typename Key>
auto radix_digits(Key key, int begin_bit, int end_bit) {
  using Bits = decltype(radix_bits(key));
  constexpr int kBits = 8 * sizeof(Bits);
  const Bits bits = static_cast<Bits>(radix_bits(key) >> begin_bit);
  const int count = end_bit - begin_bit;
  return count >= kBits ? bits : static_cast<Bits>(bits & ((Bits{1} << count) - 1));
}

// The stable order of keys by their bits [begin_bit, end_bit).
template <typename Key>
std::vector<int> radix_order(const std::vector<Key>& keys, bool descending, int begin_bit, int end_bit) {
  std::vector<int> order(keys.size());
  std::iota(order.begin(), order.end(), 0);
  if (begin_bit >= end_bit) return order;
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    const auto first = radix_digits(keys[static_cast<std::size_t>(a)], begin_bit, end_bit);
    const auto second = radix_digits(keys[static_cast<std::size_t>(b)], begin_bit, end_bit);
    return descending ? second < first : first < second;
  });
  return order;
}

// Device-wide primitives are called twice: without memory they tell how much they need. With it they spoil
// it.
inline bool measures(void* scratch, std::size_t& bytes, std::size_t items) {
  const std::size_t needed = 1024 + items / 16 * 16;
  if (scratch == nullptr) {
    bytes = needed;
    return true;
  }
  std::memset(scratch, kPoison, needed);
  return false;
}

}  // namespace emulator
