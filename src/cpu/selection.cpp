// Selection: scores -> expiry, exactly.
//
// A task is one head, where every row's keys are wanted. A bounded min-heap holds the keep_window keys of
// highest rank so far. A key that enters a full heap evicts the one of lowest rank, and the evicted key's
// expiry is the position that evicted it: it can never return, since every later position sees the same
// better keys and more. A rank is one integer, the order-preserving bits of the score above the index of the
// key, so -0 equals +0 and of equal scores the later key ranks higher. O(N log w) time, min(w, Sk) ranks of
// memory per worker.
//
// Where a few rows at the end, or all alike, see the result (num_queries, not causal), the order in which
// other keys dropped out before them does not matter: candidates.h finds the best w keys of the first row in
// one pass, and the heap goes on from there.
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "core/layout.h"
#include "core/numeric.h"
#include "core/parallel.h"
#include "core/workspace.h"
#include "cpu/backend.h"
#include "cpu/candidates.h"
#include "cpu/ranking.h"

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

// Makes a min-heap.
template <typename Rank>
bool higher_first(const Rank& a, const Rank& b) {
  return b < a;
}

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

template <typename Element>
void select_all(VectorView<Element> score, std::int64_t seqlen, const ExpiryWriter& writer) {
  for (std::int64_t key = 0; key < seqlen; ++key) {
    ordered_bits(widen(score[key])) == 0 ? writer.disabled(key) : writer.never_evicted(key);
  }
}

// The keys from `begin` on meet a heap that holds the best of those before; nothing else of them is read.
template <typename Element>
void select_from(std::int64_t begin, VectorView<Element> score, std::int64_t seqlen, std::int64_t keep_window,
                 bool causal, RankOf<Element>* heap, std::int64_t size, const ExpiryWriter& writer) {
  using Rank = RankOf<Element>;
  const std::uint32_t tie_order = cpu::tie_order();
  for (std::int64_t key = begin; key < seqlen; ++key) {
    const auto bits = ordered_bits(widen(score[key]));
    if (bits == 0) {
      writer.disabled(key);
      continue;
    }
    const Rank rank(bits, static_cast<std::uint32_t>(key) ^ tie_order);
    if (size < keep_window) {
      heap[size++] = rank;
      if (size == keep_window) std::make_heap(heap, heap + size, higher_first<Rank>);
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

// The keys whose order of dropping out nobody asks for: those up to the first row's position, or all.
CandidateShape candidate_shape(const SelectArgs& args, const Layout& layout) {
  const std::int64_t seqlen = layout.max_seqlen_k;
  const bool ordered = layout.packed || (args.causal && args.num_queries < 0);
  const std::int64_t first_position =
      args.causal ? std::max<std::int64_t>(seqlen - args.num_queries, 0) : seqlen;
  return {args.keep_window, ordered ? 0 : std::min(first_position + 1, seqlen)};
}

// The memory of a call: one heap per worker, none where nothing can be dropped; or the candidates of every
// head.
struct Memory {
  std::byte* heads;
  std::byte* ranks;
  std::size_t stride;  // bytes of the ranks of a worker or head
};

Memory cut(Arena& arena, const SelectArgs& args, const Layout& layout, const Target& target) {
  if (args.keep_window >= layout.max_seqlen_k) return {};
  const bool is_double = args.score.dtype == DType::kFloat64;
  const std::size_t rank = is_double ? sizeof(Rank64) : sizeof(Rank32);
  const std::int64_t num_heads = layout.num_sequences * layout.heads_kv;
  const CandidateShape shape = candidate_shape(args, layout);
  if (shape.pays()) {
    const std::size_t head = is_double ? sizeof(CandidateHead<double>) : sizeof(CandidateHead<float>);
    const std::size_t stride = static_cast<std::size_t>(shape.memory()) * rank;
    std::byte* heads = arena.take<std::byte>(static_cast<std::size_t>(num_heads) * head);
    return {heads, arena.take<std::byte>(static_cast<std::size_t>(num_heads) * stride), stride};
  }
  const auto workers = std::min<std::int64_t>(target.parallel_for.num_workers, num_heads);
  const std::size_t stride = Arena::align(static_cast<std::size_t>(args.keep_window) * rank);
  return {nullptr, arena.take<std::byte>(static_cast<std::size_t>(workers) * stride), stride};
}

template <typename Element>
void select_by_heap(const SelectArgs& args, const Layout& layout, const Target& target,
                    const Memory& memory) {
  const auto select_one = [&](std::int64_t task, int worker) {
    const Sequence sequence = layout.sequence(task / layout.heads_kv);
    const std::int64_t head = task % layout.heads_kv;
    const std::int64_t seqlen = sequence.seqlen_k;
    const auto score = layout.per_key<Element>(args.score, sequence, head);
    const ExpiryWriter writer(args, layout.per_key<std::int32_t>(args.expiry, sequence, head), seqlen);
    if (args.keep_window >= seqlen) return select_all(score, seqlen, writer);
    auto* heap =
        reinterpret_cast<RankOf<Element>*>(memory.ranks + static_cast<std::size_t>(worker) * memory.stride);
    select_from(0, score, seqlen, args.keep_window, args.causal, heap, 0, writer);
  };
  for_each_task(target.parallel_for, layout.num_sequences * layout.heads_kv, select_one);
}

template <typename Element>
void select_by_candidates(const SelectArgs& args, const Layout& layout, const Target& target,
                          const Memory& memory) {
  using Score = decltype(widen(Element{}));
  using Rank = RankOf<Element>;
  const CandidateSearch<Score> search{args, layout, candidate_shape(args, layout),
                                      reinterpret_cast<CandidateHead<Score>*>(memory.heads),
                                      reinterpret_cast<Rank*>(memory.ranks)};
  for_each_task(target.parallel_for, search.num_heads(),
                [&](std::int64_t head, int /*worker*/) { sample_head(search, head); });
  for_each_task(target.parallel_for, search.num_tasks(),
                [&](std::int64_t task, int /*worker*/) { collect(search, task); });
  for_each_task(target.parallel_for, search.num_heads(), [&](std::int64_t head, int /*worker*/) {
    const Sequence sequence = search.sequence(head);
    const auto score = layout.per_key<Element>(args.score, sequence, head % layout.heads_kv);
    Rank* ranks = search.ranks + head * search.shape.memory();
    std::int64_t begin = 0, size = 0;
    if (search.complete(head)) {
      begin = search.shape.num_keys;
      const std::int64_t count = search.heads[head].count;
      size = std::min(count, args.keep_window);
      std::nth_element(ranks, ranks + size, ranks + count, higher_first<Rank>);
      if (size == args.keep_window) std::make_heap(ranks, ranks + size, higher_first<Rank>);
    }
    select_from(begin, score, sequence.seqlen_k, args.keep_window, args.causal, ranks, size,
                search.writer(head));
  });
}

template <typename Element>
void select_as(const SelectArgs& args, const Target& target, const Workspace& workspace) {
  const Layout layout = make_layout(args);
  Arena arena(workspace);
  const Memory memory = cut(arena, args, layout, target);
  const auto select = memory.heads != nullptr ? select_by_candidates<Element> : select_by_heap<Element>;
  select(args, layout, target, memory);
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
