// The gradient of a bias that several rows, heads or sequences share. A CTA owns the elements of an aligned
// block of 64 keys and a tile of rows, or of all rows where the bias has one row for all, and goes through
// the heads and sequences that read them, in a fixed order. It computes S and dP once more and keeps the sum
// in registers.
//
//   dbias = sum of P^T (V dO^T - delta)     keys down, rows across
#pragma once

#include "cuda/sm80/dense_columns.cuh"
#include "cuda/sm80/params.h"
#include "cuda/sm80/tile.cuh"

namespace flash_dmattn::cuda::sm80 {

// The axes of a bias: 1 where it is shared.
struct BiasShape {
  int batches;  // 1 or all
  int heads;    // 1, of key or of query
  bool rows;    // one for each row
};

template <typename Element_, int kHeadDim_, int kTileQ_, int kCtasPerSm_>
struct DenseBiasGradConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kTileQ = kTileQ_;
  static constexpr int kWarps = kBlock / 16;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kCtasPerSm = kCtasPerSm_;

  struct SharedMemory {
    Element key[kBlock * kHeadDim];
    Element value[kBlock * kHeadDim];
    Element query[kTileQ * kHeadDim];
    Element dout[kTileQ * kHeadDim];
    RowStats stats[kTileQ];
    std::uint64_t bits[kTileQ];
  };
  static constexpr std::size_t shared_bytes(int /*bias_element_bytes*/) { return sizeof(SharedMemory); }
};

// Adds the share of one head of a sequence: dS of a tile of rows and a block of keys.
template <typename Config>
__device__ __forceinline__ void add_bias_grad(float (&sum)[Config::kTileQ / 8][4],
                                              const float (&bias)[Config::kTileQ / 8][4],
                                              const typename Config::SharedMemory& shared, float scale_log2,
                                              int first_n, int first_of_thread) {
  using Element = typename Config::Element;
  constexpr int kNTiles = Config::kTileQ / 8;
  constexpr int kRowBytes = 2 * Config::kHeadDim;
  float p[1][kNTiles][4], dp[1][kNTiles][4];
  clear(p);
  clear(dp);
  multiply_abt<Element, Config::kHeadDim>(p, shared_address(shared.key) + first_n * kRowBytes,
                                          shared_address(shared.query));
  multiply_abt<Element, Config::kHeadDim>(dp, shared_address(shared.value) + first_n * kRowBytes,
                                          shared_address(shared.dout));
#pragma unroll
  for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int column = n * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + c;
      const RowStats stats = shared.stats[column];
      const unsigned visible = static_cast<unsigned>(shared.bits[column] >> first_of_thread) & 3;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int e = 2 * i + c;
        const float x = fmaf(p[0][n][e], scale_log2, bias[n][e]);
        if ((visible >> i & 1) != 0) {
          sum[n][e] += exp2_approx(x - stats.lse_log2) * (dp[0][n][e] - stats.delta);
        }
      }
    }
  }
}

// Begins the copy of rows [first, first + count) of one head, kRows at most. place(n): the row for line n.
template <int kRows, typename Copy, typename Element, typename Place>
__device__ __forceinline__ void load_neighbours(const Element* to, const Copy& copy, const Element* head,
                                                std::int64_t row_stride, int first, int count,
                                                Place&& place) {
  copy.template load<kRows>(
      shared_address(to),
      [&](int n) {
        return reinterpret_cast<const char*>(head + (place(n) < count ? first + place(n) : 0) * row_stride);
      },
      [&](int n) { return place(n) < count; });
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    dense_bias_grad_kernel(const __grid_constant__ BackwardParams<typename Config::Element> params,
                           const __grid_constant__ DenseParams dense,
                           const __grid_constant__ BiasShape shape) {
  using Element = typename Config::Element;
  constexpr int kTileQ = Config::kTileQ;
  constexpr int kNTiles = kTileQ / 8;
  constexpr int kThreads = Config::kThreads;

  const Geometry& geometry = params.geometry;
  const DenseLists& lists = dense.lists;
  const int group = geometry.group();
  const int row_tiles = static_cast<int>(ceil_div(geometry.seqlen_q, kTileQ));
  const int owned_tiles = shape.rows ? row_tiles : 1;
  std::int64_t cta = blockIdx.x;
  const int block = static_cast<int>(cta % lists.num_blocks);
  cta /= lists.num_blocks;
  const int owned_tile = static_cast<int>(cta % owned_tiles);
  cta /= owned_tiles;
  const int bias_head = static_cast<int>(cta % shape.heads);
  const int bias_batch = static_cast<int>(cta / shape.heads);
  const int first_key = block * kBlock;
  const int num_heads = geometry.heads_q / shape.heads;
  const int first_head = bias_head * num_heads;
  const int num_batches = geometry.num_sequences / shape.batches;
  const int n_of_thread = static_cast<int>(threadIdx.x);

  auto& shared = *reinterpret_cast<typename Config::SharedMemory*>(dynamic_shared_memory());
  const RowCopy<Config::kHeadDim, kThreads> copy(params.head_dim);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int first_n = warp * 16;
  const int first_of_thread = down_key(first_n + lane / 4);

  // The thread's elements of the bias serve all that share them.
  const std::int64_t offset = dense.bias.offset(bias_batch, first_head / group, first_head % group);
  float bias[kNTiles][4], sum[kNTiles][4];
#pragma unroll
  for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = owned_tile * kTileQ + n * 8 + lane % 4 * 2 + e % 2;
      const int key = first_key + first_of_thread + e / 2;
      const bool exists = row < geometry.seqlen_q && key < geometry.seqlen_k;
      bias[n][e] = !exists ? 0
                           : static_cast<float>(kLog2E) *
                                 bias_element(dense.bias, offset + row * dense.bias.row_stride +
                                                              key * dense.bias.key_stride);
      sum[n][e] = 0;
    }
  }

  for (int batch = bias_batch; batch < bias_batch + num_batches; ++batch) {
    for (int head = first_head; head < first_head + num_heads; ++head) {
      const std::uint64_t* words = lists.words(lists.unit(batch, head / group), head % group, block);
      for (int tile = shape.rows ? owned_tile : 0; tile < (shape.rows ? owned_tile + 1 : row_tiles); ++tile) {
        const int first_row = tile * kTileQ;
        const int num_rows = min(kTileQ, geometry.seqlen_q - first_row);
        const std::uint64_t word = n_of_thread < num_rows ? words[first_row + n_of_thread] : 0;
        // The barrier also ends the reading of the tiles of the last step.
        if (__syncthreads_or(word != 0 ? 1 : 0) == 0) continue;
        const int num_keys = min(kBlock, geometry.seqlen_k - first_key);
        load_neighbours<kBlock>(shared.key, copy, params.key.head(geometry, batch, 0, head / group),
                                params.key.row_stride, first_key, num_keys,
                                [](int n) { return down_key(n); });
        load_neighbours<kBlock>(shared.value, copy, params.value.head(geometry, batch, 0, head / group),
                                params.value.row_stride, first_key, num_keys,
                                [](int n) { return down_key(n); });
        load_neighbours<kTileQ>(shared.query, copy, params.query.head(geometry, batch, 0, head),
                                params.query.row_stride, first_row, num_rows, [](int n) { return n; });
        load_neighbours<kTileQ>(shared.dout, copy, params.dout.head(geometry, batch, 0, head),
                                params.dout.row_stride, first_row, num_rows, [](int n) { return n; });
        if (n_of_thread < kTileQ) {
          shared.bits[n_of_thread] = word;
          if (n_of_thread < num_rows) {
            shared.stats[n_of_thread] =
                params.stats[head * geometry.total_q() +
                             static_cast<std::int64_t>(batch) * geometry.seqlen_q + first_row + n_of_thread];
          }
        }
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        add_bias_grad<Config>(sum, bias, shared, params.scale_log2, first_n, first_of_thread);
      }
    }
  }

  const std::int64_t to = dense.dbias.offset(bias_batch, first_head / group, first_head % group);
  if (shape.rows) {
    store_bias_grad<kNTiles>(dense.dbias, sum, true, 0, 0, first_key + first_of_thread, geometry.seqlen_k,
                             [&](int column) -> std::int64_t {
                               const int row = owned_tile * kTileQ + column;
                               return row < geometry.seqlen_q ? to + row * dense.dbias.row_stride : -1;
                             });
    return;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float total = 0;
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) total += sum[n][2 * i] + sum[n][2 * i + 1];
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    const int key = first_key + first_of_thread + i;
    if (lane % 4 == 0 && key < geometry.seqlen_k)
      store_element(dense.dbias, to + key * dense.dbias.key_stride, total);
  }
}

}  // namespace flash_dmattn::cuda::sm80
