// How the kernels that keep rows in place bring a tile of rows into shared memory and back.
#pragma once

#include <cuda_runtime.h>

#include "cuda/sm80/params.h"
#include "cuda/sm80/tile.cuh"

namespace flash_dmattn::cuda::sm80 {

// Begins the copy of the rows of a tile.
template <int kHeadDim, int kTileM, int kThreads, typename Element>
__device__ __forceinline__ void load_tile_rows(SharedAddress to, const RowCopy<kHeadDim, kThreads>& copy,
                                               const RowsTensor<const Element>& rows,
                                               const Geometry& geometry, const RowTile& tile,
                                               const RowPlace (&places)[kTileM]) {
  const Element* first = tile_rows(rows, geometry, tile);
  copy.template load<kTileM>(
      to,
      [&](int m) {
        const RowPlace place = places[m];
        return reinterpret_cast<const char*>(first + max(place.row, 0) * rows.row_stride +
                                             place.head * rows.head_stride);
      },
      [&](int m) { return places[m].row >= 0; });
}

// A thread's part of a row of an accumulator (entries 2 i, 2 i + 1 of each block) times `scale` goes to row
// `local` of a tile.
template <typename Element, int kHeadDim>
__device__ __forceinline__ void put_row(Element* tile, int local, const float (&acc)[kHeadDim / 8][4], int i,
                                        float scale) {
#pragma unroll
  for (int n = 0; n < kHeadDim / 8; ++n) {
    const SharedAddress chunk = tile_address<kHeadDim>(0, local, n);
    reinterpret_cast<std::uint32_t*>(tile)[chunk / 4 + threadIdx.x % 4] =
        pack<Element>(acc[n][2 * i] * scale, acc[n][2 * i + 1] * scale);
  }
}

// A warp stores the kRows rows that it has put into the tile from row `first_m` on, once all lanes have.
template <int kRows, int kHeadDim, int kTileM, typename Element>
__device__ __forceinline__ void store_tile_rows(const Element* tile_in_shared, int first_m, int head_dim,
                                                const RowsTensor<Element>& rows, const Geometry& geometry,
                                                const RowTile& tile, const RowPlace (&places)[kTileM]) {
  __syncwarp();
  Element* first = tile_rows(rows, geometry, tile);
  store_rows<Element, kHeadDim, kRows>(tile_in_shared, first_m, head_dim, [&](int m) -> Element* {
    const RowPlace place = places[m];
    return place.row < 0 ? nullptr : first + place.row * rows.row_stride + place.head * rows.head_stride;
  });
}

}  // namespace flash_dmattn::cuda::sm80
