// What the backward needs of each query row before it begins: lse in units of log2(e), and delta = rowsum(dO
// O) - dlse.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "cuda/common/log2.h"
#include "cuda/common/ptx.cuh"
#include "cuda/sm80/params.h"

namespace flash_dmattn::cuda::sm80 {

constexpr int kStatsThreads = 256;
constexpr int kLanesPerRow = 16;

// kLanesPerRow threads per row and head; the heads of a row are neighbours.
template <typename Element>
__global__ void __launch_bounds__(kStatsThreads)
    row_stats_kernel(const __grid_constant__ BackwardParams<Element> params) {
  const Geometry& geometry = params.geometry;
  const std::int64_t index =
      static_cast<std::int64_t>(blockIdx.x) * (kStatsThreads / kLanesPerRow) + threadIdx.x / kLanesPerRow;
  const bool valid = index < geometry.total_q() * geometry.heads_q;
  const int lane = threadIdx.x % kLanesPerRow;
  const std::int64_t place = valid ? index / geometry.heads_q : 0;
  const int head = valid ? static_cast<int>(index % geometry.heads_q) : 0;
  // All packed sequences count as one here.
  const int batch = geometry.packed() ? 0 : static_cast<int>(place / geometry.seqlen_q);
  const std::int64_t row = geometry.packed() ? place : place % geometry.seqlen_q;

  float delta = 0;
  if (valid) {
    const Element* out = params.out.head(geometry, batch, 0, head) + row * params.out.row_stride;
    const Element* dout = params.dout.head(geometry, batch, 0, head) + row * params.dout.row_stride;
    for (int column = lane * 8; column < params.head_dim; column += kLanesPerRow * 8) {
      Element o[8], d[8];
      *reinterpret_cast<uint4*>(o) = *reinterpret_cast<const uint4*>(out + column);
      *reinterpret_cast<uint4*>(d) = *reinterpret_cast<const uint4*>(dout + column);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (column + i < params.head_dim) delta = fmaf(to_float(o[i]), to_float(d[i]), delta);
      }
    }
  }
#pragma unroll
  for (int step = kLanesPerRow / 2; step > 0; step /= 2) delta += __shfl_xor_sync(0xffffffffu, delta, step);
  if (!valid || lane != 0) return;
  if (params.dlse.present()) delta -= params.dlse.head(geometry, batch, 0, head)[row * params.dlse.stride];
  const float lse = params.lse.head(geometry, batch, 0, head)[row * params.lse.stride];
  params.stats[head * geometry.total_q() + place] = {
      lse == -INFINITY ? INFINITY : lse * static_cast<float>(kLog2E), delta};
}

}  // namespace flash_dmattn::cuda::sm80
