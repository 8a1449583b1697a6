// The k keys of highest rank among the candidates of one CTA. The bits of the lowest one kept lie in a range
// that histograms of 2048 bins narrow, at most three times, until it is one number or holds few candidates.
// Mostly only few candidates can be kept at all: a sample gives a bound that probably enough of them reach
// and not too many, one look at all puts these aside, and from there on their bits are in registers. Where
// the bound fails, or more are kept than there is room for, all candidates are read again for every
// histogram, from the L1 or L2 cache, so that any number of them will do. Ties at the lowest score kept are
// settled by the order of the candidates, which is that of their indices.
#pragma once

#include "cuda/selection/select_problem.cuh"

namespace flash_dmattn::cuda {

constexpr int kSelectThreads = 1024;
// As many threads as a multiprocessor holds: 2048, on 8.6, 8.9 and 12.0 1536.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kSelectCtasPerSm = 1;
#else
constexpr int kSelectCtasPerSm = 2;
#endif
constexpr int kSelectWarps = kSelectThreads / 32;
static_assert(kSelectWarps <= 32, "a warp sums over all warps with one number per lane");

// A list of keys, then a second list or a range of neighbouring keys, all in ascending order of their
// indices. Keys of bits 0 never count.
struct Candidates {
  const unsigned* list_bits = nullptr;  // [list_size]
  const int* list_keys = nullptr;       // [list_size]
  unsigned list_size = 0;
  const unsigned* range_bits = nullptr;  // [range_size]; with range_is_scores float32 scores as they are
  bool range_is_scores = false;
  const int* range_keys = nullptr;  // [range_size]; null: range_begin, range_begin + 1, ...
  int range_begin = 0;
  unsigned range_size = 0;

  __device__ unsigned size() const { return list_size + range_size; }
  __device__ unsigned bits(unsigned i) const {
    return i < list_size ? list_bits[i] : to_bits(range_bits[i - list_size], range_is_scores);
  }
  __device__ int key(unsigned i) const {
    if (i < list_size) return list_keys[i];
    return range_keys != nullptr ? range_keys[i - list_size] : range_begin + static_cast<int>(i - list_size);
  }

  __device__ static unsigned to_bits(unsigned value, bool is_score) {
    return is_score ? ordered_bits(__uint_as_float(value)) : value;
  }
};

// Each warp visits a contiguous part of the candidates, 32 at a time: visit(first, bits) gets the place of
// the first and this lane's bits, 0 beyond the end.
template <typename Visit>
__device__ __forceinline__ void visit_candidates(const Candidates& candidates, Visit&& visit) {
  constexpr int kUnroll = 4;
  const unsigned size = candidates.size();
  const unsigned part = (size + kSelectThreads - 1) / kSelectThreads * 32;
  const unsigned end = min(size, (warp_index() + 1) * part);
  for (unsigned first = warp_index() * part; first < end; first += 32 * kUnroll) {
    unsigned bits[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const unsigned i = first + 32 * u + lane_index();
      bits[u] = i < end ? candidates.bits(i) : 0;
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (first + 32 * u < end) visit(first + 32 * u, bits[u]);
    }
  }
}

// Visits array[begin, size) in any order, kGroup keys per thread at a time: visit(i, bits) gets the ordered
// bits of array[i + u * kSelectThreads] in bits[u], 0 beyond the end. All lanes of a warp take part.
constexpr unsigned kGroup = 4;
template <typename Visit>
__device__ __forceinline__ void visit_groups(const unsigned* array, bool is_scores, unsigned begin,
                                             unsigned size, Visit&& visit) {
  for (unsigned first = begin; first < size; first += kSelectThreads * kGroup) {
    const unsigned i = first + threadIdx.x;
    unsigned bits[kGroup] = {};
    if (first + kSelectThreads * kGroup <= size) {
#pragma unroll
      for (unsigned u = 0; u < kGroup; ++u) bits[u] = array[i + u * kSelectThreads];
    } else {
#pragma unroll
      for (unsigned u = 0; u < kGroup; ++u) {
        if (i + u * kSelectThreads < size) bits[u] = array[i + u * kSelectThreads];
      }
    }
    if (is_scores) {
#pragma unroll
      for (unsigned u = 0; u < kGroup; ++u) {
        bits[u] = i + u * kSelectThreads < size ? ordered_bits(__uint_as_float(bits[u])) : 0;
      }
    }
    visit(i, bits);
  }
}

// The same for all candidates; the places of the keys are place + u * kSelectThreads.
template <typename Visit>
__device__ __forceinline__ void visit_in_any_order(const Candidates& candidates, Visit&& visit) {
  visit_groups(candidates.list_bits, false, 0, candidates.list_size, visit);
  visit_groups(candidates.range_bits, candidates.range_is_scores, 0, candidates.range_size,
               [&](unsigned i, const unsigned(&bits)[kGroup]) { visit(candidates.list_size + i, bits); });
}

// The lowest score kept: keys of higher bits are kept, of those of equal bits, the ties, all but the first
// `dropped_ties`.
struct Threshold {
  unsigned bits = 0;
  unsigned dropped_ties = 0;
  int num_kept = 0;
  bool short_of_keys = false;  // fewer than k are enabled: all of them are kept, and none is a tie

  // No key below it is kept, and no later one below it ever will be.
  __device__ unsigned lower_bound() const { return short_of_keys ? 1 : bits; }
  __device__ bool above(unsigned key_bits) const { return key_bits > bits; }
  __device__ bool tie(unsigned key_bits) const { return !short_of_keys && key_bits == bits; }
};

// Sorts the values of a warp, the highest in lane 0.
__device__ __forceinline__ unsigned sort_in_warp(unsigned value) {
#pragma unroll
  for (int run = 2; run <= 32; run *= 2) {
#pragma unroll
    for (int stride = run / 2; stride > 0; stride /= 2) {
      const unsigned other = __shfl_xor_sync(kFullWarp, value, stride);
      const bool higher = ((lane_index() & run) == 0) == ((lane_index() & stride) == 0);
      value = higher ? max(value, other) : min(value, other);
    }
  }
  return value;
}

class BestKeys {
 public:
  static constexpr unsigned kPerThread = 8;
  static constexpr unsigned kMaxAside = kPerThread * kSelectThreads;
  static constexpr unsigned kFew = 32;

  struct Storage {
    alignas(8) unsigned histogram[2048];  // zeros but between counting and find_bin
    unsigned places[kMaxAside];           // of the candidates put aside; before, the sample
    Rank few[kFew];                       // the last candidates in question: bits and place
    unsigned num_aside, highest, num_few;
    unsigned bin, above, in_bin;
    unsigned warp_sums[kSelectWarps];
    unsigned warp_above[kSelectWarps];
    unsigned warp_ties[kSelectWarps];
  };

  __device__ BestKeys(Storage& storage, const Candidates& candidates)
      : storage_(storage), candidates_(candidates) {}

  // Once, and before find_lowest.
  __device__ Threshold find_threshold(int k) {
    clear();
    unsigned rank = k;                       // of the key sought, among those in the range
    unsigned in_range = candidates_.size();  // at most
    const unsigned bound = bound_from_sample(k);
    if (bound > range_.least) put_aside({bound, range_.most}, k);
    for (;;) {
      if (!is_aside_ && in_range <= kMaxAside) put_aside(range_, 0);
      const int shift = max(32 - __clz(static_cast<int>(range_.most - range_.least)) - 11, 0);
      count(shift);
      const unsigned counted = find_bin(rank);
      if (counted < rank) return {0, 0, static_cast<int>(counted), true};
      rank -= storage_.above;
      in_range = storage_.in_bin;
      range_.least += storage_.bin << shift;
      range_.most = min(range_.most - range_.least, (1u << shift) - 1) + range_.least;
      if (in_range <= kFew) {
        if (!is_aside_) put_aside(range_, 0);
        return settle(rank, k);
      }
      if (range_.least == range_.most) return {range_.least, in_range - rank, k, false};
    }
  }

  // The place of the first tie that is kept. Only one thread learns it; the others get false.
  __device__ bool find_lowest(const Threshold& threshold, unsigned& place) {
    if (threshold.short_of_keys) return false;
    if (is_settled_) {
      place = lowest_;
      return threadIdx.x == 0;
    }
    unsigned ties = 0;
    unsigned first_tie = 0;
    visit_candidates(candidates_, [&](unsigned first, unsigned bits) {
      const unsigned mask = __ballot_sync(kFullWarp, threshold.tie(bits));
      if (ties == 0 && mask != 0) first_tie = first + __ffs(mask) - 1;
      ties += __popc(mask);
    });
    const unsigned before = sum_over_earlier_warps(storage_.warp_ties, ties);
    if (threshold.dropped_ties < before || threshold.dropped_ties >= before + ties) return false;
    unsigned to_skip = threshold.dropped_ties - before;  // ties of this warp's part
    place = first_tie;
    if (to_skip > 0) {
      visit_candidates(candidates_, [&](unsigned first, unsigned bits) {
        const unsigned mask = __ballot_sync(kFullWarp, threshold.tie(bits));
        const bool here = (mask >> lane_index() & 1) != 0 &&
                          static_cast<unsigned>(__popc(mask & lanes_before(lane_index()))) == to_skip;
        const unsigned found = __ballot_sync(kFullWarp, here);
        if (found != 0) place = first + __ffs(found) - 1;
        to_skip -= __popc(mask);  // wraps around behind the tie that is found, out of reach
      });
    }
    return lane_index() == 0;
  }

  // Calls keep(position, bits, key) for every key of at least these bits, with positions in ascending order
  // of the keys, and returns their number.
  template <typename Keep>
  __device__ unsigned for_each_from(unsigned least_bits, Keep&& keep) {
    unsigned count = 0;
    visit_candidates(candidates_, [&](unsigned, unsigned bits) {
      count += __popc(__ballot_sync(kFullWarp, bits >= least_bits));
    });
    unsigned position = sum_over_earlier_warps(storage_.warp_above, count);
    const unsigned all =
        __reduce_add_sync(kFullWarp, lane_index() < kSelectWarps ? storage_.warp_above[lane_index()] : 0u);
    visit_candidates(candidates_, [&](unsigned first, unsigned bits) {
      const unsigned mask = __ballot_sync(kFullWarp, bits >= least_bits);
      if (bits >= least_bits) {
        keep(position + __popc(mask & lanes_before(lane_index())), bits,
             candidates_.key(first + lane_index()));
      }
      position += __popc(mask);
    });
    return all;
  }

  // Calls keep(position, bits, key) for every key kept, with positions in ascending order of the keys.
  template <typename Keep>
  __device__ void for_each_kept(const Threshold& threshold, Keep&& keep) {
    unsigned above = 0;
    unsigned ties = 0;
    visit_candidates(candidates_, [&](unsigned, unsigned bits) {
      above += __popc(__ballot_sync(kFullWarp, threshold.above(bits)));
      ties += __popc(__ballot_sync(kFullWarp, threshold.tie(bits)));
    });
    unsigned position = sum_over_earlier_warps(storage_.warp_above, above);
    ties = sum_over_earlier_warps(storage_.warp_ties, ties);
    if (ties > threshold.dropped_ties) position += ties - threshold.dropped_ties;
    visit_candidates(candidates_, [&](unsigned first, unsigned bits) {
      const unsigned before = lanes_before(lane_index());
      const bool tie = threshold.tie(bits);
      const unsigned tie_mask = __ballot_sync(kFullWarp, tie);
      const bool kept =
          threshold.above(bits) || (tie && ties + __popc(tie_mask & before) >= threshold.dropped_ties);
      const unsigned mask = __ballot_sync(kFullWarp, kept);
      if (kept) keep(position + __popc(mask & before), bits, candidates_.key(first + lane_index()));
      position += __popc(mask);
      ties += __popc(tie_mask);
    });
  }

 private:
  // Bits of enabled keys, both ends included.
  struct Range {
    unsigned least = 0x00800000u;
    unsigned most = 0xff800000u;

    __device__ bool has(unsigned bits) const { return bits - least <= most - least; }
    // Numbers that the scores of a range lie between: the least one's, and the greatest one's.
    __device__ float least_score() const { return score_of(least); }
    __device__ float most_score() const { return score_of(most == 0x7fffffffu ? most - 1 : most); }

    // 0x7fffffff, which no score has, would be -0.
    __device__ static float score_of(unsigned bits) {
      return __uint_as_float((bits >> 31) != 0 ? bits ^ 0x80000000u : ~bits);
    }
  };

  __device__ void clear() {
    for (unsigned bin = threadIdx.x; bin < 2048; bin += kSelectThreads) storage_.histogram[bin] = 0;
    if (threadIdx.x == 0) storage_.num_aside = storage_.highest = storage_.num_few = 0;
    __syncthreads();
  }

  // Bits that probably at least k of the candidates reach, twice as many if there is room for them; 0 where
  // none are sought. The sample is 32 runs of neighbouring candidates, evenly spread; where few candidates
  // shall reach the bound, each key is the best of several runs. Every warp finds the bound for one key of
  // each run, and the median of the warps is taken.
  __device__ unsigned bound_from_sample(unsigned k) {
    const unsigned size = candidates_.size();
    const unsigned wanted = min(max(2 * k, kMaxAside / 16), (k + kMaxAside) / 2);
    if (k > kMaxAside / 4 * 3 || size < kSelectThreads || wanted > size / 4 * 3) return 0;
    const float share = static_cast<float>(wanted) / static_cast<float>(size);
    constexpr float kLeastOrder = 4;  // of a warp's 32: the first are too uncertain
    const auto runs = min(static_cast<unsigned>(ceilf(kLeastOrder / (32 * share))), size / kSelectThreads);
    const auto order = static_cast<int>(32 * share * static_cast<float>(runs) + 0.5f);
    const unsigned distance = size / (32 * runs);
    unsigned value = 0;
    for (unsigned run = warp_index(); run < 32 * runs; run += 32) {
      value = max(value, candidates_.bits(run * distance + (distance - 32) / 2 + lane_index()));
    }
    unsigned(&sample)[kMaxAside] = storage_.places;
    sample[lane_index() * 33 + warp_index()] = value;
    __syncthreads();
    value = sort_in_warp(sample[warp_index() * 33 + lane_index()]);
    value = __shfl_sync(kFullWarp, value, max(order, 1) - 1);
    if (lane_index() == 0) storage_.warp_sums[warp_index()] = value;
    __syncthreads();
    return __shfl_sync(kFullWarp, sort_in_warp(storage_.warp_sums[lane_index()]), 16);
  }

  // Puts the candidates in the range aside, unless they are fewer than `least` or more than there is room
  // for; then range_ is theirs.
  __device__ void put_aside(const Range& range, unsigned least) {
    collect<false>(candidates_.list_bits, candidates_.list_size, 0, range);
    if (candidates_.range_is_scores) {
      collect<true>(candidates_.range_bits, candidates_.range_size, candidates_.list_size, range);
    } else {
      collect<false>(candidates_.range_bits, candidates_.range_size, candidates_.list_size, range);
    }
    __syncthreads();
    const unsigned number = storage_.num_aside;
    is_aside_ = number >= least && number <= kMaxAside;
    unsigned highest = 0;
    if (is_aside_) {
#pragma unroll
      for (unsigned i = 0; i < kPerThread; ++i) {
        const unsigned index = threadIdx.x + i * kSelectThreads;
        bits_[i] = index < number ? candidates_.bits(storage_.places[index]) : 0;
        highest = max(highest, bits_[i]);
      }
      highest = __reduce_max_sync(kFullWarp, highest);
      if (lane_index() == 0) atomicMax(&storage_.highest, highest);
    }
    __syncthreads();
    if (is_aside_) {
      range_ = {range.least, max(storage_.highest, range.least)};
    } else {
      if (threadIdx.x == 0) storage_.num_aside = 0;
      __syncthreads();
    }
  }

  // Appends the places of the keys of array[size] that are in the range to those put aside; num_aside counts
  // also those that there is no room for. first_place: of array[0].
  template <bool kScores>
  __device__ void collect(const unsigned* array, unsigned size, unsigned first_place, const Range& range) {
    const float least = range.least_score();
    const float most = range.most_score();
    const auto reaches = [&](unsigned value) {
      if (!kScores) return range.has(value);
      return __uint_as_float(value) >= least && __uint_as_float(value) <= most;
    };
    for (unsigned first = 0; first < size; first += 32 * kSelectThreads) {
      const unsigned* const own = array + first + threadIdx.x;
      const unsigned left = size - first;
      unsigned mask = 0;  // of the thread's 32 keys, kSelectThreads apart
      for (unsigned u = 0; u < 32 && u * kSelectThreads < left; u += kGroup) {
        unsigned values[kGroup];
        if ((u + kGroup) * kSelectThreads <= left) {
#pragma unroll
          for (unsigned i = 0; i < kGroup; ++i) values[i] = own[(u + i) * kSelectThreads];
        } else {
#pragma unroll
          for (unsigned i = 0; i < kGroup; ++i) {
            constexpr unsigned kNone = kScores ? 0xffffffffu : 0;
            values[i] = threadIdx.x + (u + i) * kSelectThreads < left ? own[(u + i) * kSelectThreads] : kNone;
          }
        }
        unsigned group = 0;
#pragma unroll
        for (unsigned i = 0; i < kGroup; ++i) group |= reaches(values[i]) ? 1u << i : 0;
        mask |= group << u;
      }
      append_places(mask, first_place + first + threadIdx.x);
    }
  }

  // Appends place + n * kSelectThreads for every bit n of the mask.
  __device__ void append_places(unsigned mask, unsigned place) {
    const auto number = static_cast<unsigned>(__popc(mask));
    unsigned until = number;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const unsigned before = __shfl_up_sync(kFullWarp, until, step);
      if (lane_index() >= step) until += before;
    }
    const unsigned all = __shfl_sync(kFullWarp, until, 31);
    if (all == 0) return;
    unsigned index = 0;
    if (lane_index() == 0) index = atomicAdd(&storage_.num_aside, all);
    index = __shfl_sync(kFullWarp, index, 0) + until - number;
    for (; mask != 0 && index < kMaxAside; mask &= mask - 1) {
      storage_.places[index++] =
          place + static_cast<unsigned>(__ffs(static_cast<int>(mask)) - 1) * kSelectThreads;
    }
  }

  // The histogram of the bits in the range, 2^shift of them to a bin. Where scores hardly differ, whole warps
  // share a bin; then one lane adds for all.
  __device__ void count(int shift) {
    const auto add = [&](unsigned bits, unsigned number) {
      if (range_.has(bits)) atomicAdd(&storage_.histogram[(bits - range_.least) >> shift], number);
    };
    if (is_aside_) {
#pragma unroll
      for (unsigned i = 0; i < kPerThread; ++i) add(bits_[i], 1);
    } else {
      visit_in_any_order(candidates_, [&](unsigned, const unsigned(&bits)[kGroup]) {
        if (all_equal(bits)) {
          if (lane_index() == 0) add(bits[0], 32 * kGroup);
          return;
        }
#pragma unroll
        for (unsigned u = 0; u < kGroup; ++u) add(bits[u], 1);
      });
    }
    __syncthreads();
  }

  // All keys of a warp's group have the same bits.
  __device__ static bool all_equal(const unsigned (&bits)[kGroup]) {
    const unsigned first = __shfl_sync(kFullWarp, bits[0], 0);
    bool equal = true;
#pragma unroll
    for (unsigned u = 0; u < kGroup; ++u) equal = equal && bits[u] == first;
    return __all_sync(kFullWarp, equal);
  }

  // The bin that holds the key of this rank, counted from the highest bin, 1 the first, unless fewer are
  // counted. Returns how many are, and clears the histogram. A thread has two bins.
  __device__ unsigned find_bin(unsigned rank) {
    static_assert(kSelectThreads == 1024);
    const unsigned low_bin = 2046 - 2 * threadIdx.x;
    uint2* const bins = reinterpret_cast<uint2*>(storage_.histogram + low_bin);
    const uint2 counts = *bins;
    *bins = {0, 0};
    const unsigned sum = counts.x + counts.y;
    const unsigned warp_sum = __reduce_add_sync(kFullWarp, sum);
    if (lane_index() == 0) storage_.warp_sums[warp_index()] = warp_sum;
    __syncthreads();
    const unsigned of_lane = storage_.warp_sums[lane_index()];
    const unsigned counted = __reduce_add_sync(kFullWarp, of_lane);
    unsigned before = __reduce_add_sync(kFullWarp, lane_index() < warp_index() ? of_lane : 0u);
    if (before < rank && rank <= before + warp_sum) {
      unsigned until = sum;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const unsigned earlier = __shfl_up_sync(kFullWarp, until, step);
        if (lane_index() >= step) until += earlier;
      }
      before += until - sum;
      const bool is_high = rank <= before + counts.y;
      if (before < rank && rank <= before + sum) {
        storage_.bin = low_bin + (is_high ? 1 : 0);
        storage_.above = before + (is_high ? 0 : counts.y);
        storage_.in_bin = is_high ? counts.y : counts.x;
      }
    }
    __syncthreads();
    return counted;
  }

  // The threshold, when at most kFew candidates are in the range, and among them the lowest kept has this
  // rank.
  __device__ Threshold settle(unsigned rank, int k) {
#pragma unroll
    for (unsigned i = 0; i < kPerThread; ++i) {
      if (!range_.has(bits_[i])) continue;
      const unsigned place = storage_.places[threadIdx.x + i * kSelectThreads];
      storage_.few[atomicAdd(&storage_.num_few, 1u)] = make_rank(bits_[i], static_cast<int>(place));
    }
    __syncthreads();
    const auto number = static_cast<int>(storage_.num_few);
    const Rank own = lane_index() < number ? storage_.few[lane_index()] : 0;
    unsigned better = own == 0 ? kFew : 0;
    for (int i = 0; i < number; ++i) better += storage_.few[i] > own ? 1 : 0;
    const unsigned here = __ballot_sync(kFullWarp, better == rank - 1);
    const Rank lowest = __shfl_sync(kFullWarp, own, __ffs(static_cast<int>(here)) - 1);
    const auto bits = static_cast<unsigned>(lowest >> 32);
    const bool dropped = own < lowest && own >> 32 == bits;
    is_settled_ = true;
    lowest_ = static_cast<unsigned>(key_of(lowest));
    return {bits, static_cast<unsigned>(__popc(__ballot_sync(kFullWarp, dropped))), k, false};
  }

  __device__ unsigned sum_over_earlier_warps(unsigned (&sums)[kSelectWarps], unsigned value) {
    if (lane_index() == 0) sums[warp_index()] = value;
    __syncthreads();
    return __reduce_add_sync(kFullWarp, lane_index() < warp_index() ? sums[lane_index()] : 0u);
  }

  Storage& storage_;
  const Candidates candidates_;
  Range range_;                // where the bits of the lowest key kept lie
  bool is_aside_ = false;      // the candidates in the range are
  unsigned bits_[kPerThread];  // of the thread's candidates put aside, 0 for none
  bool is_settled_ = false;
  unsigned lowest_ = 0;  // if settled: the place of the lowest key kept
};

}  // namespace flash_dmattn::cuda
