// Exact deaths inside one chunk. The candidates are its new keys above the threshold at its start, and the
// old ones that die in it: at most twice the chunk, whatever keep_window is. Sorted by rank, the time of
// every death is one query: a key dies when as many better ones have come as there were worse ones and free
// places before.
#pragma once

#include "cuda/selection/bin_sort.cuh"
#include "cuda/selection/select_best.cuh"
#include "cuda/selection/select_problem.cuh"

namespace flash_dmattn::cuda {

// Lane l gets the masks of the lanes up to l together.
__device__ inline unsigned union_until(unsigned mask) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const unsigned before = __shfl_up_sync(kFullWarp, mask, step);
    if (lane_index() >= step) mask |= before;
  }
  return mask;
}

// Of the new keys: which time (number among the new keys of the chunk, in the order of their positions) has
// which rank. Answers kth in logarithmic time.
template <int kChunk>
struct RankTimes {
  static constexpr int kBlocks = kChunk / 32;  // of 32 ranks, and of 32 times

  int num_blocks;                       // that are in use
  unsigned short time_of_rank[kChunk];  // rank 0 is the best
  unsigned short rank_of_time[kChunk];
  unsigned until[kBlocks + 1]
                [kBlocks];  // [ranks][times]: the ranks of a block whose time is in block `times` or before
  int count_before[kBlocks + 1][kBlocks];  // [ranks][times]: how many ranks of the blocks before are such
  unsigned best[kBlocks][32];              // [times][n]: the times of a block that have its n + 1 best ranks

  // From time_of_rank[0, num_new) and rank_of_time[0, num_new). Ends without a barrier behind the last
  // writes.
  __device__ void build(int num_new) {
    const int warp = warp_index();
    const int lane = lane_index();
    const int blocks = (num_new + 31) / 32;
    const bool in_use = warp < blocks;
    if (threadIdx.x == 0) num_blocks = blocks;
    if (in_use) {
      const int index = 32 * warp + lane;  // a rank, then a time
      unsigned* const of_block = until[warp];
      if (lane < blocks) of_block[lane] = 0;
      __syncwarp();
      if (index < num_new) atomicOr(of_block + time_of_rank[index] / 32, 1u << lane);
      __syncwarp();
      const unsigned ranks_until = union_until(lane < blocks ? of_block[lane] : 0);
      __syncwarp();
      if (lane < blocks) of_block[lane] = ranks_until;
      if (warp == 0 && lane < blocks) until[blocks][lane] = 0;

      const unsigned by_rank = index < num_new ? (kChunk - rank_of_time[index]) * 32u + lane : 0;
      const unsigned nth = sort_in_warp(by_rank);
      best[warp][lane] = union_until(nth == 0 ? 0 : 1u << nth % 32);
    }
    __syncthreads();
    if (!in_use) return;
    int sum = lane < blocks ? __popc(until[lane][warp]) : 0;
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(kFullWarp, sum, step);
      if (lane >= step) sum += before;
    }
    if (lane < blocks) count_before[lane + 1][warp] = sum;
    if (lane == 0) count_before[0][warp] = 0;
  }

  // New keys among the `top` best whose time is in time_block or before.
  __device__ int count(int top, int time_block) const {
    const unsigned mask = until[top / 32][time_block] & lanes_before(top % 32);
    return count_before[top / 32][time_block] + __popc(mask);
  }

  // The k-th in time, 1 the first, of the `top` best; k <= top.
  __device__ int kth(int top, int k) const {
    int low = 0;
    int high = num_blocks - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (count(top, middle) >= k) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    const int before = low == 0 ? 0 : count(top, low - 1);
    const unsigned times = best[low][(count(top, low) - before - 1) & 31];
    return 32 * low + select_bit(times, k - before);
  }

 private:
  // The place of the n-th set bit, 1 the lowest.
  __device__ static int select_bit(unsigned mask, int n) {
    int place = 0;
    for (int width = 16; width > 0; width /= 2) {
      const int below = __popc(mask >> place & ((1u << width) - 1));
      if (below < n) {
        n -= below;
        place += width;
      }
    }
    return place;
  }
};

template <int kChunk>
struct ChunkStorage {
  Rank ranks[2 * kChunk];
  union {
    RankTimes<kChunk> times;
    typename BinSort<kChunk, 2>::Storage sort;  // before
  };
  unsigned short time_of_offset[kChunk];  // of the new key at this place of the chunk
  unsigned short offset_of_time[kChunk];
  int sums[32];  // of warps
};

// Chunk boundaries and what is known at them.
struct ChunkState {
  int begin = 0;
  int size = 0;
  Rank threshold_before = 0;
  Rank threshold_after = ~Rank{0};
  int free_places = 0;  // of the window, at the chunk's start
  int num_old = 0;
};

// Gathers the candidates, best first, and returns their number. rank: of the thread's new key.
template <int kChunk>
__device__ int gather_candidates(const SelectProblem& problem, const Sequence& sequence, int head, int chunk,
                                 const ChunkState& state, Rank rank, ChunkStorage<kChunk>& storage) {
  const int thread = static_cast<int>(threadIdx.x);
  const bool is_new = rank > state.threshold_before;
  Rank own[2] = {is_new ? rank : 0, 0};
  if (thread < state.num_old) {
    const int key = problem.old_of(sequence, head, chunk)[thread];
    // Always so, unless cu_seqlens is nonsense.
    const bool is_old = static_cast<unsigned>(key) < static_cast<unsigned>(state.begin);
    if (is_old) own[1] = make_rank(problem.key_bits(sequence, head).bits(key), key);
    if (own[1] >> 32 == 0) own[1] = 0;
  }
  int num_new;
  const int time = sum_before(is_new ? 1 : 0, storage.sums, num_new);
  if (is_new) {
    storage.time_of_offset[thread] = static_cast<unsigned short>(time);
    storage.offset_of_time[time] = static_cast<unsigned short>(thread);
  }
  return BinSort<kChunk, 2>(storage.sort, storage.ranks).sort(own);
}

// Expiry of the candidates that die in the chunk. A thread owns the sorted candidates 2 * thread and 2 *
// thread + 1.
template <int kChunk>
__device__ void find_deaths(const ChunkState& state, const ExpiryWriter& writer, int candidates,
                            ChunkStorage<kChunk>& storage) {
  const int first = 2 * static_cast<int>(threadIdx.x);
  Rank ranks[2];
  int time[2];  // negative: an old key, or none
  for (int i = 0; i < 2; ++i) {
    ranks[i] = first + i < candidates ? storage.ranks[first + i] : 0;
    const int offset = ranks[i] == 0 ? -1 : key_of(ranks[i]) - state.begin;
    time[i] = offset < 0 ? -1 : storage.time_of_offset[offset];
  }
  int better_new[2], num_new;
  better_new[0] = sum_before((time[0] >= 0 ? 1 : 0) + (time[1] >= 0 ? 1 : 0), storage.sums, num_new);
  better_new[1] = better_new[0] + (time[0] >= 0 ? 1 : 0);
  for (int i = 0; i < 2; ++i) {
    if (time[i] < 0) continue;
    storage.times.time_of_rank[better_new[i]] = static_cast<unsigned short>(time[i]);
    storage.times.rank_of_time[time[i]] = static_cast<unsigned short>(better_new[i]);
  }
  __syncthreads();
  storage.times.build(num_new);
  __syncthreads();
  for (int i = 0; i < 2; ++i) {
    if (ranks[i] == 0 || ranks[i] >= state.threshold_after) continue;
    const int better_old = first + i - better_new[i];
    const int needed = max(state.free_places + state.num_old - better_old, 1);
    if (needed > better_new[i]) {
      writer.never_evicted(key_of(ranks[i]));
      continue;
    }
    const int death = storage.times.kth(better_new[i], needed);
    writer.dropped(key_of(ranks[i]), state.begin + storage.offset_of_time[death]);
  }
}

// Expiry of every key that dies in the chunk, of those born in it unless they die at birth by the threshold
// before. Without thresholds a sequence is one chunk, and its keys all get their expiry here. A CTA owns a
// chunk.
template <int kChunk>
__global__ void __launch_bounds__(kChunk, kChunk == kSelectThreads ? kSelectCtasPerSm : 1)
    finish_chunks(const __grid_constant__ SelectProblem problem) {
  __shared__ ChunkStorage<kChunk> storage;
  wait_for_previous_kernel();
  const auto [sequence, head, chunk] = find_piece(problem, problem.chunks);
  const int seqlen = sequence.seqlen_k;
  if (chunk >= problem.cut.chunks(seqlen)) return;
  const bool whole = problem.thresholds == nullptr;
  ChunkState state;
  state.begin = problem.cut.prefix(seqlen) + chunk * kChunk;
  state.size = min(kChunk, seqlen - state.begin);
  if (whole) {
    state.free_places = min(problem.keep_window, kChunk + 1);
  } else {
    const std::int64_t place = problem.boundaries_of(sequence, head) + chunk;
    state.threshold_before = problem.thresholds[place];
    state.threshold_after = problem.thresholds[place + 1];
    state.free_places = min(problem.keep_window - problem.num_alive[place], kChunk + 1);
    state.num_old = min(problem.num_old[place], kChunk);
    if (state.threshold_after == 0) return;  // the window is not full yet
  }

  const ExpiryWriter writer = problem.writer_of(sequence, head);
  const int thread = static_cast<int>(threadIdx.x);
  const int key = state.begin + thread;
  unsigned bits = 0;
  if (thread < state.size) {
    bits = problem.key_bits(sequence, head).bits(key);
    if (whole && bits == 0) writer.disabled(key);
  }
  const Rank rank = bits == 0 ? 0 : make_rank(bits, key);
  if (__syncthreads_or(rank > state.threshold_before ? 1 : 0) == 0)
    return;  // nothing enters, so nothing dies
  const int candidates = gather_candidates(problem, sequence, head, chunk, state, rank, storage);
  find_deaths(state, writer, candidates, storage);
}

}  // namespace flash_dmattn::cuda
