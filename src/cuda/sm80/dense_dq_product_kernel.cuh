// dQ where dS lies in memory already, as the gradient of a bias that no two pairs share, in the type of the
// products: dQ = scale dS K, one product instead of three.
#pragma once

#include "cuda/sm80/dense_rows.cuh"
#include "cuda/sm80/params.h"
#include "cuda/sm80/row_tile_io.cuh"
#include "cuda/sm80/tile.cuh"

namespace flash_dmattn::cuda::sm80 {

template <typename Element_, int kHeadDim_, int kWarps_, int kCtasPerSm_>
struct DenseQueryProductConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kWarps = kWarps_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kTileM = 16 * kWarps;
  static constexpr int kCtasPerSm = kCtasPerSm_;
  static_assert(kTileM <= kBlock);

  struct SharedMemory {
    Element key[2][kBlock * kHeadDim];  // the first one later the rows of dq
    DenseSlot<kTileM> slots[3];
    RowPlace places[kTileM];
    std::int64_t rows[kTileM];  // offsets in dS, in elements
  };
  static_assert(sizeof(SharedMemory) % 128 == 0);
  // Two tiles of dS lie behind it.
  static constexpr std::size_t shared_bytes(int /*bias_element_bytes*/) {
    return sizeof(SharedMemory) + 2 * bias_tile_bytes(kTileM, sizeof(Element));
  }
};

// The thread's part of dS of a block as the A operand. first_m: of the warp's rows.
template <int kTileM>
__device__ __forceinline__ void read_ds(std::uint32_t (&a)[1][kBlock / 16][4], int first_m,
                                        const DenseSlot<kTileM>& slot, const BiasSource& source) {
  const int lane = threadIdx.x % 32;
  const int quad = lane % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = first_m + i * 8 + lane / 4;
    if (source.staged != nullptr) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 chunk =
            *reinterpret_cast<const uint4*>(source.staged + bias_address<2>(0, row, 2 * quad + half));
        a[0][2 * half][i] = chunk.x;
        a[0][2 * half][2 + i] = chunk.y;
        a[0][2 * half + 1][i] = chunk.z;
        a[0][2 * half + 1][2 + i] = chunk.w;
      }
      continue;
    }
    const auto* elements = reinterpret_cast<const std::uint16_t*>(source.bias->data) + source.rows[row];
    const unsigned visible = reinterpret_cast<const std::uint16_t*>(&slot.bits[row])[quad];
#pragma unroll
    for (int n = 0; n < kBlock / 8; ++n) {
      std::uint32_t pair = 0;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if ((visible >> (2 * n + c) & 1) == 0) continue;
        pair |=
            static_cast<std::uint32_t>(elements[slot.keys[n * 8 + quad * 2 + c] * source.bias->key_stride])
            << (16 * c);
      }
      a[0][n / 2][n % 2 * 2 + i] = pair;
    }
  }
}

// dense.bias: dS.
template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    dense_query_product_kernel(const __grid_constant__ BackwardParams<typename Config::Element> params,
                               const __grid_constant__ DenseParams dense) {
  using Element = typename Config::Element;
  constexpr int kHeadDim = Config::kHeadDim;
  constexpr int kTileM = Config::kTileM;
  constexpr int kThreads = Config::kThreads;

  const Geometry& geometry = params.geometry;
  RowTile tile;
  if (!params.tiles.locate(geometry, blockIdx.x, tile)) return;

  auto& shared = *reinterpret_cast<typename Config::SharedMemory*>(dynamic_shared_memory());
  const auto key_tile = [&](int step) { return shared_address(shared.key[step % 2]); };
  const Element* key = params.key.head(geometry, tile.sequence.index, 0, tile.head_kv);
  const int key_bytes = static_cast<int>(params.key.row_stride * sizeof(Element));
  const RowCopy<kHeadDim, kThreads> copy(params.head_dim);

  // Keys and bits of the first two blocks, K and dS of the first.
  DenseBlocks list(dense.lists, dense.lists.tile_list(params.tiles, blockIdx.x));
  DenseBlock block, next_block, later_block;
  if (list.size > 0) block = list.at(0);
  if (list.size > 1) next_block = list.at(1);
  if (list.size > 2) later_block = list.at(2);
  place_tile<kTileM, kThreads>(shared.places, shared.rows, list, dense, geometry, tile);
  const BiasTiles<kTileM, kThreads> ds_tiles(dense, geometry, shared.places, shared.rows,
                                             dynamic_shared_memory() + sizeof(shared));
  if (list.size > 0) list.load(shared.slots[0], block);
  if (list.size > 1) list.load(shared.slots[1], next_block);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  if (list.size > 0) {
    gather_rows<kHeadDim>(key_tile(0), copy, key, key_bytes, shared.slots[0]);
    ds_tiles.load(0, block);
  }
  cp_async_commit();

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int first_m = warp * 16;
  float acc[1][kHeadDim / 8][4];
  clear(acc);
  for (int step = 0; step < list.size; ++step) {
    cp_async_wait<0>();
    __syncthreads();  // K and dS of this step, keys and bits of the next have arrived; those of the last are
                      // no longer read
    if (step + 1 < list.size) {
      gather_rows<kHeadDim>(key_tile(step + 1), copy, key, key_bytes, shared.slots[(step + 1) % 3]);
      ds_tiles.load(step + 1, next_block);
    }
    if (step + 2 < list.size) list.load(shared.slots[(step + 2) % 3], later_block);
    cp_async_commit();

    std::uint32_t ds[1][kBlock / 16][4];
    read_ds(ds, first_m, shared.slots[step % 3], ds_tiles.source(step, block));
    block = next_block;
    next_block = later_block;
    if (step + 3 < list.size) later_block = list.at(step + 3);
    multiply_ab<Element, kHeadDim>(acc, ds, key_tile(step));
  }
  cp_async_wait<0>();
  __syncthreads();  // K is no longer read
#pragma unroll
  for (int i = 0; i < 2; ++i)
    put_row<Element, kHeadDim>(shared.key[0], first_m + i * 8 + lane / 4, acc[0], i, params.scale);
  store_tile_rows<16, kHeadDim>(shared.key[0], first_m, params.head_dim, params.dq, geometry, tile,
                                shared.places);
}

}  // namespace flash_dmattn::cuda::sm80
