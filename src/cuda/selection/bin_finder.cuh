// Finds bins of a histogram of digits by the number of entries in higher bins.
#pragma once

#include <cub/block/block_scan.cuh>

namespace flash_dmattn::cuda {

constexpr int kDigitBits = 11;
constexpr int kDigitBins = 1 << kDigitBits;

// In shared memory. kSearches: 1, or 2 histograms of up to 2^16 - 1 entries in the halves of one.
template <int kThreads, int kSearches>
struct BinFinder {
  static_assert(kSearches <= 2);
  static constexpr int kBins = kDigitBins / kThreads;  // of each thread
  using Scan = cub::BlockScan<unsigned, kThreads>;

  typename Scan::TempStorage scan;
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
    unsigned before;
    unsigned all;
    Scan(scan).ExclusiveSum(sum, before, all);
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
