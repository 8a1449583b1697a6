// The forward pass on Hopper: wgmma on keys that are packed (packed_keys.cuh) or gathered one by one
// (gather_feed.cuh), one persistent CTA per multiprocessor.
//
//   for each tile of rows, for each step of its keys:  S = scale Q K^T + bias, hidden where the key is not
//                                                      visible
//                                                      m, l, O: online softmax of each row; O += P V
//   out = O / l,  lse = m + log l
//
// Roles. The CTA's warpgroups are one of producers and kConsumers of consumers:
//
//                     packed                                gathered
//   planner, warp 0   forms the steps of each tile          lists the keys of each step, their entries and
//                     (key_units.cuh), several ahead        biases, several steps ahead
//   copiers           warp 1: K, entries and biases of a    warp 1: the rows of K; warp 3: those of V
//                     step, and V of the step before
//   reader, warp 2    copies Q of the next tile while the consumers work on this one
//   consumers         products and softmax of 64 rows each; each stores its own rows of out and lse
//
// Barriers, in shared memory: one for each planned step, for each stage of the ring of keys, or for each of
// the two query tiles:
//
//   barrier      its phase ends when                          who waits
//   step_full    the units or keys of the step are known      copiers
//   step_empty   they have been read; keys by consumers too   planner, before it plans another
//   key_full     K, entries, biases of the step are there     consumers
//   value_full   V is there                                   consumers
//   key_empty    all consumer warps have their scores         copier, before it copies K again
//   value_empty  all consumer warps have added P V            copier, before it copies V again
//   query_full   Q and the targets of its rows are there      consumers
//   query_empty  all consumer warps have stored the tile      reader, before it copies Q again
//
// Consumers take turns (named barriers kTurn + consumer): a warpgroup queues its products and passes the turn
// on, so that the tensor cores work for one while the others are at their softmax. Within a warpgroup S of a
// step is queued before P V of the step before, also across tiles: the stream of steps never drains.
#pragma once

#include <type_traits>

#include "cuda/sm90/consumer.cuh"
#include "cuda/sm90/gather_feed.cuh"
#include "cuda/sm90/packed_feed.cuh"

namespace flash_dmattn::cuda::sm90 {

// The row and the head of a row of a tile.
struct ShortPlace {
  std::int16_t row;
  std::int16_t head;
};

template <typename Element_, Feed kFeed_, int kHeadDim_, int kConsumers_, int kUnits_, int kStages_,
          int kProducerRegisters_, int kConsumerRegisters_>
struct ForwardConfig {
  using Element = Element_;
  static constexpr Feed kFeed = kFeed_;
  static constexpr bool kGather = kFeed == Feed::kGather;
  static constexpr int kHeadDim = kHeadDim_;  // 64 or 128
  static constexpr int kConsumers = kConsumers_;
  static constexpr int kThreads = kWarpgroup * (kConsumers + 1);
  static constexpr int kCtasPerSm = 1;
  static constexpr int kTileM = 64 * kConsumers;
  static constexpr int kUnits = kUnits_;  // of keys in a step
  static constexpr int kTileN = kUnit * kUnits;
  static constexpr int kStages = kStages_;
  static constexpr int kProducerRegisters = kProducerRegisters_;
  static constexpr int kConsumerRegisters = kConsumerRegisters_;
  static constexpr int kHalves = kHeadDim / 64;

  static constexpr int kQueryBytes = kTileM * kHeadDim * 2;
  static constexpr int kUnitBytes = kUnit * kHeadDim * 2;
  static constexpr int kKeyBytes = kUnits * kUnitBytes;

  // A warp copies so many rows at once, and a lane wants the keys of its rows side by side.
  static constexpr int kRowsPerPass = 32 / (kHeadDim / 8);
  __device__ static int row_place(int row) {
    return row % kRowsPerPass * (kUnit / kRowsPerPass) + row / kRowsPerPass;
  }
  // The ring of the keys' entries; where keys are gathered it is also that of the steps planned.
  static constexpr int kSlots = kGather ? 2 * kStages : kStages;
  static constexpr int kPlanned = kGather ? kSlots : 4;
  struct PlannedStep {
    int units[kUnits];
    unsigned flags;  // see Step
  };
  struct GatheredRows {
    int rows[kUnits][kUnit];  // the keys again, see row_place
    int count;                // without the padding
  };
  struct Nothing {};
  struct __align__(16) StepKeys : std::conditional_t<kGather, GatheredRows, Nothing> {
    UnitKeys units[kUnits];
    unsigned flags;  // see Step
  };
  // Where a row of a tile goes; null: nowhere.
  struct RowTarget {
    Element* out;
    float* lse;
  };

  struct SharedMemory {
    unsigned char query[2][kQueryBytes];  // [kHalves][kTileM / kAtomRows][kAtomBytes]
    unsigned char key[kStages][kKeyBytes];
    unsigned char value[kStages][kKeyBytes];
    StepKeys slots[kSlots];
    ShortPlace places[kTileM];  // the same in every tile
    RowTarget targets[2][kTileM];
    int begins[2];  // position of the first row of a tile
    PlannedStep planned[kGather ? 1 : kPlanned];
    std::uint64_t step_full[kPlanned], step_empty[kPlanned];
    std::uint64_t key_full[kStages], value_full[kStages], key_empty[kStages], value_empty[kStages];
    std::uint64_t query_full[2], query_empty[2];
  };
};

template <typename Config>
__device__ __forceinline__ typename Config::RowTarget row_target(
    const ForwardParams<typename Config::Element>& params, const RowTile& tile, ShortPlace place) {
  if (place.row >= tile.num_rows || place.head >= tile.num_heads) return {nullptr, nullptr};
  typename Config::RowTarget target = {tile_rows(params.out, params.geometry, tile) +
                                           place.row * params.out.row_stride +
                                           place.head * params.out.head_stride,
                                       nullptr};
  if (params.lse.present()) {
    target.lse = params.lse.head(params.geometry, tile.sequence.index, tile.sequence.begin_q,
                                 tile.first_head + place.head) +
                 (tile.first_row + place.row) * params.lse.stride;
  }
  return target;
}

template <typename Config>
__device__ __forceinline__ void read_queries(const ForwardParams<typename Config::Element>& params,
                                             typename Config::SharedMemory& shared) {
  using Element = typename Config::Element;
  constexpr int kChunks = Config::kHeadDim / 8;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int chunk = lane % kChunks;
  const int valid = chunk * 8 < params.head_dim ? 16 : 0;
  const int tiles = num_tiles(params);
  RingPlace<2> place;
  for (int item = static_cast<int>(blockIdx.x); item < tiles; item += static_cast<int>(gridDim.x)) {
    RowTile tile;
    if (!locate_tile(params, item, tile)) continue;
    barrier_wait(shared_address(&shared.query_empty[place.index]), place.parity ^ 1);
    for (int m = lane; m < Config::kTileM; m += 32) {
      shared.targets[place.index][m] = row_target<Config>(params, tile, shared.places[m]);
    }
    if (lane == 0) shared.begins[place.index] = tile_begin(params, tile);
    __syncwarp();
    const SharedAddress full = shared_address(&shared.query_full[place.index]);
    if (lane == 0) barrier_arrive(full);
    const Element* first = tile_rows(params.query, params.geometry, tile) + (valid > 0 ? chunk * 8 : 0);
    const SharedAddress to = shared_address(shared.query[place.index]) + chunk / 8 * (Config::kTileM * 128);
#pragma unroll 4
    for (int m = lane / kChunks; m < Config::kTileM; m += 32 / kChunks) {
      const ShortPlace row = shared.places[m];
      const bool inside = row.row < tile.num_rows && row.head < tile.num_heads;
      const Element* from =
          inside ? first + row.row * params.query.row_stride + row.head * params.query.head_stride : first;
      cp_async_16(to + m * 128 + ((chunk ^ m) & 7) * 16, from, inside ? valid : 0);
    }
    barrier_arrive_after_copies(full);
    place.advance();
  }
  cp_async_commit();
  cp_async_wait<0>();
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    forward_kernel(const __grid_constant__ ForwardParams<typename Config::Element> params) {
  auto& shared = *reinterpret_cast<typename Config::SharedMemory*>(dynamic_shared_memory());
  if (threadIdx.x == 0) {
    for (int i = 0; i < Config::kStages; ++i) {
      barrier_init(shared_address(&shared.key_full[i]), Config::kGather ? 32 : 1);
      barrier_init(shared_address(&shared.value_full[i]), Config::kGather ? 32 : 1);
      barrier_init(shared_address(&shared.key_empty[i]), 4 * Config::kConsumers);
      barrier_init(shared_address(&shared.value_empty[i]), 4 * Config::kConsumers);
    }
    for (int i = 0; i < Config::kPlanned; ++i) {
      barrier_init(shared_address(&shared.step_full[i]), 32);
      barrier_init(shared_address(&shared.step_empty[i]), Config::kGather ? 2 : 1);
    }
    for (int i = 0; i < 2; ++i) {
      barrier_init(shared_address(&shared.query_full[i]), 32 + 1);
      barrier_init(shared_address(&shared.query_empty[i]), 4 * Config::kConsumers);
    }
    fence_barrier_init();
  }
  for (int m = static_cast<int>(threadIdx.x); m < Config::kTileM; m += Config::kThreads) {
    shared.places[m] = {static_cast<std::int16_t>(m / params.tiles.heads),
                        static_cast<std::int16_t>(m % params.tiles.heads)};
  }
  __syncthreads();
  wait_for_previous_kernel();

  const int warpgroup = uniform(static_cast<int>(threadIdx.x) / kWarpgroup);
  if (warpgroup == 0) {
    register_decrease<Config::kProducerRegisters>();
    const int warp = uniform(static_cast<int>(threadIdx.x) / 32);
    if constexpr (Config::kGather) {
      if (warp == 0) KeyLister<Config>{params, shared}.run();
      if (warp == 1) RowCopier<Config, true>{params, shared}.run();
      if (warp == 3) RowCopier<Config, false>{params, shared}.run();
    } else {
      if (warp == 0) Planner<Config>{params, shared}.run();
      if (warp == 1) Copier<Config>{params.packed, shared}.run();
    }
    if (warp == 2) read_queries<Config>(params, shared);
  } else {
    register_increase<Config::kConsumerRegisters>();
    const int consumer = warpgroup - 1;
    const int warp = static_cast<int>(threadIdx.x) / 32 % 4;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    Consumer<Config>{params, shared, consumer, consumer * 64 + warp * 16 + lane / 4}.run();
  }
}

}  // namespace flash_dmattn::cuda::sm90
