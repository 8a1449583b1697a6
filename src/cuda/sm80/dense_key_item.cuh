// The block of keys of a CTA of dK and dV: a block of the list of all keys that the call's rows see.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/sm80/dense_params.h"
#include "cuda/sm80/tile.cuh"

namespace flash_dmattn::cuda::sm80 {

// The block of a CTA.
struct DenseKeyItem {
  int batch;
  int head_kv;
  int unit;
  int place;  // among the blocks of the list of all keys
  bool whole;
  int first_key;  // of a whole block
  int size;       // rows in the block's list
  int repeats;    // heads of the group that go through the list: all where they share their bits
  const int* rows;
  const std::uint64_t* bits;  // of a row of the list
};

__device__ __forceinline__ DenseKeyItem locate_keys(const Geometry& geometry, const DenseLists& lists) {
  DenseKeyItem item;
  item.place = static_cast<int>(blockIdx.x % lists.num_blocks);
  const int pair = static_cast<int>(blockIdx.x / lists.num_blocks);
  item.head_kv = pair % geometry.heads_kv;
  item.batch = pair / geometry.heads_kv;
  item.unit = lists.unit(item.batch, item.head_kv);
  const std::int64_t index = static_cast<std::int64_t>(item.unit) * lists.num_blocks + item.place;
  const int num_whole = lists.all.counts[item.unit].x;
  item.whole = item.place < num_whole;
  item.size = lists.row_counts[index];
  item.repeats = lists.bit_heads == 1 ? geometry.group() : 1;
  item.rows = lists.rows + index * lists.all_rows();
  if (item.whole) {
    const int block = lists.all.blocks[static_cast<std::int64_t>(item.unit) * lists.num_blocks + item.place];
    item.first_key = block * kBlock;
    item.bits = lists.words(item.unit, 0, block);
  } else {
    const std::int64_t gathered =
        static_cast<std::int64_t>(item.unit) * lists.num_gathered + item.place - num_whole;
    item.first_key = 0;
    item.bits = lists.all.gathered + gathered * lists.all_rows();
  }
  return item;
}

// The word of a row; whole blocks of several heads are num_blocks words apart.
__device__ __forceinline__ const std::uint64_t* row_bits(const DenseKeyItem& item, const DenseLists& lists,
                                                         RowPlace place) {
  const int head = lists.bit_heads == 1 ? 0 : place.head;
  return item.bits +
         head * (item.whole ? static_cast<std::int64_t>(lists.num_blocks) * lists.seqlen_q : lists.seqlen_q) +
         place.row;
}

// The key of line n of the tiles, -1: none.
__device__ __forceinline__ int key_of_line(const DenseKeyItem& item, const DenseLists& lists, int n) {
  const int k = down_key(n);
  if (item.whole) {
    const std::uint64_t seen =
        lists.all.seen[static_cast<std::int64_t>(item.unit) * lists.num_blocks + item.first_key / kBlock];
    return (seen >> k & 1) != 0 ? item.first_key + k : -1;
  }
  const int2 counts = lists.all.counts[item.unit];
  const int index = (item.place - counts.x) * kBlock + k;
  if (index >= counts.y) return -1;
  return lists.all.keys[static_cast<std::int64_t>(item.unit) * lists.num_gathered * kBlock + index];
}

// Zeros for the keys of aligned block `block` that nobody sees.
template <typename Element>
__device__ __forceinline__ void zero_unseen(const RowsTensor<Element>& gradient, const Geometry& geometry,
                                            const DenseKeyItem& item, const DenseLists& lists, int head_dim) {
  if (!gradient.present()) return;
  const std::uint64_t seen =
      lists.all.seen[static_cast<std::int64_t>(item.unit) * lists.num_blocks + item.place];
  Element* rows = gradient.head(geometry, item.batch, 0, item.head_kv);
  for (int k = static_cast<int>(threadIdx.x) / 32; k < kBlock; k += static_cast<int>(blockDim.x) / 32) {
    const int key = item.place * kBlock + k;
    if (key >= geometry.seqlen_k || (seen >> k & 1) != 0) continue;
    for (int column = static_cast<int>(threadIdx.x) % 32; column < head_dim; column += 32)
      rows[key * gradient.row_stride + column].bits = 0;
  }
}

}  // namespace flash_dmattn::cuda::sm80
