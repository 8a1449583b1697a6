// What the kernels of dense masks and biases take beside the parameters of every pass.
//
// Everything that hides a pair of row and key (causality, expiry, mask, -inf in a bias) is folded into one
// bit per pair first. From these bits come lists: for each tile of rows the keys that some row of it sees,
// for each 64 keys the rows that see some of them. Calls whose heads or batch entries see the same share
// bits and lists: a unit is one of the different ones.
//
// A list of keys names first the whole blocks, aligned blocks of 64 keys of which the tile sees at least
// half, in ascending order, and then the other keys that it sees, in ascending order, in blocks of 64 as
// well.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/geometry.cuh"
#include "cuda/common/plan.cuh"
#include "cuda/common/row_tiles.cuh"

namespace flash_dmattn::cuda::sm80 {

enum class PairType : int { kNone, kBool, kBFloat16, kFloat16, kFloat32 };

// A mask or a bias: one element per row and key. Strides in elements; 0 along an axis of size 1.
struct PairTensor {
  unsigned char* data = nullptr;
  PairType type = PairType::kNone;
  std::int64_t batch_stride = 0;
  std::int64_t kv_stride = 0;     // from the heads of one group to those of the next
  std::int64_t group_stride = 0;  // from head to head of a group
  std::int64_t row_stride = 0;
  std::int64_t key_stride = 0;
  bool vectors = false;  // aligned groups of keys lie in aligned pieces of 16 bytes

  __host__ __device__ bool present() const { return type != PairType::kNone; }
  __host__ __device__ int element_bytes() const {
    return type == PairType::kNone ? 0 : type == PairType::kBool ? 1 : type == PairType::kFloat32 ? 4 : 2;
  }
  __device__ std::int64_t offset(int batch, int head_kv, int head_in_group) const {
    return batch * batch_stride + head_kv * kv_stride + head_in_group * group_stride;
  }
};

// Lists of keys, one per tile of rows, or one per unit for all rows.
struct KeyLists {
  int2* counts = nullptr;         // [lists]: whole blocks, other keys
  int* blocks = nullptr;          // [lists][num_blocks]: the whole blocks
  int* keys = nullptr;            // [lists][num_gathered * 64]: the others, -1 up to the next multiple of 64
  std::uint64_t* seen = nullptr;  // [lists][num_blocks]: bit k of word n: some row sees key 64 n + k
  std::uint64_t* gathered = nullptr;  // [lists][num_gathered][rows]: who sees the other keys
  int rows = 0;
};

struct DenseLists {
  int num_units = 0;
  int unit_heads = 1;  // kv heads that differ
  bool per_batch = false;
  bool per_head = false;
  int bit_heads = 1;     // heads of a group that differ: 1 or all
  int num_blocks = 0;    // aligned blocks of 64 keys
  int num_gathered = 0;  // blocks of other keys that a list can have
  int seqlen_q = 0;
  std::uint64_t* bits = nullptr;  // [units][bit_heads][num_blocks][Sq]: bit k: the row sees key 64 n + k
  KeyLists tiles;
  KeyLists all;  // of the backward
  // Of the backward: [units][num_blocks] and [units][num_blocks][bit_heads * Sq], the rows that see some key
  // of a block of `all`, as head in group * Sq + row, ascending.
  int* row_counts = nullptr;
  int* rows = nullptr;

  __device__ int unit(int batch, int head_kv) const {
    return (per_batch ? batch : 0) * unit_heads + (per_head ? head_kv : 0);
  }
  // The words of all rows for one block.
  __device__ std::uint64_t* words(int unit, int head_in_group, int block) const {
    const std::int64_t plane =
        static_cast<std::int64_t>(unit) * bit_heads + (bit_heads == 1 ? 0 : head_in_group);
    return bits + (plane * num_blocks + block) * seqlen_q;
  }
  __host__ __device__ std::int64_t all_rows() const {
    return static_cast<std::int64_t>(bit_heads) * seqlen_q;
  }
  // The list of the tile that RowTiles::locate gives the CTA.
  __device__ std::int64_t tile_list(const RowTiles& tiling, std::int64_t cta) const {
    const int chunk = static_cast<int>(cta / tiling.num_tiles);
    const int id = tiling.num_tiles - 1 - static_cast<int>(cta % tiling.num_tiles);
    const int owner = unit(id / tiling.per_sequence, chunk / tiling.head_chunks);
    return (static_cast<std::int64_t>(owner) * tiling.head_chunks + chunk % tiling.head_chunks) *
               tiling.per_sequence +
           id % tiling.per_sequence;
  }
};

// Of a kernel.
struct DenseParams {
  DenseLists lists;
  PairTensor bias;
  PairTensor dbias;  // of bias' shape along every axis; where present, the kernel of dK and dV writes it
  bool staged;       // the bias of whole blocks goes through shared memory
};

// Fragments hold keys in an order that lets each thread read neighbours. Of a block of 64 keys across (rows
// down), column c of the accumulator is key across_key(c): the 16 columns of a thread are 16 neighbours. Of
// keys down, line r is key down_key(r): the two lines of a thread are neighbours.
__host__ __device__ constexpr int across_key(int column) {
  return column % 8 / 2 * 16 + column / 8 * 2 + column % 2;
}
__host__ __device__ constexpr int down_key(int line) { return line / 16 * 16 + line % 8 * 2 + line % 16 / 8; }

}  // namespace flash_dmattn::cuda::sm80
