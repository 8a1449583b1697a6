// dQ under a dense mask or bias: backward_dq_kernel.cuh with the keys of a tile's own list.
#pragma once

#include "cuda/sm80/dense_rows.cuh"
#include "cuda/sm80/params.h"
#include "cuda/sm80/row_tile_io.cuh"
#include "cuda/sm80/tile.cuh"

namespace flash_dmattn::cuda::sm80 {

template <typename Element_, int kHeadDim_, int kWarps_, int kKeyStages_, int kCtasPerSm_>
struct DenseQueryGradConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kWarps = kWarps_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kTileM = 16 * kWarps;
  static constexpr int kKeyStages = kKeyStages_;
  static constexpr int kCtasPerSm = kCtasPerSm_;

  struct SharedMemory {
    Element query[kTileM * kHeadDim];  // later the rows of dq
    Element dout[kTileM * kHeadDim];
    Element key[kKeyStages][kBlock * kHeadDim];
    Element value[kBlock * kHeadDim];
    DenseSlot<kTileM> slots[3];
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
    dense_query_grad_kernel(const __grid_constant__ BackwardParams<typename Config::Element> params,
                            const __grid_constant__ DenseParams dense) {
  using Element = typename Config::Element;
  constexpr int kHeadDim = Config::kHeadDim;
  constexpr int kTileM = Config::kTileM;
  constexpr int kNTiles = kBlock / 8;
  constexpr int kThreads = Config::kThreads;

  const Geometry& geometry = params.geometry;
  RowTile tile;
  if (!params.tiles.locate(geometry, blockIdx.x, tile)) return;
  const int batch = tile.sequence.index;

  auto& shared = *reinterpret_cast<typename Config::SharedMemory*>(dynamic_shared_memory());
  const SharedAddress query_tile = shared_address(shared.query);
  const SharedAddress dout_tile = shared_address(shared.dout);
  const SharedAddress value_tile = shared_address(shared.value);
  const auto key_tile = [&](int step) { return shared_address(shared.key[step % Config::kKeyStages]); };
  const Element* key = params.key.head(geometry, batch, 0, tile.head_kv);
  const Element* value = params.value.head(geometry, batch, 0, tile.head_kv);
  const int key_bytes = static_cast<int>(params.key.row_stride * sizeof(Element));
  const int value_bytes = static_cast<int>(params.value.row_stride * sizeof(Element));
  const RowCopy<kHeadDim, kThreads> copy(params.head_dim);

  // Q, dO, keys and bits of the first two blocks, K, V and bias of the first.
  DenseBlocks list(dense.lists, dense.lists.tile_list(params.tiles, blockIdx.x));
  DenseBlock block, next_block, later_block;
  if (list.size > 0) block = list.at(0);
  if (list.size > 1) next_block = list.at(1);
  if (list.size > 2) later_block = list.at(2);
  place_tile<kTileM, kThreads>(shared.places, shared.bias_rows, list, dense, geometry, tile);
  const BiasTiles<kTileM, kThreads> bias_tiles(dense, geometry, shared.places, shared.bias_rows,
                                               dynamic_shared_memory() + sizeof(shared));
  if (list.size > 0) list.load(shared.slots[0], block);
  if (list.size > 1) list.load(shared.slots[1], next_block);
  __syncthreads();
  load_tile_rows<kHeadDim, kTileM>(query_tile, copy, params.query, geometry, tile, shared.places);
  load_tile_rows<kHeadDim, kTileM>(dout_tile, copy, params.dout, geometry, tile, shared.places);
  if (list.size > 0) bias_tiles.load(0, block);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  if (list.size > 0) {
    gather_rows<kHeadDim>(key_tile(0), copy, key, key_bytes, shared.slots[0]);
    gather_rows<kHeadDim>(value_tile, copy, value, value_bytes, shared.slots[0]);
  }
  cp_async_commit();

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int first_m = warp * 16;
  RowStats stats[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const RowPlace place = shared.places[first_m + i * 8 + lane / 4];
    stats[i] = {INFINITY, 0};
    if (place.row >= 0) {
      stats[i] = params.stats[(tile.first_head + place.head) * geometry.total_q() + tile.sequence.begin_q +
                              tile.first_row + place.row];
    }
  }

  float acc[1][kHeadDim / 8][4];
  clear(acc);
  for (int step = 0; step < list.size; ++step) {
    const DenseSlot<kTileM>& slot = shared.slots[step % 3];
    const DenseSlot<kTileM>& next_slot = shared.slots[(step + 1) % 3];
    const bool another = step + 1 < list.size;
    cp_async_wait<0>();
    __syncthreads();  // K, V and bias of this step, keys and bits of the next have arrived; K and bias of the
                      // last are no longer read
    if (Config::kKeyStages == 2 && another) {
      gather_rows<kHeadDim>(key_tile(step + 1), copy, key, key_bytes, next_slot);
    }
    if (another) bias_tiles.load(step + 1, next_block);
    if (step + 2 < list.size) list.load(shared.slots[(step + 2) % 3], later_block);
    cp_async_commit();

    float s[1][kNTiles][4], dp[1][kNTiles][4];
    clear(s);
    clear(dp);
    multiply_abt<Element, kHeadDim>(s, query_tile + first_m * (2 * kHeadDim), key_tile(step));
    multiply_abt<Element, kHeadDim>(dp, dout_tile + first_m * (2 * kHeadDim), value_tile);
    __syncthreads();  // V is no longer read
    if (another) gather_rows<kHeadDim>(value_tile, copy, value, value_bytes, next_slot);
    cp_async_commit();

    make_dense_logits(s, params.scale_log2, first_m, slot, bias_tiles.source(step, block));
    block = next_block;
    next_block = later_block;
    if (step + 3 < list.size) later_block = list.at(step + 3);
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s[0][n][e] = exp2_approx(s[0][n][e] - stats[e / 2].lse_log2) * (dp[0][n][e] - stats[e / 2].delta);
      }
    }
    std::uint32_t ds[1][kNTiles / 2][4];
    round_to_fragments<Element>(ds, s);
    multiply_ab<Element, kHeadDim>(acc, ds, key_tile(step));
    if (Config::kKeyStages == 1) {
      __syncthreads();  // K is no longer read
      if (another) gather_rows<kHeadDim>(key_tile(step + 1), copy, key, key_bytes, next_slot);
      cp_async_commit();
    }
  }
  cp_async_wait<0>();
#pragma unroll
  for (int i = 0; i < 2; ++i)
    put_row<Element, kHeadDim>(shared.query, first_m + i * 8 + lane / 4, acc[0], i, params.scale);
  store_tile_rows<16, kHeadDim>(shared.query, first_m, params.head_dim, params.dq, geometry, tile,
                                shared.places);
}

}  // namespace flash_dmattn::cuda::sm80
