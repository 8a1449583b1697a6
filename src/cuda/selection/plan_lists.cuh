// Steps on the list of one segment, each for all threads of a CTA.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <cstdint>
#include <cub/block/block_merge_sort.cuh>

#include "cuda/selection/plan_keys.cuh"

namespace flash_dmattn::cuda {

struct PlanList {
  PlanEntry* entries;
  float* bias;  // null without a bias
  BlockHull* hulls;

  __device__ PlanList(const PlanView& plan, const PlanTask& task, int segment, int length) {
    const std::int64_t begin_k = task.sequence.begin_k;
    const std::int64_t entry =
        task.head * plan.layout.num_entries + PlanLayout::entry(begin_k, segment, length);
    entries = plan.entries + entry;
    bias = plan.bias == nullptr ? nullptr : plan.bias + entry;
    hulls = plan.hulls + task.head * plan.layout.num_blocks +
            PlanLayout::block(begin_k, task.sequence.index, segment, length);
  }
};

struct HigherFirst {
  __device__ bool operator()(PlanRank a, PlanRank b) const { return a > b; }
};

// The ranks of count <= kPlanThreads * kItems entries, in order: a thread gets those of the places from
// threadIdx.x * kItems on. What lies behind the last one is 0.
template <int kItems>
__device__ void sort_by_rank(const HeadKeys& keys, const PlanEntry* entries, int count,
                             PlanRank (&ranks)[kItems]) {
  using Sort = cub::BlockMergeSort<PlanRank, kPlanThreads, kItems>;
  __shared__ typename Sort::TempStorage storage;
  PlanEntry unsorted[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int place = static_cast<int>(threadIdx.x) + i * kPlanThreads;
    unsorted[i] = place < count ? entries[place] : PlanEntry{-1, 0};
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) ranks[i] = unsorted[i].key < 0 ? 0 : keys.rank(unsorted[i]);
  Sort(storage).Sort(ranks, HigherFirst{});
}

// Hulls, cores and biases of the entries [first, last) of a list; first % kBlock == 0.
__device__ inline void finish_blocks(const PlanList& list, const HeadKeys& keys, const PlanSegment& segment,
                                     int first, int last) {
  constexpr float kLog2E = 1.44269504088896340736f;
  constexpr int kStep = kPlanThreads / 32 * kBlock;
  const int lane = threadIdx.x % 32;
  for (std::int64_t begin = first + threadIdx.x / 32 * kBlock; begin < last; begin += kStep) {
    BlockHull hull{INT_MAX, 0, 0, INT_MAX};
    for (std::int64_t place = begin + lane; place < begin + kBlock && place < last; place += 32) {
      const PlanEntry entry = list.entries[place];
      const int birth = max(entry.key, segment.begin);
      const int death = min(entry.expiry, segment.end);
      hull = {min(hull.begin, birth), max(hull.end, death), max(hull.core_begin, birth),
              min(hull.core_end, death)};
      if (list.bias != nullptr) list.bias[place] = keys.bias(entry.key) * kLog2E;
    }
    hull = {__reduce_min_sync(kAllLanes, hull.begin), __reduce_max_sync(kAllLanes, hull.end),
            __reduce_max_sync(kAllLanes, hull.core_begin), __reduce_min_sync(kAllLanes, hull.core_end)};
    if (!keys.causal) hull = {0, INT_MAX, 0, INT_MAX};
    if (lane == 0) list.hulls[begin / kBlock] = hull;
  }
}

}  // namespace flash_dmattn::cuda
