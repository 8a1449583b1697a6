// The tiles of rows of the kernels that keep queries in place (forward, dQ). A tile holds `positions`
// neighbouring rows times `heads` heads of a group, all of which share one list of keys. Tiles start at
// multiples of `positions` counted from stripes of kMinSegment positions, so that none crosses the border of
// a segment and the tile of a row depends on its position alone.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/geometry.cuh"
#include "cuda/common/plan.cuh"

namespace flash_dmattn::cuda {

struct RowTile {
  Sequence sequence;
  int head_kv = 0;
  int first_head = 0;  // query heads first_head .. first_head + num_heads - 1
  int num_heads = 0;
  int first_row = 0;  // of the sequence
  int num_rows = 0;   // per head
};

struct RowTiles {
  int positions = 0;
  int heads = 0;
  int head_chunks = 0;   // tiles that share the heads of a group; 1 unless the group exceeds a tile
  int per_stripe = 0;    // tiles in kMinSegment positions
  int per_sequence = 0;  // batched: tiles of each sequence
  int num_tiles = 0;     // ids per head chunk
  bool causal = true;

  static RowTiles make(const Geometry& geometry, bool causal, int tile_m) {
    RowTiles tiles;
    const int group = geometry.group();
    tiles.causal = causal;
    tiles.heads = group < tile_m ? group : tile_m;
    tiles.positions = tile_m / tiles.heads;
    tiles.head_chunks = static_cast<int>(ceil_div(group, tiles.heads));
    tiles.per_stripe = static_cast<int>(ceil_div(kMinSegment, tiles.positions));
    if (geometry.packed()) {
      tiles.num_tiles = tiles.first_id(geometry.seqlen_q, geometry.num_sequences);
    } else {
      tiles.per_sequence = tiles.count(geometry.seqlen_q, geometry.seqlen_k);
      tiles.num_tiles = tiles.per_sequence * geometry.num_sequences;
    }
    return tiles;
  }

  // CTAs for all heads.
  std::int64_t grid(const Geometry& geometry) const {
    return static_cast<std::int64_t>(geometry.heads_kv) * head_chunks * num_tiles;
  }

  // Where the tile numbers start counting: a row stands at this number plus its index.
  __host__ __device__ int offset(int seqlen_q, int seqlen_k) const {
    return causal && seqlen_k > seqlen_q ? seqlen_k - seqlen_q : 0;
  }
  __host__ __device__ int tile_of(int place) const {
    return place / kMinSegment * per_stripe + place % kMinSegment / positions;
  }
  __host__ __device__ int count(int seqlen_q, int seqlen_k) const {
    if (seqlen_q == 0) return 0;
    const int begin = offset(seqlen_q, seqlen_k);
    return tile_of(begin + seqlen_q - 1) - tile_of(begin) + 1;
  }
  // Packed sequences: n rows lie in at most n / kMinSegment + 2 stripes, hence in at most n / positions + n /
  // kMinSegment + 3 tiles; two more for the quotients rounded down.
  __host__ __device__ int first_id(int begin_q, int sequence) const {
    return begin_q / positions + begin_q / kMinSegment + 5 * sequence;
  }

  // The tile of a CTA, the last rows, which have most to do, first; false if there is none.
  __device__ bool locate(const Geometry& geometry, std::int64_t cta, RowTile& tile) const {
    return locate(geometry, static_cast<int>(cta / num_tiles), static_cast<int>(cta % num_tiles), tile);
  }
  // The same of a head chunk.
  __device__ bool locate(const Geometry& geometry, int chunk, int number_from_last, RowTile& tile) const {
    const int id = num_tiles - 1 - number_from_last;
    int first = 0;
    if (geometry.packed()) {
      const int index = owner_of(id, geometry.num_sequences, [&](int candidate) {
        return first_id(static_cast<int>(geometry.sequence(candidate).begin_q), candidate);
      });
      tile.sequence = geometry.sequence(index);
      first = first_id(static_cast<int>(tile.sequence.begin_q), index);
    } else {
      tile.sequence = geometry.sequence(id / per_sequence);
      first = tile.sequence.index * per_sequence;
    }
    const int seqlen_q = tile.sequence.seqlen_q;
    if (id < first || id - first >= count(seqlen_q, tile.sequence.seqlen_k)) return false;
    const int begin = offset(seqlen_q, tile.sequence.seqlen_k);
    const int number = tile_of(begin) + id - first;
    const int place = number / per_stripe * kMinSegment + number % per_stripe * positions;
    const int stripe_end = number / per_stripe * kMinSegment + kMinSegment;
    const int from = max(place, begin);
    const int to = min(min(place + positions, stripe_end), begin + seqlen_q);
    tile.first_row = from - begin;
    tile.num_rows = to - from;
    tile.head_kv = chunk / head_chunks;
    const int head_in_group = chunk % head_chunks * heads;
    tile.first_head = tile.head_kv * geometry.group() + head_in_group;
    tile.num_heads = min(heads, geometry.group() - head_in_group);
    return true;
  }
};

// The row and the head of each row of a tile of queries; row -1: the tile has fewer rows.
struct RowPlace {
  int row;
  int head;
};

template <int kTileM, int kThreads>
__device__ __forceinline__ void place_rows(RowPlace (&places)[kTileM], int num_heads, int num_rows) {
  for (int m = static_cast<int>(threadIdx.x); m < kTileM; m += kThreads) {
    const int row = m / num_heads;
    places[m] = {row < num_rows ? row : -1, m - row * num_heads};
  }
}

// The first row of a tile in the first of its heads.
template <typename Element>
__device__ __forceinline__ Element* tile_rows(const RowsTensor<Element>& rows, const Geometry& geometry,
                                              const RowTile& tile) {
  return rows.head(geometry, tile.sequence.index, tile.sequence.begin_q, tile.first_head) +
         tile.first_row * rows.row_stride;
}

}  // namespace flash_dmattn::cuda
