// The packed copy of the keys: K, V, entries and biases of every block of the plan, in the order of its lists
// and in the layout in which wgmma reads them, so that a tile's keys arrive by a few bulk copies of
// contiguous memory instead of one copy for each row.
//
// The unit is 16 keys. In K and V each 8 of them are one atom of the 128-byte swizzle for each 64 columns
// (head dims that are no multiple of 64 are padded with zeros), so that units that follow each other in
// memory are also neighbours in a tile. A block of the plan has kUnitsPerBlock units. Keys beyond the end of
// a list are zeros that no row sees; kPaddingUnits more of them fill up what a tile's last step lacks.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/key_blocks.cuh"
#include "cuda/common/ptx.cuh"

namespace flash_dmattn::cuda::sm90 {

constexpr int kUnit = 16;
constexpr int kUnitsPerBlock = kBlock / kUnit;
constexpr int kPaddingUnits = 16;
constexpr int kAtomRows = 8;
constexpr int kAtomBytes = 1024;  // 8 rows of 64 columns

// What is known of the keys of a unit beside K and V, in the order in which threads need it: those of the
// columns that a thread of wgmma holds lie side by side.
struct __align__(16) UnitKeys {
  PlanEntry entries[kUnit];
  float bias[kUnit];  // divided by the scale; 0 without a bias

  __device__ static int place(int key) { return key % 8 / 2 * 4 + key / 8 * 2 + key % 2; }
};

// Arrays over the units of some heads, and the padding.
struct PackedKeys {
  unsigned char* key = nullptr;  // [units][kUnit / kAtomRows][kHeadDim / 64][kAtomBytes]
  unsigned char* value = nullptr;
  UnitKeys* keys = nullptr;
  int blocks_per_head = 0;
  int padding = 0;  // the first unit of it
};

template <typename Element>
struct PackParams {
  Geometry geometry;
  PlanView plan;
  RowsTensor<const Element> key, value;
  PackedKeys packed;
  int first_head;  // kv heads first_head .. first_head + num_heads - 1
  int num_heads;
  int head_dim;
  float bias_scale;
  bool causal;
};

constexpr int kPackThreads = 256;
constexpr int kPackUnits = kPackThreads / 32;  // a warp packs a unit

// The 16-byte chunk `chunk` of row `row` of a tile of keys, in bytes from its first.
template <int kHeadDim>
__device__ __forceinline__ int chunk_offset(int row, int chunk) {
  return (row / kAtomRows * (kHeadDim / 64) + chunk / 8) * kAtomBytes + row % kAtomRows * 128 +
         ((chunk ^ row) & 7) * 16;
}

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(kPackThreads)
    pack_kernel(const __grid_constant__ PackParams<Element> params) {
  constexpr int kChunks = kHeadDim / 8;
  constexpr int kRowsPerPass = 32 / kChunks;
  constexpr int kPasses = kUnit / kRowsPerPass;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int lane = static_cast<int>(threadIdx.x % 32);
  const std::int64_t unit = static_cast<std::int64_t>(blockIdx.x) * kPackUnits + threadIdx.x / 32;
  const PackedKeys& packed = params.packed;
  if (unit >= packed.padding + kPaddingUnits) return;

  KeyBlock block;
  int count = 0;  // keys of the unit
  int first = 0;  // among those of the list
  if (unit < packed.padding) {
    const int number = static_cast<int>(unit / kUnitsPerBlock);
    if (!KeyBlocks::locate(params.geometry, params.plan, params.causal,
                           params.first_head + number / packed.blocks_per_head,
                           number % packed.blocks_per_head, block)) {
      return;
    }
    const int in_block = static_cast<int>(unit % kUnitsPerBlock) * kUnit;
    first = block.keys.first + in_block;
    count = min(block.keys.count - in_block, kUnit);
  }

  PlanEntry entry = {0, 0};
  float bias = 0;
  if (lane < count) {
    const int index = first + lane;
    entry =
        block.list.entries == nullptr ? PlanEntry{index, block.sequence.seqlen_k} : block.list.entries[index];
    if (block.list.bias != nullptr) bias = block.list.bias[index] * params.bias_scale;
  }
  if (lane < kUnit) {
    packed.keys[unit].entries[UnitKeys::place(lane)] = entry;
    packed.keys[unit].bias[UnitKeys::place(lane)] = bias;
  }

  const int chunk = lane % kChunks;
  const bool inside = chunk * 8 < params.head_dim;
  const auto copy = [&](const RowsTensor<const Element>& rows, unsigned char* to) {
    const char* from = nullptr;
    if (count > 0) {
      from = reinterpret_cast<const char*>(
                 rows.head(params.geometry, block.sequence.index, block.sequence.begin_k, block.head_kv)) +
             chunk * 16;
    }
    const std::int64_t row_bytes = rows.row_stride * static_cast<std::int64_t>(sizeof(Element));
    uint4 data[kPasses];
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int row = pass * kRowsPerPass + lane / kChunks;
      const int key = __shfl_sync(0xffffffffu, entry.key, row);
      data[pass] = make_uint4(0, 0, 0, 0);
      if (inside && row < count) data[pass] = *reinterpret_cast<const uint4*>(from + key * row_bytes);
    }
    to += unit * (kUnit * kHeadDim * 2);
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int row = pass * kRowsPerPass + lane / kChunks;
      *reinterpret_cast<uint4*>(to + chunk_offset<kHeadDim>(row, chunk)) = data[pass];
    }
  };
  copy(params.key, packed.key);
  copy(params.value, packed.value);
}

}  // namespace flash_dmattn::cuda::sm90
