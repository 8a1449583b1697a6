// Feeds the consumers with the very keys that a tile sees: the planner lists them, two copiers gather their
// rows of K and V.
#pragma once

#include "cuda/common/key_visits.cuh"
#include "cuda/sm90/pipeline.cuh"

namespace flash_dmattn::cuda::sm90 {

// One warp: writes the entries and biases of the steps of each tile into their ring, several steps ahead.
template <typename Config>
struct KeyLister {
  using Element = typename Config::Element;
  static constexpr int kTileN = Config::kTileN;
  static constexpr unsigned kAll = (1u << Config::kUnits) - 1;
  static_assert(2 * Config::kUnits < 30);
  static_assert(kTileN >= kBlock);  // so that a block ends in this step or the next

  const ForwardParams<Element>& params;
  typename Config::SharedMemory& shared;
  RingPlace<Config::kSlots> place = {};  // of the step being filled
  int count = 0;                         // keys in it
  unsigned tests = 0;                    // of its units; those of the next step from bit kUnits on

  __device__ void wait_for_slot(const RingPlace<Config::kSlots>& slot) {
    barrier_wait(shared_address(&shared.step_empty[slot.index]), slot.parity ^ 1);
  }

  __device__ void put_key(const RingPlace<Config::kSlots>& next, int at, const PlanEntry& entry, float bias) {
    auto& step = shared.slots[at < kTileN ? place.index : next.index];
    if (at >= kTileN) at -= kTileN;
    step.rows[at / kUnit][Config::row_place(at % kUnit)] = entry.key;
    step.units[at / kUnit].put(at % kUnit, entry, bias);
  }

  // Hands over the step; what lies beyond it moves to the front.
  __device__ void end_step(unsigned flags) {
    auto& step = shared.slots[place.index];
    if (threadIdx.x % 32 == 0) {
      step.count = min(count, kTileN);
      step.flags = (tests & kAll) | flags;
    }
    barrier_arrive(shared_address(&shared.step_full[place.index]));  // each lane for what it has written
    place.advance();
    tests >>= Config::kUnits;
    count = max(count - kTileN, 0);
  }

  // Lane l judges the keys 2 l and 2 l + 1 of a block.
  __device__ void add_block(const PlanEntry (&entries)[2], const float (&bias)[2], const bool (&exists)[2],
                            int begin, int end) {
    bool seen[2];
    unsigned votes[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const PlanEntry& entry = entries[i];
      seen[i] = exists[i] && entry.key < end && begin < entry.expiry && entry.key < entry.expiry;
      votes[i] = __ballot_sync(0xffffffffu, seen[i]);
    }
    const int found = __popc(votes[0]) + __popc(votes[1]);
    RingPlace<Config::kSlots> next = place;
    next.advance();
    if (count + found > kTileN) wait_for_slot(next);
    const unsigned before = (1u << threadIdx.x % 32) - 1;
    int at = count + __popc(votes[0] & before) + __popc(votes[1] & before);
    unsigned tested = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!seen[i]) continue;
      put_key(next, at, entries[i], bias[i]);
      if (entries[i].key > begin || entries[i].expiry < end) tested |= 1u << at / kUnit;
      ++at;
    }
    tests |= __reduce_or_sync(0xffffffffu, tested);
    count += found;
    if (count > kTileN) end_step(0);
  }

  __device__ void list_tile(const RowTile& tile) {
    const Sequence& sequence = tile.sequence;
    const int begin = tile_begin(params, tile);
    const int end = params.causal ? begin + tile.num_rows : begin + 1;
    KeyVisits<kBlock> visits(params.plan, params.geometry, sequence, tile.head_kv, begin, end, params.causal);
    const KeyList list = visits.list;
    wait_for_slot(place);
    KeyTile keys;
    while (visits.next(keys)) {
      PlanEntry entries[2];
      float bias[2] = {0, 0};
      bool exists[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int in_block = static_cast<int>(threadIdx.x % 32) * 2 + i;
        exists[i] = in_block < keys.count;
        const int index = keys.first + (exists[i] ? in_block : 0);
        entries[i] = list.entries == nullptr ? PlanEntry{index, sequence.seqlen_k} : list.entries[index];
        if (list.bias != nullptr) bias[i] = list.bias[index] * params.bias_scale;
      }
      add_block(entries, bias, exists, begin, end);
    }
    // What the last step lacks: keys that nobody sees.
    for (int at = count + static_cast<int>(threadIdx.x % 32); at < kTileN; at += 32) {
      put_key(place, at, PlanEntry{0, 0}, 0);
    }
    tests |= kAll & ~((1u << count / kUnit) - 1);
    end_step(Step::kLast);
  }

  __device__ void run() {
    const int tiles = num_tiles(params);
    for (int item = static_cast<int>(blockIdx.x); item < tiles; item += static_cast<int>(gridDim.x)) {
      RowTile tile;
      if (locate_tile(params, item, tile)) list_tile(tile);
    }
    wait_for_slot(place);
    end_step(Step::kEnd);
  }
};

// One warp: gathers the rows of K, or of V, of every step.
template <typename Config, bool kOfKey>
struct RowCopier {
  using Element = typename Config::Element;
  static constexpr int kChunks = Config::kHeadDim / 8;
  static constexpr int kRowsPerPass = 32 / kChunks;

  const ForwardParams<Element>& params;
  typename Config::SharedMemory& shared;
  RingPlace<Config::kSlots> slot = {};
  RingPlace<Config::kStages> place = {};
  int steps = 0;  // so far

  __device__ static int lane() { return static_cast<int>(threadIdx.x % 32); }

  // Waits for the next step, and until its place is free.
  __device__ const typename Config::StepKeys& wait_for_step() {
    barrier_wait(shared_address(&shared.step_full[slot.index]), slot.parity);
    if constexpr (kOfKey) {
      barrier_wait(shared_address(&shared.key_empty[place.index]), place.parity ^ 1);
      // So the consumers are done with the entries of the step that was here before.
      constexpr int kStages = Config::kStages;
      if (steps >= kStages && lane() == 0) {
        const int before =
            slot.index >= kStages ? slot.index - kStages : slot.index + Config::kSlots - kStages;
        barrier_arrive(shared_address(&shared.step_empty[before]));
      }
    } else {
      barrier_wait(shared_address(&shared.value_empty[place.index]), place.parity ^ 1);
    }
    return shared.slots[slot.index];
  }

  __device__ void advance() {
    if constexpr (!kOfKey) {
      __syncwarp();
      if (lane() == 0) barrier_arrive(shared_address(&shared.step_empty[slot.index]));
    }
    slot.advance();
    place.advance();
    ++steps;
  }

  __device__ SharedAddress full() {
    return shared_address(kOfKey ? &shared.key_full[place.index] : &shared.value_full[place.index]);
  }

  // from: the lane's chunk of row 0.
  template <bool kWhole>
  __device__ void copy(const typename Config::StepKeys& step, const char* from, int row_bytes, int valid) {
    constexpr int kPasses = kUnit / kRowsPerPass;
    const int chunk = lane() % kChunks;
    const int first_row = lane() / kChunks;
    const SharedAddress to = shared_address(kOfKey ? shared.key[place.index] : shared.value[place.index]);
#pragma unroll 1
    for (int u = 0; u < Config::kUnits; ++u) {
      int keys[kPasses];  // read before the copies, which nothing may pass
#pragma unroll
      for (int pass = 0; pass < kPasses; pass += 4) {
        const int4 four = *reinterpret_cast<const int4*>(&step.rows[u][first_row * kPasses + pass]);
        keys[pass] = four.x;
        keys[pass + 1] = four.y;
        keys[pass + 2] = four.z;
        keys[pass + 3] = four.w;
      }
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        const int row = pass * kRowsPerPass + first_row;  // of the unit
        const char* chunk_from = from + static_cast<std::int64_t>(keys[pass]) * row_bytes;
        const SharedAddress chunk_to =
            to + u * Config::kUnitBytes + chunk_offset<Config::kHeadDim>(row, chunk);
        if constexpr (kWhole) {
          cp_async_16(chunk_to, chunk_from);
        } else {
          cp_async_16(chunk_to, chunk_from, u * kUnit + row < step.count ? valid : 0);
        }
      }
    }
  }

  __device__ void run() {
    const RowsTensor<const Element>& rows = kOfKey ? params.key : params.value;
    const int chunk = lane() % kChunks;
    const int valid = chunk * 8 < params.head_dim ? 16 : 0;
    const int row_bytes = static_cast<int>(rows.row_stride * static_cast<std::int64_t>(sizeof(Element)));
    const bool padded = params.head_dim < Config::kHeadDim;
    const int tiles = num_tiles(params);
    for (int item = static_cast<int>(blockIdx.x); item < tiles; item += static_cast<int>(gridDim.x)) {
      RowTile tile;
      if (!locate_tile(params, item, tile)) continue;
      const char* from = reinterpret_cast<const char*>(rows.head(params.geometry, tile.sequence.index,
                                                                 tile.sequence.begin_k, tile.head_kv)) +
                         (valid > 0 ? chunk * 16 : 0);
      for (bool last = false; !last;) {
        const auto& step = wait_for_step();
        last = (step.flags & Step::kLast) != 0;
        if (step.count == Config::kTileN && !padded) {
          copy<true>(step, from, row_bytes, valid);
        } else {
          copy<false>(step, from, row_bytes, valid);
        }
        barrier_arrive_after_copies(full());
        advance();
      }
    }
    if constexpr (kOfKey) {
      wait_for_step();  // which is the end
      barrier_arrive(full());
    }
    cp_async_commit();
    cp_async_wait<0>();
  }
};

}  // namespace flash_dmattn::cuda::sm90
