// Feeds the consumers with units of packed keys: the planner finds out which, the copier copies them.
#pragma once

#include "cuda/sm90/key_units.cuh"
#include "cuda/sm90/pipeline.cuh"

namespace flash_dmattn::cuda::sm90 {

template <typename Config>
struct Planner {
  using Element = typename Config::Element;

  const ForwardParams<Element>& params;
  typename Config::SharedMemory& shared;
  RingPlace<Config::kPlanned> place = {};

  // unit: of this lane.
  __device__ void put(int unit, unsigned flags) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    barrier_wait(shared_address(&shared.step_empty[place.index]), place.parity ^ 1);
    auto& step = shared.planned[place.index];
    if (lane < Config::kUnits) step.units[lane] = unit;
    if (lane == 0) step.flags = flags;
    barrier_arrive(shared_address(&shared.step_full[place.index]));  // each lane for what it has written
    place.advance();
  }

  __device__ void plan_tile(const RowTile& tile) {
    const Geometry& geometry = params.geometry;
    const Sequence& sequence = tile.sequence;
    const int begin = tile_begin(params, tile);
    const int end = params.causal ? begin + tile.num_rows : begin + 1;
    const KeyVisits<kBlock> visits(params.plan, geometry, sequence, tile.head_kv, begin, end, params.causal);
    std::int64_t first_block = KeyBlocks::first(params.plan, sequence.begin_k, sequence.index);
    if (params.plan.present()) {
      const int length = params.plan.segment_length(tile.head_kv, sequence.index, geometry.num_sequences);
      first_block = PlanLayout::block(sequence.begin_k, sequence.index,
                                      params.causal ? max(begin, 0) / length : 0, length);
    }
    first_block +=
        static_cast<std::int64_t>(tile.head_kv - params.first_head) * params.packed.blocks_per_head;
    KeySteps<Config::kUnits> steps(visits, params.packed, first_block, begin, end);
    while (steps.next()) put(steps.unit, steps.tests | (steps.last ? Step::kLast : 0));
  }

  __device__ void run() {
    const int tiles = num_tiles(params);
    for (int item = static_cast<int>(blockIdx.x); item < tiles; item += static_cast<int>(gridDim.x)) {
      RowTile tile;
      if (locate_tile(params, item, tile)) plan_tile(tile);
    }
    put(0, Step::kEnd);
  }
};

template <typename Config>
struct Copier {
  const PackedKeys& packed;
  typename Config::SharedMemory& shared;
  RingPlace<Config::kStages> place = {};        // of the next step
  RingPlace<Config::kStages> value_place = {};  // of the step whose V has not been copied yet
  int value_unit = 0;                           // its unit, of this lane
  int value_count = 0;                          // see units_to_copy

  // How many units, from that of this lane on, follow each other in the packed keys; 0 where the lane before
  // has counted them.
  __device__ static int units_to_copy(int unit) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int before = __shfl_up_sync(0xffffffffu, unit, 1);
    const bool first = lane == 0 || lane == Config::kUnits || unit != before + 1;
    const unsigned firsts = __ballot_sync(0xffffffffu, first);
    return first && lane < Config::kUnits ? __ffs(firsts >> lane >> 1) : 0;
  }

  __device__ void copy_value() {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int stage = value_place.index;
    barrier_wait(shared_address(&shared.value_empty[stage]), value_place.parity ^ 1);
    const SharedAddress full = shared_address(&shared.value_full[stage]);
    if (lane == 0) barrier_arrive_expect(full, Config::kKeyBytes);
    __syncwarp();
    if (value_count > 0) {
      bulk_copy(shared_address(&shared.value[stage][lane * Config::kUnitBytes]),
                packed.value + static_cast<std::int64_t>(value_unit) * Config::kUnitBytes,
                value_count * Config::kUnitBytes, full);
    }
    value_place.advance();
  }

  __device__ void copy_key(int unit, int count, unsigned flags) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int stage = place.index;
    barrier_wait(shared_address(&shared.key_empty[stage]), place.parity ^ 1);
    const SharedAddress full = shared_address(&shared.key_full[stage]);
    if (lane == 0) {
      shared.slots[stage].flags = flags;
      barrier_arrive_expect(full, Config::kKeyBytes + static_cast<int>(sizeof(shared.slots[stage].units)));
    }
    __syncwarp();
    if (count > 0) {
      bulk_copy(shared_address(&shared.key[stage][lane * Config::kUnitBytes]),
                packed.key + static_cast<std::int64_t>(unit) * Config::kUnitBytes, count * Config::kUnitBytes,
                full);
      bulk_copy(shared_address(&shared.slots[stage].units[lane]), packed.keys + unit,
                count * static_cast<int>(sizeof(UnitKeys)), full);
    }
    place.advance();
  }

  __device__ void run() {
    const int lane = static_cast<int>(threadIdx.x % 32);
    RingPlace<Config::kPlanned> step;
    for (bool first = true;; first = false) {
      barrier_wait(shared_address(&shared.step_full[step.index]), step.parity);
      const int unit = shared.planned[step.index].units[min(lane, Config::kUnits - 1)];
      const unsigned flags = shared.planned[step.index].flags;
      __syncwarp();
      if (lane == 0) barrier_arrive(shared_address(&shared.step_empty[step.index]));
      step.advance();
      if (flags == Step::kEnd) {
        if (!first) copy_value();
        break;
      }
      const int count = units_to_copy(unit);
      copy_key(unit, count, flags);
      if (!first) copy_value();
      value_unit = unit;
      value_count = count;
    }
    barrier_wait(shared_address(&shared.key_empty[place.index]), place.parity ^ 1);
    if (lane == 0) {
      shared.slots[place.index].flags = Step::kEnd;
      barrier_arrive(shared_address(&shared.key_full[place.index]));
    }
  }
};

}  // namespace flash_dmattn::cuda::sm90
