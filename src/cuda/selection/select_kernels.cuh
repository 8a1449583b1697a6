// The kernels of the selection but the last (finish_chunks, in select_chunk.cuh), in the order in which they
// run.
#pragma once

#include "cuda/selection/select_best.cuh"
#include "cuda/selection/select_problem.cuh"

namespace flash_dmattn::cuda {

constexpr int kConvertThreads = 256;
constexpr int kConvertTile = 1024;
constexpr int kDeathThreads = 1024;

// The ordered bits of all scores, side by side whatever the strides of the scores, and the expiry of the
// prefix as it is for keys that are not kept at its end. With keep_all, expiry alone. A CTA owns kConvertTile
// keys of a sequence and head.
__global__ void __launch_bounds__(kConvertThreads)
    convert_scores(const __grid_constant__ SelectProblem problem) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const auto [sequence, head, tile] = find_piece(problem, problem.tiles);
  const HeadScores scores = problem.scores_of(sequence, head);
  const ExpiryWriter writer = problem.writer_of(sequence, head);
  const int prefix = problem.cut.prefix(sequence.seqlen_k);
  unsigned* to = problem.keep_all ? nullptr : problem.bits + problem.keys_of(sequence, head);
  constexpr int kPerThread = kConvertTile / kConvertThreads;
  const std::int64_t begin = static_cast<std::int64_t>(tile) * kConvertTile + threadIdx.x;
  unsigned bits[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const std::int64_t key = begin + i * kConvertThreads;
    bits[i] = key < sequence.seqlen_k ? scores.bits(static_cast<int>(key)) : 0;
  }
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const std::int64_t position = begin + i * kConvertThreads;
    if (position >= sequence.seqlen_k) return;
    const int key = static_cast<int>(position);
    if (to != nullptr) to[key] = bits[i];
    if (key >= prefix) continue;
    if (bits[i] == 0) {
      writer.disabled(key);
    } else if (problem.keep_all) {
      writer.never_evicted(key);
    } else {
      writer.dropped(key, key);
    }
  }
}

// Copies the keep_window best candidates, in their order, to bits[keep_window] and keys[keep_window].
__device__ inline Threshold copy_best(BestKeys::Storage& storage, const Candidates& candidates,
                                      int keep_window, unsigned* bits, int* keys) {
  BestKeys best(storage, candidates);
  const Threshold threshold = best.find_threshold(keep_window);
  best.for_each_kept(threshold, [&](unsigned position, unsigned kept_bits, int key) {
    if (position >= static_cast<unsigned>(keep_window)) return;
    bits[position] = kept_bits;
    keys[position] = key;
  });
  for (int i = threshold.num_kept + static_cast<int>(threadIdx.x); i < keep_window; i += kSelectThreads) {
    bits[i] = 0;
    keys[i] = 0;
  }
  return threshold;
}

// local_bits and local_keys: the keep_window best keys of each super-chunk that is followed by another
// boundary. A CTA owns a super-chunk.
__global__ void __launch_bounds__(kSelectThreads, kSelectCtasPerSm)
    select_in_supers(const __grid_constant__ SelectProblem problem) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  __shared__ BestKeys::Storage storage;
  const auto [sequence, head, super] = find_piece(problem, problem.supers);
  const SelectCut& cut = problem.cut;
  const int seqlen = sequence.seqlen_k;
  const int supers = cut.supers(seqlen);
  const bool last_counts = cut.tail_length(seqlen) == 0;
  if (supers <= 1 || super >= supers - (last_counts ? 0 : 1)) return;
  const int begin = cut.super_begin(seqlen, super);
  const int end = super + 1 < supers ? cut.super_begin(seqlen, super + 1) : seqlen;
  Candidates candidates;
  candidates.range_bits = problem.bits + problem.keys_of(sequence, head) + begin;
  candidates.range_begin = begin;
  candidates.range_size = end - begin;
  const std::int64_t list = problem.list_of(sequence, head, super);
  copy_best(storage, candidates, problem.keep_window, problem.local_bits + list, problem.local_keys + list);
}

// The local lists of the first `supers` super-chunks.
__device__ inline Candidates best_of_supers(const SelectProblem& problem, const Sequence& sequence, int head,
                                            int supers) {
  const std::int64_t list = problem.list_of(sequence, head, 0);
  Candidates candidates;
  candidates.list_bits = problem.local_bits + list;
  candidates.list_keys = problem.local_keys + list;
  candidates.list_size = static_cast<unsigned>(supers) * problem.keep_window;
  return candidates;
}

// survivor_bits and survivor_keys where a super-chunk of the tail begins, and entrant_bits, entrant_keys and
// num_entrants of the super-chunk: of its keys those that may enter the window at all, since they are not
// below the least that is kept at its start. Few do in a long sequence whose scores do not grow. A CTA owns a
// super-chunk.
__global__ void __launch_bounds__(kSelectThreads, kSelectCtasPerSm)
    merge_supers(const __grid_constant__ SelectProblem problem) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  __shared__ BestKeys::Storage storage;
  const auto [sequence, head, super] = find_piece(problem, problem.supers);
  const int seqlen = sequence.seqlen_k;
  if (super == 0 || super < problem.cut.prefix_supers(seqlen) || super >= problem.cut.supers(seqlen)) return;
  const std::int64_t list = problem.list_of(sequence, head, super);
  const Threshold threshold =
      copy_best(storage, best_of_supers(problem, sequence, head, super), problem.keep_window,
                problem.survivor_bits + list, problem.survivor_keys + list);
  __syncthreads();
  const int begin = problem.cut.super_begin(seqlen, super);
  Candidates keys;
  keys.range_bits = problem.bits + problem.keys_of(sequence, head) + begin;
  keys.range_begin = begin;
  keys.range_size = min(problem.cut.super_chunk, seqlen - begin);
  const std::int64_t first = problem.keys_of(sequence, head) + begin;
  const unsigned num_entrants =
      BestKeys(storage, keys)
          .for_each_from(threshold.lower_bound(), [&](unsigned position, unsigned bits, int key) {
            problem.entrant_bits[first + position] = bits;
            problem.entrant_keys[first + position] = key;
          });
  if (threadIdx.x == 0) problem.num_entrants[list / problem.keep_window] = static_cast<int>(num_entrants);
}

// How many of the ascending keys lie before the position. All lanes of a warp call.
__device__ inline unsigned count_before(const int* keys, unsigned size, int position) {
  unsigned low = 0;  // the answer lies in [low, low + size]
  while (size > 0) {
    const unsigned step = (size + 31) / 32;
    const unsigned place = (lane_index() + 1) * step - 1;  // the last of the lane's part
    const bool before = place < size && keys[low + place] < position;
    const auto parts = static_cast<unsigned>(__popc(__ballot_sync(kFullWarp, before)));
    low += parts * step;
    size = min(step - 1, size - min(size, parts * step));
  }
  return low;
}

// Without a tail: expiry of the keys kept at the end. A CTA owns a sequence and head.
__global__ void __launch_bounds__(kSelectThreads, kSelectCtasPerSm)
    keep_best(const __grid_constant__ SelectProblem problem) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  __shared__ BestKeys::Storage storage;
  const int head = static_cast<int>(blockIdx.x % problem.geometry.heads_kv);
  const Sequence sequence =
      problem.geometry.sequence(static_cast<int>(blockIdx.x / problem.geometry.heads_kv));
  const int supers = problem.cut.supers(sequence.seqlen_k);
  Candidates candidates;
  if (supers > 1) {
    candidates = best_of_supers(problem, sequence, head, supers);
  } else {
    candidates.range_bits = problem.bits + problem.keys_of(sequence, head);
    candidates.range_size = sequence.seqlen_k;
  }
  BestKeys best(storage, candidates);
  const Threshold threshold = best.find_threshold(problem.keep_window);
  const ExpiryWriter writer = problem.writer_of(sequence, head);
  best.for_each_kept(threshold, [&](unsigned, unsigned, int key) {
    if (static_cast<unsigned>(key) < static_cast<unsigned>(sequence.seqlen_k)) writer.never_evicted(key);
  });
}

// Later boundaries have more to read. The last ones come first, and the first ones last, so that a CTA that
// shares its SM with one of the first half of the CTAs has the less to do the more that one has.
__device__ inline int boundary_of(const SelectProblem& problem, int piece) {
  if (problem.geometry.packed()) return piece;
  const int boundaries = problem.boundaries.per_sequence;
  const int half = (boundaries + 1) / 2;
  return piece < half ? boundaries - 1 - piece : piece - half;
}

// thresholds and num_alive; num_old becomes 0. A CTA owns a boundary and reads the survivors at the start of
// its super-chunk and the entrants between them and the boundary; in the first super-chunk all keys.
__global__ void __launch_bounds__(kSelectThreads, kSelectCtasPerSm)
    find_thresholds(const __grid_constant__ SelectProblem problem) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  __shared__ BestKeys::Storage storage;
  const auto [sequence, head, piece] = find_piece(problem, problem.boundaries);
  const int boundary = boundary_of(problem, piece);
  const SelectCut& cut = problem.cut;
  const int seqlen = sequence.seqlen_k;
  const int chunks = cut.chunks(seqlen);
  if (chunks == 0 || boundary > chunks) return;
  const std::int64_t place = problem.boundaries_of(sequence, head) + boundary;
  if (threadIdx.x == 0) {
    problem.thresholds[place] = 0;
    problem.num_alive[place] = 0;
    problem.num_old[place] = 0;
  }
  if (seqlen <= problem.keep_window) return;

  const int prefix = cut.prefix(seqlen);
  const int position = boundary < chunks ? prefix + boundary * cut.chunk : seqlen;
  const int super =
      min(cut.prefix_supers(seqlen) + boundary / (cut.super_chunk / cut.chunk), cut.supers(seqlen) - 1);
  const int begin = cut.super_begin(seqlen, super);
  Candidates candidates;
  if (super > 0) {
    const std::int64_t list = problem.list_of(sequence, head, super);
    candidates.list_bits = problem.survivor_bits + list;
    candidates.list_keys = problem.survivor_keys + list;
    candidates.list_size = problem.keep_window;
    const std::int64_t first = problem.keys_of(sequence, head) + begin;
    candidates.range_bits = problem.entrant_bits + first;
    candidates.range_keys = problem.entrant_keys + first;
    // Never more than the keys, unless cu_seqlens is nonsense.
    const int entrants = min(max(problem.num_entrants[list / problem.keep_window], 0), position - begin);
    candidates.range_size = count_before(candidates.range_keys, entrants, position);
  } else {
    const HeadScores keys = problem.key_bits(sequence, head);
    candidates.range_bits = static_cast<const unsigned*>(keys.data) + begin;
    candidates.range_is_scores = keys.dtype == DType::kFloat32;
    candidates.range_begin = begin;
    candidates.range_size = position - begin;
  }

  BestKeys best(storage, candidates);
  const Threshold threshold = best.find_threshold(problem.keep_window);
  if (threadIdx.x == 0) problem.num_alive[place] = threshold.num_kept;
  unsigned lowest;
  if (best.find_lowest(threshold, lowest)) {
    problem.thresholds[place] = make_rank(candidates.bits(lowest), candidates.key(lowest));
  }
}

// The chunk in which a key dies: the first, from `chunk` on, at whose end the threshold lies above it.
__device__ inline int chunk_of_death(const Rank* thresholds, Rank rank, int chunk, int chunks) {
  int low = chunk;
  int high = chunks;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (thresholds[middle + 1] > rank) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// Puts the key into the list of the chunk in which it dies; chunk -1: the lane has no key. All lanes of a
// warp call.
__device__ inline void append_old(const SelectProblem& problem, const Sequence& sequence, int head, int key,
                                  int chunk) {
  if (!__any_sync(kFullWarp, chunk >= 0)) return;
  const unsigned peers = __match_any_sync(kFullWarp, chunk);
  const int leader = __ffs(peers) - 1;
  int place = 0;
  if (chunk >= 0 && lane_index() == leader) {
    place = atomicAdd(&problem.num_old[problem.boundaries_of(sequence, head) + chunk], __popc(peers));
  }
  place = __shfl_sync(kFullWarp, place, leader) + __popc(peers & lanes_before(lane_index()));
  // No more keys die in a chunk than enter in it, but cu_seqlens may be nonsense.
  if (chunk >= 0 && place < problem.cut.chunk) problem.old_of(sequence, head, chunk)[place] = key;
}

// Expiry of the keys that die at birth, by the threshold before them, or never; the lists `old` of those that
// die in a later chunk. Left to finish_chunks: those that die in the chunk of their birth. A CTA owns the
// keys of a chunk, or as many survivors of the prefix.
__global__ void __launch_bounds__(kDeathThreads, kSelectCtasPerSm)
    find_death_chunks(const __grid_constant__ SelectProblem problem) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const auto [sequence, head, piece] = find_piece(problem, problem.deaths);
  const SelectCut& cut = problem.cut;
  const int seqlen = sequence.seqlen_k;
  const int prefix = cut.prefix(seqlen);
  const int chunks = cut.chunks(seqlen);
  const bool born_here = piece < chunks;
  if (!born_here && prefix == 0) return;
  const Rank* thresholds = problem.thresholds + problem.boundaries_of(sequence, head);
  const ExpiryWriter writer = problem.writer_of(sequence, head);
  const HeadScores bits_of_keys = problem.key_bits(sequence, head);
  const std::int64_t survivors = born_here ? 0 : problem.list_of(sequence, head, cut.prefix_supers(seqlen));
  const int begin = born_here ? prefix + piece * cut.chunk : (piece - chunks) * cut.chunk;
  const int end = born_here ? seqlen : problem.keep_window;

  for (int i = static_cast<int>(threadIdx.x); i < cut.chunk; i += blockDim.x) {
    int key = 0;
    int old_in = -1;
    if (i < end - begin) {
      key = born_here ? begin + i : problem.survivor_keys[survivors + begin + i];
      const unsigned bits = born_here ? bits_of_keys.bits(key) : problem.survivor_bits[survivors + begin + i];
      const Rank rank = make_rank(bits, key);
      if (bits == 0) {
        if (born_here) writer.disabled(key);
      } else if (born_here && rank < thresholds[piece]) {
        writer.dropped(key, key);
      } else {
        const int death = chunk_of_death(thresholds, rank, born_here ? piece : 0, chunks);
        if (death == chunks) {
          writer.never_evicted(key);
        } else if (!born_here || death != piece) {
          old_in = death;
        }
      }
    }
    append_old(problem, sequence, head, key, old_in);
  }
}

}  // namespace flash_dmattn::cuda
