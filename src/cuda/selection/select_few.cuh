// Selection for few rows over a long sequence: decode. What the rows see are the keep_window best keys before
// the first of them, the survivors, and the keys of the rows themselves, each of which may drive out one of
// the survivors, the lowest. So expiry takes two looks at the scores, by the whole GPU:
//
//   count_digits    a histogram of the highest bits of all scores
//   split_keys      by the histogram most keys are settled at once; the rest, the candidates, are listed
//   settle          the CTA of split_keys that finishes last: the lowest survivors exactly, and who evicts
//   them
#pragma once

#include <cub/block/block_scan.cuh>

#include "cuda/selection/select_problem.cuh"

namespace flash_dmattn::cuda {

constexpr int kFewThreads = 512;
constexpr int kFewPerThread = 8;
constexpr int kFewTile = kFewThreads * kFewPerThread;
constexpr int kDigitBits = 11;
constexpr int kDigitBins = 1 << kDigitBits;
constexpr int kDigitShift = 32 - kDigitBits;
constexpr int kMaxFewRows = 32;

// [sequences * heads] of each. All but the candidates are zeroed before.
struct FewState {
  unsigned* histogram = nullptr;  // [..][kDigitBins] of the prefix: the keys before the first row
  unsigned* num_candidates = nullptr;
  unsigned* num_finished = nullptr;  // CTAs of split_keys
  Rank* candidates = nullptr;        // [..][seqlen]
};

struct FewProblem {
  SelectProblem select;  // tiles: the pieces of CTAs, multiples of kFewTile keys
  FewState state;

  __device__ std::int64_t line(const Sequence& sequence, int head) const {
    return static_cast<std::int64_t>(sequence.index) * select.geometry.heads_kv + head;
  }
};

// The keys of a thread in the tile of keys that begins with `first`: groups of four neighbours.
__device__ __forceinline__ int few_key(int first, int i) {
  return first + i / 4 * (4 * kFewThreads) + static_cast<int>(threadIdx.x) * 4 + i % 4;
}
__device__ __forceinline__ bool is_aligned(const void* address) {
  return reinterpret_cast<std::uintptr_t>(address) % 16 == 0;
}

// Ordered bits of the thread's keys; 0 from `end` on.
__device__ __forceinline__ void load_bits(const HeadScores& scores, int first, int end,
                                          unsigned (&bits)[kFewPerThread]) {
  const auto* floats = static_cast<const float*>(scores.data);
  if (scores.dtype == DType::kFloat32 && scores.stride == 1 && first + kFewTile <= end &&
      is_aligned(floats + first)) {
    float4 groups[kFewPerThread / 4];
#pragma unroll
    for (int g = 0; g < kFewPerThread / 4; ++g) {
      groups[g] = *reinterpret_cast<const float4*>(floats + few_key(first, 4 * g));
    }
#pragma unroll
    for (int g = 0; g < kFewPerThread / 4; ++g) {
      bits[4 * g] = ordered_bits(groups[g].x);
      bits[4 * g + 1] = ordered_bits(groups[g].y);
      bits[4 * g + 2] = ordered_bits(groups[g].z);
      bits[4 * g + 3] = ordered_bits(groups[g].w);
    }
    return;
  }
  const auto load = [&](auto element) {
    const auto* data = static_cast<const decltype(element)*>(scores.data);
    decltype(element) values[kFewPerThread] = {};
#pragma unroll
    for (int i = 0; i < kFewPerThread; ++i) {
      const int key = few_key(first, i);
      if (key < end) values[i] = data[key * scores.stride];
    }
#pragma unroll
    for (int i = 0; i < kFewPerThread; ++i) {
      bits[i] = few_key(first, i) < end ? ordered_bits(to_float(values[i])) : 0;
    }
  };
  if (scores.dtype == DType::kFloat32) {
    load(0.0f);
  } else if (scores.dtype == DType::kBFloat16) {
    load(BFloat16{});
  } else {
    load(Float16{});
  }
}

// Expiry of the thread's keys before `end`.
__device__ __forceinline__ void store_expiry(const ExpiryWriter& writer, int first, int end,
                                             const int (&expiry)[kFewPerThread]) {
  if (writer.stride == 1 && first + kFewTile <= end && is_aligned(writer.data + first)) {
#pragma unroll
    for (int g = 0; g < kFewPerThread / 4; ++g) {
      *reinterpret_cast<int4*>(writer.data + few_key(first, 4 * g)) =
          make_int4(expiry[4 * g], expiry[4 * g + 1], expiry[4 * g + 2], expiry[4 * g + 3]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kFewPerThread; ++i) {
    const int key = few_key(first, i);
    if (key < end) writer.data[key * writer.stride] = expiry[i];
  }
}

__global__ void __launch_bounds__(kFewThreads, 4) count_digits(const __grid_constant__ FewProblem problem) {
  __shared__ unsigned histogram[kDigitBins];
  const SelectProblem& select = problem.select;
  const auto [sequence, head, tile] = find_piece(select, select.tiles);
  const HeadScores scores = select.scores_of(sequence, head);
  const int begin = tile * problem.select.tiles.unit;
  const int end = min(begin + problem.select.tiles.unit, select.cut.prefix(sequence.seqlen_k));
  for (int bin = static_cast<int>(threadIdx.x); bin < kDigitBins; bin += kFewThreads) histogram[bin] = 0;
  __syncthreads();
  unsigned bits[kFewPerThread];
  load_bits(scores, begin, end, bits);
  for (int first = begin; first < end; first += kFewTile) {
    unsigned digits[kFewPerThread];
#pragma unroll
    for (int i = 0; i < kFewPerThread; ++i) digits[i] = bits[i] >> kDigitShift;
    load_bits(scores, first + kFewTile, end, bits);  // of the next tile, on the way meanwhile
#pragma unroll
    for (int i = 0; i < kFewPerThread; ++i) {
      const unsigned digit = digits[i];
      // Where scores hardly differ, a whole warp shares a bin; then one lane adds for all.
      if (__all_sync(kFullWarp, digit == __shfl_sync(kFullWarp, digit, 0))) {
        if (lane_index() == 0) atomicAdd(&histogram[digit], 32u);
      } else {
        atomicAdd(&histogram[digit], 1u);
      }
    }
  }
  __syncthreads();
  unsigned* const total = problem.state.histogram + problem.line(sequence, head) * kDigitBins;
  // Bin 0 is that of disabled keys.
  for (int bin = 1 + static_cast<int>(threadIdx.x); bin < kDigitBins; bin += kFewThreads) {
    if (histogram[bin] != 0) atomicAdd(&total[bin], histogram[bin]);
  }
}

// Finds bins of a histogram by the number of keys above them.
struct BinFinder {
  static constexpr int kBins = kDigitBins / kFewThreads;  // of each thread
  typename cub::BlockScan<unsigned, kFewThreads>::TempStorage scan;
  unsigned total;
  unsigned bin[2], above[2], in_bin[2];

  // The bins with the keys of ranks[0] and ranks[1], 1 the highest, each at most the number of keys. All
  // threads call; the histogram was written before a barrier. Ends with a barrier.
  __device__ void find(const unsigned* histogram, unsigned least_bin, const unsigned (&ranks)[2]) {
    const unsigned first_bin = kDigitBins - 1 - kBins * threadIdx.x;
    unsigned counts[kBins];
    unsigned sum = 0;
#pragma unroll
    for (int i = 0; i < kBins; ++i) {
      counts[i] = first_bin - i < least_bin ? 0 : histogram[first_bin - i];
      sum += counts[i];
    }
    unsigned before;
    unsigned all;
    cub::BlockScan<unsigned, kFewThreads>(scan).ExclusiveSum(sum, before, all);
    if (threadIdx.x == 0) total = all;
#pragma unroll
    for (int i = 0; i < kBins; ++i) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const unsigned rank = min(ranks[n], all);
        if (before < rank && rank <= before + counts[i]) {
          bin[n] = first_bin - i;
          above[n] = before;
          in_bin[n] = counts[i];
        }
      }
      before += counts[i];
    }
    __syncthreads();
  }
};

struct FewStorage {
  static constexpr unsigned kCached = 4096;
  BinFinder finder;
  unsigned histogram[kDigitBins];
  Rank cached[kCached];  // the candidates, if they are so few
  Rank warp_least[kFewThreads / 32];
  bool is_last;
};

// visit(rank) for every candidate, in any order, several loads in flight: there are many where scores are
// equal.
template <typename Visit>
__device__ __forceinline__ void for_each_candidate(const Rank* candidates, unsigned count, Visit&& visit) {
  constexpr unsigned kUnroll = 8;
  unsigned first = threadIdx.x;
  for (; first + (kUnroll - 1) * kFewThreads < count; first += kUnroll * kFewThreads) {
    Rank ranks[kUnroll];
#pragma unroll
    for (unsigned u = 0; u < kUnroll; ++u) ranks[u] = candidates[first + u * kFewThreads];
#pragma unroll
    for (unsigned u = 0; u < kUnroll; ++u) visit(ranks[u]);
  }
  for (; first < count; first += kFewThreads) visit(candidates[first]);
}

// The least rank of the candidates that is at least `bound`; all ones if there is none. All threads call.
__device__ inline Rank least_from(const Rank* candidates, unsigned count, Rank bound, FewStorage& storage) {
  Rank least = ~Rank{0};
  for_each_candidate(candidates, count, [&](Rank rank) {
    if (rank >= bound) least = min(least, rank);
  });
  for (int step = 16; step > 0; step /= 2) least = min(least, __shfl_xor_sync(kFullWarp, least, step));
  __syncthreads();  // the last answer is read
  if (lane_index() == 0) storage.warp_least[warp_index()] = least;
  __syncthreads();
  least = lane_index() < kFewThreads / 32 ? storage.warp_least[lane_index()] : ~Rank{0};
  for (int step = 16; step > 0; step /= 2) least = min(least, __shfl_xor_sync(kFullWarp, least, step));
  return least;
}

// A bound that exactly k of the candidates reach, 1 <= k <= count, by radix selection on their ranks.
// common_bin: of all candidates; kDigitBins: they differ.
__device__ inline Rank bound_of_best(const Rank* candidates, unsigned count, unsigned k, unsigned common_bin,
                                     FewStorage& storage) {
  Rank digits = common_bin == kDigitBins ? 0 : common_bin;
  int shift = common_bin == kDigitBins ? 64 : 64 - kDigitBits;
  while (shift > 0 && count > 0) {
    const int width = shift == 42 || shift <= kDigitBits ? min(10, shift) : kDigitBits;  // 11, 11, 10 twice
    for (unsigned bin = threadIdx.x; bin < kDigitBins; bin += kFewThreads) storage.histogram[bin] = 0;
    __syncthreads();
    for_each_candidate(candidates, count, [&](Rank rank) {
      if (shift == 64 || rank >> shift == digits) {
        atomicAdd(&storage.histogram[rank >> (shift - width) & ((1u << width) - 1)], 1u);
      }
    });
    __syncthreads();
    storage.finder.find(storage.histogram, 0, {k, k});
    digits = digits << width | storage.finder.bin[0];
    shift -= width;
    k -= storage.finder.above[0];
    const bool whole = storage.finder.in_bin[0] == k;  // all keys of the bin count
    __syncthreads();                                   // the bin is known to all
    if (whole) break;
  }
  return digits << shift;
}

// The keys of the rows arrive one after the other; each that enters a full window evicts the lowest key in
// it, whose expiry becomes the row's position. Survivors are the candidates that reach `bound`. All threads
// call.
__device__ inline void evict_by_rows(const FewProblem& problem, const Sequence& sequence, int head,
                                     const ExpiryWriter& writer, const Rank* candidates, unsigned count,
                                     Rank bound, unsigned free_places, FewStorage& storage) {
  const HeadScores scores = problem.select.scores_of(sequence, head);
  const int prefix = problem.select.cut.prefix(sequence.seqlen_k);
  if (prefix == sequence.seqlen_k) return;
  Rank lowest = least_from(candidates, count, bound, storage);  // survivor
  // Lane n of every warp holds row key n while it is in the window.
  Rank mine = ~Rank{0};
  for (int key = prefix; key < sequence.seqlen_k; ++key) {
    const unsigned bits = scores.bits(key);
    if (bits == 0) {
      if (threadIdx.x == 0) writer.disabled(key);
      continue;
    }
    const Rank rank = make_rank(bits, key);
    Rank lowest_of_rows = mine;
    for (int step = 16; step > 0; step /= 2) {
      lowest_of_rows = min(lowest_of_rows, __shfl_xor_sync(kFullWarp, lowest_of_rows, step));
    }
    const Rank victim = min(min(lowest, lowest_of_rows), rank);
    bool enters = true;
    if (free_places > 0) {
      --free_places;
    } else if (victim == rank) {
      enters = false;
      if (threadIdx.x == 0) writer.dropped(key, key);
    } else {
      if (threadIdx.x == 0) writer.dropped(key_of(victim), key);
      if (victim == lowest) {
        lowest = least_from(candidates, count, victim + 1, storage);
      } else if (mine == victim) {
        mine = ~Rank{0};
      }
    }
    if (enters && lane_index() == key - prefix) mine = rank;
  }
  if (threadIdx.x < 32 && mine != ~Rank{0}) writer.never_evicted(key_of(mine));
}

// Expiry of the candidates and of the rows' own keys.
__device__ inline void settle(const FewProblem& problem, const Sequence& sequence, int head,
                              unsigned surely_kept, unsigned common_bin, FewStorage& storage) {
  const std::int64_t line = problem.line(sequence, head);
  const ExpiryWriter writer = problem.select.writer_of(sequence, head);
  const unsigned count = problem.state.num_candidates[line];
  const Rank* candidates = problem.state.candidates + line * sequence.seqlen_k;
  if (count <= FewStorage::kCached) {
    for (unsigned i = threadIdx.x; i < count; i += kFewThreads) storage.cached[i] = candidates[i];
    candidates = storage.cached;
    __syncthreads();
  }
  const unsigned window = problem.select.keep_window;
  const unsigned places = window - min(window, surely_kept);
  const unsigned kept = min(places, count);
  const Rank bound =
      kept < count ? (kept == 0 ? ~Rank{0} : bound_of_best(candidates, count, kept, common_bin, storage)) : 0;
  for_each_candidate(candidates, count, [&](Rank rank) {
    const int key = key_of(rank);
    if (rank >= bound) {
      writer.never_evicted(key);
    } else {
      writer.dropped(key, key);
    }
  });
  __syncthreads();
  evict_by_rows(problem, sequence, head, writer, candidates, count, bound, places - kept, storage);
}

__global__ void __launch_bounds__(kFewThreads, 2) split_keys(const __grid_constant__ FewProblem problem) {
  __shared__ FewStorage storage;
  const SelectProblem& select = problem.select;
  const auto [sequence, head, tile] = find_piece(select, select.tiles);
  const std::int64_t line = problem.line(sequence, head);
  const int prefix = select.cut.prefix(sequence.seqlen_k);
  const HeadScores scores = select.scores_of(sequence, head);
  const ExpiryWriter writer = select.writer_of(sequence, head);
  const int begin = tile * problem.select.tiles.unit;
  const int end = min(begin + problem.select.tiles.unit, prefix);
  unsigned bits[kFewPerThread];
  load_bits(scores, begin, end, bits);

  // The rows evict no more than one survivor each: of the window's best, all but so many are kept for good.
  const unsigned window = select.keep_window;
  const unsigned rows = sequence.seqlen_k - prefix;
  const unsigned safe = window - min(window, rows);
  storage.finder.find(problem.state.histogram + line * kDigitBins, 1, {window, max(safe, 1u)});
  const BinFinder& finder = storage.finder;
  const bool all_safe = finder.total <= safe;
  const unsigned lowest_bin = finder.total == 0 ? kDigitBins : finder.bin[0];
  const unsigned highest_bin = all_safe || safe == 0 ? kDigitBins - 1 : finder.bin[1];
  const unsigned surely_kept = all_safe ? finder.total : safe == 0 ? 0 : finder.above[1];

  for (int first = begin; first < end; first += kFewTile) {
    unsigned next_bits[kFewPerThread];
    load_bits(scores, first + kFewTile, end, next_bits);
    unsigned candidates = 0;  // bit i: bits[i] is one
    unsigned mine = 0;
#pragma unroll
    for (int i = 0; i < kFewPerThread; ++i) {
      const unsigned digit = bits[i] >> kDigitShift;
      const bool candidate = bits[i] != 0 && !all_safe && digit >= lowest_bin && digit <= highest_bin;
      candidates |= candidate ? 1u << i : 0;
      mine += candidate ? 1 : 0;
    }
    unsigned place = 0;
    if (__any_sync(kFullWarp, mine != 0)) {
      unsigned until = mine;  // of this lane and those before it
      for (int step = 1; step < 32; step *= 2) {
        const unsigned before = __shfl_up_sync(kFullWarp, until, step);
        if (lane_index() >= step) until += before;
      }
      if (lane_index() == 31) place = atomicAdd(problem.state.num_candidates + line, until);
      place = __shfl_sync(kFullWarp, place, 31) + until - mine;
    }
    int expiry[kFewPerThread];  // of candidates anything: it is settled later
#pragma unroll
    for (int i = 0; i < kFewPerThread; ++i) {
      const int key = few_key(first, i);
      if ((candidates >> i & 1) != 0) {
        problem.state.candidates[line * sequence.seqlen_k + place++] = make_rank(bits[i], key);
      }
      const bool kept = all_safe || bits[i] >> kDigitShift > highest_bin;
      expiry[i] = bits[i] == 0 ? key
                  : kept       ? writer.value_never_evicted(key)
                               : writer.value_dropped(key, key);
    }
    store_expiry(writer, first, end, expiry);
#pragma unroll
    for (int i = 0; i < kFewPerThread; ++i) bits[i] = next_bits[i];
  }

  __threadfence();  // the candidates are written before the CTA counts as finished
  __syncthreads();
  if (threadIdx.x == 0) {
    const unsigned ctas = select.tiles.per_sequence;
    storage.is_last = atomicAdd(problem.state.num_finished + line, 1u) == ctas - 1;
    __threadfence();
  }
  __syncthreads();
  const unsigned common_bin = lowest_bin == highest_bin ? lowest_bin : kDigitBins;
  if (storage.is_last) settle(problem, sequence, head, surely_kept, common_bin, storage);
}

}  // namespace flash_dmattn::cuda
