// The blocks of keys of a call, by number: those of the plan's lists, or the neighbouring kBlock keys of a
// sequence where there is no plan. For the kernels that keep keys in place, or copy them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/geometry.cuh"
#include "cuda/common/key_visits.cuh"
#include "cuda/common/plan.cuh"

namespace flash_dmattn::cuda {

struct KeyBlock {
  Sequence sequence;
  int head_kv = 0;
  int segment = 0;
  int segment_length = 0;
  KeyTile keys;    // of its list; full is not set
  BlockHull hull;  // in positions
  KeyList list;
};

struct KeyBlocks {
  // Numbers in one head; some of them belong to no block. Of the plan its layout is enough.
  __host__ __device__ static std::int64_t per_head(const Geometry& geometry, const PlanView& plan) {
    const std::int64_t listed = plan.layout.num_blocks;
    return listed > 0 ? listed : geometry.total_k() / kBlock + geometry.num_sequences;
  }
  // The number of a sequence's first block.
  __device__ static std::int64_t first(const PlanView& plan, std::int64_t begin_k, int sequence) {
    return plan.present() ? PlanLayout::first_block(begin_k, sequence) : begin_k / kBlock + sequence;
  }
  // False if there is no block of this number.
  __device__ static bool locate(const Geometry& geometry, const PlanView& plan, bool causal, int head_kv,
                                int number, KeyBlock& block);
};

__device__ __forceinline__ bool KeyBlocks::locate(const Geometry& geometry, const PlanView& plan, bool causal,
                                                  int head_kv, int number, KeyBlock& block) {
  const PlanLayout& layout = plan.layout;
  const auto first_number = [&](int index) { return first(plan, geometry.sequence(index).begin_k, index); };
  const int index = owner_of(number, geometry.num_sequences, first_number);
  block.head_kv = head_kv;
  block.sequence = geometry.sequence(index);
  const Sequence& sequence = block.sequence;
  int in_list = static_cast<int>(number - first_number(index));
  if (in_list < 0) return false;
  int size = sequence.seqlen_k;
  if (plan.present()) {
    block.segment_length = plan.segment_length(head_kv, index, geometry.num_sequences);
    block.segment = causal ? PlanLayout::segment_of(in_list, block.segment_length) : 0;
    if (static_cast<std::int64_t>(block.segment) * block.segment_length >= sequence.seqlen_k) return false;
    const std::int64_t first_of_list =
        PlanLayout::block(sequence.begin_k, index, block.segment, block.segment_length);
    in_list -= static_cast<int>(first_of_list - PlanLayout::first_block(sequence.begin_k, index));
    size = plan.segment_sizes[head_kv * layout.num_segments + block.segment +
                              PlanLayout::first_segment(sequence.begin_k, index)];
    if (in_list * kBlock >= size) return false;
    const std::int64_t first_entry = head_kv * layout.num_entries +
                                     PlanLayout::entry(sequence.begin_k, block.segment, block.segment_length);
    block.list.entries = plan.entries + first_entry;
    block.list.bias = plan.bias == nullptr ? nullptr : plan.bias + first_entry;
    block.hull = plan.hulls[head_kv * layout.num_blocks + first_of_list + in_list];
  } else {
    if (in_list * kBlock >= size) return false;
    block.hull = {in_list * kBlock, size, in_list * kBlock + kBlock - 1, size};
  }
  block.keys.first = in_list * kBlock;
  block.keys.count = min(kBlock, size - block.keys.first);
  return true;
}

}  // namespace flash_dmattn::cuda
