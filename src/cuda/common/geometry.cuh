// The geometry of one call on the device, the same for batched and packed tensors: a call is a list of
// sequences, and the rows of all sequences count from 0 to the total, sequence after sequence. The lengths of
// packed sequences are known on the device alone; the host sizes grids and workspaces by upper bounds, and
// work items beyond the true number find out that they are and end.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace flash_dmattn::cuda {

__host__ __device__ constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

struct Sequence {
  int index = 0;
  std::int64_t begin_q = 0;  // its first row among the rows of all sequences
  std::int64_t begin_k = 0;
  int seqlen_q = 0;
  int seqlen_k = 0;

  __device__ int first_position() const { return seqlen_k - seqlen_q; }
};

struct Geometry {
  const int* cu_seqlens_q =
      nullptr;  // [num_sequences + 1]; null if batched. Values are clamped, never trusted
  const int* cu_seqlens_k = nullptr;
  int num_sequences = 0;
  int seqlen_q = 0;  // of every sequence if batched, of all together if packed
  int seqlen_k = 0;
  int heads_q = 0;
  int heads_kv = 0;

  __host__ __device__ bool packed() const { return cu_seqlens_k != nullptr; }
  __host__ __device__ std::int64_t total_q() const {
    return packed() ? seqlen_q : static_cast<std::int64_t>(num_sequences) * seqlen_q;
  }
  __host__ __device__ std::int64_t total_k() const {
    return packed() ? seqlen_k : static_cast<std::int64_t>(num_sequences) * seqlen_k;
  }
  __host__ __device__ int group() const { return heads_q / heads_kv; }

  __device__ Sequence sequence(int index) const {
    if (!packed()) {
      return {index, static_cast<std::int64_t>(index) * seqlen_q, static_cast<std::int64_t>(index) * seqlen_k,
              seqlen_q, seqlen_k};
    }
    Sequence sequence;
    sequence.index = index;
    if (cu_seqlens_q != nullptr) {
      const int begin = min(max(cu_seqlens_q[index], 0), seqlen_q);
      sequence.begin_q = begin;
      sequence.seqlen_q = min(max(cu_seqlens_q[index + 1], begin), seqlen_q) - begin;
    }
    const int begin = min(max(cu_seqlens_k[index], 0), seqlen_k);
    sequence.begin_k = begin;
    sequence.seqlen_k = min(max(cu_seqlens_k[index + 1], begin), seqlen_k) - begin;
    return sequence;
  }
};

// A tensor of rows, [B, S, heads, D] or packed [total, heads, D], the last axis of unit stride. Strides in
// elements.
template <typename Element>
struct RowsTensor {
  Element* data = nullptr;
  std::int64_t batch_stride = 0;  // unused if packed
  std::int64_t row_stride = 0;
  std::int64_t head_stride = 0;

  __host__ __device__ bool present() const { return data != nullptr; }
  // Row 0 of one head of a sequence; `begin` is the sequence's first row among those of all sequences.
  __device__ Element* head(const Geometry& geometry, int sequence, std::int64_t begin, int head) const {
    return data + (geometry.packed() ? begin * row_stride : sequence * batch_stride) + head * head_stride;
  }
};

// One number per key, [B, Hkv, Sk] or packed [total_k, Hkv], or one per query row and query head, [B, H, Sq]
// or packed [H, total_q].
template <typename Element>
struct VectorTensor {
  Element* data = nullptr;
  std::int64_t batch_stride = 0;  // unused if packed
  std::int64_t head_stride = 0;
  std::int64_t stride = 0;

  __host__ __device__ bool present() const { return data != nullptr; }
  __device__ Element* head(const Geometry& geometry, int sequence, std::int64_t begin, int head) const {
    return data + (geometry.packed() ? begin * stride : sequence * batch_stride) + head * head_stride;
  }
};

// Numbers the items of all sequences when the host knows the total length alone. Where a sequence of `length`
// rows has at most length / unit + slack - 1 items, the ids from base(index) on are its own, and
// base(num_sequences) bounds them all. base never decreases, so the owner of an id is found by bisection.
// With several units (see RowTiles) the quotients add up.
//   owner(id, base): the last index with base(index) <= id.
template <typename Base>
__device__ int owner_of(int id, int num_sequences, Base&& base) {
  int low = 0;
  int high = num_sequences;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (base(middle) <= id) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace flash_dmattn::cuda
