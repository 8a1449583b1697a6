#include "cpu/plan.h"

#include <algorithm>
#include <limits>

#include "core/parallel.h"
#include "cpu/config.h"

namespace flash_dmattn::cpu {
namespace {

// Segments of a plan without lists: the last one reads every key, so a few long ones bound the partial sums.
constexpr std::int64_t kMaxRangeSegments = 16;

std::int64_t segment_length(const PlanShape& shape, std::int64_t at_least) {
  return round_up(std::max(kMinSegment, at_least), shape.tile_positions);
}

// First row after the segment of `length` positions that begins with `row_begin`; boundaries are tile
// boundaries.
std::int64_t segment_end(const PlanShape& shape, std::int64_t row_begin, std::int64_t length) {
  const std::int64_t first_tile = (row_begin + shape.offset()) / shape.tile_positions * shape.tile_positions;
  return std::min(first_tile + length - shape.offset(), shape.seqlen_q);
}

Plan build_ranges(const PlanShape& shape, Segment* segments) {
  Plan plan{.segments = segments};
  const std::int64_t length =
      segment_length(shape, (shape.seqlen_q + kMaxRangeSegments - 1) / kMaxRangeSegments);
  for (std::int64_t row = 0; row < shape.seqlen_q;) {
    const std::int64_t end = segment_end(shape, row, length);
    segments[plan.num_segments++] = {row, end, 0, shape.causal ? end + shape.offset() : shape.seqlen_k};
    row = end;
  }
  return plan;
}

// Not causal: every row sees the same keys, listed once for all segments.
Plan build_shared_list(const PlanShape& shape, VectorView<const std::int32_t> expiry, PlanEntry* entries,
                       Segment* segments) {
  Plan plan{.entries = entries, .segments = segments};
  std::int64_t count = 0;
  for (std::int64_t key = 0; key < shape.seqlen_k; ++key) {
    if (expiry[key] >= shape.seqlen_k) entries[count++] = {static_cast<std::int32_t>(key), expiry[key]};
  }
  const std::int64_t length = segment_length(shape, count);
  for (std::int64_t row = 0; row < shape.seqlen_q;) {
    const std::int64_t end = segment_end(shape, row, length);
    segments[plan.num_segments++] = {row, end, 0, count};
    row = end;
  }
  return plan;
}

// A segment's list holds the keys alive at its start, at most as many as it has positions, and its births.
// Only the first segment, which alignment may cut short, and the last may have more keys than that: three
// entries per key in all.
std::int64_t entries_per_key(bool causal, bool has_expiry) {
  return has_expiry ? (causal ? kMaxEntriesPerKey : 1) : 0;
}

// The first and the last segment may be cut short.
std::int64_t segments_per_head(std::int64_t seqlen_q) { return seqlen_q / kMinSegment + 2; }

}  // namespace

std::int64_t PlanShape::num_tiles() const { return seqlen_q == 0 ? 0 : tile_of_row(seqlen_q - 1) + 1; }

std::int64_t PlanShape::tile_of_row(std::int64_t row) const {
  return (row + offset()) / tile_positions - offset() / tile_positions;
}

std::int64_t PlanShape::tile_row_begin(std::int64_t tile) const {
  const std::int64_t row = (offset() / tile_positions + tile) * tile_positions - offset();
  return std::clamp<std::int64_t>(row, 0, seqlen_q);
}

const Segment& Plan::segment_of_row(std::int64_t row) const {
  const Segment* end = segments + num_segments;
  return *std::partition_point(segments, end,
                               [row](const Segment& segment) { return segment.row_end <= row; });
}

Plan build_plan(const PlanShape& shape, VectorView<const std::int32_t> expiry, PlanEntry* entries,
                Segment* segments) {
  if (!shape.has_expiry) return build_ranges(shape, segments);
  if (!shape.causal) return build_shared_list(shape, expiry, entries, segments);

  Plan plan{.entries = entries, .segments = segments};
  const std::int64_t offset = shape.offset();
  std::int64_t count = 0;
  for (std::int64_t row = 0; row < shape.seqlen_q;) {
    const std::int64_t position = row + offset;
    const std::int64_t list_begin = count;
    if (row == 0) {
      for (std::int64_t key = 0; key < position; ++key) {
        if (expiry[key] > position) entries[count++] = {static_cast<std::int32_t>(key), expiry[key]};
      }
    } else {
      const Segment& previous = segments[plan.num_segments - 1];
      for (std::int64_t i = previous.list_begin; i < previous.list_end; ++i) {
        if (entries[i].expiry > position) entries[count++] = entries[i];
      }
    }
    const std::int64_t end = segment_end(shape, row, segment_length(shape, count - list_begin));
    for (std::int64_t key = position; key < end + offset; ++key) {
      if (expiry[key] > key) entries[count++] = {static_cast<std::int32_t>(key), expiry[key]};
    }
    segments[plan.num_segments++] = {row, end, list_begin, count};
    row = end;
  }
  return plan;
}

TileKeys::TileKeys(const Plan& plan, const Segment& segment, const PlanShape& shape, std::int64_t row_begin,
                   std::int64_t row_end)
    : entries_(plan.entries),
      place_(segment.list_begin),
      begin_(segment.list_begin),
      end_(segment.list_end),
      seqlen_k_(static_cast<std::int32_t>(shape.seqlen_k)),
      first_position_(row_begin + shape.offset()),
      last_position_(row_end - 1 + shape.offset()),
      causal_(shape.causal) {}

void TileKeys::restrict_to(std::int64_t key_begin, std::int64_t key_end) {
  const auto place_of = [this](std::int64_t key) {
    if (entries_ == nullptr) return std::clamp(key, begin_, end_);
    const auto before = [](const PlanEntry& entry, std::int64_t bound) { return entry.key < bound; };
    return std::lower_bound(entries_ + begin_, entries_ + end_, key, before) - entries_;
  };
  place_ = place_of(key_begin);
  end_ = place_of(key_end);
}

template <class T>
int TileKeys::next(VectorView<const T> bias, int capacity, PlanEntry* entries, std::int32_t* places,
                   bool* partial) {
  *partial = false;
  int count = 0;
  for (; place_ < end_ && count < capacity; ++place_) {
    const PlanEntry entry =
        entries_ != nullptr ? entries_[place_] : PlanEntry{static_cast<std::int32_t>(place_), seqlen_k_};
    if (causal_) {
      if (entry.key > last_position_) {
        place_ = end_;
        break;
      }
      if (entry.expiry <= first_position_) continue;
    }
    if (bias.present() && bias[entry.key] == -std::numeric_limits<T>::infinity()) continue;
    *partial |= causal_ && (entry.key > first_position_ || entry.expiry <= last_position_);
    places[count] = static_cast<std::int32_t>(place_ - begin_);
    entries[count++] = entry;
  }
  return count;
}

template int TileKeys::next(VectorView<const float>, int, PlanEntry*, std::int32_t*, bool*);
template int TileKeys::next(VectorView<const double>, int, PlanEntry*, std::int32_t*, bool*);

Plans::Plans(const Layout& layout, bool causal, bool has_expiry, std::int64_t tile_positions, Arena& arena)
    : layout_(layout), causal_(causal), has_expiry_(has_expiry), tile_positions_(tile_positions) {
  plans_ = arena.take<Plan>(num_heads());
  entries_ = arena.take<PlanEntry>(entries_per_key(causal, has_expiry) * layout.total_k * layout.heads_kv);
  segments_ = arena.take<Segment>(max_segments());
  tile_begin_ = arena.take<std::int64_t>(layout.num_sequences + 1);
}

std::int64_t Plans::max_segments() const {
  return (layout_.total_q / kMinSegment + 2 * layout_.num_sequences) * layout_.heads_kv;
}

PlanShape Plans::shape(const Sequence& sequence) const {
  return {.seqlen_q = sequence.seqlen_q,
          .seqlen_k = sequence.seqlen_k,
          .tile_positions = tile_positions_,
          .causal = causal_,
          .has_expiry = has_expiry_};
}

void Plans::build(const TensorView& expiry, const ParallelFor& parallel_for) {
  tile_begin_[0] = 0;
  for (std::int64_t index = 0; index < layout_.num_sequences; ++index) {
    const std::int64_t num_tiles = shape(layout_.sequence(index)).num_tiles();
    tile_begin_[index + 1] = tile_begin_[index] + num_tiles * layout_.heads_kv;
  }
  const std::int64_t per_key = entries_per_key(causal_, has_expiry_);
  for_each_task(parallel_for, num_heads(), [&](std::int64_t head_index, int /*worker*/) {
    const std::int64_t index = head_index / layout_.heads_kv;
    const std::int64_t head = head_index % layout_.heads_kv;
    const Sequence sequence = layout_.sequence(index);
    const std::int64_t keys_before = layout_.packed ? sequence.begin_k : index * layout_.max_seqlen_k;
    const std::int64_t rows_before = layout_.packed ? sequence.begin_q : index * layout_.max_seqlen_q;
    PlanEntry* entries = entries_ + per_key * (keys_before * layout_.heads_kv + head * sequence.seqlen_k);
    Segment* segments = segments_ + (rows_before / kMinSegment + 2 * index) * layout_.heads_kv +
                        head * segments_per_head(sequence.seqlen_q);
    plans_[head_index] = build_plan(
        shape(sequence), layout_.per_key<const std::int32_t>(expiry, sequence, head), entries, segments);
  });
}

Plans::Tile Plans::locate_tile(std::int64_t index) const {
  const std::int64_t* begin = tile_begin_;
  const std::int64_t* end = begin + layout_.num_sequences + 1;
  const std::int64_t sequence_index = std::upper_bound(begin, end, index) - begin - 1;
  const Sequence sequence = layout_.sequence(sequence_index);
  const std::int64_t num_tiles = shape(sequence).num_tiles();
  const std::int64_t within = index - tile_begin_[sequence_index];
  const std::int64_t head = within / num_tiles;
  return {.sequence = sequence,
          .head = head,
          .head_index = sequence_index * layout_.heads_kv + head,
          .tile = within % num_tiles};
}

}  // namespace flash_dmattn::cpu
