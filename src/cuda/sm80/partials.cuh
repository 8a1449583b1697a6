// A key that lives in several segments gets a float32 row of partial sums from each, and one warp adds them
// up in the order of the segments. The rows of a key lie side by side; the first one's number is a running
// sum over the keys.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "cuda/sm80/params.h"
#include "cuda/sm80/tile.cuh"

namespace flash_dmattn::cuda::sm80 {

constexpr int kReduceThreads = 256;

// Floats in a row: dK (without the scale), dV, dbias, and up to the next multiple of 16 bytes.
__host__ __device__ constexpr int partial_stride(int head_dim) { return 2 * head_dim + 4; }

// Segments in whose lists the key stands. Without lists, and where one segment holds all positions: one.
template <typename Params>
__device__ __forceinline__ int num_segments_of(const Params& params, const Sequence& sequence,
                                               const PlanEntry& entry, int segment_length) {
  if (!params.causal || !params.plan.present()) return 1;
  const int first_seen = max(entry.key, max(sequence.first_position(), 0));
  return (entry.expiry - 1) / segment_length - first_seen / segment_length + 1;
}

constexpr std::int64_t kDirect = -1;   // the key lives in this segment alone
constexpr std::int64_t kDropped = -2;  // an expiry that no selection gives left no room for the row

// The row of partial sums of a key in a segment.
template <typename Params>
__device__ __forceinline__ std::int64_t partial_row(const Params& params, const Sequence& sequence,
                                                    int head_kv, const PlanEntry& entry, int segment,
                                                    int segment_length) {
  if (num_segments_of(params, sequence, entry, segment_length) <= 1) return kDirect;
  const int first_seen = max(entry.key, max(sequence.first_position(), 0));
  const std::int64_t key = sequence.begin_k + entry.key;
  const std::int64_t row =
      params.partial_rows[(head_kv - params.first_head) * params.geometry.total_k() + key] + segment -
      first_seen / segment_length;
  return row < params.max_partial_rows ? row : kDropped;
}

// The key of a thread or warp that has number `index` among the keys of params.num_heads heads; an entry that
// nobody sees, {0, 0}, for one that is in no list.
struct KeyOfHead {
  Sequence sequence;
  int head_kv;
  int key;
  PlanEntry entry;
  int segment_length;
};

struct KeyInputs {
  VectorTensor<const int> expiry;  // optional
  VectorTensor<const float> bias;  // optional
};

template <typename Params>
__device__ __forceinline__ KeyOfHead key_of_head(const Params& params, const KeyInputs& inputs,
                                                 std::int64_t index) {
  const Geometry& geometry = params.geometry;
  const std::int64_t total_k = geometry.total_k();
  const std::int64_t number = index % total_k;
  KeyOfHead key;
  key.head_kv = params.first_head + static_cast<int>(index / total_k);
  int owner = 0;
  if (geometry.packed()) {
    owner = owner_of(static_cast<int>(number), geometry.num_sequences,
                     [&](int candidate) { return static_cast<int>(geometry.sequence(candidate).begin_k); });
  } else {
    owner = static_cast<int>(number / geometry.seqlen_k);
  }
  key.sequence = geometry.sequence(owner);
  key.key = static_cast<int>(number - key.sequence.begin_k);
  key.entry = {0, 0};
  key.segment_length = params.plan.segment_length(key.head_kv, owner, geometry.num_sequences);
  const int seqlen_k = key.sequence.seqlen_k;
  if (key.key < 0 || key.key >= seqlen_k || key.sequence.seqlen_q == 0) return key;
  int expiry = seqlen_k;
  if (inputs.expiry.present()) {
    expiry = min(expiry, inputs.expiry.head(geometry, owner, key.sequence.begin_k,
                                            key.head_kv)[key.key * inputs.expiry.stride]);
  }
  const int first_seen = params.causal ? max(key.key, max(key.sequence.first_position(), 0)) : seqlen_k - 1;
  if (expiry <= first_seen) return key;
  if (inputs.bias.present() && inputs.bias.head(geometry, owner, key.sequence.begin_k,
                                                key.head_kv)[key.key * inputs.bias.stride] == -INFINITY) {
    return key;
  }
  key.entry = {key.key, expiry};
  return key;
}

// counts [num_heads][total_k]: rows of partial sums of each key, 0 for one that needs none.
template <typename Params>
__global__ void __launch_bounds__(kReduceThreads)
    count_partials_kernel(const __grid_constant__ Params params, const __grid_constant__ KeyInputs inputs,
                          int* counts) {
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kReduceThreads + threadIdx.x;
  if (index >= params.num_heads * params.geometry.total_k()) return;
  const KeyOfHead key = key_of_head(params, inputs, index);
  const int segments =
      key.entry.expiry == 0 ? 0 : num_segments_of(params, key.sequence, key.entry, key.segment_length);
  counts[index] = segments > 1 ? segments : 0;
}

// One warp per key: the sum of its rows, or the zeros of a key that nobody sees. A key with one segment is
// complete.
template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_partials_kernel(const __grid_constant__ BackwardParams<Element> params,
                           const __grid_constant__ KeyInputs inputs) {
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * (kReduceThreads / 32) + threadIdx.x / 32;
  if (index >= params.num_heads * params.geometry.total_k()) return;
  const KeyOfHead key = key_of_head(params, inputs, index);
  const int lane = threadIdx.x % 32;
  int num_rows = 0;
  std::int64_t first_row = 0;
  if (key.entry.expiry != 0) {
    num_rows = num_segments_of(params, key.sequence, key.entry, key.segment_length);
    if (num_rows == 1) return;
    first_row = params.partial_rows[index];
    num_rows =
        static_cast<int>(max(min(static_cast<std::int64_t>(num_rows), params.max_partial_rows - first_row),
                             static_cast<std::int64_t>(0)));
  }
  const Geometry& geometry = params.geometry;
  constexpr int kStride = partial_stride(kHeadDim);
  const float* rows = params.partials + first_row * kStride;
  const auto store = [&](const RowsTensor<Element>& gradient, int offset, float scale) {
    if (!gradient.present()) return;
    Element* to = gradient.head(geometry, key.sequence.index, key.sequence.begin_k, key.head_kv) +
                  key.key * gradient.row_stride;
    for (int column = 2 * lane; column < params.head_dim; column += 64) {
      float2 sum = make_float2(0, 0);
      for (int r = 0; r < num_rows; ++r) {
        const float2 part =
            *reinterpret_cast<const float2*>(rows + static_cast<std::int64_t>(r) * kStride + offset + column);
        sum.x += part.x;
        sum.y += part.y;
      }
      const std::uint32_t rounded = pack<Element>(sum.x * scale, sum.y * scale);
      if (column + 1 < params.head_dim) {
        *reinterpret_cast<std::uint32_t*>(to + column) = rounded;
      } else {
        to[column].bits = static_cast<std::uint16_t>(rounded & 0xffff);
      }
    }
  };
  store(params.dk, 0, params.scale);
  store(params.dv, kHeadDim, 1);
  if (params.dbias.present() && lane == 0) {
    float sum = 0;
    for (int r = 0; r < num_rows; ++r) sum += rows[static_cast<std::int64_t>(r) * kStride + 2 * kHeadDim];
    params.dbias.head(geometry, key.sequence.index, key.sequence.begin_k,
                      key.head_kv)[key.key * params.dbias.stride] = sum;
  }
}

}  // namespace flash_dmattn::cuda::sm80
