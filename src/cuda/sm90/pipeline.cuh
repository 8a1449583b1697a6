// What the roles of the forward kernel share: their way through the tiles, the rings between them, and the
// flags of a step.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/ptx_sm90.cuh"
#include "cuda/sm90/params.h"

namespace flash_dmattn::cuda::sm90 {

constexpr int kWarpgroup = 128;

// The same in all lanes, which the compiler cannot know.
template <typename T>
__device__ __forceinline__ T uniform(T value) {
  return __shfl_sync(0xffffffffu, value, 0);
}

// How keys come to shared memory.
enum class Feed {
  kPacked,  // in units of packed keys
  kGather,  // one by one
};

// The flags of a step. Bit u: unit u holds a key that some row of the tile does not see.
struct Step {
  static constexpr unsigned kLast = 1u << 30;  // of its tile
  static constexpr unsigned kEnd = 1u << 31;   // no step, there are no more
};

// A place in a ring: the parity of a barrier's phase flips with each round.
template <int kStages>
struct RingPlace {
  int index = 0;
  int parity = 0;

  __device__ void advance() {
    if (++index == kStages) {
      index = 0;
      parity ^= 1;
    }
  }
};

// The tiles of this CTA: every gridDim-th, the last rows of all heads first.
template <typename Element>
__device__ __forceinline__ int num_tiles(const ForwardParams<Element>& params) {
  return params.num_heads * params.tiles.head_chunks * params.tiles.num_tiles;
}
template <typename Element>
__device__ __forceinline__ bool locate_tile(const ForwardParams<Element>& params, int item, RowTile& tile) {
  const int chunks = params.num_heads * params.tiles.head_chunks;
  const int chunk = params.first_head * params.tiles.head_chunks + item % chunks;
  return params.tiles.locate(params.geometry, chunk, item / chunks, tile);
}
template <typename Element>
__device__ __forceinline__ int tile_begin(const ForwardParams<Element>& params, const RowTile& tile) {
  return params.causal ? tile.first_row + tile.sequence.first_position() : tile.sequence.seqlen_k - 1;
}

}  // namespace flash_dmattn::cuda::sm90
