// A bitonic sort of a CTA's ranks, best first. A thread holds kItems neighbours: distances below kItems stay
// in its registers, those within a warp go through shuffles, and only the rest through shared memory, which a
// bitonic sort there would keep busy for all of its log(n)^2 / 2 steps.
#pragma once

#include <cuda_runtime.h>

namespace flash_dmattn::cuda {

__device__ __forceinline__ unsigned long long choose_rank(unsigned long long a, unsigned long long b,
                                                          bool better) {
  return (a > b) == better ? a : b;
}

__device__ __forceinline__ void sort_pair(unsigned long long& a, unsigned long long& b, bool descending) {
  const unsigned long long first = choose_rank(a, b, descending);
  b = choose_rank(a, b, !descending);
  a = first;
}

// The distances kItems / 2 to 1.
template <int kItems>
__device__ __forceinline__ void merge_in_thread(unsigned long long (&ranks)[kItems], bool descending) {
#pragma unroll
  for (int stride = kItems / 2; stride > 0; stride /= 2) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if ((i & stride) == 0) sort_pair(ranks[i], ranks[i + stride], descending);
    }
  }
}

// Sorts the `size` ranks that the first size / kItems threads hold, kItems neighbours each; size is a power
// of two, at least 32 * kItems. All threads of the CTA call. exchange: shared memory for `size` ranks, free
// behind a barrier; it is behind one again at the end.
template <int kItems>
__device__ void sort_ranks(unsigned long long (&ranks)[kItems], int size, unsigned long long* exchange) {
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = size / kItems;
#pragma unroll
  for (int run = 2; run < kItems; run *= 2) {
#pragma unroll
    for (int stride = run / 2; stride > 0; stride /= 2) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if ((i & stride) == 0) sort_pair(ranks[i], ranks[i + stride], (i & run) == 0);
      }
    }
  }
  merge_in_thread(ranks, (thread & 1) == 0);
  // From here on runs and distances are counted in threads.
  for (int run = 2; run <= threads; run *= 2) {
    const bool descending = (thread & run) == 0;
    for (int stride = run / 2; stride > 0; stride /= 2) {
      const bool better = descending == ((thread & stride) == 0);
      if (stride >= 32) {
        if (thread < threads) {
#pragma unroll
          for (int i = 0; i < kItems; ++i) exchange[i * threads + thread] = ranks[i];
        }
        __syncthreads();
        if (thread < threads) {
#pragma unroll
          for (int i = 0; i < kItems; ++i) {
            ranks[i] = choose_rank(ranks[i], exchange[i * threads + (thread ^ stride)], better);
          }
        }
        __syncthreads();
      } else if (thread < threads) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          ranks[i] = choose_rank(ranks[i], __shfl_xor_sync(0xffffffffu, ranks[i], stride), better);
        }
      }
    }
    if (thread < threads) merge_in_thread(ranks, descending);
  }
}

}  // namespace flash_dmattn::cuda
