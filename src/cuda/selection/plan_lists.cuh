// Steps on the list of one segment, each for all threads of a CTA.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <cstdint>

#include "cuda/common/log2.h"
#include "cuda/selection/bin_sort.cuh"
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

// The ranks of count <= kPlanThreads * kItems entries, in order: a thread gets those of the places from
// threadIdx.x * kItems on. What lies behind the last one is 0.
template <int kItems>
__device__ void sort_by_rank(const HeadKeys& keys, const PlanEntry* entries, int count,
                             PlanRank (&ranks)[kItems]) {
  using Sort = BinSort<kPlanThreads, kItems>;
  __shared__ PlanRank sorted[Sort::kCapacity];
  __shared__ typename Sort::Storage storage;
  PlanEntry unsorted[kItems];
  PlanRank own[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int place = static_cast<int>(threadIdx.x) + i * kPlanThreads;
    unsorted[i] = place < count ? entries[place] : PlanEntry{-1, 0};
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) own[i] = unsorted[i].key < 0 ? 0 : keys.rank(unsorted[i]);
  const int size = Sort(storage, sorted).sort(own);  // the least rank of all, 0, counts as none
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int place = static_cast<int>(threadIdx.x) * kItems + i;
    ranks[i] = place < size ? sorted[place] : 0;
  }
}

// The number of ranks above `rank`, of `count` descending ones.
__device__ inline int count_above(const PlanRank* ranks, int count, PlanRank rank) {
  int low = 0;
  while (low < count) {
    const int middle = low + (count - low) / 2;
    if (ranks[middle] > rank) {
      low = middle + 1;
    } else {
      count = middle;
    }
  }
  return low;
}

// Where ranks[place] belongs when the sorted runs of run_length from `begin` to `end` become one: its place
// in its own run, and the number of higher ranks in the others.
__device__ inline int merged_place(const PlanRank* ranks, int place, int begin, int end, int run_length) {
  const PlanRank rank = ranks[place];
  const int own_run = begin + (place - begin) / run_length * run_length;
  int merged = begin + place - own_run;
  for (int run = begin, left = end - begin; left > 0; run += run_length, left -= run_length) {
    if (run != own_run) merged += count_above(ranks + run, min(run_length, left), rank);
  }
  return merged;
}

// Hulls, cores and biases of the entries [first, last) of a list; first % kBlock == 0. A warp takes a block
// at a time, a lane two of its entries.
__device__ inline void finish_blocks(const PlanList& list, const HeadKeys& keys, const PlanSegment& segment,
                                     int first, int last) {
  constexpr int kStep = kPlanThreads / 32 * kBlock;
  const unsigned lane = threadIdx.x % 32;
  for (unsigned begin = first + threadIdx.x / 32 * kBlock; begin < static_cast<unsigned>(last);
       begin += kStep) {
    const unsigned places[2] = {begin + lane, begin + lane + 32};
    PlanEntry entries[2];
    BlockHull hull{INT_MAX, 0, 0, INT_MAX};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      entries[i] =
          list.entries[min(places[i], static_cast<unsigned>(last) - 1)];  // the last one again: harmless
      const int birth = max(entries[i].key, segment.begin);
      const int death = min(entries[i].expiry, segment.end);
      hull = {min(hull.begin, birth), max(hull.end, death), max(hull.core_begin, birth),
              min(hull.core_end, death)};
    }
    if (list.bias != nullptr) {
      const float biases[2] = {keys.bias(entries[0].key), keys.bias(entries[1].key)};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (places[i] < static_cast<unsigned>(last))
          list.bias[places[i]] = biases[i] * static_cast<float>(kLog2E);
      }
    }
    hull = {__reduce_min_sync(kAllLanes, hull.begin), __reduce_max_sync(kAllLanes, hull.end),
            __reduce_max_sync(kAllLanes, hull.core_begin), __reduce_min_sync(kAllLanes, hull.core_end)};
    if (!keys.causal) hull = {0, INT_MAX, 0, INT_MAX};
    if (lane == 0) list.hulls[begin / kBlock] = hull;
  }
}

}  // namespace flash_dmattn::cuda
