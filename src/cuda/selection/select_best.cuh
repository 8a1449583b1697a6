// The k keys of highest rank among the candidates of one CTA, by radix selection: 11, 11 and 10 bits of the
// score at a time, from the top. The candidates are read again in every pass, from the L1 or L2 cache, so
// that any number of them will do. Ties at the lowest score kept are settled by the order of the candidates,
// which is that of their indices.
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
  const unsigned* range_bits = nullptr;  // [range_size]
  const int* range_keys = nullptr;       // [range_size]; null: range_begin, range_begin + 1, ...
  int range_begin = 0;
  unsigned range_size = 0;

  __device__ unsigned size() const { return list_size + range_size; }
  __device__ unsigned bits(unsigned i) const {
    return i < list_size ? list_bits[i] : range_bits[i - list_size];
  }
  __device__ int key(unsigned i) const {
    if (i < list_size) return list_keys[i];
    return range_keys != nullptr ? range_keys[i - list_size] : range_begin + static_cast<int>(i - list_size);
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

// Visits the candidates in any order: visit(place, bits) with bits 0 beyond the end. All lanes of a warp take
// part.
template <typename Visit>
__device__ __forceinline__ void visit_in_any_order(const Candidates& candidates, Visit&& visit) {
  constexpr unsigned kUnroll = 4;
  const auto visit_array = [&](const unsigned* array, unsigned size, unsigned first_place) {
    for (unsigned first = 0; first < size; first += kSelectThreads * kUnroll) {
      unsigned bits[kUnroll];
#pragma unroll
      for (unsigned u = 0; u < kUnroll; ++u) {
        const unsigned i = first + u * kSelectThreads + threadIdx.x;
        bits[u] = i < size ? array[i] : 0;
      }
#pragma unroll
      for (unsigned u = 0; u < kUnroll; ++u) {
        if (first + u * kSelectThreads >= size) break;
        visit(first_place + first + u * kSelectThreads + threadIdx.x, bits[u]);
      }
    }
  };
  visit_array(candidates.list_bits, candidates.list_size, 0);
  visit_array(candidates.range_bits, candidates.range_size, candidates.list_size);
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
  // Once so few candidates agree with the digits known so far, they are put aside, and the rest is not looked
  // at again.
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
    for (int width = 11; threshold.shift > 0; width = min(11, threshold.shift)) {
      count_digits(threshold, width);
      find_bin(rank);
      if (threshold.shift == 32 && storage_.enabled < static_cast<unsigned>(k)) {
        return {0, 0, 0, static_cast<int>(storage_.enabled), true};
      }
      rank -= storage_.above;
      threshold.digits = threshold.digits << width | storage_.digit;
      threshold.shift -= width;
      threshold.dropped_ties = storage_.in_bin - rank;
      if (storage_.in_bin == 1) break;
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
  // The histogram of the next `width` bits of the keys that agree with threshold.digits.
  __device__ void count_digits(const Threshold& threshold, int width) {
    const int shift = threshold.shift - width;
    const unsigned digit_mask = (1u << width) - 1;
    const bool first_pass = threshold.shift == 32;
    const bool gathers = !gathered_ && !first_pass && storage_.in_bin <= kMaxGathered;
    for (unsigned bin = threadIdx.x; bin < 2048; bin += kSelectThreads) storage_.histogram[bin] = 0;
    if (gathers && threadIdx.x == 0) storage_.num_gathered = 0;
    __syncthreads();
    if (gathered_) {
      for (unsigned i = threadIdx.x; i < storage_.num_gathered; i += kSelectThreads) {
        const unsigned bits = storage_.gathered_bits[i];
        if (bits >> threshold.shift == threshold.digits) {
          atomicAdd(&storage_.histogram[bits >> shift & digit_mask], 1u);
        }
      }
    } else if (gathers) {
      visit_in_any_order(candidates_, [&](unsigned place, unsigned bits) {
        const bool counts = bits >> threshold.shift == threshold.digits;
        if (counts) atomicAdd(&storage_.histogram[bits >> shift & digit_mask], 1u);
        gather(place, bits, counts);
      });
    } else {
      visit_in_any_order(candidates_, [&](unsigned, unsigned bits) {
        const bool counts = first_pass || bits >> threshold.shift == threshold.digits;
        count_digit(bits >> shift & digit_mask, counts);
      });
    }
    gathered_ = gathered_ || gathers;
    __syncthreads();
  }

  // Where scores hardly differ, whole warps share a bin; then one lane adds for all.
  __device__ void count_digit(unsigned digit, bool counts) {
    const unsigned first_digit = __shfl_sync(kFullWarp, digit, 0);
    if (__all_sync(kFullWarp, counts && digit == first_digit)) {
      if (lane_index() == 0) atomicAdd(&storage_.histogram[digit], 32u);
    } else if (counts) {
      atomicAdd(&storage_.histogram[digit], 1u);
    }
  }

  __device__ void gather(unsigned place, unsigned bits, bool gathers) {
    const unsigned mask = __ballot_sync(kFullWarp, gathers);
    if (mask == 0) return;
    const int leader = __ffs(mask) - 1;
    unsigned index = 0;
    if (lane_index() == leader) index = atomicAdd(&storage_.num_gathered, __popc(mask));
    index = __shfl_sync(kFullWarp, index, leader) + __popc(mask & lanes_before(lane_index()));
    if (gathers && index < kMaxGathered) {
      storage_.gathered_bits[index] = bits;
      storage_.gathered_places[index] = place;
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
