// The gradient of a dense bias that sequences, key/value heads or query tiles share: an axis of size 1. The
// backward proper computes dS where it needs it for dk and dq, a task per segment, and could add to an
// element that others share only in the order of chance. Here a task owns some keys of one tile of the bias's
// rows, computes dS of all that share them again, one after the other, and stores the sum.
#pragma once

#include <cstdint>

#include "cpu/backward.h"
#include "flash_dmattn/target.h"

namespace flash_dmattn::cpu {

inline constexpr std::int64_t kSharedDbiasKeys = 4 * kTileN;  // of a task

struct Range {
  std::int64_t begin, end;
};

// How the work is cut into tasks. Each walks what shares its elements: all sequences, key/value heads or
// tiles where the bias has one, and one of them where it has all.
struct SharedDbias {
  struct Task {
    Range sequences, kv_heads, tiles, keys;
    Range rows;  // of the bias
  };

  PlanShape plan_shape;
  Range sequences, kv_heads;  // of the call
  bool shares_sequences, shares_kv_heads, shares_tiles;
  std::int64_t heads;      // sums of each row, key and key/value head: the group's heads, or 1
  std::int64_t positions;  // rows of the bias in a task, at most

  SharedDbias(const BackwardArgs& args, const Layout& layout, const PlanShape& shape);

  std::int64_t num_tasks() const;
  Task task(std::int64_t index) const;
  std::int64_t sums_of_worker() const { return kSharedDbiasKeys * positions * heads; }
};

// After the backward proper, which has built the plans.
template <class T>
void sum_shared_dbias(const BackwardProblem& problem, const ParallelFor& parallel_for);

}  // namespace flash_dmattn::cpu
