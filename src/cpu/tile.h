// The query tile, which both passes work on: the rows of a few neighbouring positions and all heads of a
// group. They share their keys, so a key that is gathered once serves them all.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/layout.h"
#include "core/workspace.h"
#include "cpu/config.h"
#include "cpu/plan.h"

namespace flash_dmattn::cpu {

// The sizes of a full tile.
struct TileShape {
  std::int64_t positions;
  std::int64_t rows;          // positions * group
  std::int64_t rows_padded;   // a multiple of kPanel
  std::int64_t score_stride;  // elements between two keys of a score tile [key][row]
  std::int64_t head_dim;
  std::int64_t head_dim_padded;  // a multiple of kPanel

  TileShape(const Layout& layout, std::int64_t target_rows) {
    const std::int64_t group = layout.group();
    positions = std::clamp<std::int64_t>(group == 0 ? 1 : target_rows / group, 1, kMaxTilePositions);
    rows = positions * group;
    rows_padded = round_up(rows, kPanel);
    // Register tiles read up to kMaxTileM rows past the end. An odd number of cache lines, so that walking
    // from key to key meets every set of the cache.
    score_stride = rows_padded + kPanel;
    if (score_stride / kPanel % 2 == 0) score_stride += kPanel;
    head_dim = layout.head_dim;
    head_dim_padded = round_up(head_dim, kPanel);
  }
};

// A worker's memory for the keys of a tile under a mask or a dense bias; none where there is neither.
template <class T>
struct DenseScratch {
  T* addend;           // [2 kTileN][score_stride]: bias in units of log 2; -inf: the row does not see the key
  T* values;           // [kTileN], of one row
  std::uint8_t* seen;  // [kTileN], by some row
  std::uint8_t* sees;  // [kTileN], of one row

  DenseScratch(const TileShape& shape, bool is_dense, Arena& arena)
      : addend(arena.take<T>(is_dense ? 2 * kTileN * shape.score_stride : 0)),
        values(arena.take<T>(is_dense ? kTileN : 0)),
        seen(arena.take<std::uint8_t>(is_dense ? kTileN : 0)),
        sees(arena.take<std::uint8_t>(is_dense ? kTileN : 0)) {}
};

// Row r is head r % group of the group, at position row_begin + r / group.
struct QueryTile {
  Sequence sequence;
  std::int64_t kv_head;
  std::int64_t group;
  std::int64_t row_begin, row_end;  // query rows of the sequence
  std::int64_t offset;              // position of query row 0

  std::int64_t num_rows() const { return (row_end - row_begin) * group; }
  std::int64_t num_panels() const { return round_up(num_rows(), kPanel) / kPanel; }
  std::int64_t query_head(std::int64_t in_group) const { return kv_head * group + in_group; }
  std::int64_t tile_row(std::int64_t query_row, std::int64_t in_group) const {
    return (query_row - row_begin) * group + in_group;
  }
};

}  // namespace flash_dmattn::cpu
