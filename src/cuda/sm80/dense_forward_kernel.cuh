// The forward pass under a dense mask or bias: forward_kernel.cuh with the keys of a tile's own list. While S
// of step n is computed, V of step n and keys and bits of step n + 1 arrive; while O is, K of step n + 1; the
// bias of step n + 1 has the whole of step n.
#pragma once

#include <cmath>

#include "cuda/common/log2.h"
#include "cuda/sm80/dense_rows.cuh"
#include "cuda/sm80/params.h"
#include "cuda/sm80/row_tile_io.cuh"
#include "cuda/sm80/softmax_rows.cuh"
#include "cuda/sm80/tile.cuh"

namespace flash_dmattn::cuda::sm80 {

template <typename Element_, int kHeadDim_, int kWarps_, int kMTiles_, int kCtasPerSm_>
struct DenseForwardConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kMTiles = kMTiles_;  // blocks of 16 rows per warp
  static constexpr int kWarps = kWarps_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kTileM = 16 * kMTiles * kWarps;
  static constexpr int kCtasPerSm = kCtasPerSm_;
  static_assert(kThreads >= kBlock && kThreads >= kTileM);

  struct SharedMemory {
    Element query[kTileM * kHeadDim];  // later the rows of out
    Element key[kBlock * kHeadDim];
    Element value[kBlock * kHeadDim];
    DenseSlot<kTileM> slots[2];
    RowPlace places[kTileM];
    std::int64_t bias_rows[kTileM];  // offsets, in elements
  };
  static_assert(sizeof(SharedMemory) % 128 == 0);
  // Two tiles of the bias lie behind it.
  static constexpr std::size_t shared_bytes(int bias_element_bytes) {
    return sizeof(SharedMemory) + 2 * bias_tile_bytes(kTileM, bias_element_bytes);
  }
};

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    dense_forward_kernel(const __grid_constant__ ForwardParams<typename Config::Element> params,
                         const __grid_constant__ DenseParams dense) {
  using Element = typename Config::Element;
  constexpr int kHeadDim = Config::kHeadDim;
  constexpr int kMTiles = Config::kMTiles;
  constexpr int kTileM = Config::kTileM;
  constexpr int kThreads = Config::kThreads;

  const Geometry& geometry = params.geometry;
  RowTile tile;
  if (!params.tiles.locate(geometry, blockIdx.x, tile)) return;
  const int batch = tile.sequence.index;

  auto& shared = *reinterpret_cast<typename Config::SharedMemory*>(dynamic_shared_memory());
  const SharedAddress query_tile = shared_address(shared.query);
  const SharedAddress key_tile = shared_address(shared.key);
  const SharedAddress value_tile = shared_address(shared.value);
  const Element* key = params.key.head(geometry, batch, 0, tile.head_kv);
  const Element* value = params.value.head(geometry, batch, 0, tile.head_kv);
  const int key_bytes = static_cast<int>(params.key.row_stride * sizeof(Element));
  const int value_bytes = static_cast<int>(params.value.row_stride * sizeof(Element));
  const RowCopy<kHeadDim, kThreads> copy(params.head_dim);

  DenseBlocks list(dense.lists, dense.lists.tile_list(params.tiles, blockIdx.x));
  DenseBlock block, next_block;
  if (list.size > 0) block = list.at(0);
  if (list.size > 1) next_block = list.at(1);
  place_tile<kTileM, kThreads>(shared.places, shared.bias_rows, list, dense, geometry, tile);
  const BiasTiles<kTileM, kThreads> bias_tiles(dense, geometry, shared.places, shared.bias_rows,
                                               dynamic_shared_memory() + sizeof(shared));
  if (list.size > 0) list.load(shared.slots[0], block);
  __syncthreads();
  load_tile_rows<kHeadDim, kTileM>(query_tile, copy, params.query, geometry, tile, shared.places);
  if (list.size > 0) bias_tiles.load(0, block);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  if (list.size > 0) gather_rows<kHeadDim>(key_tile, copy, key, key_bytes, shared.slots[0]);
  cp_async_commit();

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int first_m = warp * (16 * kMTiles);  // of the warp's rows
  float acc[kMTiles][kHeadDim / 8][4];
  clear(acc);
  SoftmaxRows<kMTiles> softmax;
  softmax.start();

  for (int step = 0; step < list.size; ++step) {
    const DenseSlot<kTileM>& slot = shared.slots[step % 2];
    const bool another = step + 1 < list.size;
    cp_async_wait<0>();
    __syncthreads();  // K, keys, bits and bias of this step have arrived; V of the last is no longer read
    gather_rows<kHeadDim>(value_tile, copy, value, value_bytes, slot);
    if (another) list.load(shared.slots[(step + 1) % 2], next_block);
    cp_async_commit();
    if (another) bias_tiles.load(step + 1, next_block);
    cp_async_commit();

    float s[kMTiles][kBlock / 8][4];
    clear(s);
    multiply_abt<Element, kHeadDim>(s, query_tile + first_m * (2 * kHeadDim), key_tile);

    cp_async_wait<1>();
    __syncthreads();  // V and the next keys have arrived, and K is no longer read
    if (another) gather_rows<kHeadDim>(key_tile, copy, key, key_bytes, shared.slots[(step + 1) % 2]);
    cp_async_commit();

    make_dense_logits(s, params.scale_log2, first_m, slot, bias_tiles.source(step, block));
    block = next_block;
    if (step + 2 < list.size) next_block = list.at(step + 2);
    softmax.step(s, acc);
    std::uint32_t p[kMTiles][kBlock / 16][4];
    round_to_fragments<Element>(p, s);
    multiply_ab<Element, kHeadDim>(acc, p, value_tile);
  }
  cp_async_wait<0>();
  softmax.finish();

#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int local = first_m + m * 16 + i * 8 + lane / 4;
      put_row<Element, kHeadDim>(shared.query, local, acc[m], i, softmax.inverse_sum(m, i));
      const RowPlace place = shared.places[local];
      if (params.lse.present() && lane % 4 == 0 && place.row >= 0) {
        float* lse = params.lse.head(geometry, batch, tile.sequence.begin_q, tile.first_head + place.head);
        lse[(tile.first_row + place.row) * params.lse.stride] = softmax.lse(m, i);
      }
    }
  }
  store_tile_rows<16 * kMTiles, kHeadDim>(shared.query, first_m, params.head_dim, params.out, geometry, tile,
                                          shared.places);
}

}  // namespace flash_dmattn::cuda::sm80
