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

  // inputs: a kernel parameter, of which the members read later need no register.
  __device__ HeadKeys(const PlanInputs& inputs, const Sequence& sequence, int head)
      : seqlen(sequence.seqlen_k), causal(inputs.causal), inputs_(inputs), sequence_(sequence), head_(head) {
    first_seen = causal ? max(sequence.first_position(), 0) : seqlen - 1;
    const Geometry& geometry = inputs.geometry;
    if (inputs.expiry.present())
      expiry_ = inputs.expiry.head(geometry, sequence.index, sequence.begin_k, head);
    if (inputs.bias.present()) bias_ = inputs.bias.head(geometry, sequence.index, sequence.begin_k, head);
  }

  __device__ int expiry(unsigned key) const {
    return expiry_ == nullptr ? seqlen : min(expiry_[key * inputs_.expiry.stride], seqlen);
  }
  // Of the keys first, first + 32 and so on below `end`; 0, which outlives nothing, from there on.
  template <int kCount>
  __device__ void load_expiries(unsigned first, int end, int (&expiries)[kCount]) const {
    const int* from = expiry_ == nullptr ? nullptr : expiry_ + first * inputs_.expiry.stride;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      expiries[i] = 0;
      if (first + 32 * i < static_cast<unsigned>(end))
        expiries[i] = expiry_ == nullptr ? seqlen : min(*from, seqlen);
      from += 32 * inputs_.expiry.stride;
    }
  }
  __device__ float bias(unsigned key) const { return bias_[key * inputs_.bias.stride]; }
  __device__ int key(unsigned index) const { return static_cast<int>(index); }

  // Whether some position from `from` on sees the key.
  __device__ bool outlives(unsigned key, int expiry, int from) const {
    return expiry > max(static_cast<int>(key), from) &&
           (bias_ == nullptr || __float_as_uint(bias(key)) != kMinusInfinity);
  }

  __device__ PlanRank rank(const PlanEntry& entry) const {
    const unsigned high =
        inputs_.score.present() ? ordered_score(entry.key) : static_cast<unsigned>(entry.expiry);
    return static_cast<PlanRank>(high) << 32 | static_cast<unsigned>(entry.key);
  }
  __device__ PlanEntry entry(PlanRank rank) const {
    const auto key = static_cast<unsigned>(rank);
    return {static_cast<int>(key), expiry(key)};
  }

 private:
  // An unsigned integer in the order of the scores, -0 equal to +0; 0 for -inf and NaN.
  __device__ unsigned ordered_score(unsigned key) const {
    const float score = load_score(key);
    const unsigned bits = __float_as_uint(score);
    if (!(score > __uint_as_float(kMinusInfinity))) return 0;
    if (score == 0) return 0x80000000u;
    return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
  }
  __device__ float load_score(unsigned key) const {
    const VectorTensor<const void>& score = inputs_.score;
    const std::int64_t first =
        inputs_.geometry.packed() ? sequence_.begin_k * score.stride : sequence_.index * score.batch_stride;
    const std::int64_t place = first + head_ * score.head_stride + key * score.stride;
    if (inputs_.score_dtype == DType::kBFloat16)
      return to_float(static_cast<const BFloat16*>(score.data)[place]);
    if (inputs_.score_dtype == DType::kFloat16)
      return to_float(static_cast<const Float16*>(score.data)[place]);
    return static_cast<const float*>(score.data)[place];
  }

  static constexpr unsigned kMinusInfinity = 0xff800000u;

  const PlanInputs& inputs_;
  Sequence sequence_;
  int head_;
  const int* expiry_ = nullptr;
  const float* bias_ = nullptr;
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

// Where a segment's old keys are in each of PlanScratch::ranks: those of segment n, of which there are at
// most `length`, have the places of the keys [(n - 1) * length, n * length).
__device__ inline std::int64_t first_rank(const PlanParams& params, const PlanTask& task, int segment,
                                          int length) {
  return task.head * params.inputs.geometry.total_k() + task.sequence.begin_k +
         (segment - 1) * static_cast<std::int64_t>(length);
}

// Calls found(n, key, expiry) for the items of [begin, end) that outlive position `from`: n counts them in
// ascending order. Returns their number. For all threads of the CTA, which looks at kPlanThreads * kPerLane
// items at a time. Items: HeadKeys, whose items are the keys, or others with the same three functions.
template <int kPerLane, typename Items, typename Found>
__device__ int for_each_outliving(const Items& items, int begin, int end, int from, Found&& found) {
  constexpr int kWarps = kPlanThreads / 32;
  constexpr unsigned kTile = kPlanThreads * kPerLane;
  __shared__ int warp_counts[2][kWarps];
  const int warp = threadIdx.x / 32;
  const unsigned lane = threadIdx.x % 32;
  unsigned first = begin + warp * 32 * kPerLane + lane;
  int total = 0;
  for (unsigned tile = begin; tile < static_cast<unsigned>(end); tile += kTile, first += kTile) {
    int expiry[kPerLane];
    items.load_expiries(first, end, expiry);
    int count = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (!items.outlives(first + 32 * i, expiry[i], from)) expiry[i] = 0;
      count += __popc(__ballot_sync(kAllLanes, expiry[i] != 0));
    }
    int* const counts = warp_counts[tile / kTile % 2];
    if (lane == 0) counts[warp] = count;
    __syncthreads();
    int place = total;
    for (int other = 0; other < kWarps; ++other) {
      if (other < warp) place += counts[other];
      total += counts[other];
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const unsigned lanes = __ballot_sync(kAllLanes, expiry[i] != 0);
      const int before = __popc(lanes & ((1u << lane) - 1));
      if (expiry[i] != 0) found(place + before, items.key(first + 32 * i), expiry[i]);
      place += __popc(lanes);
    }
  }
  __syncthreads();
  return total;
}

// As for_each_outliving over the keys [0, end), in any order: without a barrier for every tile, and with more
// loads at a time.
template <typename Found>
__device__ int for_each_outliving_in_any_order(const HeadKeys& keys, int end, int from, Found&& found) {
  constexpr int kPerLane = 16;
  __shared__ int total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  const unsigned lane = threadIdx.x % 32;
  const unsigned warp_first = threadIdx.x / 32 * 32 * kPerLane;
  for (unsigned first = warp_first + lane; first - lane < static_cast<unsigned>(end);
       first += kPlanThreads * kPerLane) {
    int expiry[kPerLane];
    keys.load_expiries(first, end, expiry);
    unsigned outliving = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      outliving |= keys.outlives(first + 32 * i, expiry[i], from) ? 1u << i : 0;
    }
    const int count = __popc(outliving);
    int until = count;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(kAllLanes, until, step);
      if (lane >= static_cast<unsigned>(step)) until += before;
    }
    const int of_warp = __shfl_sync(kAllLanes, until, 31);
    if (of_warp == 0) continue;
    int place = 0;
    if (lane == 0) place = atomicAdd(&total, of_warp);
    place = __shfl_sync(kAllLanes, place, 0) + until - count;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if ((outliving >> i & 1) != 0) found(place++, keys.key(first + 32 * i), expiry[i]);
    }
  }
  __syncthreads();
  return total;
}

// alive[c]: by how many more keys of the plan are alive at the start of chunk c than of the one before it.
// Adds a warp's keys, each lane's first, first + 32 and so on, of which a chunk has 32 or none. Returns how
// many are in the plan.
template <int kCount>
__device__ int count_boundaries(const HeadKeys& keys, unsigned first, const int (&expiries)[kCount],
                                int* alive) {
  const unsigned lane = threadIdx.x % 32;
  int num_born = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const unsigned key = first + 32 * i;
    const bool born = keys.outlives(key, expiries[i], keys.first_seen);
    const int chunk = static_cast<int>(key / kMinSegment);
    const int last = born ? (expiries[i] - 1) / kMinSegment : chunk;
    const unsigned leaving = __ballot_sync(kAllLanes, last > chunk);
    if (lane == 0 && leaving != 0) atomicAdd(alive + chunk + 1, __popc(leaving));
    const bool ends = last > chunk && last < (keys.seqlen - 1) / kMinSegment;
    const unsigned same = __match_any_sync(kAllLanes, ends ? last : -1);
    if (ends && lane + 1 == static_cast<unsigned>(__ffs(same))) atomicAdd(alive + last + 1, -__popc(same));
    num_born += __popc(__ballot_sync(kAllLanes, born));
  }
  return num_born;
}

// The least length that holds the old keys of every segment, from the numbers of keys alive at the start of
// each chunk. Boundaries before the call's first position do not matter, and need no test: every key counted
// outlives that position, so the later ones of them have no fewer.
__device__ inline int choose_length(const int* alive, int num_chunks) {
  __shared__ unsigned too_short;  // bit n: kMinSegment << n is
  if (threadIdx.x == 0) too_short = 0;
  __syncthreads();
  for (int chunk = 1 + static_cast<int>(threadIdx.x); chunk < num_chunks; chunk += kPlanThreads) {
    unsigned bits = 0;
    for (int n = 0; n < __ffs(chunk); ++n) bits |= alive[chunk] > kMinSegment << n ? 1u << n : 0;
    if (bits != 0) atomicOr(&too_short, bits);
  }
  __syncthreads();
  return kMinSegment << (__ffs(~too_short) - 1);
}

}  // namespace flash_dmattn::cuda
