// The forward pass on Hopper: wgmma on packed keys (packed_keys.cuh), one persistent CTA per multiprocessor.
//
//   for each tile of rows, for each step of its keys:  S = scale Q K^T + bias, hidden where the key is not
//                                                      visible
//                                                      m, l, O: online softmax of each row; O += P V
//   out = O / l,  lse = m + log l
//
// Roles. The CTA's warpgroups are one of producers and kConsumers of consumers:
//
//   planner, warp 0   forms the steps of each tile (key_units.cuh), several ahead
//   copier, warp 1    copies K, entries and biases of a step, and V of the step before
//   reader, warp 2    copies Q of the next tile while the consumers work on this one
//   consumers         products and softmax of 64 rows each; each stores its own rows of out and lse
//
// Barriers, in shared memory: one for each planned step, for each stage of the ring of keys, or for each of
// the two query tiles:
//
//   barrier      its phase ends when                          who waits
//   step_full    the units of the step are known              copier
//   step_empty   they have been read                          planner, before it plans another
//   key_full     K, entries, biases of the step are there     consumers
//   value_full   V is there                                   consumers
//   key_empty    all consumer warps have their logits         copier, before it copies K again
//   value_empty  all consumer warps have added P V            copier, before it copies V again
//   query_full   Q and the description of the tile are there  consumers
//   query_empty  all consumer warps have stored the tile      reader, before it copies Q again
//
// Consumers take turns (named barriers kTurn + consumer): a warpgroup queues its products and passes the turn
// on, so that the tensor cores work for one while the others are at their softmax. Within a warpgroup S of a
// step is queued before P V of the step before, also across tiles: the stream of steps never drains.
#pragma once

#include <cmath>

#include "cuda/common/log2.h"
#include "cuda/common/ptx_sm90.cuh"
#include "cuda/sm90/key_units.cuh"
#include "cuda/sm90/params.h"

namespace flash_dmattn::cuda::sm90 {

constexpr int kWarpgroup = 128;

template <typename Element_, int kHeadDim_, int kConsumers_, int kUnits_, int kStages_,
          int kProducerRegisters_, int kConsumerRegisters_>
struct ForwardConfig {
  using Element = Element_;
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

  static constexpr int kPlanned = 8;  // steps that the planner may be ahead

  struct PlannedStep {
    int units[kUnits];
    unsigned flags;  // see Step
  };
  // What the consumers need to know of a tile.
  struct Tile {
    RowTile rows;
    int begin;  // position of its first row
  };

  struct SharedMemory {
    unsigned char query[2][kQueryBytes];  // [kHalves][kTileM / kAtomRows][kAtomBytes]
    unsigned char key[kStages][kKeyBytes];
    unsigned char value[kStages][kKeyBytes];
    UnitKeys keys[kStages][kUnits];
    RowPlace places[kTileM];  // the same in every tile
    Tile tiles[2];
    PlannedStep planned[kPlanned];
    unsigned steps[kStages];  // flags
    std::uint64_t step_full[kPlanned], step_empty[kPlanned];
    std::uint64_t key_full[kStages], value_full[kStages], key_empty[kStages], value_empty[kStages];
    std::uint64_t query_full[2], query_empty[2];
  };
};

// The flags of a step. Bit u: unit u holds a key that some row of the tile does not see.
struct Step {
  static constexpr unsigned kLast = 1u << 30;  // of its tile
  static constexpr unsigned kEnd = 1u << 31;   // no step, there are no more
};

// A place in a ring: the parity of a barrier's phase flips with each round.
template <int kStages>
struct RingPlace {
  int index = 0;
  int parity = 0;

  __device__ void advance() {
    if (++index == kStages) {
      index = 0;
      parity ^= 1;
    }
  }
};

// The tiles of this CTA: every gridDim-th, the last rows of all heads first.
template <typename Element>
__device__ __forceinline__ int num_tiles(const ForwardParams<Element>& params) {
  return params.num_heads * params.tiles.head_chunks * params.tiles.num_tiles;
}
template <typename Element>
__device__ __forceinline__ bool locate_tile(const ForwardParams<Element>& params, int item, RowTile& tile) {
  const int chunks = params.num_heads * params.tiles.head_chunks;
  const int chunk = params.first_head * params.tiles.head_chunks + item % chunks;
  return params.tiles.locate(params.geometry, chunk, item / chunks, tile);
}
template <typename Element>
__device__ __forceinline__ int tile_begin(const ForwardParams<Element>& params, const RowTile& tile) {
  return params.causal ? tile.first_row + tile.sequence.first_position() : tile.sequence.seqlen_k - 1;
}

// --- The planner: one warp ---

template <typename Config>
struct Planner {
  using Element = typename Config::Element;

  const ForwardParams<Element>& params;
  typename Config::SharedMemory& shared;
  RingPlace<Config::kPlanned> place;

  // unit: of this lane.
  __device__ void put(int unit, unsigned flags) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    barrier_wait(shared_address(&shared.step_empty[place.index]), place.parity ^ 1);
    auto& step = shared.planned[place.index];
    if (lane < Config::kUnits) step.units[lane] = unit;
    if (lane == 0) step.flags = flags;
    __syncwarp();
    if (lane == 0) barrier_arrive(shared_address(&shared.step_full[place.index]));
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

// --- The copier: one warp ---

template <typename Config>
struct Copier {
  const PackedKeys& packed;
  typename Config::SharedMemory& shared;
  RingPlace<Config::kStages> place;        // of the next step
  RingPlace<Config::kStages> value_place;  // of the step whose V has not been copied yet
  int value_unit;                          // its unit, of this lane
  int value_count;                         // see units_to_copy

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
      shared.steps[stage] = flags;
      barrier_arrive_expect(full, Config::kKeyBytes + static_cast<int>(sizeof(shared.keys[stage])));
    }
    __syncwarp();
    if (count > 0) {
      bulk_copy(shared_address(&shared.key[stage][lane * Config::kUnitBytes]),
                packed.key + static_cast<std::int64_t>(unit) * Config::kUnitBytes, count * Config::kUnitBytes,
                full);
      bulk_copy(shared_address(&shared.keys[stage][lane]), packed.keys + unit,
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
      shared.steps[place.index] = Step::kEnd;
      barrier_arrive(shared_address(&shared.key_full[place.index]));
    }
  }
};

// --- The reader of queries: one warp ---

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
    const SharedAddress full = shared_address(&shared.query_full[place.index]);
    if (lane == 0) {
      shared.tiles[place.index].rows = tile;
      shared.tiles[place.index].begin = tile_begin(params, tile);
      barrier_arrive(full);
    }
    const Element* first = tile_rows(params.query, params.geometry, tile) + (valid > 0 ? chunk * 8 : 0);
    const SharedAddress to = shared_address(shared.query[place.index]) + chunk / 8 * (Config::kTileM * 128);
#pragma unroll 4
    for (int m = lane / kChunks; m < Config::kTileM; m += 32 / kChunks) {
      const RowPlace row = shared.places[m];
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

// --- Consumers ---

// The same in all lanes, which the compiler cannot know.
template <typename T>
__device__ __forceinline__ T uniform(T value) {
  return __shfl_sync(0xffffffffu, value, 0);
}

// Registers of one thread: rows lane / 4 + 8 i of its warp, i = 0, 1; columns as wgmma has them.
template <typename Config>
struct Consumer {
  using Element = typename Config::Element;
  using SharedMemory = typename Config::SharedMemory;
  static constexpr int kTileN = Config::kTileN;
  static constexpr int kHeadDim = Config::kHeadDim;
  static constexpr int kTurn = 1;  // the named barriers of the turns

  const ForwardParams<Element>& params;
  SharedMemory& shared;
  int consumer;  // of the CTA
  int first_m;   // of the thread's rows in the tile: first_m and first_m + 8

  float out[kHeadDim / 2];
  float logits[kTileN / 2];  // then probabilities
  std::uint32_t probabilities[kTileN / 16][4];
  float max[2];  // of a row's logits so far, times log2(e); -inf: no key was visible yet
  float sum[2];  // of this thread's columns
  float rescale[2];
  int position[2];

  __device__ void wait_for_turn() { named_barrier_sync(kTurn + consumer, 2 * kWarpgroup); }
  __device__ void pass_turn() {
    named_barrier_arrive(kTurn + (consumer + 1) % Config::kConsumers, 2 * kWarpgroup);
  }
  // For the other lanes too.
  __device__ void release(std::uint64_t& barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(shared_address(&barrier));
  }

  __device__ void start_rows(int query_index) {
    const auto& tile = shared.tiles[query_index];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      position[i] = params.causal ? tile.begin + shared.places[first_m + 8 * i].row : tile.begin;
      max[i] = -INFINITY;
      sum[i] = 0;
    }
  }

  // Queues S = Q K^T.
  __device__ void multiply_keys(int query_index, int stage) {
    constexpr int kColumnBytes = Config::kTileM * 128;  // from 64 columns of Q to the next
    const Operand query =
        operand(uniform(shared_address(shared.query[query_index]) + consumer * (64 * 128)), kAtomBytes);
    const Operand key = operand(uniform(shared_address(shared.key[stage])), Config::kHalves * kAtomBytes);
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      const int half = k / 4;
      const int step = k % 4 * 32;
      wgmma<Element, kTileN>(logits, query + (half * kColumnBytes + step), key + (half * kAtomBytes + step),
                             k > 0);
    }
    wgmma_commit();
  }

  // Queues O += P V, or O = P V.
  __device__ void multiply_values(int stage, bool accumulate) {
    const Operand value =
        operand(uniform(shared_address(shared.value[stage])), Config::kHalves * kAtomBytes, kAtomBytes);
#pragma unroll
    for (int k = 0; k < Config::kUnits; ++k) {
      wgmma<Element, kHeadDim>(out, probabilities[k], value + k * Config::kUnitBytes, accumulate || k > 0);
    }
    wgmma_commit();
  }

  // From products to logits times log2(e); -inf where the row does not see the key.
  __device__ void make_logits(int stage, unsigned tests) {
    const int first = static_cast<int>(threadIdx.x % 4) * 4;  // UnitKeys::place of the thread's columns
#pragma unroll
    for (int u = 0; u < Config::kUnits; ++u) {
      const float4 bias = *reinterpret_cast<const float4*>(&shared.keys[stage][u].bias[first]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        logits[8 * u + 2 * i] = fmaf(logits[8 * u + 2 * i], params.scale_log2, bias.x);
        logits[8 * u + 2 * i + 1] = fmaf(logits[8 * u + 2 * i + 1], params.scale_log2, bias.y);
        logits[8 * u + 4 + 2 * i] = fmaf(logits[8 * u + 4 + 2 * i], params.scale_log2, bias.z);
        logits[8 * u + 4 + 2 * i + 1] = fmaf(logits[8 * u + 4 + 2 * i + 1], params.scale_log2, bias.w);
      }
    }
    if (tests == 0) return;
#pragma unroll
    for (int u = 0; u < Config::kUnits; ++u) {
      if ((tests >> u & 1) == 0) continue;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const PlanEntry entry = shared.keys[stage][u].entries[first + k];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (!visible(entry, position[i])) logits[8 * u + k / 2 * 4 + 2 * i + k % 2] = -INFINITY;
        }
      }
    }
  }

  // logits become probabilities relative to the new maximum; `rescale` is what O has to be multiplied by.
  __device__ void softmax() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float row_max = max[i];
#pragma unroll
      for (int n = 0; n < kTileN / 8; ++n) {
        row_max = fmaxf(row_max, fmaxf(logits[4 * n + 2 * i], logits[4 * n + 2 * i + 1]));
      }
      row_max = fmaxf(row_max, __shfl_xor_sync(0xffffffffu, row_max, 1));
      row_max = fmaxf(row_max, __shfl_xor_sync(0xffffffffu, row_max, 2));
      // While no key is visible 0 is subtracted, since (-inf) - (-inf) is NaN.
      const float base = row_max == -INFINITY ? 0 : row_max;
      rescale[i] = exp2_approx(max[i] - base);
      max[i] = row_max;
      float step_sum[2] = {0, 0};
#pragma unroll
      for (int n = 0; n < kTileN / 8; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& logit = logits[4 * n + 2 * i + c];
          logit = exp2_approx(logit - base);
          step_sum[c] += logit;
        }
      }
      sum[i] = sum[i] * rescale[i] + (step_sum[0] + step_sum[1]);
    }
  }

  __device__ void round_probabilities() {
#pragma unroll
    for (int k = 0; k < Config::kUnits; ++k) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int first = 8 * k + 2 * r;
        probabilities[k][r] = pack<Element>(logits[first], logits[first + 1]);
      }
    }
  }

  __device__ void rescale_out() {
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[4 * n + i] *= rescale[i / 2];
    }
  }

  // Stores the thread's part of the rows of a tile, whose statistics are row_max and row_sum.
  __device__ void store(int query_index, const float (&row_max)[2], const float (&row_sum)[2]);

  __device__ void run();
};

// Lanes 4 g .. 4 g + 3 hold the four parts of a chunk of 8 elements: part q of chunks n .. n + 3 in words[0]
// .. words[3] of lane q becomes the whole chunk n + q in lane q.
__device__ __forceinline__ void transpose_quad(std::uint32_t (&words)[4]) {
  const bool odd = (threadIdx.x & 1) != 0;
  const bool high = (threadIdx.x & 2) != 0;
#pragma unroll
  for (int pair = 0; pair < 4; pair += 2) {
    const std::uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? words[pair] : words[pair + 1], 1);
    words[pair] = odd ? other : words[pair];
    words[pair + 1] = odd ? words[pair + 1] : other;
  }
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    const std::uint32_t other = __shfl_xor_sync(0xffffffffu, high ? words[pair] : words[pair + 2], 2);
    words[pair] = high ? other : words[pair];
    words[pair + 2] = high ? words[pair + 2] : other;
  }
}

template <typename Config>
__device__ __forceinline__ void Consumer<Config>::store(int query_index, const float (&row_max)[2],
                                                        const float (&row_sum)[2]) {
  const RowTile& tile = shared.tiles[query_index].rows;
  const int quarter = static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float total = row_sum[i];
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    const float inverse = total == 0 ? 0 : 1 / total;  // a row that sees no key
    const RowPlace row = shared.places[first_m + 8 * i];
    const bool inside = row.row < tile.num_rows && row.head < tile.num_heads;
    if (inside && quarter == 0 && params.lse.present()) {
      float* lse = params.lse.head(params.geometry, tile.sequence.index, tile.sequence.begin_q,
                                   tile.first_head + row.head);
      lse[(tile.first_row + row.row) * params.lse.stride] =
          total == 0 ? -INFINITY : (row_max[i] + log2f(total)) * kLn2;
    }
    Element* to = tile_rows(params.out, params.geometry, tile) + row.row * params.out.row_stride +
                  row.head * params.out.head_stride + quarter * 8;
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; n += 4) {
      std::uint32_t words[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        words[k] = pack<Element>(out[4 * (n + k) + 2 * i] * inverse, out[4 * (n + k) + 2 * i + 1] * inverse);
      }
      transpose_quad(words);
      if (inside && (n + quarter) * 8 < params.head_dim) {
        *reinterpret_cast<uint4*>(to + n * 8) = make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
}

template <typename Config>
__device__ __forceinline__ void Consumer<Config>::run() {
  RingPlace<Config::kStages> place;  // of the step whose logits come next
  RingPlace<2> query;                // of its tile
  if (consumer == Config::kConsumers - 1) pass_turn();

  // The first step: no P V to go with it.
  barrier_wait(shared_address(&shared.key_full[0]), 0);
  unsigned step = uniform(shared.steps[0]);
  if (step & Step::kEnd) return;
  barrier_wait(shared_address(&shared.query_full[0]), 0);
  fence_async_proxy();
  start_rows(0);
  wait_for_turn();
  pin(logits);
  wgmma_fence();
  multiply_keys(0, 0);
  pass_turn();
  wgmma_wait<0>();
  pin(logits);
  make_logits(0, step & ~(Step::kLast | Step::kEnd));
  release(shared.key_empty[0]);
  softmax();
  round_probabilities();
  bool accumulate = false;

  for (;;) {
    const RingPlace<Config::kStages> done = place;  // of the step whose P is at hand
    const RingPlace<2> done_query = query;
    const bool last = (step & Step::kLast) != 0;
    place.advance();
    barrier_wait(shared_address(&shared.key_full[place.index]), place.parity);
    step = uniform(shared.steps[place.index]);
    if (step & Step::kEnd) break;
    if (last) {
      query.advance();
      barrier_wait(shared_address(&shared.query_full[query.index]), query.parity);
      fence_async_proxy();
    }
    wait_for_turn();
    pin(logits);
    pin(out);
    wgmma_fence();
    multiply_keys(query.index, place.index);
    barrier_wait(shared_address(&shared.value_full[done.index]), done.parity);
    multiply_values(done.index, accumulate);
    pass_turn();
    wgmma_wait<1>();
    pin(logits);
    const float done_max[2] = {max[0], max[1]};
    const float done_sum[2] = {sum[0], sum[1]};
    if (last) start_rows(query.index);
    make_logits(place.index, step & ~(Step::kLast | Step::kEnd));
    release(shared.key_empty[place.index]);
    softmax();
    wgmma_wait<0>();
    pin(out);
    release(shared.value_empty[done.index]);
    if (last) {
      store(done_query.index, done_max, done_sum);
      release(shared.query_empty[done_query.index]);
      accumulate = false;
    } else {
      rescale_out();
      accumulate = true;
    }
    round_probabilities();
  }

  const int stage = place.index == 0 ? Config::kStages - 1 : place.index - 1;
  const int parity = place.index == 0 ? place.parity ^ 1 : place.parity;
  barrier_wait(shared_address(&shared.value_full[stage]), parity);
  pin(out);
  wgmma_fence();
  multiply_values(stage, accumulate);
  wgmma_wait<0>();
  pin(out);
  store(query.index, max, sum);
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    forward_kernel(const __grid_constant__ ForwardParams<typename Config::Element> params) {
  auto& shared = *reinterpret_cast<typename Config::SharedMemory*>(dynamic_shared_memory());
  if (threadIdx.x == 0) {
    for (int i = 0; i < Config::kStages; ++i) {
      barrier_init(shared_address(&shared.key_full[i]), 1);
      barrier_init(shared_address(&shared.value_full[i]), 1);
      barrier_init(shared_address(&shared.key_empty[i]), 4 * Config::kConsumers);
      barrier_init(shared_address(&shared.value_empty[i]), 4 * Config::kConsumers);
    }
    for (int i = 0; i < Config::kPlanned; ++i) {
      barrier_init(shared_address(&shared.step_full[i]), 1);
      barrier_init(shared_address(&shared.step_empty[i]), 1);
    }
    for (int i = 0; i < 2; ++i) {
      barrier_init(shared_address(&shared.query_full[i]), 32 + 1);
      barrier_init(shared_address(&shared.query_empty[i]), 4 * Config::kConsumers);
    }
    fence_barrier_init();
  }
  for (int m = static_cast<int>(threadIdx.x); m < Config::kTileM; m += Config::kThreads) {
    shared.places[m] = {m / params.tiles.heads, m % params.tiles.heads};
  }
  __syncthreads();

  const int warpgroup = uniform(static_cast<int>(threadIdx.x) / kWarpgroup);
  if (warpgroup == 0) {
    register_decrease<Config::kProducerRegisters>();
    const int warp = uniform(static_cast<int>(threadIdx.x) / 32);
    if (warp == 0) Planner<Config>{params, shared}.run();
    if (warp == 1) Copier<Config>{params.packed, shared}.run();
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
