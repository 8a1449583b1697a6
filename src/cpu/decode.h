// One decode call on the CPU: a few query rows against a long cache. What its tasks share, and the memory of
// a worker.
//
// The key axis is cut into splits of kSplitKeys positions, whatever the batch and the number of workers. A
// task is one split of one key/value head with up to kRowTile rows; it leaves a partial result. Then the
// partial results of every row are merged in the order of the splits.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "core/layout.h"
#include "core/workspace.h"
#include "cpu/config.h"
#include "cpu/plan.h"
#include "cpu/softmax_state.h"

namespace flash_dmattn::cpu {

inline constexpr std::int64_t kMaxDecodeQueries = 16;  // positions of a call
inline constexpr std::int64_t kSplitKeys = 4096;
// Rows that share what a task reads. 128 rows of head dim 128, float32, AVX2, one thread, 65536 keys: 73 ms;
// with 64 rows in a task 86, their queries and sums no longer fitting into the L1 cache, with 16 rows 97.
inline constexpr std::int64_t kRowTile = 32;
inline constexpr int kBlockKeys = 64;    // keys between two looks at the running maximum
inline constexpr int kQuad = 4;          // keys that are multiplied with a pair of rows at a time
inline constexpr int kPrefetchKeys = 8;  // keys that are asked for ahead of the quad at work
static_assert(kBlockKeys % kPanel == 0 && kBlockKeys % kQuad == 0);

// Row r of a key/value head is head r % group of its group, query r / group.
struct DecodeShape {
  std::int64_t group;
  std::int64_t rows;  // of one key/value head
  std::int64_t row_tiles;
  std::int64_t splits;
  std::int64_t heads;  // key/value heads of all batch entries
  std::int64_t head_dim;
  std::int64_t head_dim_padded;

  explicit DecodeShape(const Layout& layout)
      : group(layout.group()),
        rows(layout.max_seqlen_q * group),
        row_tiles(round_up(rows, kRowTile) / kRowTile),
        splits(round_up(layout.max_seqlen_k, kSplitKeys) / kSplitKeys),
        heads(layout.num_sequences * layout.heads_kv),
        head_dim(layout.head_dim),
        head_dim_padded(round_up(head_dim, kPanel)) {}

  std::int64_t num_partials() const { return heads * splits * rows; }
  std::int64_t partial(std::int64_t head_index, std::int64_t split, std::int64_t row) const {
    return (head_index * splits + split) * rows + row;
  }
};

// The partial results of every row and split. T is the arithmetic type.
template <class T>
struct DecodePartials {
  SoftmaxState<T>* states;  // [num_partials]
  T* sums;  // [num_partials][head_dim_padded], of the values, weighted relative to the state's max

  DecodePartials(const DecodeShape& shape, Arena& arena)
      : states(arena.take<SoftmaxState<T>>(shape.num_partials())),
        sums(arena.take<T>(shape.num_partials() * shape.head_dim_padded)) {}
};

// A worker's memory for one task.
template <class T>
struct DecodeScratch {
  T* query;            // [kRowTile][head_dim_padded]; 0 after the head dim, as in the other rows
  T* quad;             // [kQuad][head_dim_padded], rows of keys or values that cannot be read in place
  T* zeros;            // [head_dim_padded]
  T* scores;           // [kRowTile][kBlockKeys]: products, then logits in units of log 2, then weights
  T* bias;             // [kBlockKeys], in units of log 2
  PlanEntry* entries;  // [kBlockKeys]

  DecodeScratch(const DecodeShape& shape, Arena& arena)
      : query(arena.take<T>(std::min(shape.rows, kRowTile) * shape.head_dim_padded)),
        quad(arena.take<T>(kQuad * shape.head_dim_padded)),
        zeros(arena.take<T>(shape.head_dim_padded)),
        scores(arena.take<T>(std::min(shape.rows, kRowTile) * kBlockKeys)),
        bias(arena.take<T>(kBlockKeys)),
        entries(arena.take<PlanEntry>(kBlockKeys)) {}
};

struct DecodeProblem {
  const ForwardArgs& args;
  Layout layout;
  DecodeShape shape;
  Workspace partials;         // DecodePartials
  std::size_t scratch_bytes;  // of one worker
  std::byte* scratch;         // [num_workers][scratch_bytes]

  // Position of row 0's query; every row of a call that is not causal stands at the last key.
  std::int64_t first_position() const {
    return layout.max_seqlen_k - (args.causal ? layout.max_seqlen_q : 1);
  }
  std::int64_t last_position() const { return layout.max_seqlen_k - 1; }
  std::int64_t position(std::int64_t row) const {
    return first_position() + (args.causal ? row / shape.group : 0);
  }
};

}  // namespace flash_dmattn::cpu
