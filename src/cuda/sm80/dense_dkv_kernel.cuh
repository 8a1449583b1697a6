// dK, dV and the gradient of a dense bias that no two pairs share: a CTA owns a block of the list of all keys
// that the call's rows see, and the rows that see some of its keys pass by. Each element of the three has one
// owner, which adds in a fixed order. The CTA also writes the zeros of the keys of an aligned block that
// nobody sees.
//
//   P^T = exp(scale K Q^T + bias - lse)     keys down, rows across
//   dV += P^T dO
//   dbias = dS^T = P^T (V dO^T - delta)
//   dK += dS^T Q;   at the end dK *= scale
//
// Line r of the tiles of keys holds key down_key(r), so that each thread has two neighbouring keys of a row.
// The rows' numbers come two steps ahead, Q, dO, statistics and bits one; the bias of the next step arrives
// after P of this one is there.
#pragma once

#include "cuda/sm80/backward_dkv_kernel.cuh"
#include "cuda/sm80/dense_columns.cuh"
#include "cuda/sm80/dense_key_item.cuh"
#include "cuda/sm80/dense_rows.cuh"
#include "cuda/sm80/params.h"
#include "cuda/sm80/tile.cuh"

namespace flash_dmattn::cuda::sm80 {

template <typename Element_, int kHeadDim_, int kTileQ_, int kStages_, int kColumnSplit_, int kCtasPerSm_>
struct DenseKeyGradConfig {
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
    std::uint64_t bits[kStages][kTileQ];
    RowPlace places[3][kTileQ];
    std::int64_t dbias_rows[3][kTileQ];  // where the rows of dbias begin; -1: nowhere
    int keys[kBlock];                    // by line of the tiles; -1: none
  };
  // A tile of the bias lies behind it.
  static constexpr std::size_t kBiasOffset = (sizeof(SharedMemory) + 127) / 128 * 128;
  static constexpr std::size_t shared_bytes(int bias_element_bytes) {
    return kBiasOffset + bias_tile_bytes(kTileQ, bias_element_bytes);
  }
};

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    dense_key_grad_kernel(const __grid_constant__ BackwardParams<typename Config::Element> params,
                          const __grid_constant__ DenseParams dense) {
  using Element = typename Config::Element;
  constexpr int kHeadDim = Config::kHeadDim;
  constexpr int kTileQ = Config::kTileQ;
  constexpr int kNTiles = kTileQ / 8;
  constexpr int kThreads = Config::kThreads;
  constexpr int kColumns = Config::kColumns;

  const Geometry& geometry = params.geometry;
  const DenseLists& lists = dense.lists;
  const DenseKeyItem item = locate_keys(geometry, lists);
  zero_unseen(params.dk, geometry, item, lists, params.head_dim);
  zero_unseen(params.dv, geometry, item, lists, params.head_dim);
  if (item.size == 0) return;
  const bool need_ds = params.dk.present() || dense.dbias.present();

  auto& shared = *reinterpret_cast<typename Config::SharedMemory*>(dynamic_shared_memory());
  const SharedAddress key_tile = shared_address(shared.key);
  const SharedAddress value_tile = shared_address(shared.value);
  unsigned char* bias_tile = dynamic_shared_memory() + Config::kBiasOffset;
  const RowCopy<kHeadDim, kThreads> copy(params.head_dim);
  const int n_of_thread = static_cast<int>(threadIdx.x);

  // A step is a tile of rows of the list.
  const int tiles = static_cast<int>(ceil_div(item.size, kTileQ));
  const int num_steps = tiles * item.repeats;
  const int first_head = item.head_kv * geometry.group();
  // One thread per row; the number of a row is read a step before its place is written.
  const std::int64_t first_dbias = dense.dbias.offset(item.batch, item.head_kv, 0);
  int pending = -1;
  const auto read_number = [&](int step) {
    const int index = step % tiles * kTileQ + n_of_thread;
    pending = n_of_thread < kTileQ && step < num_steps && index < item.size ? item.rows[index] : -1;
  };
  const auto write_place = [&](int step) {
    if (n_of_thread >= kTileQ) return;
    RowPlace place{-1, 0};
    if (pending >= 0) {
      const int head = pending / geometry.seqlen_q;
      place = {pending - head * geometry.seqlen_q, lists.bit_heads == 1 ? step / tiles : head};
    }
    shared.places[step % 3][n_of_thread] = place;
    if (!dense.dbias.present()) return;
    shared.dbias_rows[step % 3][n_of_thread] =
        place.row < 0
            ? -1
            : first_dbias + place.head * dense.dbias.group_stride + place.row * dense.dbias.row_stride;
  };
  const auto load_rows = [&](int step) {
    const int stage = step % Config::kStages;
    const RowPlace* places = shared.places[step % 3];
    const auto load = [&](SharedAddress to, const RowsTensor<const Element>& rows) {
      const char* first = reinterpret_cast<const char*>(rows.head(geometry, item.batch, 0, first_head));
      copy.template load<kTileQ>(
          to,
          [&](int n) {
            const RowPlace place = places[n];
            return first + (max(place.row, 0) * rows.row_stride + place.head * rows.head_stride) *
                               static_cast<std::int64_t>(sizeof(Element));
          },
          [&](int n) { return places[n].row >= 0; });
    };
    load(shared_address(shared.rows[stage].query), params.query);
    load(shared_address(shared.rows[stage].dout), params.dout);
    if (n_of_thread < kTileQ) {
      const RowPlace place = places[n_of_thread];
      const bool exists = place.row >= 0;
      const RowPlace safe = exists ? place : RowPlace{0, 0};
      cp_async_8(shared_address(&shared.stats[stage][n_of_thread]),
                 params.stats + (first_head + safe.head) * geometry.total_q() +
                     static_cast<std::int64_t>(item.batch) * geometry.seqlen_q + safe.row,
                 exists ? 8 : 0);
      cp_async_8(shared_address(&shared.bits[stage][n_of_thread]), row_bits(item, lists, safe),
                 exists ? 8 : 0);
    }
  };
  const bool staged = dense.staged && item.whole;
  const std::int64_t first_bias = dense.bias.offset(item.batch, item.head_kv, 0);
  const auto bias_row = [&](RowPlace place) {
    return first_bias + place.head * dense.bias.group_stride + place.row * dense.bias.row_stride;
  };
  const auto load_bias_tile = [&](int step) {
    if (!staged) return;
    const RowPlace* places = shared.places[step % 3];
    const auto row = [&](int n) -> const unsigned char* {
      const RowPlace place = places[n];
      if (place.row < 0) return nullptr;
      return dense.bias.data + (bias_row(place) + item.first_key) * dense.bias.element_bytes();
    };
    const int count = geometry.seqlen_k - item.first_key;
    if (dense.bias.type == PairType::kFloat32) {
      load_bias<4, kTileQ, kThreads>(shared_address(bias_tile), count, row);
    } else {
      load_bias<2, kTileQ, kThreads>(shared_address(bias_tile), count, row);
    }
  };

  // The keys, and the first rows.
  if (n_of_thread < kBlock) shared.keys[n_of_thread] = key_of_line(item, lists, n_of_thread);
  read_number(0);
  write_place(0);
  read_number(1);
  write_place(1);
  read_number(2);
  __syncthreads();
  load_rows(0);
  load_bias_tile(0);
  const auto load_keys = [&](SharedAddress to, const RowsTensor<const Element>& rows) {
    const char* first = reinterpret_cast<const char*>(rows.head(geometry, item.batch, 0, item.head_kv));
    copy.template load<kBlock>(
        to,
        [&](int n) {
          return first +
                 max(shared.keys[n], 0) * rows.row_stride * static_cast<std::int64_t>(sizeof(Element));
        },
        [&](int n) { return shared.keys[n] >= 0; });
  };
  load_keys(key_tile, params.key);
  load_keys(value_tile, params.value);
  cp_async_commit();

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int first_n = warp % (kBlock / 16) * 16;                  // of the warp's keys
  const int first_chunk = warp / (kBlock / 16) * (kColumns / 8);  // of the warp's columns
  const SharedAddress warp_keys = key_tile + first_n * (2 * kHeadDim);
  const SharedAddress warp_values = value_tile + first_n * (2 * kHeadDim);
  const int pair_of_thread = down_key(first_n + lane / 4);  // the thread's keys are this one and the next

  // The common case: a gradient of the products' type, its whole blocks in aligned pieces.
  const bool stores_pairs = dense.dbias.present() && dense.dbias.type == kPairType<Element> && item.whole &&
                            dense.dbias.vectors && item.first_key + kBlock <= geometry.seqlen_k;
  Element* const dbias_keys = reinterpret_cast<Element*>(dense.dbias.data) + item.first_key + pair_of_thread;

  float dk[1][kColumns / 8][4], dv[1][kColumns / 8][4];
  clear(dk);
  clear(dv);
  for (int step = 0; step < num_steps; ++step) {
    const int stage = step % Config::kStages;
    const RowPlace* places = shared.places[step % 3];
    cp_async_wait<0>();
    __syncthreads();  // the rows of this step have arrived, those of the last are no longer read
    write_place(step + 2);
    read_number(step + 3);
    if (Config::kStages > 1 && step + 1 < num_steps) load_rows(step + 1);
    cp_async_commit();
    const SharedAddress query_tile = shared_address(shared.rows[stage].query);
    const SharedAddress dout_tile = shared_address(shared.rows[stage].dout);

    float p[1][kNTiles][4];
    clear(p);
    multiply_abt<Element, kHeadDim>(p, warp_keys, query_tile);
    const auto sees = [&](int column) {
      return reinterpret_cast<const std::uint16_t*>(&shared.bits[stage][column])[pair_of_thread / 16] >>
             (pair_of_thread % 16);
    };
    make_pair_logits<kNTiles>(
        p[0], params.scale_log2, dense.bias, staged ? bias_tile : nullptr, pair_of_thread,
        [&](int column, int i) {
          return bias_row(places[column]) + shared.keys[first_n + i * 8 + lane / 4] * dense.bias.key_stride;
        },
        sees);
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int column = n * 8 + lane % 4 * 2 + c;
        const float lse_log2 = shared.stats[stage][column].lse_log2;
        const unsigned visible = sees(column);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = p[0][n][2 * i + c];
          x = (visible >> i & 1) != 0 ? exp2_approx(x - lse_log2) : 0;
        }
      }
    }
    if (staged) {
      __syncthreads();  // the bias is no longer read
      if (step + 1 < num_steps) load_bias_tile(step + 1);
      cp_async_commit();
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
          const int column = n * 8 + lane % 4 * 2 + c;
          const float delta = shared.stats[stage][column].delta;
          const unsigned visible = sees(column);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& ds = dp[0][n][2 * i + c];
            ds = (visible >> i & 1) != 0 ? p[0][n][2 * i + c] * (ds - delta) : 0;
          }
        }
      }
      if (params.dk.present()) {
        std::uint32_t fragments[1][kNTiles / 2][4];
        round_to_fragments<Element>(fragments, dp);
        multiply_ab<Element, kHeadDim>(dk, fragments, query_tile, first_chunk);
      }
      if (dense.dbias.present() && first_chunk == 0) {
        const std::int64_t* dbias_rows = shared.dbias_rows[step % 3];
        if (stores_pairs) {
          store_pairs<Element, kNTiles>(dbias_keys, dp[0], dbias_rows);
        } else {
          store_bias_grad<kNTiles>(dense.dbias, dp[0], item.whole, shared.keys[first_n + lane / 4],
                                   shared.keys[first_n + 8 + lane / 4], item.first_key + pair_of_thread,
                                   geometry.seqlen_k, [&](int column) { return dbias_rows[column]; });
        }
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
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int local = first_n + i * 8 + lane / 4;
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      const SharedAddress chunk = tile_address<kHeadDim>(0, local, first_chunk + n);
      constexpr float kUnscale = 1 / kProbabilityScale<Element>;
      reinterpret_cast<std::uint32_t*>(shared.key)[chunk / 4 + lane % 4] =
          pack<Element>(dk[0][n][2 * i] * params.scale, dk[0][n][2 * i + 1] * params.scale);
      reinterpret_cast<std::uint32_t*>(shared.value)[chunk / 4 + lane % 4] =
          pack<Element>(dv[0][n][2 * i] * kUnscale, dv[0][n][2 * i + 1] * kUnscale);
    }
  }
  __syncthreads();
  constexpr int kStoredRows = kBlock / Config::kWarps;
  const auto store = [&](const Element* tile, const RowsTensor<Element>& gradient) {
    if (!gradient.present()) return;
    Element* rows = gradient.head(geometry, item.batch, 0, item.head_kv);
    store_rows<Element, kHeadDim, kStoredRows>(tile, warp * kStoredRows, params.head_dim,
                                               [&](int n) -> Element* {
                                                 const int key = shared.keys[n];
                                                 return key < 0 ? nullptr : rows + key * gradient.row_stride;
                                               });
  };
  store(shared.key, params.dk);
  store(shared.value, params.dv);
}

}  // namespace flash_dmattn::cuda::sm80
