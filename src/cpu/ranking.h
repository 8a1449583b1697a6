// The order of keys in a selection, and how its result is stored.
#pragma once

#include <algorithm>
#include <bit>
#include <concepts>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "core/layout.h"
#include "cpu/bugs.h"

namespace flash_dmattn::cpu {

// An unsigned integer in the order of the scores; 0 for -inf and NaN, which disable a key.
template <std::floating_point Score>
auto ordered_bits(Score score) {
  using Bits = std::conditional_t<sizeof(Score) == 4, std::uint32_t, std::uint64_t>;
  constexpr Bits kSign = Bits{1} << (8 * sizeof(Bits) - 1);
  constexpr Bits kInfinity = std::bit_cast<Bits>(std::numeric_limits<Score>::infinity());
  Bits bits = std::bit_cast<Bits>(score);
  const Bits magnitude = bits & ~kSign;
  if (magnitude > kInfinity || bits == (kSign | kInfinity)) return Bits{0};
  if (magnitude == 0) bits = 0;
  return (bits & kSign) != 0 ? ~bits : bits | kSign;
}

struct Rank32 {
  std::uint64_t value;

  Rank32() = default;
  Rank32(std::uint32_t score, std::uint32_t index) : value(std::uint64_t{score} << 32 | index) {}
  std::uint32_t index() const { return static_cast<std::uint32_t>(value); }
  friend bool operator<(const Rank32& a, const Rank32& b) { return a.value < b.value; }
};

struct Rank64 {
  std::uint64_t score;
  std::uint64_t low;

  Rank64() = default;
  Rank64(std::uint64_t score, std::uint32_t index) : score(score), low(index) {}
  std::uint32_t index() const { return static_cast<std::uint32_t>(low); }
  friend bool operator<(const Rank64& a, const Rank64& b) {
    return a.score < b.score || (a.score == b.score && a.low < b.low);
  }
};

template <typename Element>
using RankOf = std::conditional_t<std::is_same_v<Element, double>, Rank64, Rank32>;

// Flips the order of equal scores where that bug is injected.
inline std::uint32_t tie_order() { return injected(Bug::kWrongTie) ? ~std::uint32_t{0} : 0; }

// The result of one head, with the sinks and the local window on top of what the ranks decide.
struct ExpiryWriter {
  VectorView<std::int32_t> expiry;
  std::int32_t seqlen;
  std::int64_t num_sinks;
  std::int64_t local_window;
  std::int64_t first_position;  // of the rows that read expiry

  ExpiryWriter(const SelectArgs& args, VectorView<std::int32_t> expiry, std::int64_t seqlen)
      : expiry(expiry),
        seqlen(static_cast<std::int32_t>(seqlen)),
        num_sinks(args.num_sinks),
        local_window(std::min(args.local_window, seqlen)),
        first_position(args.num_queries < 0 ? 0 : std::max<std::int64_t>(seqlen - args.num_queries, 0)) {}

  // A key that none of the rows sees gets its own position.
  void store(std::int64_t key, std::int64_t value) const {
    expiry[key] = static_cast<std::int32_t>(value <= first_position ? key : value);
  }
  void disabled(std::int64_t key) const { expiry[key] = static_cast<std::int32_t>(key); }
  void never_evicted(std::int64_t key) const { store(key, seqlen); }
  // Dropped by the ranks at this position; the key's own: never among the best.
  void dropped(std::int64_t key, std::int64_t position) const {
    if (key < num_sinks) return never_evicted(key);
    store(key, std::max(position, std::min<std::int64_t>(key + local_window, seqlen)));
  }
};

}  // namespace flash_dmattn::cpu
