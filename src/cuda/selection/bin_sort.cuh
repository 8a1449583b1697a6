// Sorts a CTA's ranks, best first, by bins of equal width between the least and the greatest score: a rank's
// place is where its bin begins, and among the few of its bin. Ranks of which many share a bin, such as those
// of equal scores, are sorted by comparing all.
#pragma once

#include <cuda_runtime.h>

#include "cuda/selection/sort_ranks.cuh"

namespace flash_dmattn::cuda {

// The sum over the threads before, and `all`, that over all of the CTA. sums: of warps, free behind a
// barrier.
__device__ inline int sum_before(int value, int (&sums)[32], int& all) {
  constexpr unsigned kWarp = 0xffffffffu;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  int until = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(kWarp, until, step);
    if (lane >= step) until += before;
  }
  if (lane == 31) sums[warp] = until;
  __syncthreads();
  const int of_warp = lane < static_cast<int>(blockDim.x / 32) ? sums[lane] : 0;
  all = __reduce_add_sync(kWarp, of_warp);
  return until - value + __reduce_add_sync(kWarp, lane < warp ? of_warp : 0);
}

// kItems ranks of each of kThreads threads.
template <int kThreads, int kItems>
class BinSort {
 public:
  static constexpr int kCapacity = kThreads * kItems;
  static constexpr int kOwnBins = kItems < 4 ? kItems : 4;  // a thread's
  static constexpr int kBins = kThreads * kOwnBins;
  using Rank = unsigned long long;

  struct Storage {
    int bins[kBins + 1];  // ranks in each bin, then where it begins
    int sums[32];
    unsigned least, greatest;  // high halves of the ranks
  };

  __device__ BinSort(Storage& storage, Rank* sorted) : storage_(storage), sorted_(sorted) {}

  // Puts the ranks, 0 for none, into sorted[kCapacity], from its beginning on, and returns their number.
  // Begins and ends with a barrier.
  __device__ int sort(const Rank (&own)[kItems]) {
    find_ends(own);
    int arrival[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      arrival[i] = own[i] == 0 ? 0 : atomicAdd(&storage_.bins[bin_of(own[i])], 1);
    }
    __syncthreads();
    int size;
    const bool crowded = begin_bins(size);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (own[i] != 0) sorted_[storage_.bins[bin_of(own[i])] + arrival[i]] = own[i];
    }
    __syncthreads();
    if (crowded) {
      compare_all(size);
    } else {
      order_bins(own, arrival);
    }
    return size;
  }

 private:
  static constexpr int kCrowded = 48;

  __device__ int bin_of(Rank rank) const {
    const unsigned span = storage_.greatest - storage_.least;
    const int shift = max(32 - __clz(static_cast<int>(span)) - (__ffs(kBins) - 1), 0);
    return static_cast<int>((storage_.greatest - static_cast<unsigned>(rank >> 32)) >> shift);
  }

  // Clears the bins and finds the least and the greatest high half.
  __device__ void find_ends(const Rank (&own)[kItems]) {
    for (int bin = static_cast<int>(threadIdx.x); bin < kBins; bin += kThreads) storage_.bins[bin] = 0;
    if (threadIdx.x == 0) {
      storage_.least = ~0u;
      storage_.greatest = 0;
    }
    __syncthreads();
    unsigned least = ~0u;
    unsigned greatest = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const auto high = static_cast<unsigned>(own[i] >> 32);
      if (own[i] != 0) least = min(least, high);
      greatest = max(greatest, high);
    }
    least = __reduce_min_sync(0xffffffffu, least);
    greatest = __reduce_max_sync(0xffffffffu, greatest);
    if (threadIdx.x % 32 == 0) {
      atomicMin(&storage_.least, least);
      atomicMax(&storage_.greatest, greatest);
    }
    __syncthreads();
  }

  // From the numbers of ranks to where each bin begins. Returns whether some bin holds many.
  __device__ bool begin_bins(int& size) {
    int* const bins = storage_.bins + kOwnBins * threadIdx.x;
    int counts[kOwnBins];
    int sum = 0;
    int most = 0;
#pragma unroll
    for (int i = 0; i < kOwnBins; ++i) {
      counts[i] = bins[i];
      sum += counts[i];
      most = max(most, counts[i]);
    }
    int before = sum_before(sum, storage_.sums, size);
#pragma unroll
    for (int i = 0; i < kOwnBins; ++i) {
      bins[i] = before;
      before += counts[i];
    }
    if (threadIdx.x == kThreads - 1) storage_.bins[kBins] = size;
    return __syncthreads_or(most > kCrowded ? 1 : 0) != 0;
  }

  // place: any memory of the thread.
  __device__ void order_bins(const Rank (&own)[kItems], int (&place)[kItems]) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (own[i] == 0) continue;
      const int bin = bin_of(own[i]);
      const int end = storage_.bins[bin + 1];
      place[i] = storage_.bins[bin];
      for (int other = place[i]; other < end; ++other) place[i] += sorted_[other] > own[i] ? 1 : 0;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (own[i] != 0) sorted_[place[i]] = own[i];
    }
    __syncthreads();
  }

  __device__ void compare_all(int number) {
    constexpr int kSorted = kThreads == 32 ? kItems : (kItems < 4 ? 4 : kItems);
    const int thread = static_cast<int>(threadIdx.x);
    int size = 32 * kSorted;
    while (size < number) size *= 2;
    for (int i = number + thread; i < size; i += kThreads) sorted_[i] = 0;
    __syncthreads();
    const bool sorts = thread < size / kSorted;
    Rank* const own = sorted_ + (sorts ? thread * kSorted : 0);
    Rank ranks[kSorted];
#pragma unroll
    for (int i = 0; i < kSorted; ++i) ranks[i] = own[i];
    __syncthreads();
    sort_ranks(ranks, size, sorted_);
#pragma unroll
    for (int i = 0; i < kSorted; ++i) {
      if (sorts) own[i] = ranks[i];
    }
    __syncthreads();
  }

  Storage& storage_;
  Rank* const sorted_;
};

}  // namespace flash_dmattn::cuda
