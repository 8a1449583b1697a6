// The plan: which keys the tiles visit, in which order; built by selection/, read by every attention kernel.
//
// The positions of a sequence are cut into segments of L, a power of two. A segment's list names the keys
// that some row of the call sees inside it: first the old ones, alive at its start, by descending rank (the
// order of death, and known from the past alone), then those born in it, by birth. Lists are cut into blocks
// of kBlock keys. A block has a hull, outside which none of its keys is visible, and a core, inside which all
// are: a tile of rows visits the blocks whose hull it meets and tests single keys only outside the core.
//
// A segment has at most L old keys (w <= L keys are alive at a time) and L born ones, the first no old ones.
// So the place of every list is known without counting: a sequence of n keys owns 2n entries, and finds its
// lists, blocks and counters by the formulas of PlanLayout. What lies between the lists is never read.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/geometry.cuh"

namespace flash_dmattn::cuda {

constexpr int kBlock = 64;
constexpr int kMinSegment = 2048;

struct PlanEntry {
  int key;     // index in its sequence: visible to no earlier position
  int expiry;  // visible to no position from here on; clamped to the sequence's length
};

// Positions [begin, end) see some key of the block, [core_begin, core_end) (perhaps empty) see all. Clipped
// to the segment.
struct __align__(16) BlockHull {
  int begin;
  int end;
  int core_begin;
  int core_end;
};

struct PlanLayout {
  int segment_length = kMinSegment;  // L; where the plan chooses it, the least it can be
  std::int64_t num_entries = 0;      // per head, as the rest
  std::int64_t num_segments = 0;
  std::int64_t num_blocks = 0;

  // total_k keys in num_sequences sequences.
  __host__ __device__ static PlanLayout make(std::int64_t total_k, std::int64_t num_sequences,
                                             int segment_length) {
    PlanLayout layout;
    layout.segment_length = segment_length;
    layout.num_entries = 2 * total_k;
    layout.num_segments = total_k / kMinSegment + num_sequences;
    layout.num_blocks = layout.num_entries / kBlock + layout.num_segments;
    return layout;
  }

  // The ids of a sequence's segments and blocks count from these.
  __host__ __device__ static std::int64_t first_segment(std::int64_t begin_k, int sequence) {
    return begin_k / kMinSegment + sequence;
  }
  __host__ __device__ static std::int64_t first_block(std::int64_t begin_k, int sequence) {
    return 2 * begin_k / kBlock + first_segment(begin_k, sequence);
  }
  // Old and born keys together, before segment `segment` of a sequence, if all lists were full.
  __host__ __device__ static std::int64_t entries_before(int segment, int segment_length) {
    return segment == 0 ? 0 : (2 * static_cast<std::int64_t>(segment) - 1) * segment_length;
  }
  // First entry and first block of a segment.
  __host__ __device__ static std::int64_t entry(std::int64_t begin_k, int segment, int segment_length) {
    return 2 * begin_k + entries_before(segment, segment_length);
  }
  __host__ __device__ static std::int64_t block(std::int64_t begin_k, int sequence, int segment,
                                                int segment_length) {
    return first_block(begin_k, sequence) + entries_before(segment, segment_length) / kBlock + segment;
  }
  // The other way round: the segment of the block first_block() + number.
  __host__ __device__ static int segment_of(std::int64_t number, int segment_length) {
    const std::int64_t first = segment_length / kBlock + 1;  // blocks of segment 0
    return number < first ? 0 : 1 + static_cast<int>((number - first) / (2 * first - 1));
  }
};

// Arrays of [heads_kv][layout.num_...].
struct PlanView {
  PlanLayout layout;
  PlanEntry* entries =
      nullptr;            // null: no plan, every key before the row (every key, if not causal) is visible
  float* bias = nullptr;  // of each entry, times log2(e); null without a bias
  BlockHull* hulls = nullptr;
  int* segment_sizes = nullptr;  // entries in each segment
  int* segment_lengths =
      nullptr;  // [heads_kv][num_sequences]: L where the plan chose it; null: layout.segment_length

  __host__ __device__ bool present() const { return entries != nullptr; }
  __device__ int segment_length(int head, int sequence, int num_sequences) const {
    return segment_lengths == nullptr
               ? layout.segment_length
               : segment_lengths[static_cast<std::int64_t>(head) * num_sequences + sequence];
  }
};

}  // namespace flash_dmattn::cuda
