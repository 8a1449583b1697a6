// Tiles of 16-bit elements in shared memory, and the two products that the attention kernels are made of.
//
// A row of a tile holds kHeadDim elements in chunks of 16 bytes. Chunk c of row r lies at place c ^ (r % 8),
// so that the eight rows that ldmatrix reads at once fall into different banks. Tiles start at multiples of
// 128 bytes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/geometry.cuh"
#include "cuda/common/key_visits.cuh"
#include "cuda/common/plan.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/common/row_tiles.cuh"

namespace flash_dmattn::cuda::sm80 {

template <int kHeadDim>
__device__ __forceinline__ SharedAddress tile_address(SharedAddress tile, int row, int chunk) {
  return tile + row * (2 * kHeadDim) + ((chunk ^ (row & 7)) << 4);
}

// acc += A B^T. A: 16 * kMTiles rows of a tile from `a` on, B: 8 * kNTiles rows from `b` on. The accumulator
// is that of mma: acc[m][n] holds the pairs at rows lane / 4 and lane / 4 + 8, columns 2 * (lane % 4) of
// block (m, n).
template <typename Element, int kHeadDim, int kMTiles, int kNTiles>
__device__ __forceinline__ void multiply_abt(float (&acc)[kMTiles][kNTiles][4], SharedAddress a,
                                             SharedAddress b) {
  static_assert(kNTiles % 2 == 0);
  const int lane = threadIdx.x % 32;
  const SharedAddress a_lane = tile_address<kHeadDim>(a, lane % 16, lane / 16);
  const SharedAddress b_lane = tile_address<kHeadDim>(b, lane % 8 + 8 * (lane / 16), lane / 8 % 2);
#pragma unroll
  for (int k = 0; k < kHeadDim / 16; ++k) {
    // Chunk 2k + c lies at ((2k) ^ place(c)): the swizzle commutes with the step.
    const int flip = k % 4 * 32;
    const int step = k / 4 * 128;
    std::uint32_t a_fragment[kMTiles][4];
#pragma unroll
    for (int m = 0; m < kMTiles; ++m)
      ldmatrix_x4(a_fragment[m], (a_lane ^ flip) + step + m * 16 * (2 * kHeadDim));
#pragma unroll
    for (int n = 0; n < kNTiles; n += 2) {
      std::uint32_t b_fragment[4];
      ldmatrix_x4(b_fragment, (b_lane ^ flip) + step + n * 8 * (2 * kHeadDim));
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
        mma_m16n8k16<Element>(acc[m][n], a_fragment[m], b_fragment[0], b_fragment[1]);
        mma_m16n8k16<Element>(acc[m][n + 1], a_fragment[m], b_fragment[2], b_fragment[3]);
      }
    }
  }
}

// acc += A B. A: fragments of 16 * kMTiles rows and 16 * kKTiles columns, B: 16 * kKTiles rows of a tile from
// `b` on, 8 * kNTiles of its columns from chunk `first_chunk` (a multiple of 8) on.
template <typename Element, int kHeadDim, int kMTiles, int kKTiles, int kNTiles>
__device__ __forceinline__ void multiply_ab(float (&acc)[kMTiles][kNTiles][4],
                                            const std::uint32_t (&a)[kMTiles][kKTiles][4], SharedAddress b,
                                            int first_chunk = 0) {
  static_assert(kNTiles % 2 == 0);
  const int lane = threadIdx.x % 32;
  const SharedAddress b_lane = tile_address<kHeadDim>(b, lane % 16, lane / 16) + first_chunk * 16;
#pragma unroll
  for (int k = 0; k < kKTiles; ++k) {
#pragma unroll
    for (int n = 0; n < kNTiles; n += 2) {
      std::uint32_t b_fragment[4];
      ldmatrix_x4_trans(b_fragment, (b_lane ^ (n / 2 % 4 * 32)) + n / 8 * 128 + k * 16 * (2 * kHeadDim));
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
        mma_m16n8k16<Element>(acc[m][n], a[m][k], b_fragment[0], b_fragment[1]);
        mma_m16n8k16<Element>(acc[m][n + 1], a[m][k], b_fragment[2], b_fragment[3]);
      }
    }
  }
}

// An accumulator times `scale`, rounded to Element, as the A operand of the next product.
template <typename Element, int kMTiles, int kNTiles>
__device__ __forceinline__ void round_to_fragments(std::uint32_t (&a)[kMTiles][kNTiles / 2][4],
                                                   const float (&acc)[kMTiles][kNTiles][4], float scale = 1) {
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int k = 0; k < kNTiles / 2; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float(&pair)[4] = acc[m][2 * k + i / 2];
        a[m][k][i] = pack<Element>(pair[i % 2 * 2] * scale, pair[i % 2 * 2 + 1] * scale);
      }
    }
  }
}

template <int kMTiles, int kNTiles>
__device__ __forceinline__ void clear(float (&acc)[kMTiles][kNTiles][4]) {
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[m][n][i] = 0;
    }
  }
}

// The share of one thread in copying rows of head_dim elements into a tile: one chunk of every
// kRowsPerPass-th row. What lies beyond head_dim becomes 0.
template <int kHeadDim, int kThreads>
struct RowCopy {
  static constexpr int kChunks = kHeadDim / 8;
  static constexpr int kRowsPerPass = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0);

  int chunk;
  int row;          // in the first pass
  int valid_bytes;  // of the chunk
  int offset;       // of the chunk in a row, in bytes; 0 where nothing is valid, to stay inside the tensor

  __device__ explicit RowCopy(int head_dim)
      : chunk(static_cast<int>(threadIdx.x) % kChunks),
        row(static_cast<int>(threadIdx.x) / kChunks),
        valid_bytes(min(max((head_dim - chunk * 8) * 2, 0), 16)),
        offset(valid_bytes == 0 ? 0 : chunk * 16) {}

  // Row r of the tile comes from `from(r)`, any address inside the tensor for one that is not valid(r): that
  // becomes 0.
  template <int kRows, typename From, typename Valid>
  __device__ __forceinline__ void load(SharedAddress tile, From&& from, Valid&& valid) const {
    static_assert(kRows % kRowsPerPass == 0);
#pragma unroll
    for (int pass = 0; pass < kRows / kRowsPerPass; ++pass) {
      const int r = row + pass * kRowsPerPass;
      cp_async_16(tile_address<kHeadDim>(tile, r, chunk), from(r) + offset, valid(r) ? valid_bytes : 0);
    }
  }
};

// A slot for the entries of one tile of keys, filled two steps before the math needs them.
template <int kTileN>
struct KeySlot {
  PlanEntry entries[kTileN];
  float bias[kTileN];
};

// Begins the copy of a tile's entries into a slot; without a plan writes them. The slot can be read after the
// next wait and barrier.
template <int kTileN, int kThreads>
__device__ __forceinline__ void load_entries(KeySlot<kTileN>& slot, const KeyList& list, const KeyTile& tile,
                                             int seqlen_k) {
  static_assert(kThreads >= kTileN);
  const int n = static_cast<int>(threadIdx.x);
  if (n >= kTileN) return;
  const bool valid = n < tile.count;
  if (list.entries == nullptr) {
    slot.entries[n] = valid ? PlanEntry{tile.first + n, seqlen_k} : PlanEntry{0, 0};
    return;
  }
  const int index = tile.first + (valid ? n : 0);
  cp_async_8(shared_address(&slot.entries[n]), list.entries + index, valid ? 8 : 0);
  if (list.bias != nullptr) cp_async_4(shared_address(&slot.bias[n]), list.bias + index, valid ? 4 : 0);
}

// Begins the copy of the rows of key or value that the slot names.
template <int kHeadDim, int kTileN, int kThreads>
__device__ __forceinline__ void gather_rows(SharedAddress tile, const RowCopy<kHeadDim, kThreads>& copy,
                                            const void* rows, int row_bytes, const KeySlot<kTileN>& slot,
                                            int count) {
  copy.template load<kTileN>(
      tile,
      [&](int n) {
        return static_cast<const char*>(rows) + static_cast<std::int64_t>(slot.entries[n].key) * row_bytes;
      },
      [&](int n) { return n < count; });
}

// One warp stores its kRows rows of a tile, from row `first` on, to the addresses that to(row) gives; null:
// nowhere.
template <typename Element, int kHeadDim, int kRows, typename To>
__device__ __forceinline__ void store_rows(const Element* tile, int first, int head_dim, To&& to) {
  constexpr int kChunks = kHeadDim / 8;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int index = lane; index < kRows * kChunks; index += 32) {
    const int row = first + index / kChunks;
    const int chunk = index % kChunks;
    Element* data = to(row);
    const int valid = head_dim - chunk * 8;
    if (data == nullptr || valid <= 0) continue;
    const Element* from = tile + tile_address<kHeadDim>(0, row, chunk) / sizeof(Element);
    if (valid >= 8) {
      *reinterpret_cast<uint4*>(data + chunk * 8) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int i = 0; i < valid; ++i) data[chunk * 8 + i] = from[i];
    }
  }
}

}  // namespace flash_dmattn::cuda::sm80
