// From the products of a tile of rows (down) with a tile of keys (across) to logits; of the kernels that keep
// rows in place. Logits are in units of log2(e) everywhere: exp2 is what the hardware has.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "cuda/sm80/tile.cuh"

namespace flash_dmattn::cuda::sm80 {

// From products to logits times log2(e).
template <int kMTiles, int kNTiles, int kTileN>
__device__ __forceinline__ void make_logits(float (&s)[kMTiles][kNTiles][4], float scale_log2, bool has_bias,
                                            const KeySlot<kTileN>& slot) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int n = 0; n < kNTiles; ++n) {
    float2 bias = make_float2(0, 0);
    if (has_bias) bias = *reinterpret_cast<const float2*>(&slot.bias[n * 8 + column]);
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        s[m][n][2 * i] = fmaf(s[m][n][2 * i], scale_log2, bias.x);
        s[m][n][2 * i + 1] = fmaf(s[m][n][2 * i + 1], scale_log2, bias.y);
      }
    }
  }
}

// Hides the keys that a row does not see.
template <int kMTiles, int kNTiles, int kTileN>
__device__ __forceinline__ void hide_keys(float (&s)[kMTiles][kNTiles][4], const int (&position)[kMTiles][2],
                                          const KeySlot<kTileN>& slot) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const PlanEntry entry = slot.entries[n * 8 + column + c];
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (!visible(entry, position[m][i])) s[m][n][2 * i + c] = -INFINITY;
        }
      }
    }
  }
}

}  // namespace flash_dmattn::cuda::sm80
