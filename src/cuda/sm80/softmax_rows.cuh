// The online softmax of the forward kernels.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "cuda/common/log2.h"
#include "cuda/common/ptx.cuh"

namespace flash_dmattn::cuda::sm80 {

// The running softmax of the rows of one thread: row i of block m is row lane / 4 + 8 * i of the warp's block
// m.
template <int kMTiles>
struct SoftmaxRows {
  float max[kMTiles][2];  // of the logits so far, times log2(e); -inf: no key was visible yet
  float sum[kMTiles][2];  // of this thread's columns

  __device__ void start() {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        max[m][i] = -INFINITY;
        sum[m][i] = 0;
      }
    }
  }

  // logits (times log2(e)) become probabilities relative to the new maximum; acc is rescaled to it.
  template <int kNTiles, int kColumns>
  __device__ void step(float (&logits)[kMTiles][kNTiles][4], float (&acc)[kMTiles][kColumns][4]) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float tile_max = max[m][i];
#pragma unroll
        for (int n = 0; n < kNTiles; ++n) {
          tile_max = fmaxf(tile_max, fmaxf(logits[m][n][2 * i], logits[m][n][2 * i + 1]));
        }
        tile_max = fmaxf(tile_max, __shfl_xor_sync(0xffffffffu, tile_max, 1));
        tile_max = fmaxf(tile_max, __shfl_xor_sync(0xffffffffu, tile_max, 2));
        // While no key is visible 0 is subtracted, since (-inf) - (-inf) is NaN.
        const float base = tile_max == -INFINITY ? 0 : tile_max;
        const float rescale = exp2_approx(max[m][i] - base);
        max[m][i] = tile_max;
        float tile_sum = 0;
#pragma unroll
        for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float& logit = logits[m][n][2 * i + c];
            logit = exp2_approx(logit - base);
            tile_sum += logit;
          }
        }
        sum[m][i] = sum[m][i] * rescale + tile_sum;
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          acc[m][n][2 * i] *= rescale;
          acc[m][n][2 * i + 1] *= rescale;
        }
      }
    }
  }

  // Adds up what the four threads of a row have.
  __device__ void finish() {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        sum[m][i] += __shfl_xor_sync(0xffffffffu, sum[m][i], 1);
        sum[m][i] += __shfl_xor_sync(0xffffffffu, sum[m][i], 2);
      }
    }
  }

  // After finish. A row that sees no key has the sum 0.
  __device__ float inverse_sum(int m, int i) const { return sum[m][i] == 0 ? 0 : 1 / sum[m][i]; }
  __device__ float lse(int m, int i) const {
    return sum[m][i] == 0 ? -INFINITY : (max[m][i] + log2f(sum[m][i])) * kLn2;
  }
};

}  // namespace flash_dmattn::cuda::sm80
