// dQ of one tile of rows per CTA: the rows stay, the keys pass by as in the forward, in the same order.
//
//   P = exp(scale Q K^T + bias - lse)      forward: out = P V, lse = log sum exp(...)
//   dS = P (dO V^T - delta)                delta = rowsum(dO O) - dlse
//   dQ += dS K;  at the end dQ *= scale
//
// While the products of step n run, K of step n + 1 and the entries of step n + 2 arrive; while dQ is added
// to, V of step n + 1.
#pragma once

#include "cuda/sm80/logits.cuh"
#include "cuda/sm80/params.h"
#include "cuda/sm80/tile.cuh"

namespace flash_dmattn::cuda::sm80 {

template <typename Element_, int kHeadDim_, int kTileN_, int kKeyStages_, int kCtasPerSm_>
struct QueryGradConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kTileM = 16 * kWarps;
  static constexpr int kTileN = kTileN_;
  static constexpr int kNTiles = kTileN / 8;
  static constexpr int kKeyStages = kKeyStages_;
  static constexpr int kCtasPerSm = kCtasPerSm_;

  struct SharedMemory {
    Element query[kTileM * kHeadDim];  // later the rows of dq
    Element dout[kTileM * kHeadDim];
    Element key[kKeyStages][kTileN * kHeadDim];
    Element value[kTileN * kHeadDim];
    KeySlot<kTileN> slots[3];
    RowPlace places[kTileM];
  };
};

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    query_grad_kernel(const __grid_constant__ BackwardParams<typename Config::Element> params) {
  using Element = typename Config::Element;
  constexpr int kHeadDim = Config::kHeadDim;
  constexpr int kTileM = Config::kTileM;
  constexpr int kTileN = Config::kTileN;
  constexpr int kNTiles = Config::kNTiles;
  constexpr int kThreads = Config::kThreads;

  const Geometry& geometry = params.geometry;
  RowTile tile;
  if (!params.tiles.locate(geometry, blockIdx.x, tile)) return;
  const Sequence& sequence = tile.sequence;

  auto& shared = *reinterpret_cast<typename Config::SharedMemory*>(dynamic_shared_memory());
  const SharedAddress query_tile = shared_address(shared.query);
  const SharedAddress dout_tile = shared_address(shared.dout);
  const SharedAddress value_tile = shared_address(shared.value);
  const auto key_tile = [&](int step) { return shared_address(shared.key[step % Config::kKeyStages]); };
  const Element* key = params.key.head(geometry, sequence.index, sequence.begin_k, tile.head_kv);
  const Element* value = params.value.head(geometry, sequence.index, sequence.begin_k, tile.head_kv);
  const int key_bytes = static_cast<int>(params.key.row_stride * sizeof(Element));
  const int value_bytes = static_cast<int>(params.value.row_stride * sizeof(Element));
  const RowCopy<kHeadDim, kThreads> copy(params.head_dim);

  const int begin = params.causal ? tile.first_row + sequence.first_position() : sequence.seqlen_k - 1;
  KeyVisits<kTileN> visits(params.plan, geometry, sequence, tile.head_kv, begin,
                           params.causal ? begin + tile.num_rows : begin + 1, params.causal);
  KeyTile keys, next_keys, later_keys;
  bool more = visits.next(keys);
  later_keys = next_keys = keys;
  bool another = more && visits.next(later_keys);
  next_keys = later_keys;

  // Q, dO, the entries of the first two tiles of keys, K and V of the first.
  place_rows<kTileM, kThreads>(shared.places, tile.num_heads, tile.num_rows);
  if (more) load_entries<kTileN, kThreads>(shared.slots[0], visits.list, keys, sequence.seqlen_k);
  if (another) load_entries<kTileN, kThreads>(shared.slots[1], visits.list, next_keys, sequence.seqlen_k);
  __syncthreads();
  const auto load_rows = [&](SharedAddress to, const RowsTensor<const Element>& rows) {
    const Element* first = rows.head(geometry, sequence.index, sequence.begin_q, tile.first_head) +
                           tile.first_row * rows.row_stride;
    copy.template load<kTileM>(
        to,
        [&](int m) {
          const RowPlace place = shared.places[m];
          return reinterpret_cast<const char*>(first + max(place.row, 0) * rows.row_stride +
                                               place.head * rows.head_stride);
        },
        [&](int m) { return shared.places[m].row >= 0; });
  };
  load_rows(query_tile, params.query);
  load_rows(dout_tile, params.dout);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  if (more) {
    gather_rows<kHeadDim>(key_tile(0), copy, key, key_bytes, shared.slots[0], keys.count);
    gather_rows<kHeadDim>(value_tile, copy, value, value_bytes, shared.slots[0], keys.count);
  }
  cp_async_commit();

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int first_m = warp * 16;
  int position[1][2];
  RowStats stats[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const RowPlace place = shared.places[first_m + i * 8 + lane / 4];
    position[0][i] = params.causal ? begin + place.row : begin;
    stats[i] = {INFINITY, 0};
    if (place.row >= 0) {
      stats[i] = params.stats[(tile.first_head + place.head) * geometry.total_q() + sequence.begin_q +
                              tile.first_row + place.row];
    }
  }

  float acc[1][kHeadDim / 8][4];
  clear(acc);
  for (int step = 0; more; ++step) {
    const KeySlot<kTileN>& slot = shared.slots[step % 3];
    const KeySlot<kTileN>& next_slot = shared.slots[(step + 1) % 3];
    cp_async_wait<0>();
    __syncthreads();  // K and V of this step and the next entries have arrived; K of the last is no longer
                      // read
    const bool yet_another = another && visits.next(later_keys);
    if (Config::kKeyStages == 2 && another) {
      gather_rows<kHeadDim>(key_tile(step + 1), copy, key, key_bytes, next_slot, next_keys.count);
    }
    if (yet_another) {
      load_entries<kTileN, kThreads>(shared.slots[(step + 2) % 3], visits.list, later_keys,
                                     sequence.seqlen_k);
    }
    cp_async_commit();

    float s[1][kNTiles][4], dp[1][kNTiles][4];
    clear(s);
    clear(dp);
    multiply_abt<Element, kHeadDim>(s, query_tile + first_m * (2 * kHeadDim), key_tile(step));
    multiply_abt<Element, kHeadDim>(dp, dout_tile + first_m * (2 * kHeadDim), value_tile);
    __syncthreads();  // V is no longer read
    if (another) gather_rows<kHeadDim>(value_tile, copy, value, value_bytes, next_slot, next_keys.count);
    cp_async_commit();

    make_logits(s, params.scale_log2, visits.list.bias != nullptr, slot);
    if (!keys.full) hide_keys(s, position, slot);
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
      if (another)
        gather_rows<kHeadDim>(key_tile(step + 1), copy, key, key_bytes, next_slot, next_keys.count);
      cp_async_commit();
    }
    keys = next_keys;
    next_keys = later_keys;
    more = another;
    another = yet_another;
  }
  cp_async_wait<0>();

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int local = first_m + i * 8 + lane / 4;
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      const SharedAddress chunk = tile_address<kHeadDim>(0, local, n);
      reinterpret_cast<std::uint32_t*>(shared.query)[chunk / 4 + lane % 4] =
          pack<Element>(acc[0][n][2 * i] * params.scale, acc[0][n][2 * i + 1] * params.scale);
    }
  }
  __syncwarp();
  Element* dq = params.dq.head(geometry, sequence.index, sequence.begin_q, tile.first_head) +
                tile.first_row * params.dq.row_stride;
  store_rows<Element, kHeadDim, 16>(shared.query, first_m, params.head_dim, [&](int m) -> Element* {
    const RowPlace place = shared.places[m];
    return place.row < 0 ? nullptr
                         : dq + place.row * params.dq.row_stride + place.head * params.dq.head_stride;
  });
}

}  // namespace flash_dmattn::cuda::sm80
