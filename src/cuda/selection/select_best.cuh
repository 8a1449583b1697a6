// The k keys of highest rank among the candidates of one CTA, by radix selection: 11, 11 and 10 bits of the
// score at a time, from the top. A sample of the candidates gives a bound that the lowest score kept cannot
// be below. Mostly few candidates reach it: one look at all of them puts these aside, and the rest is done
// there. Otherwise the candidates are read again in every pass, from the L1 or L2 cache, so that any number
// of them will do. Ties at the lowest score kept are settled by the order of the candidates, which is that of
// their indices.
#pragma once

#include <cub/block/block_scan.cuh>

#include "cuda/selection/select_problem.cuh"

namespace flash_dmattn::cuda {

constexpr int kSelectThreads = 1024;
constexpr int kSelectCtasPerSm = 2;
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

// The lowest score kept, as far as it is known: keys with bits >> shift above `digits` are kept, of those
// equal to it, the ties, all but the first `dropped_ties`.
struct Threshold {
  unsigned digits = 0;
  int shift = 0;
  unsigned dropped_ties = 0;
  int num_kept = 0;
  bool short_of_keys = false;  // fewer than k are enabled: all of them are kept, and none is a tie

  // No key below it is kept, and no later one below it ever will be.
  __device__ unsigned lower_bound() const { return short_of_keys ? 1 : max(digits << shift, 1u); }
  __device__ bool above(unsigned bits) const { return bits >> shift > digits; }
  __device__ bool tie(unsigned bits) const { return !short_of_keys && bits >> shift == digits; }
};

class BestKeys {
 public:
  // Once so few candidates can be the lowest kept, they are put aside, and the rest is not looked at again.
  static constexpr unsigned kMaxGathered = 4096;

  struct Storage {
    unsigned histogram[2048];
    typename cub::BlockScan<unsigned, kSelectThreads>::TempStorage scan;
    unsigned digit, above, in_bin, enabled;
    unsigned warp_above[kSelectWarps];
    unsigned warp_ties[kSelectWarps];
    unsigned num_gathered;
    unsigned gathered_bits[kMaxGathered];
    unsigned gathered_places[kMaxGathered];
  };

  __device__ BestKeys(Storage& storage, const Candidates& candidates)
      : storage_(storage), candidates_(candidates) {}

  __device__ Threshold find_threshold(int k) {
    Threshold threshold;
    threshold.shift = 32;
    threshold.num_kept = k;
    unsigned rank = k;  // of the key sought, among those that agree with `digits`
    const Bound bound = bound_from_sample(rank);
    for (int width = kFirstWidth; threshold.shift > 0; width = min(11, threshold.shift)) {
      if (threshold.shift == 32) {
        count_first_digits(bound);
      } else {
        count_digits(threshold, width);
      }
      find_bin(rank);
      if (threshold.shift == 32 && storage_.enabled < static_cast<unsigned>(k)) {
        return {0, 0, 0, static_cast<int>(storage_.enabled), true};
      }
      rank -= storage_.above;
      threshold.digits = threshold.digits << width | storage_.digit;
      threshold.shift -= width;
      threshold.dropped_ties = storage_.in_bin - rank;
      // Keys below the bound are not counted, so that a bin with some of them may hold more.
      if (storage_.in_bin == 1 && threshold.digits << threshold.shift >= bound.least) break;
    }
    return threshold;
  }

  // The place of the first tie that is kept. Only one thread learns it; the others get false.
  __device__ bool find_lowest(const Threshold& threshold, unsigned& place) {
    if (gathered_ && storage_.in_bin == 1) {
      bool found = false;
      for (unsigned i = threadIdx.x; i < storage_.num_gathered; i += kSelectThreads) {
        if (!threshold.tie(storage_.gathered_bits[i])) continue;
        place = storage_.gathered_places[i];
        found = true;
      }
      return found;
    }
    unsigned ties = 0;
    unsigned first_tie = 0;
    visit_candidates(candidates_, [&](unsigned first, unsigned bits) {
      const unsigned mask = __ballot_sync(kFullWarp, threshold.tie(bits));
      if (ties == 0 && mask != 0) first_tie = first + __ffs(mask) - 1;
      ties += __popc(mask);
    });
    const unsigned before = sum_over_earlier_warps(storage_.warp_ties, ties);
    if (threshold.short_of_keys || threshold.dropped_ties < before ||
        threshold.dropped_ties >= before + ties) {
      return false;
    }
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
  static constexpr int kFirstWidth = 11;

  // Bits that k of the candidates reach, and how many of them probably do.
  struct Bound {
    unsigned least;
    unsigned expected;
  };

  // Found in a sample: the later keys, since scores may grow. Without a bound, all enabled keys reach it.
  __device__ Bound bound_from_sample(unsigned k) {
    // Of n keys about n k / m reach the k-th of a sample of m.
    constexpr unsigned kAimedAt = kMaxGathered * 3 / 4;
    const unsigned size = candidates_.size();
    const Bound none{1, size};
    if (size <= kMaxGathered) return none;
    const bool from_list = candidates_.list_size >= k;
    const unsigned in_array = from_list ? candidates_.list_size : candidates_.range_size;
    const auto wanted = static_cast<unsigned>(static_cast<unsigned long long>(size) * k / kAimedAt);
    const unsigned sample_size = min(max(wanted, k), in_array);
    if (sample_size < k || sample_size > size / 2) return none;
    const auto visit_sample = [&](auto&& visit) {
      visit_groups(from_list ? candidates_.list_bits : candidates_.range_bits,
                   !from_list && candidates_.range_is_scores, in_array - sample_size, in_array,
                   [&](unsigned, const unsigned(&bits)[kGroup]) { visit(bits); });
    };
    const auto expected = [&](unsigned reached) {
      return static_cast<unsigned>(static_cast<unsigned long long>(reached) * size / sample_size);
    };
    clear_histogram();
    visit_sample([&](const unsigned(&bits)[kGroup]) { count_group(bits, 1); });
    __syncthreads();
    find_bin(k);
    if (storage_.enabled < k) return none;
    Threshold threshold;
    threshold.digits = storage_.digit;
    threshold.shift = 32 - kFirstWidth;
    unsigned reached = storage_.above + storage_.in_bin;
    if (expected(reached) > kMaxGathered * 7 / 8) {
      const unsigned above = storage_.above;
      __syncthreads();  // the bin is known to all
      clear_histogram();
      visit_sample([&](const unsigned(&bits)[kGroup]) { count_next_digit(bits, threshold, 11); });
      __syncthreads();
      find_bin(k - above);
      threshold.digits = threshold.digits << 11 | storage_.digit;
      threshold.shift -= 11;
      reached = above + storage_.above + storage_.in_bin;
    }
    __syncthreads();  // the bin is known to all
    return {threshold.digits << threshold.shift, expected(reached)};
  }

  // The histogram of the first digits of the keys that reach the bound. If they are few, they are put aside
  // first.
  __device__ void count_first_digits(const Bound& bound) {
    constexpr int kShift = 32 - kFirstWidth;
    clear_histogram();
    if (bound.expected <= kMaxGathered) {
      visit_in_any_order(candidates_, [&](unsigned place, const unsigned(&bits)[kGroup]) {
        gather(place, bits, [&](unsigned key_bits) { return key_bits >= bound.least; });
      });
      __syncthreads();
      gathered_ = storage_.num_gathered <= kMaxGathered;
    }
    if (gathered_) {
      for (unsigned i = threadIdx.x; i < storage_.num_gathered; i += kSelectThreads) {
        atomicAdd(&storage_.histogram[storage_.gathered_bits[i] >> kShift], 1u);
      }
    } else {
      visit_in_any_order(candidates_,
                         [&](unsigned, const unsigned(&bits)[kGroup]) { count_group(bits, bound.least); });
    }
    __syncthreads();
  }

  // The histogram of the next `width` bits of the keys that agree with threshold.digits.
  __device__ void count_digits(const Threshold& threshold, int width) {
    const bool gathers = !gathered_ && storage_.in_bin <= kMaxGathered;
    const auto counts = [&](unsigned bits) { return bits >> threshold.shift == threshold.digits; };
    __syncthreads();  // in_bin and num_gathered are read
    clear_histogram(!gathered_);
    if (gathered_) {
      for (unsigned i = threadIdx.x; i < storage_.num_gathered; i += kSelectThreads) {
        const unsigned bits = storage_.gathered_bits[i];
        if (counts(bits)) atomicAdd(&storage_.histogram[next_digit(bits, threshold, width)], 1u);
      }
    } else {
      visit_in_any_order(candidates_, [&](unsigned place, const unsigned(&bits)[kGroup]) {
        count_next_digit(bits, threshold, width);
        if (gathers) gather(place, bits, counts);
      });
    }
    gathered_ = gathered_ || gathers;
    __syncthreads();
  }

  __device__ void clear_histogram(bool and_gathered = true) {
    for (unsigned bin = threadIdx.x; bin < 2048; bin += kSelectThreads) storage_.histogram[bin] = 0;
    if (and_gathered && threadIdx.x == 0) storage_.num_gathered = 0;
    __syncthreads();
  }

  // All keys of a warp's group have the same bits.
  __device__ bool all_equal(const unsigned (&bits)[kGroup]) {
    const unsigned first = __shfl_sync(kFullWarp, bits[0], 0);
    bool equal = true;
#pragma unroll
    for (unsigned u = 0; u < kGroup; ++u) equal = equal && bits[u] == first;
    return __all_sync(kFullWarp, equal);
  }

  __device__ static unsigned next_digit(unsigned bits, const Threshold& threshold, int width) {
    return bits >> (threshold.shift - width) & ((1u << width) - 1);
  }

  // Adds the next `width` bits of the keys that agree with threshold.digits. Where scores hardly differ,
  // whole warps share a bin; then one lane adds for all.
  __device__ void count_next_digit(const unsigned (&bits)[kGroup], const Threshold& threshold, int width) {
    const auto count = [&](unsigned key_bits, unsigned number) {
      if (key_bits >> threshold.shift != threshold.digits) return;
      atomicAdd(&storage_.histogram[next_digit(key_bits, threshold, width)], number);
    };
    if (all_equal(bits)) {
      if (lane_index() == 0) count(bits[0], 32 * kGroup);
      return;
    }
#pragma unroll
    for (unsigned u = 0; u < kGroup; ++u) count(bits[u], 1);
  }

  // Adds the first digits of the keys that reach `least`. Bin 0, that of disabled keys, is never looked at.
  __device__ void count_group(const unsigned (&bits)[kGroup], unsigned least) {
    constexpr int kShift = 32 - kFirstWidth;
    if (all_equal(bits)) {
      if (lane_index() == 0 && bits[0] >= least) {
        atomicAdd(&storage_.histogram[bits[0] >> kShift], 32 * kGroup);
      }
      return;
    }
#pragma unroll
    for (unsigned u = 0; u < kGroup; ++u) {
      if (bits[u] >= least) atomicAdd(&storage_.histogram[bits[u] >> kShift], 1u);
    }
  }

  // Puts the keys aside for which gathers(bits), as long as there is room; num_gathered counts the others
  // too.
  template <typename Gathers>
  __device__ void gather(unsigned place, const unsigned (&bits)[kGroup], const Gathers& gathers) {
    unsigned masks[kGroup];
    unsigned count = 0;
#pragma unroll
    for (unsigned u = 0; u < kGroup; ++u) {
      masks[u] = __ballot_sync(kFullWarp, gathers(bits[u]));
      count += __popc(masks[u]);
    }
    if (count == 0) return;
    unsigned index = 0;
    if (lane_index() == 0) index = atomicAdd(&storage_.num_gathered, count);
    index = __shfl_sync(kFullWarp, index, 0);
#pragma unroll
    for (unsigned u = 0; u < kGroup; ++u) {
      const unsigned mine = index + __popc(masks[u] & lanes_before(lane_index()));
      if ((masks[u] >> lane_index() & 1) != 0 && mine < kMaxGathered) {
        storage_.gathered_bits[mine] = bits[u];
        storage_.gathered_places[mine] = place + u * kSelectThreads;
      }
      index += __popc(masks[u]);
    }
  }

  // The bin that holds the key of this rank, counted from the highest digit, 1 the first. Also counts the
  // enabled keys: in the first pass they are those of the bins from 1 on, since the least enabled score is
  // 0x00800000.
  __device__ void find_bin(unsigned rank) {
    constexpr int kBins = 2048 / kSelectThreads;
    const unsigned first_bin = 2047 - kBins * threadIdx.x;
    unsigned counts[kBins];
    unsigned sum = 0;
#pragma unroll
    for (int i = 0; i < kBins; ++i) {
      counts[i] = storage_.histogram[first_bin - i];
      sum += counts[i];
    }
    unsigned before;
    cub::BlockScan<unsigned, kSelectThreads>(storage_.scan).ExclusiveSum(sum, before);
    if (threadIdx.x == kSelectThreads - 1) storage_.enabled = before + sum - counts[kBins - 1];
#pragma unroll
    for (int i = 0; i < kBins; ++i) {
      if (before < rank && rank <= before + counts[i]) {
        storage_.digit = first_bin - i;
        storage_.above = before;
        storage_.in_bin = counts[i];
      }
      before += counts[i];
    }
    __syncthreads();
  }

  __device__ unsigned sum_over_earlier_warps(unsigned (&sums)[kSelectWarps], unsigned value) {
    if (lane_index() == 0) sums[warp_index()] = value;
    __syncthreads();
    return __reduce_add_sync(kFullWarp, lane_index() < warp_index() ? sums[lane_index()] : 0u);
  }

  Storage& storage_;
  const Candidates candidates_;
  bool gathered_ = false;
};

}  // namespace flash_dmattn::cuda
