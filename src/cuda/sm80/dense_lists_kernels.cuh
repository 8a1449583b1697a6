// The kernels that turn mask, biases, expiry and causality into the lists of dense_params.h.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "cuda/common/ptx.cuh"
#include "cuda/sm80/dense_params.h"

namespace flash_dmattn::cuda::sm80 {

constexpr int kListThreads = 256;
constexpr int kFoldRows = 32;
constexpr int kFoldKeys = 512;

struct ListParams {
  Geometry geometry;
  RowTiles tiling;
  DenseLists lists;
  PairTensor mask, bias;
  VectorTensor<const int> expiry;  // optional
  bool causal;
};

// Bit b: byte b is not 0.
__device__ __forceinline__ unsigned nonzero_bytes(unsigned bytes) {
  const unsigned high = (((bytes & 0x7f7f7f7fu) + 0x7f7f7f7fu) | bytes) & 0x80808080u;
  return (high >> 7) * 0x01020408u >> 24 & 0xfu;
}

__device__ __forceinline__ bool hides(PairType type, const unsigned char* element) {
  switch (type) {
    case PairType::kBool:
      return *element == 0;
    case PairType::kBFloat16:
      return *reinterpret_cast<const std::uint16_t*>(element) == 0xff80u;
    case PairType::kFloat16:
      return *reinterpret_cast<const std::uint16_t*>(element) == 0xfc00u;
    default:
      return *reinterpret_cast<const std::uint32_t*>(element) == 0xff800000u;
  }
}

// Of 16 neighbouring keys, those that the tensor lets a row see; `count` of them exist. from: the first.
__device__ __forceinline__ unsigned visible_keys(const PairTensor& tensor, const unsigned char* from,
                                                 int count) {
  unsigned visible = 0;
  if (!tensor.vectors || count < 16) {
    const std::int64_t step = tensor.key_stride * tensor.element_bytes();
    for (int k = 0; k < count; ++k) {
      if (!hides(tensor.type, from + k * step)) visible |= 1u << k;
    }
    return visible;
  }
  const uint4* pieces = reinterpret_cast<const uint4*>(from);
  if (tensor.type == PairType::kBool) {
    const uint4 piece = pieces[0];
    return nonzero_bytes(piece.x) | nonzero_bytes(piece.y) << 4 | nonzero_bytes(piece.z) << 8 |
           nonzero_bytes(piece.w) << 12;
  }
  if (tensor.type == PairType::kFloat32) {
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const uint4 piece = pieces[p];
      const unsigned words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) visible |= (words[k] != 0xff800000u ? 1u : 0u) << (4 * p + k);
    }
    return visible;
  }
  const unsigned hidden = tensor.type == PairType::kBFloat16 ? 0xff80u : 0xfc00u;
#pragma unroll
  for (int p = 0; p < 2; ++p) {
    const uint4 piece = pieces[p];
    const unsigned words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      visible |= ((words[k] & 0xffffu) != hidden ? 1u : 0u) << (8 * p + 2 * k);
      visible |= (words[k] >> 16 != hidden ? 2u : 0u) << (8 * p + 2 * k);
    }
  }
  return visible;
}

// A CTA folds kFoldRows rows x kFoldKeys keys: a warp takes a row at a time, a lane 16 keys of it.
inline __global__ void __launch_bounds__(kListThreads)
    fold_kernel(const __grid_constant__ ListParams params) {
  __shared__ std::uint64_t words[kFoldKeys / 64][kFoldRows];
  const Geometry& geometry = params.geometry;
  const DenseLists& lists = params.lists;
  const int key_chunks = static_cast<int>(ceil_div(geometry.seqlen_k, kFoldKeys));
  const int row_chunks = static_cast<int>(ceil_div(geometry.seqlen_q, kFoldRows));
  const int first_key = static_cast<int>(blockIdx.x % key_chunks) * kFoldKeys;
  const int first_row = static_cast<int>(blockIdx.x / key_chunks % row_chunks) * kFoldRows;
  const int plane = static_cast<int>(blockIdx.x / key_chunks / row_chunks);
  const int unit = plane / lists.bit_heads;
  const int head_in_group = plane % lists.bit_heads;
  const int batch = unit / lists.unit_heads;
  const int head_kv = unit % lists.unit_heads;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int key = first_key + lane * 16;
  const int count = min(max(geometry.seqlen_k - key, 0), 16);
  const int* expiry = nullptr;
  if (params.expiry.present()) expiry = params.expiry.head(geometry, batch, 0, head_kv);
  const auto element = [&](const PairTensor& tensor, int row) {
    return tensor.data + (tensor.offset(batch, head_kv, head_in_group) + row * tensor.row_stride +
                          key * tensor.key_stride) *
                             tensor.element_bytes();
  };
#pragma unroll 4
  for (int r = warp; r < kFoldRows; r += kListThreads / 32) {
    const int row = first_row + r;
    const int position = row + geometry.seqlen_k - geometry.seqlen_q;
    int seen = row < geometry.seqlen_q ? count : 0;
    if (params.causal) seen = min(seen, position - key + 1);
    unsigned visible = seen <= 0 ? 0 : (1u << seen) - 1;
    if (seen > 0) {
      const int at = params.causal ? position : geometry.seqlen_k - 1;
      if (expiry != nullptr) {
        for (int k = 0; k < seen; ++k) {
          if (at >= expiry[(key + k) * params.expiry.stride]) visible &= ~(1u << k);
        }
      }
      if (params.mask.present()) visible &= visible_keys(params.mask, element(params.mask, row), count);
      if (params.bias.present()) visible &= visible_keys(params.bias, element(params.bias, row), count);
    }
    reinterpret_cast<std::uint16_t*>(&words[lane / 4][r])[lane % 4] = static_cast<std::uint16_t>(visible);
  }
  __syncthreads();
  static_assert(kFoldKeys / 64 * kFoldRows == kListThreads);
  const int block = first_key / 64 + static_cast<int>(threadIdx.x) / kFoldRows;
  const int row = first_row + static_cast<int>(threadIdx.x) % kFoldRows;
  if (block < lists.num_blocks && row < geometry.seqlen_q) {
    lists.words(unit, head_in_group, block)[row] = words[threadIdx.x / kFoldRows][threadIdx.x % kFoldRows];
  }
}

// The sum of `value` over the threads before this one, and over all; sums: of the warps, in shared memory.
__device__ __forceinline__ int sum_before(int value, int (&sums)[kListThreads / 32], int& total) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += other;
  }
  __syncthreads();  // the sums of an earlier call are no longer read
  if (lane == 31) sums[warp] = sum;
  __syncthreads();
  int before = 0;
  total = 0;
#pragma unroll
  for (int w = 0; w < kListThreads / 32; ++w) {
    if (w < warp) before += sums[w];
    total += sums[w];
  }
  return before + sum - value;
}

// A list takes an aligned block as a whole if its rows see at least half of the keys that there are.
__device__ __forceinline__ bool is_whole(std::uint64_t seen, int num_keys) {
  return seen != 0 && 2 * __popcll(seen) >= num_keys;
}

// From the keys that the rows of a list see to its whole blocks and its other keys; by all threads of a CTA.
__device__ __forceinline__ int2 list_keys(const DenseLists& lists, const KeyLists& to, std::int64_t list,
                                          int seqlen_k, int (&sums)[kListThreads / 32]) {
  const std::uint64_t* seen = to.seen + list * lists.num_blocks;
  int* blocks = to.blocks + list * lists.num_blocks;
  int* keys = to.keys + list * lists.num_gathered * kBlock;
  constexpr int kWhole = 1 << 16;  // counts whole blocks above, keys below
  int num_whole = 0;
  int num_keys = 0;
  for (int base = 0; base < lists.num_blocks; base += kListThreads) {
    const int block = base + static_cast<int>(threadIdx.x);
    std::uint64_t word = block < lists.num_blocks ? seen[block] : 0;
    const bool whole = is_whole(word, min(kBlock, seqlen_k - block * kBlock));
    int total = 0;
    const int before = sum_before(whole ? kWhole : __popcll(word), sums, total);
    if (whole) {
      blocks[num_whole + before / kWhole] = block;
    } else {
      for (int place = num_keys + before % kWhole; word != 0; word &= word - 1, ++place) {
        keys[place] = block * kBlock + __ffsll(static_cast<long long>(word)) - 1;
      }
    }
    num_whole += total / kWhole;
    num_keys += total % kWhole;
  }
  const int padded = static_cast<int>(ceil_div(num_keys, kBlock)) * kBlock;
  if (num_keys + static_cast<int>(threadIdx.x) < padded) keys[num_keys + threadIdx.x] = -1;
  const int2 counts = make_int2(num_whole, num_keys);
  if (threadIdx.x == 0) to.counts[list] = counts;
  return counts;
}

// The bits of 64 keys for one row. words(block): the row's word for an aligned block.
template <typename Words>
__device__ __forceinline__ std::uint64_t gather_bits(const int* keys, Words&& words) {
  std::uint64_t gathered = 0;
  for (int k = 0; k < kBlock; ++k) {
    const int key = keys[k];
    if (key >= 0) gathered |= (words(key / kBlock) >> (key % kBlock) & 1) << k;
  }
  return gathered;
}

// A CTA per tile of rows. `all.seen`, where present, starts as 0.
inline __global__ void __launch_bounds__(kListThreads)
    tile_lists_kernel(const __grid_constant__ ListParams params) {
  __shared__ int sums[kListThreads / 32];
  const Geometry& geometry = params.geometry;
  const DenseLists& lists = params.lists;
  const RowTiles& tiling = params.tiling;
  const std::int64_t list = blockIdx.x;
  const int unit = static_cast<int>(list / tiling.per_sequence / tiling.head_chunks);
  const int chunk = static_cast<int>(list / tiling.per_sequence % tiling.head_chunks);
  const int id = unit / lists.unit_heads * tiling.per_sequence + static_cast<int>(list % tiling.per_sequence);
  RowTile tile;
  tiling.locate(
      geometry,
      (static_cast<std::int64_t>(unit % lists.unit_heads) * tiling.head_chunks + chunk) * tiling.num_tiles +
          tiling.num_tiles - 1 - id,
      tile);
  const int first_head = tile.first_head % geometry.group();
  const int num_heads = lists.bit_heads == 1 ? 1 : tile.num_heads;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  std::uint64_t* seen = lists.tiles.seen + list * lists.num_blocks;
  constexpr int kAtOnce = 4;  // blocks, so that a warp waits for several words together
  for (int base = warp * kAtOnce; base < lists.num_blocks; base += kListThreads / 32 * kAtOnce) {
    const int count = min(lists.num_blocks - base, kAtOnce);
    std::uint64_t found[kAtOnce] = {};
    for (int head = 0; head < num_heads; ++head) {
      const std::uint64_t* words = lists.words(unit, first_head + head, base) + tile.first_row;
      for (int row = lane; row < tile.num_rows; row += 32) {
#pragma unroll
        for (int b = 0; b < kAtOnce; ++b) {
          if (b < count) found[b] |= words[static_cast<std::int64_t>(b) * lists.seqlen_q + row];
        }
      }
    }
#pragma unroll
    for (int b = 0; b < kAtOnce; ++b) {
      if (b >= count) break;
      const int block = base + b;
      const unsigned low = __reduce_or_sync(0xffffffffu, static_cast<unsigned>(found[b]));
      const unsigned high = __reduce_or_sync(0xffffffffu, static_cast<unsigned>(found[b] >> 32));
      if (lane != 0) continue;
      seen[block] = static_cast<std::uint64_t>(high) << 32 | low;
      if (lists.all.seen != nullptr) {
        unsigned* halves = reinterpret_cast<unsigned*>(
            lists.all.seen + static_cast<std::int64_t>(unit) * lists.num_blocks + block);
        if (low != 0) atomicOr(halves, low);
        if (high != 0) atomicOr(halves + 1, high);
      }
    }
  }
  __syncthreads();
  const int2 counts = list_keys(lists, lists.tiles, list, geometry.seqlen_k, sums);
  __syncthreads();
  const int num_gathered = static_cast<int>(ceil_div(counts.y, kBlock));
  for (int index = static_cast<int>(threadIdx.x); index < num_gathered * lists.tiles.rows;
       index += kListThreads) {
    const int m = index % lists.tiles.rows;
    const std::int64_t block = list * lists.num_gathered + index / lists.tiles.rows;
    const int row = m / tile.num_heads;
    const int head = first_head + m % tile.num_heads;
    std::uint64_t word = 0;
    if (row < tile.num_rows) {
      word = gather_bits(lists.tiles.keys + block * kBlock,
                         [&](int aligned) { return lists.words(unit, head, aligned)[tile.first_row + row]; });
    }
    lists.tiles.gathered[block * lists.tiles.rows + m] = word;
  }
}

// A CTA per unit: the keys that some row of the call sees.
inline __global__ void __launch_bounds__(kListThreads)
    all_keys_kernel(const __grid_constant__ ListParams params) {
  __shared__ int sums[kListThreads / 32];
  list_keys(params.lists, params.lists.all, blockIdx.x, params.geometry.seqlen_k, sums);
}

// A CTA per unit and block of `all`: the rows that see some of its keys.
inline __global__ void __launch_bounds__(kListThreads)
    row_lists_kernel(const __grid_constant__ ListParams params) {
  __shared__ int sums[kListThreads / 32];
  const DenseLists& lists = params.lists;
  const int unit = static_cast<int>(blockIdx.x / lists.num_blocks);
  const int place = static_cast<int>(blockIdx.x % lists.num_blocks);
  const int2 counts = lists.all.counts[unit];
  const int gathered = place - counts.x;
  const std::int64_t num_rows = lists.all_rows();
  int num_listed = 0;
  int* listed = lists.rows + blockIdx.x * num_rows;
  const bool whole = place < counts.x;
  const std::int64_t gathered_block = static_cast<std::int64_t>(unit) * lists.num_gathered + gathered;
  if (whole || gathered * kBlock < counts.y) {
    const int block =
        whole ? lists.all.blocks[static_cast<std::int64_t>(unit) * lists.num_blocks + place] : 0;
    constexpr int kPerThread = 4;
    for (std::int64_t base = 0; base < num_rows; base += kListThreads * kPerThread) {
      unsigned flags = 0;
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        const std::int64_t index = base + threadIdx.x * kPerThread + i;
        if (index >= num_rows) continue;
        const int head = static_cast<int>(index / lists.seqlen_q);
        const int row = static_cast<int>(index % lists.seqlen_q);
        std::uint64_t word = 0;
        if (whole) {
          word = lists.words(unit, head, block)[row];
        } else {
          word = gather_bits(lists.all.keys + gathered_block * kBlock,
                             [&](int aligned) { return lists.words(unit, head, aligned)[row]; });
          lists.all.gathered[gathered_block * num_rows + index] = word;
        }
        if (word != 0) flags |= 1u << i;
      }
      int total = 0;
      int to = num_listed + sum_before(__popc(flags), sums, total);
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        if ((flags >> i & 1) != 0) listed[to++] = static_cast<int>(base + threadIdx.x * kPerThread + i);
      }
      num_listed += total;
    }
  }
  if (threadIdx.x == 0) lists.row_counts[blockIdx.x] = num_listed;
}

// Zeros in num_keys elements of the rows whose bit is set; begin: the first of row 0. By a warp.
__device__ __forceinline__ void zero_rows(const PairTensor& dbias, std::int64_t begin, unsigned rows,
                                          int num_keys) {
  for (; rows != 0; rows &= rows - 1) {
    const std::int64_t row = begin + (__ffs(static_cast<int>(rows)) - 1) * dbias.row_stride;
    for (int k = static_cast<int>(threadIdx.x) % 32; k < num_keys; k += 32) {
      const std::int64_t element = row + k * dbias.key_stride;
      if (dbias.type == PairType::kFloat32) {
        reinterpret_cast<float*>(dbias.data)[element] = 0;
      } else {
        reinterpret_cast<std::uint16_t*>(dbias.data)[element] = 0;
      }
    }
  }
}

// The bias's gradient where the kernel that owns it writes nothing: 0. A CTA per sequence, kv head
// and aligned block.
inline __global__ void __launch_bounds__(kListThreads)
    zero_bias_grad_kernel(const __grid_constant__ ListParams params,
                          const __grid_constant__ PairTensor dbias) {
  const DenseLists& lists = params.lists;
  const Geometry& geometry = params.geometry;
  const int block = static_cast<int>(blockIdx.x % lists.num_blocks);
  const int line = static_cast<int>(blockIdx.x / lists.num_blocks);
  const int batch = line / geometry.heads_kv;
  const int head_kv = line % geometry.heads_kv;
  const int unit = lists.unit(batch, head_kv);
  const int num_keys = min(kBlock, geometry.seqlen_k - block * kBlock);
  const std::int64_t list_block = static_cast<std::int64_t>(unit) * lists.num_blocks + block;
  const bool whole = is_whole(lists.all.seen[list_block], num_keys);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int head = 0; head < geometry.group(); ++head) {
    const std::uint64_t* words = lists.words(unit, head, block);
    const std::int64_t first = dbias.offset(batch, head_kv, head) + block * kBlock * dbias.key_stride;
    // A lane looks at four rows, 32 apart.
    for (int base = warp * 128; base < lists.seqlen_q; base += 4 * kListThreads) {
      bool empty[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = base + i * 32 + lane;
        empty[i] = row < lists.seqlen_q && !(whole && words[row] != 0);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const unsigned rows = __ballot_sync(0xffffffffu, empty[i]);
        zero_rows(dbias, first + (base + i * 32) * dbias.row_stride, rows, num_keys);
      }
    }
  }
}

}  // namespace flash_dmattn::cuda::sm80
