// What the dense kernels that keep rows in place (forward, dQ) read: the blocks of a tile's list, the bits of
// each (row, key) and the bias.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "cuda/common/log2.h"
#include "cuda/sm80/dense_params.h"
#include "cuda/sm80/tile.cuh"

namespace flash_dmattn::cuda::sm80 {

// The keys of one step, by column of the accumulator, and who of the tile sees them.
template <int kTileM>
struct DenseSlot {
  int keys[kBlock];            // -1: none
  std::uint64_t bits[kTileM];  // bit across_key(c) of a row: it sees the key of column c
};

struct DenseBlock {
  int number = 0;  // of an aligned block, or among the gathered ones
  bool whole = false;
  std::uint64_t seen = 0;  // of a whole block: the keys that some row of the tile sees
};

// A thread's view of the list of its tile.
class DenseBlocks {
 public:
  int size;  // steps

  __device__ DenseBlocks(const DenseLists& lists, std::int64_t list) {
    const int2 counts = lists.tiles.counts[list];
    whole_ = counts.x;
    size = counts.x + static_cast<int>(ceil_div(counts.y, kBlock));
    blocks_ = lists.tiles.blocks + list * lists.num_blocks;
    seen_ = lists.tiles.seen + list * lists.num_blocks;
    keys_ = lists.tiles.keys + list * lists.num_gathered * kBlock;
    gathered_ = lists.tiles.gathered + list * lists.num_gathered * lists.tiles.rows;
    gathered_rows_ = lists.tiles.rows;
    seqlen_q_ = lists.seqlen_q;
  }

  // words: of the thread's row, see DenseLists::words; null: it has none.
  __device__ void set_row(const std::uint64_t* words) { words_ = words; }

  __device__ DenseBlock at(int step) const {
    if (step >= whole_) return {step - whole_, false, 0};
    const int block = blocks_[step];
    return {block, true, seen_[block]};
  }

  // Begins the copy of a block's keys and bits; the slot can be read after the next wait and barrier.
  template <int kTileM>
  __device__ __forceinline__ void load(DenseSlot<kTileM>& slot, const DenseBlock& block) const {
    const int n = static_cast<int>(threadIdx.x);
    if (n < kBlock) {
      const int key = across_key(n);
      if (block.whole) {
        slot.keys[n] = (block.seen >> key & 1) != 0 ? block.number * kBlock + key : -1;
      } else {
        cp_async_4(shared_address(&slot.keys[n]), keys_ + block.number * kBlock + key);
      }
    }
    if (n < kTileM) {
      const std::uint64_t* from =
          block.whole ? words_ + static_cast<std::int64_t>(block.number) * seqlen_q_
                      : gathered_ + static_cast<std::int64_t>(block.number) * gathered_rows_ + n;
      cp_async_8(shared_address(&slot.bits[n]), words_ == nullptr ? gathered_ : from,
                 words_ == nullptr ? 0 : 8);
    }
  }

 private:
  int whole_;
  int gathered_rows_;
  int seqlen_q_;
  const int* blocks_;
  const std::uint64_t* seen_;
  const int* keys_;
  const std::uint64_t* gathered_;
  const std::uint64_t* words_ = nullptr;
};

// Begins the copy of the rows of key or value that a slot names.
template <int kHeadDim, int kTileM, int kThreads>
__device__ __forceinline__ void gather_rows(SharedAddress tile, const RowCopy<kHeadDim, kThreads>& copy,
                                            const void* rows, int row_bytes, const DenseSlot<kTileM>& slot) {
  copy.template load<kBlock>(
      tile,
      [&](int n) {
        return static_cast<const char*>(rows) + static_cast<std::int64_t>(max(slot.keys[n], 0)) * row_bytes;
      },
      [&](int n) { return slot.keys[n] >= 0; });
}

// A tile of the bias in shared memory: rows of 64 elements in chunks of 16 bytes, chunk c of row r at place
// c ^ (r % 8).
template <int kElementBytes>
__device__ __forceinline__ SharedAddress bias_address(SharedAddress tile, int row, int chunk) {
  return tile_address<kBlock * kElementBytes / 2>(tile, row, chunk);
}

constexpr std::size_t bias_tile_bytes(int rows, int element_bytes) {
  return static_cast<std::size_t>(rows) * kBlock * element_bytes;
}

// Begins the copy of kRows rows of 64 elements; row(r): the address of the first, null for none. count: keys
// that exist.
template <int kElementBytes, int kRows, int kThreads, typename Row>
__device__ __forceinline__ void load_bias(SharedAddress tile, int count, Row&& row) {
  constexpr int kChunks = kBlock * kElementBytes / 16;
  static_assert(kThreads % kChunks == 0);
  const int chunk = static_cast<int>(threadIdx.x) % kChunks;
  const int valid = min(max(count * kElementBytes - chunk * 16, 0), 16);
#pragma unroll 4
  for (int r = static_cast<int>(threadIdx.x) / kChunks; r < kRows; r += kThreads / kChunks) {
    const unsigned char* from = row(r);
    const bool exists = from != nullptr && valid > 0;
    if (exists) cp_async_16(bias_address<kElementBytes>(tile, r, chunk), from + chunk * 16, valid);
  }
}

__device__ __forceinline__ float bias_element(const PairTensor& bias, std::int64_t index) {
  if (bias.type == PairType::kFloat32) return reinterpret_cast<const float*>(bias.data)[index];
  if (bias.type == PairType::kBFloat16) return to_float(reinterpret_cast<const BFloat16*>(bias.data)[index]);
  return to_float(reinterpret_cast<const Float16*>(bias.data)[index]);
}

__device__ __forceinline__ float2 unpack_pair(std::uint32_t pair, bool bfloat16) {
  if (bfloat16) return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  return make_float2(to_float(Float16{static_cast<std::uint16_t>(pair & 0xffff)}),
                     to_float(Float16{static_cast<std::uint16_t>(pair >> 16)}));
}

// s: the products of one row (entries 2 i, 2 i + 1 of each block) become logits times log2(e).
template <bool kBFloat16, int kNTiles>
__device__ __forceinline__ void add_staged_16(float (&s)[kNTiles][4], int i, float scale_log2,
                                              const unsigned char* tile, int row) {
  const int quad = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint4 chunk = *reinterpret_cast<const uint4*>(tile + bias_address<2>(0, row, 2 * quad + half));
    const std::uint32_t pairs[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const float2 bias = unpack_pair(pairs[p], kBFloat16);
      float(&products)[4] = s[4 * half + p];
      products[2 * i] = fmaf(products[2 * i], scale_log2, bias.x * static_cast<float>(kLog2E));
      products[2 * i + 1] = fmaf(products[2 * i + 1], scale_log2, bias.y * static_cast<float>(kLog2E));
    }
  }
}

template <int kNTiles>
__device__ __forceinline__ void add_staged_32(float (&s)[kNTiles][4], int i, float scale_log2,
                                              const unsigned char* tile, int row) {
  const int quad = threadIdx.x % 4;
#pragma unroll
  for (int quarter = 0; quarter < 4; ++quarter) {
    const uint4 chunk = *reinterpret_cast<const uint4*>(tile + bias_address<4>(0, row, 4 * quad + quarter));
    const std::uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      float& x = s[2 * quarter + v / 2][2 * i + v % 2];
      x = fmaf(x, scale_log2, __uint_as_float(words[v]) * static_cast<float>(kLog2E));
    }
  }
}

// Where the logits of a step get their bias from.
struct BiasSource {
  const PairTensor* bias;
  const std::int64_t* rows;     // the offset of each row of the tile, in elements; shared memory
  const unsigned char* staged;  // the block's tile in shared memory; null: in global memory alone
};

// The rows of a tile: their places, the thread's own row in the list, the rows' offsets in the bias.
template <int kTileM, int kThreads>
__device__ __forceinline__ void place_tile(RowPlace (&places)[kTileM], std::int64_t (&bias_rows)[kTileM],
                                           DenseBlocks& list, const DenseParams& dense,
                                           const Geometry& geometry, const RowTile& tile) {
  static_assert(kThreads >= kTileM);
  const int m = static_cast<int>(threadIdx.x);
  if (m >= kTileM) return;
  const int row = m / tile.num_heads;
  const int head = m - row * tile.num_heads;
  places[m] = {row < tile.num_rows ? row : -1, head};
  bias_rows[m] = 0;
  if (row >= tile.num_rows) return;
  const int head_in_group = tile.first_head - tile.head_kv * geometry.group() + head;
  const int unit = dense.lists.unit(tile.sequence.index, tile.head_kv);
  list.set_row(dense.lists.words(unit, head_in_group, 0) + tile.first_row + row);
  bias_rows[m] = dense.bias.offset(tile.sequence.index, tile.head_kv, head_in_group) +
                 (tile.first_row + row) * dense.bias.row_stride;
}

// Two tiles of the bias, of the block of a step and of that of the next.
template <int kTileM, int kThreads>
class BiasTiles {
 public:
  __device__ BiasTiles(const DenseParams& dense, const Geometry& geometry, const RowPlace (&places)[kTileM],
                       const std::int64_t (&rows)[kTileM], unsigned char* memory)
      : dense_(dense), seqlen_k_(geometry.seqlen_k), places_(places), rows_(rows), memory_(memory) {}

  __device__ __forceinline__ void load(int step, const DenseBlock& block) const {
    if (!dense_.staged || !block.whole) return;
    if (dense_.bias.type == PairType::kFloat32) {
      load_elements<4>(step, block.number * kBlock);
    } else {
      load_elements<2>(step, block.number * kBlock);
    }
  }

  __device__ __forceinline__ BiasSource source(int step, const DenseBlock& block) const {
    const bool staged = dense_.staged && block.whole;
    return {&dense_.bias, rows_, staged ? tile(step) : nullptr};
  }

 private:
  __device__ __forceinline__ unsigned char* tile(int step) const {
    return memory_ + step % 2 * (kTileM * kBlock) * dense_.bias.element_bytes();
  }
  template <int kElementBytes>
  __device__ __forceinline__ void load_elements(int step, int first_key) const {
    load_bias<kElementBytes, kTileM, kThreads>(
        shared_address(tile(step)), seqlen_k_ - first_key, [&](int m) -> const unsigned char* {
          if (places_[m].row < 0) return nullptr;
          return dense_.bias.data + (rows_[m] + first_key) * kElementBytes;
        });
  }

  const DenseParams& dense_;
  int seqlen_k_;
  const RowPlace* places_;
  const std::int64_t* rows_;
  unsigned char* memory_;
};

// From products to logits times log2(e), -inf where the row does not see the key. first_m: of the warp's
// rows.
template <int kMTiles, int kNTiles, int kTileM>
__device__ __forceinline__ void make_dense_logits(float (&s)[kMTiles][kNTiles][4], float scale_log2,
                                                  int first_m, const DenseSlot<kTileM>& slot,
                                                  const BiasSource& source) {
  static_assert(kNTiles * 8 == kBlock);
  const int lane = threadIdx.x % 32;
  const int quad = lane % 4;
  const PairType type = source.bias->type;
  const auto each_row = [&](auto&& apply) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) apply(s[m], i, first_m + m * 16 + i * 8 + lane / 4);
    }
  };
  const auto sees = [&](int row) {
    return static_cast<unsigned>(reinterpret_cast<const std::uint16_t*>(&slot.bits[row])[quad]);
  };
  if (type == PairType::kNone) {
    each_row([&](float(&products)[kNTiles][4], int i, int) {
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
        products[n][2 * i] *= scale_log2;
        products[n][2 * i + 1] *= scale_log2;
      }
    });
  } else if (source.staged == nullptr) {
    each_row([&](float(&products)[kNTiles][4], int i, int row) {
      const unsigned visible = sees(row);
      const std::int64_t first = source.rows[row];
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& x = products[n][2 * i + c];
          float bias = 0;
          if ((visible >> (2 * n + c) & 1) != 0) {
            bias =
                bias_element(*source.bias, first + slot.keys[n * 8 + quad * 2 + c] * source.bias->key_stride);
          }
          x = fmaf(x, scale_log2, bias * static_cast<float>(kLog2E));
        }
      }
    });
  } else if (type == PairType::kFloat32) {
    each_row([&](float(&products)[kNTiles][4], int i, int row) {
      add_staged_32(products, i, scale_log2, source.staged, row);
    });
  } else if (type == PairType::kBFloat16) {
    each_row([&](float(&products)[kNTiles][4], int i, int row) {
      add_staged_16<true>(products, i, scale_log2, source.staged, row);
    });
  } else {
    each_row([&](float(&products)[kNTiles][4], int i, int row) {
      add_staged_16<false>(products, i, scale_log2, source.staged, row);
    });
  }
  each_row([&](float(&logits)[kNTiles][4], int i, int row) {
    const unsigned visible = sees(row);
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if ((visible >> (2 * n + c) & 1) == 0) logits[n][2 * i + c] = -INFINITY;
      }
    }
  });
}

}  // namespace flash_dmattn::cuda::sm80
