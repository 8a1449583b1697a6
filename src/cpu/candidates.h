// The search for the w keys of highest rank among the first num_keys of each head, where no order in which
// the others dropped out is asked for: one pass over the scores, by all workers, whatever the number of
// heads.
//
// A sample, one key of every kSampleCell, gives each head a rank that probably w keys reach and few others.
// The pass collects the keys that reach it, in any order, and writes the expiry of all others. How the sample
// fell decides only whether the keys collected are enough: if not, and if they are too many for their memory,
// the caller starts again without them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "core/layout.h"
#include "core/workspace.h"
#include "cpu/ranking.h"
#include "cpu/rows.h"

namespace flash_dmattn::cpu {

inline constexpr std::int64_t kSampleCell = 128;
inline constexpr std::int64_t kCollectKeys = 8192;  // keys of a task

// Of the w best keys of an iid head about w / kSampleCell are in the sample, give or take the square root of
// that. A threshold six such roots further down is missed by the w best about once in a billion calls; there
// is room for ten standard deviations more keys than reach it.
struct CandidateShape {
  std::int64_t num_keys;
  std::int64_t sample_size;
  std::int64_t sample_rank;  // place of the threshold in the sample, from the highest, counted from 1
  std::int64_t capacity;     // keys that a head may collect

  CandidateShape(std::int64_t keep_window, std::int64_t num_keys)
      : num_keys(num_keys), sample_size((num_keys + kSampleCell - 1) / kSampleCell) {
    const auto kept = static_cast<double>(std::min(keep_window, num_keys));
    const double places = std::ceil(std::sqrt(kept / kSampleCell));
    sample_rank = static_cast<std::int64_t>((places + 3) * (places + 3));
    capacity = kSampleCell * static_cast<std::int64_t>((places + 8) * (places + 8));
  }

  std::int64_t memory() const { return std::max(capacity, sample_size); }  // ranks of one head
  bool pays() const { return num_keys >= capacity; }
};

// One head's search. T is the arithmetic type of the scores: double for float64, else float.
template <class T>
struct CandidateHead {
  RankOf<T> threshold{0, 0};  // lowest: every enabled key reaches it
  T threshold_score = -std::numeric_limits<T>::infinity();
  std::atomic<std::int64_t> count =
      0;  // keys that reach the threshold; beyond the capacity they are not kept
};

template <class T>
struct CandidateSearch {
  const SelectArgs& args;
  Layout layout;
  CandidateShape shape;
  CandidateHead<T>* heads;  // [sequences * heads_kv]
  RankOf<T>* ranks;         // [sequences * heads_kv][shape.memory()], the sample, then the keys collected

  std::int64_t num_heads() const { return layout.num_sequences * layout.heads_kv; }
  std::int64_t num_tasks() const { return num_heads() * tasks_per_head(); }
  std::int64_t tasks_per_head() const { return (shape.num_keys + kCollectKeys - 1) / kCollectKeys; }
  Sequence sequence(std::int64_t head) const { return layout.sequence(head / layout.heads_kv); }
  // The scores of a head as the only row of a matrix.
  Rows scores(std::int64_t head) const {
    const auto bytes = static_cast<std::int64_t>(dtype_size(args.score.dtype));
    const auto& stride = args.score.stride;
    const std::int64_t begin = head / layout.heads_kv * stride[0] + head % layout.heads_kv * stride[1];
    return {static_cast<std::byte*>(args.score.data) + begin * bytes, 0, stride[2] * bytes, args.score.dtype};
  }
  ExpiryWriter writer(std::int64_t head) const {
    const Sequence sequence = this->sequence(head);
    return {args, layout.per_key<std::int32_t>(args.expiry, sequence, head % layout.heads_kv),
            sequence.seqlen_k};
  }
  // Whether the best w of the keys collected are those of the head.
  bool complete(std::int64_t head) const {
    const std::int64_t count = heads[head].count.load(std::memory_order_relaxed);
    const bool all = !(RankOf<T>(0, 0) < heads[head].threshold);
    return count <= shape.capacity && (count >= args.keep_window || all);
  }
};

// The threshold of one head.
template <class T>
void sample_head(const CandidateSearch<T>& search, std::int64_t head);

// One task of the pass: collects, and writes the expiry that keys not selected have.
template <class T>
void collect(const CandidateSearch<T>& search, std::int64_t task);

}  // namespace flash_dmattn::cpu
