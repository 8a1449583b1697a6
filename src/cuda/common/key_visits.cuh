// The keys that a tile of rows visits: the blocks of its segment's list whose hull meets the tile's
// positions, in the order of the list, in pieces of kTileN keys.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/geometry.cuh"
#include "cuda/common/plan.cuh"

namespace flash_dmattn::cuda {

// Key j is visible to a row at position p. The padding of a last block, {0, 0}, is visible to nobody.
__device__ __forceinline__ bool visible(const PlanEntry& entry, int position) {
  return entry.key <= position && position < entry.expiry;
}

// The list of a segment. Without a plan key n of the list is key n.
struct KeyList {
  const PlanEntry* entries = nullptr;
  const float* bias = nullptr;  // of each entry, times log2(e)
};

struct KeyTile {
  int first = 0;      // among the entries of the segment
  int count = 0;      // at most kTileN
  bool full = false;  // all kTileN keys are there, and visible to every row of the tile
};

template <int kTileN>
class KeyVisits {
  static_assert(kBlock % kTileN == 0);

 public:
  KeyList list;

  // For rows at positions [begin, end), begin < end. All threads of a warp take the same steps.
  __device__ KeyVisits(const PlanView& plan, const Geometry& geometry, const Sequence& sequence, int head,
                       int begin, int end, bool causal)
      : begin_(begin), end_(end), causal_(causal) {
    if (!plan.present()) {
      size_ = causal ? min(end, sequence.seqlen_k) : sequence.seqlen_k;
    } else {
      const int length = plan.segment_length(head, sequence.index, geometry.num_sequences);
      const int segment = causal ? max(begin, 0) / length : 0;
      const PlanLayout& layout = plan.layout;
      const std::int64_t first_entry =
          head * layout.num_entries + PlanLayout::entry(sequence.begin_k, segment, length);
      list.entries = plan.entries + first_entry;
      list.bias = plan.bias == nullptr ? nullptr : plan.bias + first_entry;
      hulls_ = plan.hulls + head * layout.num_blocks +
               PlanLayout::block(sequence.begin_k, sequence.index, segment, length);
      size_ = sequence.seqlen_k == 0
                  ? 0
                  : plan.segment_sizes[head * layout.num_segments + segment +
                                       PlanLayout::first_segment(sequence.begin_k, sequence.index)];
    }
    look_at_blocks(0);
  }

  // The next tile of keys; false at the end.
  __device__ bool next(KeyTile& tile) {
    if (kTileN < kBlock && rest_ > 0) {
      tile.first += kTileN;
    } else {
      while (visit_ == 0) {
        if ((base_ + 32) * kBlock >= size_) return false;
        look_at_blocks(base_ + 32);
      }
      const int bit = __ffs(visit_) - 1;
      visit_ &= visit_ - 1;
      tile.first = (base_ + bit) * kBlock;
      inside_core_ = (core_ >> bit & 1) != 0;
      rest_ = min(kBlock, size_ - tile.first);
    }
    tile.count = min(kTileN, rest_);
    tile.full = inside_core_ && tile.count == kTileN;
    rest_ -= kTileN;
    return true;
  }

 private:
  // Lane l judges block base + l.
  __device__ void look_at_blocks(int base) {
    base_ = base;
    const int block = base + static_cast<int>(threadIdx.x % 32);
    bool meets = block * kBlock < size_;
    bool inside = meets;
    if (hulls_ == nullptr) {
      inside = meets && (!causal_ || block * kBlock + kBlock - 1 <= begin_);
    } else if (meets) {
      const BlockHull hull = hulls_[block];
      meets = hull.begin < end_ && begin_ < hull.end;
      inside = hull.core_begin <= begin_ && end_ <= hull.core_end;
    }
    visit_ = __ballot_sync(0xffffffffu, meets);
    core_ = __ballot_sync(0xffffffffu, inside);
  }

  const BlockHull* hulls_ = nullptr;
  int begin_;
  int end_;
  bool causal_;
  int size_ = 0;  // keys in the list
  int base_ = 0;  // blocks base_ .. base_ + 31 are in the masks
  unsigned visit_ = 0;
  unsigned core_ = 0;
  int rest_ = 0;  // keys of the current block not yet handed out
  bool inside_core_ = false;
};

}  // namespace flash_dmattn::cuda
