// dK, dV and dbias of one block of keys per CTA: the keys of a block of the plan stay, the rows that see them
// pass by. All positions of the block's hull are neighbours, so that nothing is gathered but the keys, and
// nothing is scattered: each sum has one owner, which adds in a fixed order (head by head of the group, row
// by row).
//
//   P^T = exp(scale K Q^T + bias - lse)     keys down, rows across
//   dV += P^T dO
//   dS^T = P^T (V dO^T - delta)
//   dK += dS^T Q,  dbias += rowsum(dS^T);   at the end dK *= scale
//
// P^T and dS^T go from the accumulators of one product into the operand of the next and never to memory. Each
// warp owns 16 keys; for long head dims two warps share them, each with half of the columns of dK and dV. A
// key that lives in one segment alone is written here; the others leave a float32 row per segment, see
// partials.cuh.
#pragma once

#include "cuda/common/key_blocks.cuh"
#include "cuda/sm80/params.h"
#include "cuda/sm80/partials.cuh"
#include "cuda/sm80/tile.cuh"

namespace flash_dmattn::cuda::sm80 {

template <typename Element_, int kHeadDim_, int kTileQ_, int kStages_, int kColumnSplit_, int kCtasPerSm_>
struct KeyGradConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kTileQ = kTileQ_;
  static constexpr int kStages = kStages_;  // of rows
  static constexpr int kColumnSplit = kColumnSplit_;
  static constexpr int kColumns = kHeadDim / kColumnSplit;
  static constexpr int kWarps = kBlock / 16 * kColumnSplit;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kCtasPerSm = kCtasPerSm_;

  struct Rows {
    Element query[kTileQ * kHeadDim];
    Element dout[kTileQ * kHeadDim];
  };
  struct SharedMemory {
    Element key[kBlock * kHeadDim];    // later the rows of dk
    Element value[kBlock * kHeadDim];  // later the rows of dv
    Rows rows[kStages];
    RowStats stats[kStages][kTileQ];
    KeySlot<kBlock> slot;
  };
};

// Of P where it is rounded to 16 bits for dV: among thousands of keys most probabilities would be subnormal
// in float16. A power of two, which changes nothing else.
template <typename Element>
constexpr float kProbabilityScale = 1;
template <>
inline constexpr float kProbabilityScale<Float16> = 4096;

// The block of a CTA, and the rows that see some key of it: [begin_row, end_row) of the sequence.
struct KeyGradItem : KeyBlock {
  int begin_row = 0;
  int end_row = 0;
};

// False if the CTA has no block.
__device__ __forceinline__ bool locate_item(const Geometry& geometry, const PlanView& plan, bool causal,
                                            std::int64_t blocks_per_head, int first_head, KeyGradItem& item) {
  const int head_kv = first_head + static_cast<int>(blockIdx.x / blocks_per_head);
  const int number = static_cast<int>(blockIdx.x % blocks_per_head);
  if (!KeyBlocks::locate(geometry, plan, causal, head_kv, number, item)) return false;
  const Sequence& sequence = item.sequence;
  if (causal) {
    const int first_position = sequence.first_position();
    item.begin_row = max(item.hull.begin - first_position, 0);
    item.end_row = min(item.hull.end - first_position, sequence.seqlen_q);
  } else {
    item.end_row = sequence.seqlen_q;
  }
  return true;
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    key_grad_kernel(const __grid_constant__ BackwardParams<typename Config::Element> params,
                    std::int64_t blocks_per_head) {
  using Element = typename Config::Element;
  constexpr int kHeadDim = Config::kHeadDim;
  constexpr int kTileQ = Config::kTileQ;
  constexpr int kNTiles = kTileQ / 8;
  constexpr int kThreads = Config::kThreads;
  constexpr int kColumns = Config::kColumns;

  const Geometry& geometry = params.geometry;
  KeyGradItem item;
  if (!locate_item(geometry, params.plan, params.causal, blocks_per_head, params.first_head, item)) return;
  const Sequence& sequence = item.sequence;
  const bool need_ds = params.dk.present() || params.dbias.present();

  auto& shared = *reinterpret_cast<typename Config::SharedMemory*>(dynamic_shared_memory());
  const SharedAddress key_tile = shared_address(shared.key);
  const SharedAddress value_tile = shared_address(shared.value);
  const RowCopy<kHeadDim, kThreads> copy(params.head_dim);

  // A step is a tile of rows of one head.
  const int tiles = static_cast<int>(ceil_div(max(item.end_row - item.begin_row, 0), kTileQ));
  const int num_steps = tiles * geometry.group();
  const int first_head = item.head_kv * geometry.group();
  const auto load_rows = [&](int step) {
    const int stage = step % Config::kStages;
    const int head = first_head + step / tiles;
    const int first_row = item.begin_row + step % tiles * kTileQ;
    const int count = min(kTileQ, item.end_row - first_row);
    const auto load = [&](SharedAddress to, const RowsTensor<const Element>& rows) {
      const Element* first =
          rows.head(geometry, sequence.index, sequence.begin_q, head) + first_row * rows.row_stride;
      const int row_bytes = static_cast<int>(rows.row_stride * sizeof(Element));
      copy.template load<kTileQ>(
          to,
          [&](int n) {
            return reinterpret_cast<const char*>(first) +
                   static_cast<std::int64_t>(n < count ? n : 0) * row_bytes;
          },
          [&](int n) { return n < count; });
    };
    load(shared_address(shared.rows[stage].query), params.query);
    load(shared_address(shared.rows[stage].dout), params.dout);
    const int n = static_cast<int>(threadIdx.x);
    if (n < kTileQ) {
      const RowStats* stats = params.stats + head * geometry.total_q() + sequence.begin_q + first_row;
      cp_async_8(shared_address(&shared.stats[stage][n]), stats + (n < count ? n : 0), n < count ? 8 : 0);
    }
  };

  // The keys, and the first rows.
  load_entries<kBlock, kThreads>(shared.slot, item.list, item.keys, sequence.seqlen_k);
  if (num_steps > 0) load_rows(0);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  const Element* key = params.key.head(geometry, sequence.index, sequence.begin_k, item.head_kv);
  const Element* value = params.value.head(geometry, sequence.index, sequence.begin_k, item.head_kv);
  gather_rows<kHeadDim>(key_tile, copy, key, static_cast<int>(params.key.row_stride * sizeof(Element)),
                        shared.slot, item.keys.count);
  gather_rows<kHeadDim>(value_tile, copy, value, static_cast<int>(params.value.row_stride * sizeof(Element)),
                        shared.slot, item.keys.count);
  cp_async_commit();

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int first_n = warp % (kBlock / 16) * 16;                  // of the warp's keys
  const int first_chunk = warp / (kBlock / 16) * (kColumns / 8);  // of the warp's columns
  const SharedAddress warp_keys = key_tile + first_n * (2 * kHeadDim);
  const SharedAddress warp_values = value_tile + first_n * (2 * kHeadDim);
  PlanEntry entry[2];
  float bias[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    entry[i] = shared.slot.entries[first_n + i * 8 + lane / 4];
    bias[i] = item.list.bias == nullptr ? 0 : shared.slot.bias[first_n + i * 8 + lane / 4];
  }

  float dk[1][kColumns / 8][4], dv[1][kColumns / 8][4];
  float dbias[2] = {0, 0};
  clear(dk);
  clear(dv);
  for (int step = 0; step < num_steps; ++step) {
    const int stage = step % Config::kStages;
    cp_async_wait<0>();
    __syncthreads();  // the rows of this step have arrived, those of the last are no longer read
    if (Config::kStages > 1 && step + 1 < num_steps) load_rows(step + 1);
    cp_async_commit();
    const SharedAddress query_tile = shared_address(shared.rows[stage].query);
    const SharedAddress dout_tile = shared_address(shared.rows[stage].dout);
    const int first_row = item.begin_row + step % tiles * kTileQ;
    const int count = min(kTileQ, item.end_row - first_row);
    const int first_position = params.causal ? first_row + sequence.first_position() : sequence.seqlen_k - 1;
    const bool full = count == kTileQ && (!params.causal || (item.hull.core_begin <= first_position &&
                                                             first_position + kTileQ <= item.hull.core_end));

    float p[1][kNTiles][4];
    clear(p);
    multiply_abt<Element, kHeadDim>(p, warp_keys, query_tile);
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int column = n * 8 + lane % 4 * 2 + c;
        const float lse_log2 = shared.stats[stage][column].lse_log2;
        const int position = column >= count ? -1 : params.causal ? first_position + column : first_position;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = p[0][n][2 * i + c];
          x = exp2_approx(fmaf(x, params.scale_log2, bias[i]) - lse_log2);
          if (!full && !visible(entry[i], position)) x = 0;
        }
      }
    }
    if (params.dv.present()) {
      std::uint32_t fragments[1][kNTiles / 2][4];
      round_to_fragments<Element>(fragments, p, kProbabilityScale<Element>);
      multiply_ab<Element, kHeadDim>(dv, fragments, dout_tile, first_chunk);
    }
    if (need_ds) {
      float dp[1][kNTiles][4];
      clear(dp);
      multiply_abt<Element, kHeadDim>(dp, warp_values, dout_tile);
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float delta = shared.stats[stage][n * 8 + lane % 4 * 2 + c].delta;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& ds = dp[0][n][2 * i + c];
            ds = p[0][n][2 * i + c] * (ds - delta);
            dbias[i] += ds;
          }
        }
      }
      if (params.dk.present()) {
        std::uint32_t fragments[1][kNTiles / 2][4];
        round_to_fragments<Element>(fragments, dp);
        multiply_ab<Element, kHeadDim>(dk, fragments, query_tile, first_chunk);
      }
    }
    if (Config::kStages == 1) {
      __syncthreads();  // the rows are no longer read
      if (step + 1 < num_steps) load_rows(step + 1);
      cp_async_commit();
    }
  }
  cp_async_wait<0>();
  __syncthreads();  // K and V are no longer read
  if (kProbabilityScale<Element> != 1) {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) dv[0][n][e] *= 1 / kProbabilityScale<Element>;
    }
  }

  // Rows of keys that live in other segments too go to the partials, the rest through shared memory to dk and
  // dv.
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    dbias[i] += __shfl_xor_sync(0xffffffffu, dbias[i], 1);
    dbias[i] += __shfl_xor_sync(0xffffffffu, dbias[i], 2);
    const int local = first_n + i * 8 + lane / 4;
    if (local >= item.keys.count) continue;
    const std::int64_t row =
        partial_row(params, item.sequence, item.head_kv, entry[i], item.segment, item.segment_length);
    if (row == kDropped) continue;
    const bool writes_bias = params.dbias.present() && lane % 4 == 0 && first_chunk == 0;
    if (row >= 0) {
      float* partial = params.partials + row * partial_stride(kHeadDim);
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        const int column = (first_chunk + n) * 8 + lane % 4 * 2;
        *reinterpret_cast<float2*>(partial + column) = make_float2(dk[0][n][2 * i], dk[0][n][2 * i + 1]);
        *reinterpret_cast<float2*>(partial + kHeadDim + column) =
            make_float2(dv[0][n][2 * i], dv[0][n][2 * i + 1]);
      }
      if (writes_bias) partial[2 * kHeadDim] = dbias[i];
      continue;
    }
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      const SharedAddress chunk = tile_address<kHeadDim>(0, local, first_chunk + n);
      reinterpret_cast<std::uint32_t*>(shared.key)[chunk / 4 + lane % 4] =
          pack<Element>(dk[0][n][2 * i] * params.scale, dk[0][n][2 * i + 1] * params.scale);
      reinterpret_cast<std::uint32_t*>(shared.value)[chunk / 4 + lane % 4] =
          pack<Element>(dv[0][n][2 * i], dv[0][n][2 * i + 1]);
    }
    if (writes_bias) {
      params.dbias.head(geometry, sequence.index, sequence.begin_k,
                        item.head_kv)[entry[i].key * params.dbias.stride] = dbias[i];
    }
  }
  __syncthreads();
  constexpr int kStoredRows = kBlock / Config::kWarps;
  const auto store = [&](const Element* tile, const RowsTensor<Element>& gradient) {
    if (!gradient.present()) return;
    Element* rows = gradient.head(geometry, sequence.index, sequence.begin_k, item.head_kv);
    store_rows<Element, kHeadDim, kStoredRows>(
        tile, warp * kStoredRows, params.head_dim, [&](int n) -> Element* {
          if (n >= item.keys.count) return nullptr;
          const PlanEntry stored = shared.slot.entries[n];
          if (num_segments_of(params, sequence, stored, item.segment_length) > 1) return nullptr;
          return rows + stored.key * gradient.row_stride;
        });
  };
  store(shared.key, params.dk);
  store(shared.value, params.dv);
}

}  // namespace flash_dmattn::cuda::sm80
