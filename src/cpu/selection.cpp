// Selection: scores -> expiry, exactly, one head at a time.
//
// A bounded min-heap holds the keep_window keys of highest rank so far. A key that enters a full heap evicts
// the one of lowest rank, and the evicted key's expiry is the position that evicted it: it can never return,
// since every later position sees the same better keys and more. A rank is one integer, the order-preserving
// bits of the score above the index of the key, so -0 equals +0 and of equal scores the later key ranks
// higher. O(N log w) time, min(w, Sk) ranks of memory per worker.
#include <algorithm>
#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "core/layout.h"
#include "core/numeric.h"
#include "core/parallel.h"
#include "core/workspace.h"
#include "cpu/backend.h"
#include "cpu/bugs.h"

namespace flash_dmattn::cpu {
namespace {

// Element types as they lie in memory; the 16-bit ones need names.
struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

float widen(BFloat16 value) { return bfloat16_to_float(value.bits); }
float widen(Float16 value) { return float16_to_float(value.bits); }
float widen(float value) { return value; }
double widen(double value) { return value; }

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

// Puts `rank` in the place of the lowest rank, heap[0]. The hole sinks to a leaf before `rank` rises from
// there: an entering key mostly belongs near the bottom, and this way costs one comparison per level.
template <typename Rank>
void replace_lowest(Rank* heap, std::int64_t size, Rank rank) {
  std::int64_t hole = 0;
  for (std::int64_t child = 1; child + 1 < size; child = 2 * hole + 1) {
    child += heap[child + 1] < heap[child] ? 1 : 0;
    heap[hole] = heap[child];
    hole = child;
  }
  if (2 * hole + 1 < size) {
    heap[hole] = heap[2 * hole + 1];
    hole = 2 * hole + 1;
  }
  while (hole > 0 && rank < heap[(hole - 1) / 2]) {
    heap[hole] = heap[(hole - 1) / 2];
    hole = (hole - 1) / 2;
  }
  heap[hole] = rank;
}

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

template <typename Element>
void select_all(VectorView<Element> score, std::int64_t seqlen, const ExpiryWriter& writer) {
  for (std::int64_t key = 0; key < seqlen; ++key) {
    ordered_bits(widen(score[key])) == 0 ? writer.disabled(key) : writer.never_evicted(key);
  }
}

template <typename Element>
void select_head(VectorView<Element> score, std::int64_t seqlen, std::int64_t keep_window, bool causal,
                 RankOf<Element>* heap, const ExpiryWriter& writer) {
  using Rank = RankOf<Element>;
  const std::uint32_t tie_order = injected(Bug::kWrongTie) ? ~std::uint32_t{0} : 0;
  const auto higher_first = [](const Rank& a, const Rank& b) { return b < a; };  // makes a min-heap
  std::int64_t size = 0;
  for (std::int64_t key = 0; key < seqlen; ++key) {
    const auto bits = ordered_bits(widen(score[key]));
    if (bits == 0) {
      writer.disabled(key);
      continue;
    }
    const Rank rank(bits, static_cast<std::uint32_t>(key) ^ tie_order);
    if (size < keep_window) {
      heap[size++] = rank;
      if (size == keep_window) std::make_heap(heap, heap + size, higher_first);
    } else if (rank < heap[0]) {
      writer.dropped(key, key);
    } else {
      const std::int64_t evicted = heap[0].index() ^ tie_order;
      writer.dropped(evicted, causal ? key : evicted);
      replace_lowest(heap, size, rank);
    }
  }
  for (std::int64_t i = 0; i < size; ++i) writer.never_evicted(heap[i].index() ^ tie_order);
}

// One heap per worker; none where nothing can be dropped.
struct Heaps {
  std::byte* data;
  std::size_t stride;  // in bytes
};

Heaps cut(Arena& arena, const SelectArgs& args, const Layout& layout, const Target& target) {
  if (args.keep_window >= layout.max_seqlen_k) return {};
  const std::size_t item = args.score.dtype == DType::kFloat64 ? sizeof(Rank64) : sizeof(Rank32);
  const std::int64_t num_tasks = layout.num_sequences * layout.heads_kv;
  const auto workers = std::min<std::int64_t>(target.parallel_for.num_workers, num_tasks);
  const std::size_t stride = Arena::align(static_cast<std::size_t>(args.keep_window) * item);
  return {arena.take<std::byte>(static_cast<std::size_t>(workers) * stride), stride};
}

template <typename Element>
void select_as(const SelectArgs& args, const Target& target, const Workspace& workspace) {
  const Layout layout = make_layout(args);
  Arena arena(workspace);
  const Heaps heaps = cut(arena, args, layout, target);
  const auto select_one = [&](std::int64_t task, int worker) {
    const Sequence sequence = layout.sequence(task / layout.heads_kv);
    const std::int64_t head = task % layout.heads_kv;
    const std::int64_t seqlen = sequence.seqlen_k;
    const auto score = layout.per_key<Element>(args.score, sequence, head);
    const ExpiryWriter writer(args, layout.per_key<std::int32_t>(args.expiry, sequence, head), seqlen);
    if (args.keep_window >= seqlen) return select_all(score, seqlen, writer);
    auto* heap =
        reinterpret_cast<RankOf<Element>*>(heaps.data + static_cast<std::size_t>(worker) * heaps.stride);
    select_head(score, seqlen, args.keep_window, args.causal, heap, writer);
  };
  for_each_task(target.parallel_for, layout.num_sequences * layout.heads_kv, select_one);
}

}  // namespace

std::string select_why_not(const SelectArgs& /*args*/, const Target& /*target*/) { return ""; }

std::size_t select_workspace_bytes(const SelectArgs& args, const Target& target) {
  Arena arena;
  cut(arena, args, make_layout(args), target);
  return arena.bytes();
}

void select(const SelectArgs& args, const Target& target, const Workspace& workspace) {
  switch (args.score.dtype) {
    case DType::kFloat64:
      return select_as<double>(args, target, workspace);
    case DType::kFloat32:
      return select_as<float>(args, target, workspace);
    case DType::kBFloat16:
      return select_as<BFloat16>(args, target, workspace);
    case DType::kFloat16:
      return select_as<Float16>(args, target, workspace);
    case DType::kInt32:
    case DType::kBool:
      return;  // refused by the validation
  }
}

}  // namespace flash_dmattn::cpu
