// Finds bins of a histogram of digits by the number of entries in higher bins.
#pragma once

#include "cuda/selection/select_problem.cuh"

namespace flash_dmattn::cuda {

constexpr int kDigitBits = 11;
constexpr int kDigitBins = 1 << kDigitBits;

// In shared memory. kSearches: 1, or 2 histograms of up to 2^16 - 1 entries in the halves of one.
template <int kThreads, int kSearches>
struct BinFinder {
  static_assert(kSearches <= 2);
  static constexpr int kBins = kDigitBins / kThreads;  // of each thread
  static constexpr int kWarps = kThreads / 32;
  static_assert(kWarps <= 32, "a warp adds up the sums of all");

  unsigned warp_sums[kWarps];
  unsigned total[kSearches];  // entries
  unsigned bin[kSearches], above[kSearches], in_bin[kSearches];

  // Of search n the bin with the entry of rank ranks[n], 1 the highest, how many entries are above the bin
  // and how many in it; nothing where there are fewer entries. All threads call; the histogram was written
  // before a barrier. Ends with a barrier.
  __device__ void find(const unsigned* histogram, const unsigned (&ranks)[kSearches]) {
    const unsigned first_bin = kDigitBins - 1 - kBins * threadIdx.x;
    unsigned counts[kBins];
    unsigned sum = 0;
#pragma unroll
    for (int i = 0; i < kBins; ++i) {
      counts[i] = histogram[first_bin - i];
      sum += counts[i];
    }
    unsigned before = sum;  // with the thread's own bins, first
    for (int step = 1; step < 32; step *= 2) {
      const unsigned earlier = __shfl_up_sync(kFullWarp, before, step);
      if (lane_index() >= step) before += earlier;
    }
    if (lane_index() == 31) warp_sums[warp_index()] = before;
    __syncthreads();
    const unsigned of_lane = lane_index() < kWarps ? warp_sums[lane_index()] : 0;
    before += __reduce_add_sync(kFullWarp, lane_index() < warp_index() ? of_lane : 0) - sum;
    const unsigned all = __reduce_add_sync(kFullWarp, of_lane);
#pragma unroll
    for (int i = 0; i < kBins; ++i) {
#pragma unroll
      for (int n = 0; n < kSearches; ++n) {
        const unsigned higher = field(before, n);
        const unsigned here = field(counts[i], n);
        if (higher < ranks[n] && ranks[n] <= higher + here) {
          bin[n] = first_bin - i;
          above[n] = higher;
          in_bin[n] = here;
        }
      }
      before += counts[i];
    }
    if (threadIdx.x == 0) {
#pragma unroll
      for (int n = 0; n < kSearches; ++n) total[n] = field(all, n);
    }
    __syncthreads();
  }

 private:
  __device__ static unsigned field(unsigned packed, int n) {
    return kSearches == 1 ? packed : packed >> 16 * n & 0xffff;
  }
};

}  // namespace flash_dmattn::cuda
