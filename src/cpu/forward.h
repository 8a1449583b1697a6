// One forward call on the CPU: what its tiles share, and the memory of a worker.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/layout.h"
#include "core/workspace.h"
#include "cpu/plan.h"
#include "cpu/tile.h"

namespace flash_dmattn::cpu {

// A worker's memory for one query tile. T is the arithmetic type. A score tile is stored keys by rows: the
// rows lie along the vector lanes, so that the softmax over keys needs no horizontal operation.
template <class T>
struct ForwardScratch {
  T* q_panels;             // [rows_padded / kPanel][head_dim][kPanel], the transposed query tile
  T* keys;                 // [kTileN][head_dim]
  T* value_panels;         // [head_dim_padded / kPanel][kTileN][kPanel]
  T* scores;               // [kTileN][score_stride]: logits in units of log 2, then softmax weights
  T* out;                  // [rows + kMaxTileM][head_dim_padded], not yet divided by row_sum
  T* row;                  // [head_dim_padded]
  T* row_max;              // [rows_padded], in units of log 2; -inf: every key so far was invisible
  T* row_sum;              // [rows_padded]
  T* rescale;              // [rows_padded + kMaxTileM], what a block's new maximum makes of the earlier sums
  T* bias;                 // [kTileN], in units of log 2
  std::int32_t* position;  // [rows_padded]
  PlanEntry* entries;      // [2 kTileN], of which a block is the first kTileN
  std::int32_t* places;    // [2 kTileN]
  DenseScratch<T> dense;

  ForwardScratch(const TileShape& shape, bool is_dense, Arena& arena)
      : q_panels(arena.take<T>(shape.rows_padded * shape.head_dim)),
        keys(arena.take<T>(kTileN * shape.head_dim)),
        value_panels(arena.take<T>(kTileN * shape.head_dim_padded)),
        scores(arena.take<T>(kTileN * shape.score_stride)),
        out(arena.take<T>((shape.rows + kMaxTileM) * shape.head_dim_padded)),
        row(arena.take<T>(shape.head_dim_padded)),
        row_max(arena.take<T>(shape.rows_padded)),
        row_sum(arena.take<T>(shape.rows_padded)),
        rescale(arena.take<T>(shape.rows_padded + kMaxTileM)),
        bias(arena.take<T>(kTileN)),
        position(arena.take<std::int32_t>(shape.rows_padded)),
        entries(arena.take<PlanEntry>(2 * kTileN)),
        places(arena.take<std::int32_t>(2 * kTileN)),
        dense(shape, is_dense, arena) {}
};

struct ForwardProblem {
  const ForwardArgs& args;
  Layout layout;
  TileShape tile_shape;
  Plans plans;
  std::size_t scratch_bytes;  // of one worker
  std::byte* scratch;         // [num_workers][scratch_bytes]
};

}  // namespace flash_dmattn::cpu
