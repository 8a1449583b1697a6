// What the kernels of the selection share: the call, the cut of its sequences into pieces, and the arrays
// that the kernels leave to one another.
//
// The prefix of a sequence is what lies before the tail, whose exact expiry is asked for: nothing where every
// row reads expiry, everything where only the keys kept at the end count. Super-chunks cut the prefix and the
// tail, chunks the tail alone. Boundary b of a sequence is where its chunk b begins or, for the last, where
// it ends.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/geometry.cuh"
#include "cuda/common/ptx.cuh"
#include "flash_dmattn/tensor_view.h"

namespace flash_dmattn::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x % 32); }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x / 32); }
__device__ __forceinline__ unsigned lanes_before(int lane) { return (1u << lane) - 1; }

// An unsigned integer in the order of the scores, -0 equal to +0; 0 for -inf and NaN, which disable a key.
__device__ __forceinline__ unsigned ordered_bits(float score) {
  constexpr unsigned kLeast = 0x00800000u;  // of the least number; -inf and negative NaN lie below
  constexpr unsigned kInfinity = 0xff800000u;
  const unsigned bits = __float_as_uint(score);
  unsigned ordered = bits ^ (static_cast<unsigned>(static_cast<int>(bits) >> 31) | 0x80000000u);
  ordered += ordered == 0x7fffffffu ? 1 : 0;  // -0
  return ordered - kLeast <= kInfinity - kLeast ? ordered : 0;
}

// The ordered bits above the index of the key: unique, and of equal scores the later key ranks higher.
using Rank = unsigned long long;

__device__ __forceinline__ Rank make_rank(unsigned bits, int key) {
  return static_cast<Rank>(bits) << 32 | static_cast<unsigned>(key);
}
__device__ __forceinline__ int key_of(Rank rank) { return static_cast<int>(rank); }

// The scores of one head of a sequence, or (kInt32) their ordered bits.
struct HeadScores {
  const void* data;  // of key 0
  std::int64_t stride;
  DType dtype;

  __device__ unsigned bits(int key) const {
    const std::int64_t offset = key * stride;
    if (dtype == DType::kInt32) return static_cast<const unsigned*>(data)[offset];
    if (dtype == DType::kFloat32) return ordered_bits(static_cast<const float*>(data)[offset]);
    if (dtype == DType::kBFloat16) {
      return ordered_bits(to_float(static_cast<const BFloat16*>(data)[offset]));
    }
    return ordered_bits(to_float(static_cast<const Float16*>(data)[offset]));
  }
};

// Writes the result of one head of a sequence, with the sinks and the local window on top of what the ranks
// decide.
struct ExpiryWriter {
  int* data;  // of key 0
  std::int64_t stride;
  int seqlen;
  int num_sinks;
  int local_window;
  int first_position;  // of the rows that read expiry; a key that none of them sees gets its own position

  __device__ int value(int key, int expiry) const { return expiry <= first_position ? key : expiry; }
  __device__ int value_never_evicted(int key) const { return value(key, seqlen); }
  __device__ int value_dropped(int key, int position) const {
    if (key < num_sinks) return value_never_evicted(key);
    const int local = local_window < seqlen - key ? key + local_window : seqlen;
    return value(key, max(position, local));
  }

  __device__ void disabled(int key) const { data[key * stride] = key; }
  __device__ void never_evicted(int key) const { data[key * stride] = value_never_evicted(key); }
  // Dropped by the ranks at this position; at the key's own or before: never among the best.
  __device__ void dropped(int key, int position) const { data[key * stride] = value_dropped(key, position); }
};

// Numbers the pieces of all sequences: a sequence has per_sequence of them if batched, at most
// length / unit + extra if packed.
struct Numbering {
  int unit = 1;
  int extra = 0;
  int per_sequence = 0;

  __host__ __device__ std::int64_t count(const Geometry& geometry) const {
    const std::int64_t sequences = geometry.num_sequences;
    return geometry.packed() ? geometry.seqlen_k / unit + extra * sequences : per_sequence * sequences;
  }
  __device__ std::int64_t first(const Geometry& geometry, const Sequence& sequence) const {
    const std::int64_t index = sequence.index;
    // A packed one begins at an int, and dividing 64 bits takes ten times the code.
    return geometry.packed() ? static_cast<int>(sequence.begin_k) / unit + extra * index
                             : per_sequence * index;
  }
};

// Changes no result.
struct SelectCut {
  int chunk = 1;
  int super_chunk = 1;  // a multiple of chunk, and at least keep_window wherever a sequence has several
  int tail = 0;         // rows in the tail, at most

  __host__ __device__ int tail_length(int seqlen) const { return seqlen < tail ? seqlen : tail; }
  __host__ __device__ int prefix(int seqlen) const { return seqlen - tail_length(seqlen); }
  __host__ __device__ int prefix_supers(int seqlen) const { return pieces(prefix(seqlen), super_chunk); }
  __host__ __device__ int supers(int seqlen) const {
    return prefix_supers(seqlen) + pieces(tail_length(seqlen), super_chunk);
  }
  __host__ __device__ int chunks(int seqlen) const { return pieces(tail_length(seqlen), chunk); }
  // The first key of a super-chunk.
  __host__ __device__ int super_begin(int seqlen, int super) const {
    const int before = prefix_supers(seqlen);
    return super < before ? super * super_chunk : prefix(seqlen) + (super - before) * super_chunk;
  }

 private:
  __host__ __device__ static int pieces(int length, int unit) {
    return static_cast<int>((static_cast<unsigned>(length) + static_cast<unsigned>(unit) - 1) /
                            static_cast<unsigned>(unit));
  }
};

struct SelectProblem {
  Geometry geometry;  // the query side is not read
  DType score_dtype = DType::kFloat32;
  const void* score = nullptr;
  std::int64_t score_batch_stride = 0;
  std::int64_t score_head_stride = 0;
  std::int64_t score_stride = 0;
  VectorTensor<int> expiry;
  int keep_window = 0;
  int num_sinks = 0;
  int local_window = 0;
  int num_queries = 0;    // rows that read expiry, the last ones
  bool keep_all = false;  // nothing can be dropped
  SelectCut cut;

  Numbering tiles;       // of convert_scores
  Numbering supers;      // a packed sequence of one super-chunk has no place here, and needs none
  Numbering boundaries;  // one more than chunks
  Numbering deaths;      // the chunks and, if there is a prefix, the pieces of the list of its survivors
  Numbering chunks;
  std::int64_t num_supers = 0;  // of all sequences
  std::int64_t num_boundaries = 0;

  // [heads][total_k]: ordered bits of the scores; null where every kernel reads the scores themselves.
  unsigned* bits = nullptr;
  // [heads][supers][keep_window]: of each super-chunk its own keep_window best keys in ascending order, and
  // those of everything before it. Places without a key have bits 0.
  unsigned* local_bits = nullptr;
  int* local_keys = nullptr;
  unsigned* survivor_bits = nullptr;
  int* survivor_keys = nullptr;
  // [heads][total_k] and [heads][supers]: the keys of each super-chunk, from the place of its first key on,
  // that may enter the window, ascending, and their number.
  unsigned* entrant_bits = nullptr;
  int* entrant_keys = nullptr;
  int* num_entrants = nullptr;
  // [heads][boundaries]
  Rank* thresholds = nullptr;  // the lowest rank kept; 0 while fewer than keep_window keys are enabled
  int* num_alive = nullptr;    // keys kept
  int* num_old = nullptr;      // entries of the list that follows
  int* old =
      nullptr;  // [heads][old_entries]: for each chunk the keys from before it that die in it, in any order
  std::int64_t old_entries = 0;

  __device__ HeadScores scores_of(const Sequence& sequence, int head) const {
    const std::int64_t element_bytes = score_dtype == DType::kFloat32 ? 4 : 2;
    const std::int64_t offset =
        (geometry.packed() ? sequence.begin_k * score_stride : sequence.index * score_batch_stride) +
        head * score_head_stride;
    return {static_cast<const char*>(score) + offset * element_bytes, score_stride, score_dtype};
  }
  __device__ ExpiryWriter writer_of(const Sequence& sequence, int head) const {
    int* data = expiry.head(geometry, sequence.index, sequence.begin_k, head);
    const int seqlen = sequence.seqlen_k;
    return {data, expiry.stride, seqlen, num_sinks, local_window, max(seqlen - num_queries, 0)};
  }
  __device__ HeadScores key_bits(const Sequence& sequence, int head) const {
    if (bits == nullptr) return scores_of(sequence, head);
    return {bits + keys_of(sequence, head), 1, DType::kInt32};
  }
  // The place of key 0 in bits and entrant_....
  __device__ std::int64_t keys_of(const Sequence& sequence, int head) const {
    return head * geometry.total_k() + sequence.begin_k;
  }
  // The first place of a super-chunk in local_... and survivor_....
  __device__ std::int64_t list_of(const Sequence& sequence, int head, int super) const {
    return (head * num_supers + supers.first(geometry, sequence) + super) * keep_window;
  }
  // The place of boundary 0 in thresholds, num_alive and num_old.
  __device__ std::int64_t boundaries_of(const Sequence& sequence, int head) const {
    return head * num_boundaries + boundaries.first(geometry, sequence);
  }
  // A packed sequence has no prefix, so its first chunk has no list, and the others fit.
  __device__ int* old_of(const Sequence& sequence, int head, int chunk) const {
    const std::int64_t first =
        geometry.packed() ? sequence.begin_k - cut.chunk
                          : static_cast<std::int64_t>(sequence.index) * chunks.per_sequence * cut.chunk;
    return old + head * old_entries + first + static_cast<std::int64_t>(chunk) * cut.chunk;
  }
};

// Where a CTA works: piece `piece` of a sequence, of one head.
struct Piece {
  Sequence sequence;
  int head;
  int piece;  // may lie beyond those of the sequence
};
constexpr int kNoPiece = 0x7fffffff;

// The piece of CTA blockIdx.x in a grid of numbering.count() * heads_kv.
__device__ inline Piece find_piece(const SelectProblem& problem, const Numbering& numbering) {
  const Geometry& geometry = problem.geometry;
  const int head = static_cast<int>(blockIdx.x % geometry.heads_kv);
  const int id = static_cast<int>(blockIdx.x / geometry.heads_kv);
  if (!geometry.packed()) {
    return {geometry.sequence(id / numbering.per_sequence), head, id % numbering.per_sequence};
  }
  const int index = owner_of(id, geometry.num_sequences, [&](int sequence) {
    return numbering.first(geometry, geometry.sequence(sequence));
  });
  const Sequence sequence = geometry.sequence(index);
  const auto piece = static_cast<int>(id - numbering.first(geometry, sequence));
  return {sequence, head, piece >= 0 ? piece : kNoPiece};  // negative where cu_seqlens is nonsense
}

}  // namespace flash_dmattn::cuda
