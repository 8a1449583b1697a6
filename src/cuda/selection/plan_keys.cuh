// The keys of one head as the plan sees them, the segments they are listed in, and who works on what.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/geometry.cuh"
#include "cuda/common/plan.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/selection/plan_params.h"

namespace flash_dmattn::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

// An id of a chunk or segment, or one of the `pieces` equal parts that each id stands for.
struct PlanTask {
  int head;
  Sequence sequence;
  int index;              // in the sequence; may lie behind its end
  std::int64_t first_id;  // id 0 of this head and sequence, in arrays of [heads_kv][num_segments]
};

// Late ones first: their lists take longest.
__device__ inline PlanTask locate_task(const PlanParams& params, unsigned cta, int pieces) {
  const Geometry& geometry = params.inputs.geometry;
  const unsigned heads = geometry.heads_kv;
  const int id = static_cast<int>((gridDim.x - 1 - cta) / heads);
  const auto first_of = [&](int sequence) {
    return PlanLayout::first_segment(geometry.sequence(sequence).begin_k, sequence);
  };
  const auto base = [&](int sequence) { return first_of(sequence) * pieces; };
  PlanTask task;
  task.head = static_cast<int>(cta % heads);
  const int owner = owner_of(id, geometry.num_sequences, base);
  task.sequence = geometry.sequence(owner);
  task.index = static_cast<int>(id - base(owner));
  task.first_id = task.head * params.plan.layout.num_segments + first_of(owner);
  return task;
}

class HeadKeys {
 public:
  int seqlen;
  int first_seen;  // a key of the plan outlives this position: the first one of the call; not causal: the
                   // last key's
  bool causal;

  __device__ HeadKeys(const PlanInputs& inputs, const Sequence& sequence, int head)
      : seqlen(sequence.seqlen_k), causal(inputs.causal), score_dtype_(inputs.score_dtype) {
    first_seen = causal ? max(sequence.first_position(), 0) : seqlen - 1;
    const Geometry& geometry = inputs.geometry;
    if (inputs.expiry.present()) {
      expiry_ = inputs.expiry.head(geometry, sequence.index, sequence.begin_k, head);
      expiry_stride_ = inputs.expiry.stride;
    }
    if (inputs.bias.present()) {
      bias_ = inputs.bias.head(geometry, sequence.index, sequence.begin_k, head);
      bias_stride_ = inputs.bias.stride;
    }
    score_ = inputs.score.data;
    score_stride_ = inputs.score.stride;
    score_offset_ = (geometry.packed() ? sequence.begin_k * inputs.score.stride
                                       : sequence.index * inputs.score.batch_stride) +
                    head * inputs.score.head_stride;
  }

  __device__ int expiry(unsigned key) const {
    return expiry_ == nullptr ? seqlen : min(expiry_[key * expiry_stride_], seqlen);
  }
  // Of the keys first, first + 32 and so on below `end`; 0, which outlives nothing, from there on.
  template <int kCount>
  __device__ void load_expiries(unsigned first, int end, int (&expiries)[kCount]) const {
    const int* from = expiry_ == nullptr ? nullptr : expiry_ + first * expiry_stride_;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      expiries[i] = 0;
      if (first + 32 * i < static_cast<unsigned>(end))
        expiries[i] = expiry_ == nullptr ? seqlen : min(*from, seqlen);
      from += 32 * expiry_stride_;
    }
  }
  __device__ float bias(unsigned key) const { return bias_[key * bias_stride_]; }
  __device__ int key(unsigned index) const { return static_cast<int>(index); }

  // Whether some position from `from` on sees the key.
  __device__ bool outlives(unsigned key, int expiry, int from) const {
    constexpr unsigned kMinusInfinity = 0xff800000u;
    return expiry > max(static_cast<int>(key), from) &&
           (bias_ == nullptr || __float_as_uint(bias(key)) != kMinusInfinity);
  }

  __device__ PlanRank rank(const PlanEntry& entry) const {
    const unsigned high = score_ == nullptr ? static_cast<unsigned>(entry.expiry) : ordered_score(entry.key);
    return static_cast<PlanRank>(high) << 32 | static_cast<unsigned>(entry.key);
  }
  __device__ PlanEntry entry(PlanRank rank) const {
    const auto key = static_cast<unsigned>(rank);
    return {static_cast<int>(key), expiry(key)};
  }

 private:
  // An unsigned integer in the order of the scores, -0 equal to +0; 0 for -inf and NaN.
  __device__ unsigned ordered_score(unsigned key) const {
    const float score = load_score(score_offset_ + key * score_stride_);
    const unsigned bits = __float_as_uint(score);
    if (!(score > __uint_as_float(0xff800000u))) return 0;
    if (score == 0) return 0x80000000u;
    return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
  }
  __device__ float load_score(std::int64_t place) const {
    if (score_dtype_ == DType::kBFloat16) return to_float(static_cast<const BFloat16*>(score_)[place]);
    if (score_dtype_ == DType::kFloat16) return to_float(static_cast<const Float16*>(score_)[place]);
    return static_cast<const float*>(score_)[place];
  }

  const int* expiry_ = nullptr;
  const float* bias_ = nullptr;
  const void* score_ = nullptr;
  std::int64_t expiry_stride_ = 0;
  std::int64_t bias_stride_ = 0;
  std::int64_t score_stride_ = 0;
  std::int64_t score_offset_ = 0;
  DType score_dtype_;
};

// Not causal, the first segment is the whole sequence and the only one.
struct PlanSegment {
  int index;
  int begin;  // positions [begin, end); begin is the sequence's end where there is no such segment
  int end;
  bool listed;  // some row of the call may stand in it: it has a list

  // The list's keys outlive this position.
  __device__ int from(const HeadKeys& keys) const { return max(begin, keys.first_seen); }
};

__device__ inline PlanSegment plan_segment(const HeadKeys& keys, int index, int length) {
  if (!keys.causal) return {index, index == 0 ? 0 : keys.seqlen, keys.seqlen, index == 0 && keys.seqlen > 0};
  const std::int64_t begin = static_cast<std::int64_t>(index) * length;
  const auto clip = [&](std::int64_t position) {
    return static_cast<int>(position < keys.seqlen ? position : keys.seqlen);
  };
  return {index, clip(begin), clip(begin + length), begin < keys.seqlen && index >= keys.first_seen / length};
}

// One chunk, for a CTA of its own.
struct Chunk {
  PlanTask task;
  HeadKeys keys;
  int length;  // of the segments; 0 while it is not known
  std::int64_t begin;

  __device__ Chunk(const PlanParams& params, bool length_known = true)
      : task(locate_task(params, blockIdx.x, 1)),
        keys(params.inputs, task.sequence, task.head),
        length(length_known ? params.plan.segment_length(task.head, task.sequence.index,
                                                         params.inputs.geometry.num_sequences)
                            : 0),
        begin(static_cast<std::int64_t>(task.index) * kMinSegment) {}
  __device__ bool exists() const { return task.index >= 0 && begin < keys.seqlen; }
  __device__ int end() const {
    return static_cast<int>(begin + kMinSegment < keys.seqlen ? begin + kMinSegment : keys.seqlen);
  }
  __device__ int segment() const { return keys.causal ? static_cast<int>(begin / length) : 0; }
};

// Calls found(n, key, expiry) for the items of [begin, end) that outlive position `from`: n counts them in
// ascending order. Returns their number. For all threads of the CTA, which looks at kPlanThreads * kPerLane
// items at a time. Items: HeadKeys, whose items are the keys, or others with the same three functions.
template <int kPerLane, typename Items, typename Found>
__device__ int for_each_outliving(const Items& items, int begin, int end, int from, Found&& found) {
  constexpr int kWarps = kPlanThreads / 32;
  __shared__ int warp_counts[kWarps];
  const int warp = threadIdx.x / 32;
  const unsigned lane = threadIdx.x % 32;
  int total = 0;
  for (auto tile = static_cast<unsigned>(begin); tile < static_cast<unsigned>(end);
       tile += kPlanThreads * kPerLane) {
    const unsigned first = tile + warp * 32 * kPerLane + lane;
    int expiry[kPerLane];
    items.load_expiries(first, end, expiry);
    int count = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (!items.outlives(first + 32 * i, expiry[i], from)) expiry[i] = 0;
      count += __popc(__ballot_sync(kAllLanes, expiry[i] != 0));
    }
    if (lane == 0) warp_counts[warp] = count;
    __syncthreads();
    int place = total;
    for (int other = 0; other < kWarps; ++other) {
      if (other < warp) place += warp_counts[other];
      total += warp_counts[other];
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const unsigned lanes = __ballot_sync(kAllLanes, expiry[i] != 0);
      const int before = __popc(lanes & ((1u << lane) - 1));
      if (expiry[i] != 0) found(place + before, items.key(first + 32 * i), expiry[i]);
      place += __popc(lanes);
    }
    __syncthreads();
  }
  return total;
}

}  // namespace flash_dmattn::cuda
