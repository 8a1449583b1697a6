// One backward call on the CPU: what its tiles share, and the memory of a worker.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/layout.h"
#include "core/workspace.h"
#include "cpu/plan.h"
#include "cpu/tile.h"

namespace flash_dmattn::cpu {

// A worker's memory for one query tile. T is the arithmetic type. Matrices that appear on both sides of
// products are held twice: transposed, where their rows lie along the vector lanes, and in panels of their
// columns.
template <class T>
struct BackwardScratch {
  T* q_transposed;     // [rows_padded / kPanel][head_dim][kPanel]
  T* dout_transposed;  // likewise
  T* q_panels;         // [head_dim_padded / kPanel][rows][kPanel]
  T* dout_panels;      // likewise
  T* keys;             // [kTileN][head_dim]
  T* values;           // [kTileN][head_dim]
  T* key_panels;       // [head_dim_padded / kPanel][kTileN][kPanel]
  T* weights;          // [kTileN][score_stride]: P^T
  T* dscores;          // [kTileN][score_stride]: dS^T
  T* dq;               // [rows + kMaxTileM][head_dim_padded], not yet scaled
  T* row;              // [head_dim_padded]
  T* out_row;          // [head_dim_padded]
  T* unused_row;       // [head_dim_padded], takes what register tiles compute past the last key
  T* lse;       // [rows_padded], in units of log 2; +inf for a row without keys, whose weights are then 0
  T* delta;     // [rows_padded], rowsum(dout * out) - dlse
  T* bias;      // [kTileN], in units of log 2
  T* dbias;     // [kTileN][kPanel], summed over the rows of each lane
  T** dk_rows;  // [kTileN + kMaxTileM], where the sums of each gathered key are
  T** dv_rows;  // likewise
  std::int32_t* position;  // [rows_padded]
  PlanEntry* entries;      // [2 kTileN], of which a block is the first kTileN
  std::int32_t* places;    // [2 kTileN]
  DenseScratch<T> dense;

  BackwardScratch(const TileShape& shape, bool is_dense, Arena& arena)
      : q_transposed(arena.take<T>(shape.rows_padded * shape.head_dim)),
        dout_transposed(arena.take<T>(shape.rows_padded * shape.head_dim)),
        q_panels(arena.take<T>(shape.rows * shape.head_dim_padded)),
        dout_panels(arena.take<T>(shape.rows * shape.head_dim_padded)),
        keys(arena.take<T>(kTileN * shape.head_dim)),
        values(arena.take<T>(kTileN * shape.head_dim)),
        key_panels(arena.take<T>(kTileN * shape.head_dim_padded)),
        weights(arena.take<T>(kTileN * shape.score_stride)),
        dscores(arena.take<T>(kTileN * shape.score_stride)),
        dq(arena.take<T>((shape.rows + kMaxTileM) * shape.head_dim_padded)),
        row(arena.take<T>(shape.head_dim_padded)),
        out_row(arena.take<T>(shape.head_dim_padded)),
        unused_row(arena.take<T>(shape.head_dim_padded)),
        lse(arena.take<T>(shape.rows_padded)),
        delta(arena.take<T>(shape.rows_padded)),
        bias(arena.take<T>(kTileN)),
        dbias(arena.take<T>(kTileN * kPanel)),
        dk_rows(arena.take<T*>(kTileN + kMaxTileM)),
        dv_rows(arena.take<T*>(kTileN + kMaxTileM)),
        position(arena.take<std::int32_t>(shape.rows_padded)),
        entries(arena.take<PlanEntry>(2 * kTileN)),
        places(arena.take<std::int32_t>(2 * kTileN)),
        dense(shape, is_dense, arena) {}
};

// A segment of one head: the unit of work. Its keys' sums of dk, dv and dbias over its rows are partial:
// other segments see the same keys.
struct SegmentItem {
  std::int64_t head_index;
  const Segment* segment;
  std::int64_t partial_begin;  // in elements of the arithmetic type
};

// Where a segment's partial sums lie: [keys of the list][width], dk then dv, and after them dbias [keys of
// the list].
struct PartialShape {
  std::int64_t dk_width, dv_width;  // head_dim_padded, or 0 where the gradient is not wanted
  std::int64_t dbias_width;         // 1 or 0

  std::int64_t width() const { return dk_width + dv_width; }
  std::int64_t elements(std::int64_t num_keys) const {
    return round_up(num_keys * (width() + dbias_width), kPanel);
  }
};

// Who computes the gradient of a dense bias.
enum class DenseDbias {
  kNone,     // nobody: it is not wanted, or the bias is key-only
  kPerTile,  // each element belongs to one query tile, which stores it
  kShared,   // sequences, key/value heads or tiles share elements: shared_dbias.cpp sums over them
};

inline DenseDbias find_dense_dbias(const BackwardArgs& args, const Layout& layout) {
  if (!args.dbias.present() || !is_dense(args.bias)) return DenseDbias::kNone;
  const auto& shape = args.bias.shape;
  const bool per_tile = shape[0] == layout.num_sequences && shape[2] == layout.max_seqlen_q &&
                        (shape[1] == layout.heads_q || shape[1] == layout.heads_kv);
  return per_tile ? DenseDbias::kPerTile : DenseDbias::kShared;
}

struct BackwardProblem {
  const BackwardArgs& args;
  Layout layout;
  TileShape tile_shape;
  PartialShape partial_shape;
  Plans plans;
  std::size_t scratch_bytes;   // of one worker
  std::byte* scratch;          // [num_workers][scratch_bytes]
  std::int64_t wave_elements;  // what the segments of one wave may take together
  void* partial;               // sums of the segments of one wave
  SegmentItem* items;          // segments of one wave
  void* dk_sum;                // [total_k][heads_kv][head_dim_padded]; null: dk itself serves
  void* dv_sum;                // likewise
  DenseDbias dense_dbias;
  void* shared_dbias;  // [num_workers][SharedDbias::sums_of_worker], for kShared alone
};

}  // namespace flash_dmattn::cpu
