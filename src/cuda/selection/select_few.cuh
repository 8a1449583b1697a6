// Selection for few rows over a long sequence: decode. What the rows see are the keep_window best keys before
// the first of them, the survivors, and the keys of the rows themselves, each of which may drive out one of
// the survivors, the lowest. So it is enough to know the survivors, and the lowest of them in order:
//
//   sample_scores   from a sample of the scores, two bounds that the window's last key nearly surely lies
//                   between (sample_scores.cuh)
//   split_keys      settles the keys outside the bounds and lists the candidates between
//   settle          the CTA of split_keys that finishes last: the lowest survivors exactly, and who evicts
//                   them. Counts tell whether the bounds were right; if not, all keys are candidates.
#pragma once

#include <cfloat>

#include "cuda/selection/bin_finder.cuh"
#include "cuda/selection/few_problem.cuh"

namespace flash_dmattn::cuda {

constexpr int kFewThreads = 512;
constexpr int kFewPerThread = 8;
constexpr int kFewTile = kFewThreads * kFewPerThread;

struct FewStorage {  // in dynamic shared memory
  static constexpr unsigned kCached = 8192;
  static constexpr unsigned kFew = 32;  // candidates that a warp orders

  BinFinder<kFewThreads, 1> finder;
  unsigned histogram[kDigitBins];
  Rank cached[kCached];  // the CTA's candidates; in the last CTA those of the head, if they are so few
  unsigned num_staged;   // candidates in `cached` ...
  unsigned staged_end;   // ... which end here, if there are more
  unsigned num_sure;
  unsigned first_place;
  Rank warp_extremes[kFewThreads / 32];
  Rank few[kFew];
  unsigned num_few;
  unsigned sure, candidates;  // of the head
  bool is_last;
};

// The keys of a thread in the tile of keys that begins with `first`: groups of four neighbours.
__device__ __forceinline__ int few_key(int first, int i) {
  return first + i / 4 * (4 * kFewThreads) + static_cast<int>(threadIdx.x) * 4 + i % 4;
}
__device__ __forceinline__ bool is_aligned(const void* address) {
  return reinterpret_cast<std::uintptr_t>(address) % 16 == 0;
}

// Scores of the thread's keys; NaN from `end` on.
__device__ __forceinline__ void load_scores(const HeadScores& scores, int first, int end,
                                            float (&values)[kFewPerThread]) {
  const auto* floats = static_cast<const float*>(scores.data);
  if (scores.dtype == DType::kFloat32 && scores.stride == 1 && first + kFewTile <= end &&
      is_aligned(floats + first)) {
#pragma unroll
    for (int g = 0; g < kFewPerThread / 4; ++g) {
      const float4 four = *reinterpret_cast<const float4*>(floats + few_key(first, 4 * g));
      values[4 * g] = four.x;
      values[4 * g + 1] = four.y;
      values[4 * g + 2] = four.z;
      values[4 * g + 3] = four.w;
    }
    return;
  }
  with_element_of(scores.dtype, [&](auto element) {
    const auto* data = static_cast<const decltype(element)*>(scores.data);
    decltype(element) elements[kFewPerThread] = {};
#pragma unroll
    for (int i = 0; i < kFewPerThread; ++i) {
      const int key = few_key(first, i);
      if (key < end) elements[i] = data[key * scores.stride];
    }
#pragma unroll
    for (int i = 0; i < kFewPerThread; ++i) {
      values[i] = few_key(first, i) < end ? to_float(elements[i]) : NAN;
    }
  });
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

// The least score of the ranks from `bound` on.
__device__ __forceinline__ float least_score(Rank bound) {
  const auto ordered = static_cast<unsigned>(bound >> 32);
  return __uint_as_float((ordered & 0x80000000u) != 0 ? ordered ^ 0x80000000u : ~ordered);
}

// One head of a sequence, as the CTAs of split_keys see it.
struct FewHead {
  const FewProblem& problem;
  Sequence sequence;
  int head;
  FewLine& line;
  Rank* candidates;
  HeadScores scores;
  ExpiryWriter writer;
  int prefix;  // keys before the first row's

  __device__ FewHead(const FewProblem& problem_, const Sequence& sequence_, int head_)
      : problem(problem_),
        sequence(sequence_),
        head(head_),
        line(problem.lines[problem.line(sequence, head)]),
        candidates(problem.candidates + problem.line(sequence, head) * sequence.seqlen_k),
        scores(problem.select.scores_of(sequence, head)),
        writer(problem.select.writer_of(sequence, head)),
        prefix(problem.select.cut.prefix(sequence.seqlen_k)) {}
};

// Puts a warp's candidates aside, one of each lane for which `is_one`.
__device__ __forceinline__ void stage(const FewHead& head, bool is_one, Rank rank, FewStorage& storage) {
  const unsigned ones = __ballot_sync(kFullWarp, is_one);
  if (ones == 0) return;
  const unsigned number = __popc(ones);
  unsigned place = 0;
  if (lane_index() == 0) place = atomicAdd(&storage.num_staged, number);
  place = __shfl_sync(kFullWarp, place, 0);
  Rank* to = storage.cached;
  if (place + number > FewStorage::kCached) {
    if (lane_index() == 0) {
      atomicMin(&storage.staged_end, place);
      place = atomicAdd(&head.line.num_candidates, number);
    }
    place = __shfl_sync(kFullWarp, place, 0);
    to = head.candidates;
  }
  if (is_one) to[place + __popc(ones & lanes_before(lane_index()))] = rank;
}

// scores[i] for an i that is known at run time alone, without memory.
__device__ __forceinline__ float pick(const float (&scores)[kFewPerThread], int i) {
  float picked = scores[0];
#pragma unroll
  for (int n = 1; n < kFewPerThread; ++n) picked = n == i ? scores[n] : picked;
  return picked;
}

// Settles the keys [begin, end) outside the bounds, lists those between, and counts both. scores: of the
// first tile. All threads call; ends behind a barrier.
__device__ __forceinline__ void split_range(const FewHead& head, int begin, int end, const FewBounds& bounds,
                                            float (&scores)[kFewPerThread], FewStorage& storage) {
  if (threadIdx.x == 0) {
    storage.num_staged = storage.num_sure = 0;
    storage.staged_end = FewStorage::kCached;
  }
  __syncthreads();
  const ExpiryWriter& writer = head.writer;
  const bool by_rank_alone = writer.num_sinks <= 0 && writer.local_window <= 0;
  const float least = least_score(bounds.lower);
  unsigned num_sure = 0;
  for (int first = begin; first < end; first += kFewTile) {
    float next[kFewPerThread];
    load_scores(head.scores, first + kFewTile, end, next);
    int expiry[kFewPerThread];  // of candidates anything: it is settled later
    unsigned reach = 0;         // bit i: scores[i] is that of a candidate or above
    unsigned sure = 0;
#pragma unroll
    for (int i = 0; i < kFewPerThread; ++i) {
      expiry[i] = few_key(first, i);
      reach |= scores[i] >= least ? 1u << i : 0;
    }
    if (!by_rank_alone) {
#pragma unroll
      for (int i = 0; i < kFewPerThread; ++i) {
        if (scores[i] >= -FLT_MAX) expiry[i] = writer.value_dropped(expiry[i], expiry[i]);
      }
    }
    while (__any_sync(kFullWarp, reach != 0)) {
      const int i = __ffs(static_cast<int>(reach)) - 1;  // -1: none
      const Rank rank = i < 0 ? 0 : make_rank(ordered_bits(pick(scores, i)), few_key(first, i));
      if (rank >= bounds.upper) sure |= 1u << i;
      stage(head, rank >= bounds.lower && rank < bounds.upper, rank, storage);
      reach &= reach - 1;
    }
    if (sure != 0) {
      num_sure += __popc(sure);
#pragma unroll
      for (int i = 0; i < kFewPerThread; ++i) {
        if ((sure >> i & 1) != 0) expiry[i] = writer.value_never_evicted(few_key(first, i));
      }
    }
    store_expiry(writer, first, end, expiry);
#pragma unroll
    for (int i = 0; i < kFewPerThread; ++i) scores[i] = next[i];
  }
  num_sure = __reduce_add_sync(kFullWarp, num_sure);
  if (lane_index() == 0 && num_sure > 0) atomicAdd(&storage.num_sure, num_sure);
  __syncthreads();
  const unsigned staged = min(storage.num_staged, storage.staged_end);
  if (threadIdx.x == 0) {
    storage.first_place = staged > 0 ? atomicAdd(&head.line.num_candidates, staged) : 0;
    if (storage.num_sure > 0) atomicAdd(&head.line.num_sure, storage.num_sure);
  }
  __syncthreads();
  for (unsigned i = threadIdx.x; i < staged; i += kFewThreads) {
    head.candidates[storage.first_place + i] = storage.cached[i];
  }
  __threadfence();  // all of it is written before the CTA counts as finished
  __syncthreads();
}

// visit(rank) for every candidate, in any order, several loads in flight: there may be many.
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

// The least of the threads' ranks. All threads call.
__device__ inline Rank least_of_all(Rank rank, FewStorage& storage) {
  for (int step = 16; step > 0; step /= 2) rank = min(rank, __shfl_xor_sync(kFullWarp, rank, step));
  __syncthreads();  // the last answer is read
  if (lane_index() == 0) storage.warp_extremes[warp_index()] = rank;
  __syncthreads();
  rank = lane_index() < kFewThreads / 32 ? storage.warp_extremes[lane_index()] : kNoRank;
  for (int step = 16; step > 0; step /= 2) rank = min(rank, __shfl_xor_sync(kFullWarp, rank, step));
  return rank;
}

// The least rank of the candidates that is at least `bound`; kNoRank if there is none. All threads call.
__device__ inline Rank least_from(const Rank* candidates, unsigned count, Rank bound, FewStorage& storage) {
  Rank least = kNoRank;
  for_each_candidate(candidates, count, [&](Rank rank) {
    if (rank >= bound) least = min(least, rank);
  });
  return least_of_all(least, storage);
}

// The k-th best of the few candidates that visit(rank) is called with, 1 <= k. All threads call.
template <typename Belongs>
__device__ Rank best_of_few(const Rank* candidates, unsigned count, unsigned k, const Belongs& belongs,
                            FewStorage& storage) {
  for_each_candidate(candidates, count, [&](Rank rank) {
    if (belongs(rank)) storage.few[atomicAdd(&storage.num_few, 1u)] = rank;
  });
  __syncthreads();
  const auto lane = static_cast<unsigned>(lane_index());
  const Rank mine = lane < storage.num_few ? storage.few[lane] : 0;
  unsigned better = 0;
  for (int other = 0; other < 32; ++other) better += __shfl_sync(kFullWarp, mine, other) > mine ? 1 : 0;
  const unsigned found = __ballot_sync(kFullWarp, mine != 0 && better == k - 1);
  return __shfl_sync(kFullWarp, mine, __ffs(static_cast<int>(found)) - 1);
}

// A bound that exactly k of the candidates reach, 1 <= k <= count, by radix selection: 11 bits at a time of
// what the ranks are above `base`, which none is below.
__device__ inline Rank bound_of_best(const Rank* candidates, unsigned count, unsigned k, Rank base,
                                     FewStorage& storage) {
  Rank least_complement = kNoRank;
  for_each_candidate(candidates, count, [&](Rank rank) { least_complement = min(least_complement, ~rank); });
  const Rank range = ~least_of_all(least_complement, storage) - base;
  int shift = 64 - __clzll(static_cast<long long>(range | 1));
  while (shift > 0) {
    const int width = min(shift, kDigitBits);
    shift -= width;
    for (unsigned bin = threadIdx.x; bin < kDigitBins; bin += kFewThreads) storage.histogram[bin] = 0;
    if (threadIdx.x == 0) storage.num_few = 0;
    __syncthreads();
    // Ranks below the base wrap around, out of all bins.
    for_each_candidate(candidates, count, [&](Rank rank) {
      const Rank digit = (rank - base) >> shift;
      if (digit < 1u << width) atomicAdd(&storage.histogram[digit], 1u);
    });
    __syncthreads();
    storage.finder.find(storage.histogram, {k});
    base += static_cast<Rank>(storage.finder.bin[0]) << shift;
    k -= storage.finder.above[0];
    const unsigned in_bin = storage.finder.in_bin[0];
    if (in_bin == k) break;  // all keys of the bin count
    if (in_bin <= FewStorage::kFew) {
      const auto belongs = [&](Rank rank) { return (rank - base) >> shift == 0; };
      return best_of_few(candidates, count, k, belongs, storage);
    }
    __syncthreads();  // the bin is known to all
  }
  return base;
}

// The keys of the rows arrive one after the other; each that enters a full window evicts the lowest key in
// it, whose expiry becomes the row's position. Survivors are the candidates that reach `bound`. All threads
// call.
__device__ inline void evict_by_rows(const FewHead& head, const Rank* candidates, unsigned count, Rank bound,
                                     unsigned free_places, FewStorage& storage) {
  const ExpiryWriter& writer = head.writer;
  const int seqlen = head.sequence.seqlen_k;
  if (head.prefix == seqlen) return;
  Rank lowest = least_from(candidates, count, bound, storage);  // survivor
  // Lane n of every warp holds row key n while it is in the window.
  Rank mine = kNoRank;
  for (int key = head.prefix; key < seqlen; ++key) {
    const unsigned bits = head.scores.bits(key);
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
        mine = kNoRank;
      }
    }
    if (enters && lane_index() == key - head.prefix) mine = rank;
  }
  if (threadIdx.x < 32 && mine != kNoRank) writer.never_evicted(key_of(mine));
}

// What the CTAs of the head counted, for all threads.
__device__ inline void read_counts(const FewHead& head, FewStorage& storage) {
  if (threadIdx.x == 0) {  // atomically: a cache may hold older values
    storage.sure = atomicAdd(&head.line.num_sure, 0u);
    storage.candidates = atomicAdd(&head.line.num_candidates, 0u);
  }
  __syncthreads();
}

// Expiry of the candidates and of the rows' own keys.
__device__ inline void settle(const FewHead& head, FewBounds bounds, FewStorage& storage) {
  const unsigned window = head.problem.select.keep_window;
  const unsigned rows = head.sequence.seqlen_k - head.prefix;
  read_counts(head, storage);
  // The rows evict no more than one survivor each: of the window's best, all but so many need no order.
  const bool few_sure = storage.sure + min(window, rows) <= window;
  const bool enough = bounds.lower == kLeastRank || storage.sure + storage.candidates >= window;
  if (!few_sure || !enough) {
    __syncthreads();  // the counts are read
    if (threadIdx.x == 0) {
      atomicExch(&head.line.num_sure, 0u);
      atomicExch(&head.line.num_candidates, 0u);
    }
    bounds = {kLeastRank, kNoRank};
    float scores[kFewPerThread];
    load_scores(head.scores, 0, head.prefix, scores);
    split_range(head, 0, head.prefix, bounds, scores, storage);
    read_counts(head, storage);
  }
  const unsigned count = storage.candidates;
  const Rank* candidates = head.candidates;
  if (count <= FewStorage::kCached) {
    for (unsigned i = threadIdx.x; i < count; i += kFewThreads) storage.cached[i] = candidates[i];
    candidates = storage.cached;
    __syncthreads();
  }
  const unsigned places = window - storage.sure;
  const unsigned kept = min(places, count);
  Rank bound = 0;
  if (kept < count) {
    bound = kept == 0 ? kNoRank : bound_of_best(candidates, count, kept, bounds.lower, storage);
  }
  for_each_candidate(candidates, count, [&](Rank rank) {
    const int key = key_of(rank);
    if (rank >= bound) {
      head.writer.never_evicted(key);
    } else {
      head.writer.dropped(key, key);
    }
  });
  __syncthreads();
  evict_by_rows(head, candidates, count, bound, places - kept, storage);
}

__global__ void __launch_bounds__(kFewThreads, 2) split_keys(const __grid_constant__ FewProblem problem) {
  auto& storage = *reinterpret_cast<FewStorage*>(dynamic_shared_memory());
  const auto [sequence, head_index, tile] = find_piece(problem.select, problem.select.tiles);
  const FewHead head(problem, sequence, head_index);
  const int begin = tile * problem.select.tiles.unit;
  const int end = min(begin + problem.select.tiles.unit, head.prefix);
  // The scores are the caller's: they may be read while sample_scores, which started in order, runs.
  float scores[kFewPerThread];
  load_scores(head.scores, begin, end, scores);
  wait_for_previous_kernel();
  const FewBounds bounds = head.line.bounds;
  split_range(head, begin, end, bounds, scores, storage);
  if (threadIdx.x == 0) {
    const unsigned ctas = problem.select.tiles.per_sequence;
    storage.is_last = atomicAdd(&head.line.num_finished, 1u) == ctas - 1;
    __threadfence();
  }
  __syncthreads();
  if (storage.is_last) settle(head, bounds, storage);
}

}  // namespace flash_dmattn::cuda
