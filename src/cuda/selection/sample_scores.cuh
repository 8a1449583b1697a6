// The first kernel of the selection for few rows: a CTA for each head takes a sample of its scores and finds
// the bounds between which the window's last key nearly surely lies, by radix selection among the sample.
#pragma once

#include "cuda/selection/bin_finder.cuh"
#include "cuda/selection/few_problem.cuh"

namespace flash_dmattn::cuda {

constexpr int kSampleThreads = 1024;
// Registers for CTAs of split_keys are left over. 8.6, 8.9 and 12.0 have no room for two.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kSampleCtasPerSm = 1;
#else
constexpr int kSampleCtasPerSm = 2;
#endif
constexpr int kSamplePerThread = FewSample::kMost / kSampleThreads;

struct SampleStorage {
  BinFinder<kSampleThreads, 2> finder;  // 0: the lower bound, 1: the upper
  unsigned histogram[kDigitBins];
};

// The search for one bound: the first digits of the rank at `place` of the sample.
struct BoundSearch {
  Rank digits = 0;
  unsigned place = 0;  // among the ranks with these digits, 1 the highest
  bool is_done = false;
  Rank bound = 0;

  __device__ void end(Rank at) {
    bound = at;
    is_done = true;
  }
};

// A thread's part of the sample; 0: no key, or a disabled one.
__device__ __forceinline__ void load_sample(const HeadScores& scores, const FewSample& sample,
                                            Rank (&ranks)[kSamplePerThread]) {
  with_element_of(scores.dtype, [&](auto element) {
    const auto* data = static_cast<const decltype(element)*>(scores.data);
    decltype(element) values[kSamplePerThread] = {};
    int keys[kSamplePerThread];
#pragma unroll
    for (int i = 0; i < kSamplePerThread; ++i) {
      const int index = i * kSampleThreads + static_cast<int>(threadIdx.x);
      keys[i] = index < sample.size ? sample.key(index) : -1;
      if (keys[i] >= 0) values[i] = data[keys[i] * scores.stride];
    }
#pragma unroll
    for (int i = 0; i < kSamplePerThread; ++i) {
      const unsigned bits = keys[i] < 0 ? 0 : ordered_bits(to_float(values[i]));
      ranks[i] = bits == 0 ? 0 : make_rank(bits, keys[i]);
    }
  });
}

// Both searches' next `width` bits below `shift`, in the halves of one histogram.
__device__ __forceinline__ void count_sample(const Rank (&ranks)[kSamplePerThread], int shift, int width,
                                             const BoundSearch& lower, const BoundSearch& upper,
                                             SampleStorage& storage) {
  for (int bin = static_cast<int>(threadIdx.x); bin < kDigitBins; bin += kSampleThreads) {
    storage.histogram[bin] = 0;
  }
  __syncthreads();
  const auto count = [&](unsigned digit, unsigned add) {
    // Where scores hardly differ, a whole warp shares a bin; then one lane adds for all.
    const unsigned what = add << kDigitBits | digit;
    if (__all_sync(kFullWarp, what == __shfl_sync(kFullWarp, what, 0))) {
      if (add != 0 && lane_index() == 0) atomicAdd(&storage.histogram[digit], 32 * add);
    } else if (add != 0) {
      atomicAdd(&storage.histogram[digit], add);
    }
  };
  constexpr unsigned kUpper = 1u << 16;
  if (shift == 64) {
    const unsigned both = (lower.is_done ? 0 : 1) + (upper.is_done ? 0 : kUpper);
#pragma unroll
    for (int i = 0; i < kSamplePerThread; ++i) {
      count(static_cast<unsigned>(ranks[i] >> (64 - kDigitBits)), ranks[i] != 0 ? both : 0);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSamplePerThread; ++i) {
      const Rank digits = ranks[i] >> shift;  // 0, like no other, of no key
      const unsigned add = (!lower.is_done && digits == lower.digits ? 1 : 0) +
                           (!upper.is_done && digits == upper.digits ? kUpper : 0);
      count(static_cast<unsigned>(ranks[i] >> (shift - width)) & ((1u << width) - 1), add);
    }
  }
  __syncthreads();
}

__device__ inline FewBounds bounds_of_sample(const Rank (&ranks)[kSamplePerThread], const FewSample& sample,
                                             SampleStorage& storage) {
  BoundSearch lower{.place = sample.lower_place};
  BoundSearch upper{.place = sample.upper_place};
  if (sample.upper_place == 0) upper.end(kNoRank);
  for (int shift = 64; shift > 0 && !(lower.is_done && upper.is_done);) {
    const int width = shift == 42 || shift <= kDigitBits ? min(10, shift) : kDigitBits;  // 11, 11, 10 twice
    count_sample(ranks, shift, width, lower, upper, storage);
    const auto& finder = storage.finder;
    storage.finder.find(storage.histogram, {lower.place, upper.place});
    shift -= width;
    const auto narrow = [&](BoundSearch& search, int n) {
      if (search.is_done) return;
      if (finder.total[n] < search.place) return search.end(kLeastRank);  // fewer are enabled
      search.digits = search.digits << width | finder.bin[n];
      search.place -= finder.above[n];
    };
    narrow(lower, 0);
    narrow(upper, 1);
    // The lower bound may let some more keys through, the upper some fewer.
    if (!lower.is_done && finder.in_bin[0] - lower.place <= sample.tolerance)
      lower.end(lower.digits << shift);
    if (!upper.is_done && (upper.place <= sample.tolerance || shift == 0)) {
      upper.end((upper.digits + 1) << shift);
    }
    __syncthreads();  // the bins are known to all
  }
  return {lower.bound, upper.bound};
}

__global__ void __launch_bounds__(kSampleThreads, kSampleCtasPerSm)
    sample_scores(const __grid_constant__ FewProblem problem) {
  __shared__ SampleStorage storage;
  let_next_kernel_start();
  const SelectProblem& select = problem.select;
  const int heads = select.geometry.heads_kv;
  const Sequence sequence = select.geometry.sequence(static_cast<int>(blockIdx.x) / heads);
  const int head = static_cast<int>(blockIdx.x) % heads;
  Rank ranks[kSamplePerThread];
  load_sample(select.scores_of(sequence, head), problem.sample, ranks);
  const FewBounds bounds = bounds_of_sample(ranks, problem.sample, storage);
  if (threadIdx.x == 0) problem.lines[blockIdx.x] = {bounds, 0, 0, 0};
}

}  // namespace flash_dmattn::cuda
