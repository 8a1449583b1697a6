// A warpgroup of the forward kernel that computes: 64 rows of a tile.
#pragma once

#include <cmath>

#include "cuda/common/log2.h"
#include "cuda/sm90/packed_keys.cuh"
#include "cuda/sm90/pipeline.cuh"

namespace flash_dmattn::cuda::sm90 {

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

  float out[kHeadDim / 2] = {};
  float scores[kTileN / 2] = {};  // S, logits / scale; then probabilities
  std::uint32_t probabilities[kTileN / 16][4] = {};
  float max[2] = {};  // of a row's scores so far; -inf: no key was visible yet
  float sum[2] = {};  // of this thread's columns
  float rescale[2] = {};
  int position[2] = {};

  __device__ void wait_for_turn() { named_barrier_sync(kTurn + consumer, 2 * kWarpgroup); }
  __device__ void pass_turn() {
    named_barrier_arrive(kTurn + (consumer + 1) % Config::kConsumers, 2 * kWarpgroup);
  }
  // For a tile of K or V.
  __device__ void wait_for_tile(std::uint64_t& barrier, int parity) {
    barrier_wait(shared_address(&barrier), parity);
    if constexpr (Config::kGather) fence_async_proxy();  // cp_async has written it
  }
  // For the other lanes too.
  __device__ void release(std::uint64_t& barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(shared_address(&barrier));
  }

  __device__ void start_rows(int query_index) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      position[i] = shared.begins[query_index] + (params.causal ? shared.places[first_m + 8 * i].row : 0);
      max[i] = -INFINITY;
      sum[i] = 0;
    }
  }

  // Queues S += Q K^T.
  __device__ void multiply_keys(int query_index, int stage) {
    constexpr int kColumnBytes = Config::kTileM * 128;  // from 64 columns of Q to the next
    const Operand query =
        operand(uniform(shared_address(shared.query[query_index]) + consumer * (64 * 128)), kAtomBytes);
    const Operand key = operand(uniform(shared_address(shared.key[stage])), Config::kHalves * kAtomBytes);
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      const int half = k / 4;
      const int step = k % 4 * 32;
      wgmma<Element, kTileN>(scores, query + (half * kColumnBytes + step), key + (half * kAtomBytes + step),
                             true);
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

  // The keys' biases: what S starts from, divided by the factor that turns S into logits.
  __device__ void start_scores(const typename Config::StepKeys& keys) {
#pragma unroll
    for (int u = 0; u < Config::kUnits; ++u) {
      const float4 bias = keys.units[u].own_bias();
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        scores[8 * u + 2 * i] = bias.x;
        scores[8 * u + 2 * i + 1] = bias.y;
        scores[8 * u + 4 + 2 * i] = bias.z;
        scores[8 * u + 4 + 2 * i + 1] = bias.w;
      }
    }
  }

  // -inf where the row does not see the key. tests: the units with such keys.
  __device__ void hide_keys(const typename Config::StepKeys& keys, unsigned tests) {
    if (tests == 0) return;
#pragma unroll
    for (int u = 0; u < Config::kUnits; ++u) {
      if ((tests >> u & 1) == 0) continue;
      const PlanEntry* entries = keys.units[u].own_entries();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const PlanEntry entry = entries[k];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (!visible(entry, position[i])) scores[8 * u + k / 2 * 4 + 2 * i + k % 2] = -INFINITY;
        }
      }
    }
  }

  // scores become probabilities relative to the new maximum; `rescale` is what O has to be multiplied by.
  __device__ void softmax() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float row_max = max[i];
#pragma unroll
      for (int n = 0; n < kTileN / 8; ++n) {
        row_max = fmaxf(row_max, fmaxf(scores[4 * n + 2 * i], scores[4 * n + 2 * i + 1]));
      }
      row_max = fmaxf(row_max, __shfl_xor_sync(0xffffffffu, row_max, 1));
      row_max = fmaxf(row_max, __shfl_xor_sync(0xffffffffu, row_max, 2));
      // While no key is visible 0 is subtracted, since (-inf) - (-inf) is NaN.
      const float base = row_max == -INFINITY ? 0 : row_max * params.scale_log2;
      // Exactly 1 where nothing new came: base is rounded, the product in fmaf is not.
      rescale[i] = row_max == max[i] ? 1 : exp2_approx(fmaf(max[i], params.scale_log2, -base));
      max[i] = row_max;
      float step_sum[2] = {0, 0};
#pragma unroll
      for (int n = 0; n < kTileN / 8; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& score = scores[4 * n + 2 * i + c];
          score = exp2_approx(fmaf(score, params.scale_log2, -base));
          step_sum[c] += score;
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
        probabilities[k][r] = pack<Element>(scores[first], scores[first + 1]);
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
  const int quarter = static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float total = row_sum[i];
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    const float inverse = total == 0 ? 0 : 1 / total;  // a row that sees no key
    const auto& to = shared.targets[query_index][first_m + 8 * i];
    if (quarter == 0 && to.lse != nullptr) {
      *to.lse = total == 0 ? -INFINITY : (row_max[i] * params.scale_log2 + log2f(total)) * kLn2;
    }
    Element* out_row = to.out;
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; n += 4) {
      std::uint32_t words[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        words[k] = pack<Element>(out[4 * (n + k) + 2 * i] * inverse, out[4 * (n + k) + 2 * i + 1] * inverse);
      }
      transpose_quad(words);
      if (out_row != nullptr && (n + quarter) * 8 < params.head_dim) {
        *reinterpret_cast<uint4*>(out_row + (n + quarter) * 8) =
            make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
}

template <typename Config>
__device__ __forceinline__ void Consumer<Config>::run() {
  RingPlace<Config::kStages> place;  // of the step whose scores come next
  RingPlace<Config::kSlots> slot;    // of its entries
  RingPlace<2> query;                // of its tile
  constexpr unsigned kTests = (1u << Config::kUnits) - 1;
  if (consumer == Config::kConsumers - 1) pass_turn();

  // The first step: no P V to go with it.
  wait_for_tile(shared.key_full[0], 0);
  unsigned step = uniform(shared.slots[0].flags);
  if (step & Step::kEnd) return;
  barrier_wait(shared_address(&shared.query_full[0]), 0);
  fence_async_proxy();
  start_rows(0);
  start_scores(shared.slots[0]);
  wait_for_turn();
  pin(scores);
  wgmma_fence();
  multiply_keys(0, 0);
  pass_turn();
  wgmma_wait<0>();
  pin(scores);
  hide_keys(shared.slots[0], step & kTests);
  release(shared.key_empty[0]);
  softmax();
  round_probabilities();
  bool accumulate = false;

  for (;;) {
    const RingPlace<Config::kStages> done = place;  // of the step whose P is at hand
    const RingPlace<2> done_query = query;
    const bool last = (step & Step::kLast) != 0;
    place.advance();
    slot.advance();
    wait_for_tile(shared.key_full[place.index], place.parity);
    step = uniform(shared.slots[slot.index].flags);
    if (step & Step::kEnd) break;
    if (last) {
      query.advance();
      barrier_wait(shared_address(&shared.query_full[query.index]), query.parity);
      fence_async_proxy();
    }
    start_scores(shared.slots[slot.index]);
    wait_for_turn();
    pin(scores);
    pin(out);
    wgmma_fence();
    multiply_keys(query.index, place.index);
    wait_for_tile(shared.value_full[done.index], done.parity);
    multiply_values(done.index, accumulate);
    pass_turn();
    wgmma_wait<1>();
    pin(scores);
    const float done_max[2] = {max[0], max[1]};
    const float done_sum[2] = {sum[0], sum[1]};
    if (last) start_rows(query.index);
    hide_keys(shared.slots[slot.index], step & kTests);
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
  wait_for_tile(shared.value_full[stage], parity);
  pin(out);
  wgmma_fence();
  multiply_values(stage, accumulate);
  wgmma_wait<0>();
  pin(out);
  store(query.index, max, sum);
}

}  // namespace flash_dmattn::cuda::sm90
