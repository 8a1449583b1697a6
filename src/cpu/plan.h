// The plan: which keys the query tiles of each (sequence, key/value head) read.
//
// The positions are cut into segments. A segment lists the keys that some position of it sees, in ascending
// order: those alive at its first position, then those born in it. A query tile walks its segment's list and
// takes the keys whose interval [key, expiry) meets its own positions. What precedes a key in that walk
// depends on no later token, so a row is summed in an order that later tokens cannot change.
//
// A segment is at least as long as the list of keys alive at its start, so the lists of one head together
// hold at most three entries per key, whatever the window. Without an expiry there are no lists: a segment
// reads a range of keys.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/layout.h"
#include "core/workspace.h"
#include "flash_dmattn/target.h"

namespace flash_dmattn::cpu {

inline constexpr std::int64_t kMaxEntriesPerKey = 3;

struct PlanEntry {
  std::int32_t key;
  std::int32_t expiry;
};

struct Segment {
  std::int64_t row_begin, row_end;    // query rows of the sequence
  std::int64_t list_begin, list_end;  // entries of the plan; keys [0, list_end) where the plan has no entries
};

struct PlanShape {
  std::int64_t seqlen_q, seqlen_k;
  std::int64_t tile_positions;
  bool causal;
  bool has_expiry;

  // Row i of a causal call stands at position i + offset; otherwise positions play no part and rows count
  // from 0.
  std::int64_t offset() const { return causal ? seqlen_k - seqlen_q : 0; }

  // Tiles stand at absolute positions that are multiples of tile_positions, so the first may be cut short.
  std::int64_t num_tiles() const;
  std::int64_t tile_row_begin(std::int64_t tile) const;
  std::int64_t tile_of_row(std::int64_t row) const;
};

// The plan of one head.
struct Plan {
  const PlanEntry* entries = nullptr;  // null: every key is visible to every position from its own on
  const Segment* segments = nullptr;
  std::int64_t num_segments = 0;

  const Segment& segment_of_row(std::int64_t row) const;
};

// The keys that the rows [row_begin, row_end) of one query tile read, one block after the other.
class TileKeys {
 public:
  TileKeys(const Plan& plan, const Segment& segment, const PlanShape& shape, std::int64_t row_begin,
           std::int64_t row_end);

  // Leaves out the keys outside [key_begin, key_end).
  void restrict_to(std::int64_t key_begin, std::int64_t key_end);

  // Fills at most `capacity` entries and their places in the segment's list, counted from its beginning. Sets
  // *partial if some of the tile's rows do not see one of them. Returns their number; 0 when the tile has no
  // more. A bias of -inf disables its key, whatever its expiry.
  template <class T>
  int next(VectorView<const T> bias, int capacity, PlanEntry* entries, std::int32_t* places, bool* partial);

 private:
  const PlanEntry* entries_;  // null: a range of keys
  std::int64_t place_, begin_, end_;
  std::int32_t seqlen_k_;
  std::int64_t first_position_, last_position_;
  bool causal_;
};

// The plans of every head of a call. Head index: sequence * heads_kv + head.
class Plans {
 public:
  // Takes its memory from the arena; nothing is computed before build().
  Plans(const Layout& layout, bool causal, bool has_expiry, std::int64_t tile_positions, Arena& arena);

  void build(const TensorView& expiry, const ParallelFor& parallel_for);

  PlanShape shape(const Sequence& sequence) const;
  const Plan& operator[](std::int64_t head_index) const { return plans_[head_index]; }
  std::int64_t num_heads() const { return layout_.num_sequences * layout_.heads_kv; }
  std::int64_t max_segments() const;  // of all heads together

  // Tiles are numbered over the whole call, the tiles of one head in a row.
  struct Tile {
    Sequence sequence;
    std::int64_t head;        // key/value head
    std::int64_t head_index;  // of the plan
    std::int64_t tile;        // of the head
  };
  std::int64_t num_tiles() const { return tile_begin_[layout_.num_sequences]; }
  Tile locate_tile(std::int64_t index) const;

 private:
  Layout layout_;
  bool causal_, has_expiry_;
  std::int64_t tile_positions_;
  Plan* plans_;
  PlanEntry* entries_;
  Segment* segments_;
  std::int64_t* tile_begin_;  // [num_sequences + 1], first tile of each sequence
};

// The plan of one head, written to entries and segments.
Plan build_plan(const PlanShape& shape, VectorView<const std::int32_t> expiry, PlanEntry* entries,
                Segment* segments);

}  // namespace flash_dmattn::cpu
