// The forward pass of one tile of rows per CTA, on mma.sync and cp.async (compute capability 8.0 and later).
//
//   for each tile of keys in the order of the plan:  S = scale Q K^T + bias, hidden where the key is not
//   visible
//                                                    m, l, O: online softmax of each row; O += P V
//   out = O / l,  lse = m + log l
//
// All heads of a group stand in one tile, since they share the list of keys. Copies run ahead of the math:
// while S of step n is computed, V of step n and the entries of step n + 1 arrive; while O is, K of step n
// + 1. A second CTA on the multiprocessor fills what gaps remain. A row's result depends on its own keys and
// their order alone: a tile of keys in which it sees none leaves m, l and O as they are, bit for bit.
#pragma once

#include "cuda/sm80/logits.cuh"
#include "cuda/sm80/params.h"
#include "cuda/sm80/row_tile_io.cuh"
#include "cuda/sm80/softmax_rows.cuh"
#include "cuda/sm80/tile.cuh"

namespace flash_dmattn::cuda::sm80 {

template <typename Element_, int kHeadDim_, int kWarps_, int kMTiles_, int kTileN_, int kCtasPerSm_>
struct ForwardConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kMTiles = kMTiles_;  // blocks of 16 rows per warp
  static constexpr int kWarps = kWarps_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kTileM = 16 * kMTiles * kWarps;
  static constexpr int kTileN = kTileN_;
  static constexpr int kNTiles = kTileN / 8;
  static constexpr int kCtasPerSm = kCtasPerSm_;

  struct SharedMemory {
    Element query[kTileM * kHeadDim];  // later the rows of out
    Element key[kTileN * kHeadDim];
    Element value[kTileN * kHeadDim];
    KeySlot<kTileN> slots[2];
    RowPlace places[kTileM];
  };
};

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    forward_kernel(const __grid_constant__ ForwardParams<typename Config::Element> params) {
  using Element = typename Config::Element;
  constexpr int kHeadDim = Config::kHeadDim;
  constexpr int kMTiles = Config::kMTiles;
  constexpr int kTileM = Config::kTileM;
  constexpr int kTileN = Config::kTileN;
  constexpr int kThreads = Config::kThreads;

  const Geometry& geometry = params.geometry;
  RowTile tile;
  if (!params.tiles.locate(geometry, blockIdx.x, tile)) return;
  const Sequence& sequence = tile.sequence;

  auto& shared = *reinterpret_cast<typename Config::SharedMemory*>(dynamic_shared_memory());
  const SharedAddress query_tile = shared_address(shared.query);
  const SharedAddress key_tile = shared_address(shared.key);
  const SharedAddress value_tile = shared_address(shared.value);
  const Element* key = params.key.head(geometry, sequence.index, sequence.begin_k, tile.head_kv);
  const Element* value = params.value.head(geometry, sequence.index, sequence.begin_k, tile.head_kv);
  const int key_bytes = static_cast<int>(params.key.row_stride * sizeof(Element));
  const int value_bytes = static_cast<int>(params.value.row_stride * sizeof(Element));
  const RowCopy<kHeadDim, kThreads> copy(params.head_dim);

  const int begin = params.causal ? tile.first_row + sequence.first_position() : sequence.seqlen_k - 1;
  KeyVisits<kTileN> visits(params.plan, geometry, sequence, tile.head_kv, begin,
                           params.causal ? begin + tile.num_rows : begin + 1, params.causal);
  KeyTile keys, next_keys;
  bool more = visits.next(keys);

  // Q, and the entries and K of the first tile of keys.
  place_rows<kTileM, kThreads>(shared.places, tile.num_heads, tile.num_rows);
  if (more) load_entries<kTileN, kThreads>(shared.slots[0], visits.list, keys, sequence.seqlen_k);
  __syncthreads();
  load_tile_rows<kHeadDim, kTileM>(query_tile, copy, params.query, geometry, tile, shared.places);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  if (more) gather_rows<kHeadDim>(key_tile, copy, key, key_bytes, shared.slots[0], keys.count);
  cp_async_commit();

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int first_m = warp * (16 * kMTiles);  // of the warp's rows
  int position[kMTiles][2];
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = shared.places[first_m + m * 16 + i * 8 + lane / 4].row;
      position[m][i] = params.causal ? begin + row : begin;
    }
  }

  float acc[kMTiles][kHeadDim / 8][4];
  clear(acc);
  SoftmaxRows<kMTiles> softmax;
  softmax.start();

  for (int step = 0; more; ++step) {
    const KeySlot<kTileN>& slot = shared.slots[step % 2];
    cp_async_wait<0>();
    __syncthreads();  // K of this step has arrived, and V of the last is no longer read
    const bool another = visits.next(next_keys);
    gather_rows<kHeadDim>(value_tile, copy, value, value_bytes, slot, keys.count);
    if (another)
      load_entries<kTileN, kThreads>(shared.slots[(step + 1) % 2], visits.list, next_keys, sequence.seqlen_k);
    cp_async_commit();

    float s[kMTiles][Config::kNTiles][4];
    clear(s);
    multiply_abt<Element, kHeadDim>(s, query_tile + first_m * (2 * kHeadDim), key_tile);

    cp_async_wait<0>();
    __syncthreads();  // V and the next entries have arrived, and K is no longer read
    if (another)
      gather_rows<kHeadDim>(key_tile, copy, key, key_bytes, shared.slots[(step + 1) % 2], next_keys.count);
    cp_async_commit();

    make_logits(s, params.scale_log2, visits.list.bias != nullptr, slot);
    if (!keys.full) hide_keys(s, position, slot);
    softmax.step(s, acc);
    std::uint32_t p[kMTiles][Config::kNTiles / 2][4];
    round_to_fragments<Element>(p, s);
    multiply_ab<Element, kHeadDim>(acc, p, value_tile);
    keys = next_keys;
    more = another;
  }
  cp_async_wait<0>();
  softmax.finish();

  // out goes through the warp's own rows of the query tile, so that whole chunks are stored.
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int local = first_m + m * 16 + i * 8 + lane / 4;
      put_row<Element, kHeadDim>(shared.query, local, acc[m], i, softmax.inverse_sum(m, i));
      const RowPlace place = shared.places[local];
      if (params.lse.present() && lane % 4 == 0 && place.row >= 0) {
        float* lse =
            params.lse.head(geometry, sequence.index, sequence.begin_q, tile.first_head + place.head);
        lse[(tile.first_row + place.row) * params.lse.stride] = softmax.lse(m, i);
      }
    }
  }
  store_tile_rows<16 * kMTiles, kHeadDim>(shared.query, first_m, params.head_dim, params.out, geometry, tile,
                                          shared.places);
}

}  // namespace flash_dmattn::cuda::sm80
