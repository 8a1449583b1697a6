// dK, dV and the gradient of a dense bias that no two pairs share, on Hopper: the kernel of
// sm80/dense_dkv_kernel.cuh with the products of a warpgroup. Its definitions hold here too: a CTA owns a
// block of the list of all keys, line r of the tiles of keys holds key down_key(r), and each element has one
// owner, which adds in a fixed order.
//
// S = K Q^T and V dO^T of a step are queued together; P is made while the second runs, dS while P^T dO does,
// and dS is stored while dS^T Q does. Q, dO, statistics and bits arrive a step ahead, as the bias does in the
// L2 cache; it goes on to shared memory once a warp has made P of the step before.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/log2.h"
#include "cuda/common/ptx_sm90.cuh"
#include "cuda/sm80/backward_dkv_kernel.cuh"
#include "cuda/sm80/dense_columns.cuh"
#include "cuda/sm80/dense_key_item.cuh"
#include "cuda/sm80/params.h"

namespace flash_dmattn::cuda::sm90 {

using sm80::BackwardParams;
using sm80::DenseKeyItem;
using sm80::DenseLists;
using sm80::DenseParams;
using sm80::PairTensor;
using sm80::PairType;
using sm80::RowStats;

template <typename Element_, int kHeadDim_, int kCtasPerSm_>
struct DenseKeyGradConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;  // 64 or 128
  static constexpr int kTileQ = 64;           // rows of a step
  static constexpr int kThreads = 128;
  static constexpr int kCtasPerSm = kCtasPerSm_;

  static constexpr int kRowBytes = 128;                     // of 64 columns
  static constexpr int kColumnsBytes = kBlock * kRowBytes;  // of 64 columns of a tile
  static constexpr int kTileBytes = kBlock * kHeadDim * 2;
  static_assert(kTileQ == kBlock);

  struct SharedMemory {
    unsigned char key[kTileBytes];    // [kHeadDim / 64][kBlock][kRowBytes], swizzled; later the rows of dk
    unsigned char value[kTileBytes];  // later the rows of dv
    struct {
      unsigned char query[kTileBytes];
      unsigned char dout[kTileBytes];
    } rows[2];
    alignas(16) RowStats stats[2][kTileQ];
    std::uint64_t bits[2][kTileQ];
    unsigned char bias[kThreads / 32][kTileQ * 32];  // of each warp's 16 keys, see BiasPairs
    // Where the rows of a step begin, a row that does not exist like row 0: in bytes from the first row of
    // the first head; in elements of the bias; in elements of its gradient, -1 for nowhere.
    std::int64_t query_rows[3][kTileQ], dout_rows[3][kTileQ], bias_rows[3][kTileQ], dbias_rows[3][kTileQ];
    int keys[kBlock];  // by line of the tiles; -1: none
  };

  // Of the 16-byte chunk `chunk` of row `row` of a tile, in bytes.
  __device__ static int chunk_offset(int row, int chunk) {
    return chunk / 8 * kColumnsBytes + row * kRowBytes + ((chunk ^ row) & 7) * 16;
  }
};

// Brings the rows of the block's list, a step at a time: their numbers three steps ahead, where they begin
// two, Q, dO, statistics and bits one.
template <typename Config>
class RowLoader {
  using Element = typename Config::Element;
  using SharedMemory = typename Config::SharedMemory;
  static constexpr int kTileQ = Config::kTileQ;
  using Copy = sm80::RowCopy<Config::kHeadDim, Config::kThreads>;

 public:
  __device__ RowLoader(const BackwardParams<Element>& params, const DenseParams& dense,
                       const DenseKeyItem& item, SharedMemory& shared)
      : params_(params),
        dense_(dense),
        item_(item),
        shared_(shared),
        tiles_(static_cast<int>(ceil_div(item.size, kTileQ))),
        first_head_(item.head_kv * params.geometry.group()),
        copy_(params.head_dim) {}

  __device__ int num_steps() const { return tiles_ * item_.repeats; }

  __device__ void read_numbers() {
    const int n = static_cast<int>(threadIdx.x);
    const int index = next_number_.tile * kTileQ + n;
    number_ = n < kTileQ && next_number_.head < item_.repeats && index < item_.size ? item_.rows[index] : -1;
    number_head_ = next_number_.head;
    next_number_.advance(tiles_);
  }

  // The places of the rows whose numbers were read last.
  __device__ void write_places(int step) {
    const int n = static_cast<int>(threadIdx.x);
    if (n >= kTileQ) return;
    place_ = {-1, 0};
    if (number_ >= 0) {
      const int head = dense_.lists.bit_heads == 1 ? 0 : number_ / params_.geometry.seqlen_q;
      place_ = {number_ - head * params_.geometry.seqlen_q,
                dense_.lists.bit_heads == 1 ? number_head_ : head};
    }
    const std::int64_t row = max(place_.row, 0);
    const auto bytes = [&](const RowsTensor<const Element>& rows) {
      return (row * rows.row_stride + place_.head * rows.head_stride) *
             static_cast<std::int64_t>(sizeof(Element));
    };
    const auto elements = [&](const PairTensor& pairs) {
      return pairs.offset(item_.batch, item_.head_kv, place_.head) + row * pairs.row_stride;
    };
    const int slot = step % 3;
    shared_.query_rows[slot][n] = bytes(params_.query);
    shared_.dout_rows[slot][n] = bytes(params_.dout);
    const std::int64_t bias_row = elements(dense_.bias);
    shared_.bias_rows[slot][n] = bias_row;
    if (dense_.bias.present() && item_.whole && place_.row >= 0) prefetch_bias(bias_row);
    shared_.dbias_rows[slot][n] = place_.row < 0 ? -1 : elements(dense_.dbias);
  }

  // Begins the copies of the step whose places were written last, before this step's barrier.
  __device__ void load(int step) {
    const int stage = step % 2;
    const int count = item_.size - next_load_.tile * kTileQ;  // rows that exist
    const auto copy = [&](unsigned char* tile, const RowsTensor<const Element>& rows,
                          const std::int64_t* begins) {
      const char* first =
          reinterpret_cast<const char*>(rows.head(params_.geometry, item_.batch, 0, first_head_));
      copy_tile(tile, [&](int r) { return first + begins[r]; }, [&](int r) { return r < count; });
    };
    copy(shared_.rows[stage].query, params_.query, shared_.query_rows[step % 3]);
    copy(shared_.rows[stage].dout, params_.dout, shared_.dout_rows[step % 3]);
    const int n = static_cast<int>(threadIdx.x);
    if (n < kTileQ) {
      const RowPlace safe = {max(place_.row, 0), place_.head};
      const bool exists = place_.row >= 0;
      cp_async_8_or_zero(shared_address(&shared_.stats[stage][n]),
                         params_.stats + (first_head_ + safe.head) * params_.geometry.total_q() +
                             static_cast<std::int64_t>(item_.batch) * params_.geometry.seqlen_q + safe.row,
                         exists);
      cp_async_8_or_zero(shared_address(&shared_.bits[stage][n]), row_bits(item_, dense_.lists, safe),
                         exists);
    }
    next_load_.advance(tiles_);
  }

  // Begins the copy of the block's keys or values.
  __device__ void load_keys(unsigned char* tile, const RowsTensor<const Element>& rows) {
    const char* first =
        reinterpret_cast<const char*>(rows.head(params_.geometry, item_.batch, 0, item_.head_kv));
    const auto row_bytes = rows.row_stride * static_cast<std::int64_t>(sizeof(Element));
    copy_tile(
        tile, [&](int r) { return first + max(shared_.keys[r], 0) * row_bytes; },
        [&](int r) { return shared_.keys[r] >= 0; });
  }

 private:
  // Into the L2 cache: a row of the block's bias, two steps before it is read.
  __device__ __forceinline__ void prefetch_bias(std::int64_t begin) {
    const PairTensor& bias = dense_.bias;
    if (!bias.vectors || item_.first_key + kBlock > params_.geometry.seqlen_k) return;
    const unsigned char* from = bias.data + (begin + item_.first_key) * bias.element_bytes();
    constexpr int kSectorBytes = 32;
    for (int byte = 0; byte < kBlock * bias.element_bytes(); byte += kSectorBytes) prefetch_l2(from + byte);
  }

  // As RowCopy::load, into the layout of wgmma.
  template <typename From, typename Exists>
  __device__ __forceinline__ void copy_tile(unsigned char* tile, From&& from, Exists&& exists) {
    const SharedAddress to = shared_address(tile) + Config::chunk_offset(copy_.row, copy_.chunk);
    static_assert(Copy::kRowsPerPass % 8 == 0);  // the swizzle is the same in every pass
    const auto each_row = [&](auto&& copy) {
#pragma unroll
      for (int first = 0; first < kBlock; first += Copy::kRowsPerPass)
        copy(to + first * Config::kRowBytes, from(copy_.row + first) + copy_.offset,
             exists(copy_.row + first));
    };
    if (copy_.valid_bytes % 16 == 0) {
      each_row([&](SharedAddress place, const char* data, bool row_exists) {
        cp_async_16_or_zero(place, data, row_exists && copy_.valid_bytes != 0);
      });
    } else {  // the end of a head dim that is no multiple of 8
      each_row([&](SharedAddress place, const char* data, bool row_exists) {
        cp_async_16(place, data, row_exists ? copy_.valid_bytes : 0);
      });
    }
  }

  // Through the tiles of the list, once for each head that shares it.
  struct Walk {
    int tile = 0;
    int head = 0;
    __device__ void advance(int tiles) {
      if (++tile == tiles) {
        tile = 0;
        ++head;
      }
    }
  };

  const BackwardParams<Element>& params_;
  const DenseParams& dense_;
  const DenseKeyItem& item_;
  SharedMemory& shared_;
  int tiles_;
  int first_head_;
  Copy copy_;
  Walk next_number_, next_load_;
  int number_ = -1;
  int number_head_ = 0;
  RowPlace place_{-1, 0};
};

// The bias of a thread's two neighbouring keys of a block, in each of its 16 rows of a step. One of 16 bits
// is copied to shared memory where strides allow it, by each warp for itself: 32 bytes of a row, rows in the
// order in which the threads of a warp read without conflicts.
template <typename Config>
class BiasPairs {
  static constexpr int kTileQ = Config::kTileQ;

 public:
  // first: the thread's first key in the block; key0, key1: its keys, -1: none. memory: the warp's.
  __device__ BiasPairs(const PairTensor& bias, const Geometry& geometry, const DenseKeyItem& item, int first,
                       int key0, int key1, unsigned char* memory)
      : bias_(bias), memory_(memory), keys_{key0, key1}, first_(item.first_key + first) {
    pairs_ = item.whole && bias.vectors && item.first_key + kBlock <= geometry.seqlen_k;
    staged_ = pairs_ && bias.present() && bias.element_bytes() == 2;
  }

  // Begins the copy of a step's part, once no thread of the warp reads the last step's any more.
  __device__ void load(const std::int64_t* rows) {
    if (!staged_) return;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int chunk = lane % 2;
    const auto* from = reinterpret_cast<const std::uint16_t*>(bias_.data) + first_ / 16 * 16 + chunk * 8;
#pragma unroll
    for (int row = lane / 2; row < kTileQ; row += 16)
      cp_async_16(shared_address(memory_) + place(row) + chunk * 16, from + rows[row]);
  }

  // use(n, c, pair): the two biases of the thread's row c of block n. visible: of visible_pairs.
  template <typename Use>
  __device__ __forceinline__ void each(const std::int64_t* rows, unsigned visible, Use&& use) const {
    if (!bias_.present()) {
      each_row([&](int n, int c) { use(n, c, make_float2(0, 0)); });
    } else if (staged_ && bias_.type == PairType::kBFloat16) {
      each_row([&](int n, int c) { use(n, c, sm80::unpack_pair(word(n, c), true)); });
    } else if (staged_) {
      each_row([&](int n, int c) { use(n, c, sm80::unpack_pair(word(n, c), false)); });
    } else if (pairs_) {
      each_row([&](int n, int c) {
        use(n, c, *reinterpret_cast<const float2*>(bias_.data + (rows[row_of(n, c)] + first_) * 4));
      });
    } else {
      each_row([&](int n, int c) {
        const std::int64_t begin = rows[row_of(n, c)];
        const unsigned seen = visible >> (4 * n + 2 * c);
        const auto element = [&](int i) {
          return (seen >> i & 1) != 0 ? sm80::bias_element(bias_, begin + keys_[i] * bias_.key_stride) : 0;
        };
        use(n, c, make_float2(element(0), element(1)));
      });
    }
  }

 private:
  // Of the 32 bytes of a row: the rows 2 q + c of a block, q = 0 .. 3, are neighbours.
  __device__ static int place(int row) { return (row / 8 * 8 + row % 2 * 4 + row % 8 / 2) * 32; }
  __device__ static int row_of(int n, int c) { return n * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + c; }
  __device__ std::uint32_t word(int n, int c) const {
    return *reinterpret_cast<const std::uint32_t*>(memory_ + place(row_of(n, c)) + first_ % 16 * 2);
  }
  template <typename Apply>
  __device__ __forceinline__ static void each_row(Apply&& apply) {
#pragma unroll
    for (int n = 0; n < kTileQ / 8; ++n) {
      apply(n, 0);
      apply(n, 1);
    }
  }

  const PairTensor& bias_;
  unsigned char* memory_;
  int keys_[2];
  int first_;   // key of the sequence
  bool pairs_;  // the two are one aligned piece of memory
  bool staged_;
};

// Bit 4 n + 2 c + i: the thread's row c of block n sees its key i. first: the thread's first key in the
// block.
template <int kTileQ>
__device__ __forceinline__ unsigned visible_pairs(const std::uint64_t* bits, int first) {
  const auto* halves = reinterpret_cast<const std::uint16_t*>(bits) + first / 16;
  unsigned visible = 0;
#pragma unroll
  for (int n = 0; n < kTileQ / 8; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int row = n * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + c;
      visible |= (static_cast<unsigned>(halves[row * 4]) >> (first % 16) & 3) << (4 * n + 2 * c);
    }
  }
  return visible;
}

// An accumulator times `scale` as the A operands of the next product.
template <typename Element, int kCount>
__device__ __forceinline__ void round_to_operands(std::uint32_t (&a)[kCount / 8][4],
                                                  const float (&acc)[kCount], float scale = 1) {
#pragma unroll
  for (int k = 0; k < kCount / 8; ++k) {
#pragma unroll
    for (int r = 0; r < 4; ++r)
      a[k][r] = pack<Element>(acc[8 * k + 2 * r] * scale, acc[8 * k + 2 * r + 1] * scale);
  }
}

constexpr int kAtomBytes = 8 * 128;  // of the swizzle

// Queues acc = A B^T of two tiles of 64 rows.
template <typename Config>
__device__ __forceinline__ void queue_abt(float (&acc)[32], const unsigned char* a, const unsigned char* b) {
  const Operand first = operand(shared_address(a), kAtomBytes);
  const Operand second = operand(shared_address(b), kAtomBytes);
#pragma unroll
  for (int k = 0; k < Config::kHeadDim / 16; ++k) {
    const int step = k / 4 * Config::kColumnsBytes + k % 4 * 32;
    wgmma<typename Config::Element, 64>(acc, first + step, second + step, k > 0);
  }
  wgmma_commit();
}

// Queues acc += A B, B a tile of 64 rows.
template <typename Config>
__device__ __forceinline__ void queue_ab(float (&acc)[Config::kHeadDim / 2], const std::uint32_t (&a)[4][4],
                                         const unsigned char* b) {
  const Operand rows = operand(shared_address(b), kAtomBytes, Config::kColumnsBytes);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    wgmma<typename Config::Element, Config::kHeadDim>(acc, a[k], rows + k * 2 * kAtomBytes, true);
  }
  wgmma_commit();
}

// Puts the thread's part of the rows of a gradient into a tile.
template <typename Config>
__device__ __forceinline__ void put_gradient(unsigned char* tile, const float (&acc)[Config::kHeadDim / 2],
                                             int line, float scale) {
#pragma unroll
  for (int n = 0; n < Config::kHeadDim / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      reinterpret_cast<std::uint32_t*>(tile + Config::chunk_offset(line + 8 * i, n))[threadIdx.x % 4] =
          pack<typename Config::Element>(acc[4 * n + 2 * i] * scale, acc[4 * n + 2 * i + 1] * scale);
    }
  }
}

// Stores the rows of a tile.
template <typename Config, typename Element>
__device__ __forceinline__ void store_gradient(const unsigned char* tile, const RowsTensor<Element>& gradient,
                                               const Geometry& geometry, const DenseKeyItem& item,
                                               const int* keys, int head_dim) {
  if (!gradient.present()) return;
  constexpr int kChunks = Config::kHeadDim / 8;
  Element* rows = gradient.head(geometry, item.batch, 0, item.head_kv);
#pragma unroll 4
  for (int index = static_cast<int>(threadIdx.x); index < kBlock * kChunks; index += Config::kThreads) {
    const int key = keys[index / kChunks];
    const int chunk = index % kChunks;
    const int valid = head_dim - chunk * 8;
    if (key < 0 || valid <= 0) continue;
    const unsigned char* from = tile + Config::chunk_offset(index / kChunks, chunk);
    Element* to = rows + key * gradient.row_stride + chunk * 8;
    if (valid >= 8) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int i = 0; i < valid; ++i) to[i] = reinterpret_cast<const Element*>(from)[i];
    }
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    dense_key_grad_kernel(const __grid_constant__ BackwardParams<typename Config::Element> params,
                          const __grid_constant__ DenseParams dense) {
  using Element = typename Config::Element;
  constexpr int kHeadDim = Config::kHeadDim;
  constexpr int kTileQ = Config::kTileQ;
  constexpr int kNTiles = kTileQ / 8;
  constexpr float kLog2EFloat = static_cast<float>(kLog2E);
  constexpr float kProbabilityScale = sm80::kProbabilityScale<Element>;

  const Geometry& geometry = params.geometry;
  const DenseLists& lists = dense.lists;
  const DenseKeyItem item = sm80::locate_keys(geometry, lists);
  sm80::zero_unseen(params.dk, geometry, item, lists, params.head_dim);
  sm80::zero_unseen(params.dv, geometry, item, lists, params.head_dim);
  if (item.size == 0) return;

  auto& shared = *reinterpret_cast<typename Config::SharedMemory*>(dynamic_shared_memory());
  RowLoader<Config> loader(params, dense, item, shared);
  if (threadIdx.x < kBlock)
    shared.keys[threadIdx.x] = sm80::key_of_line(item, lists, static_cast<int>(threadIdx.x));
  loader.read_numbers();
  loader.write_places(0);
  loader.read_numbers();
  __syncthreads();
  loader.load(0);
  loader.write_places(1);
  loader.read_numbers();
  loader.load_keys(shared.key, params.key);
  loader.load_keys(shared.value, params.value);
  cp_async_commit();

  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int line = static_cast<int>(threadIdx.x) / 32 * 16 + lane / 4;  // the thread's: this one, and 8 on
  const int first = sm80::down_key(line);                               // its keys: this one, and the next
  const int key0 = shared.keys[line];
  const int key1 = shared.keys[line + 8];
  BiasPairs<Config> bias(dense.bias, geometry, item, first, key0, key1, shared.bias[threadIdx.x / 32]);
  bias.load(shared.bias_rows[0]);
  cp_async_commit();

  // The common case: a gradient of the products' type, its whole blocks in aligned pieces.
  const bool stores_pairs = dense.dbias.type == sm80::kPairType<Element> && item.whole &&
                            dense.dbias.vectors && item.first_key + kBlock <= geometry.seqlen_k;
  Element* const dbias_keys = reinterpret_cast<Element*>(dense.dbias.data) + item.first_key + first;

  float dk[kHeadDim / 2] = {}, dv[kHeadDim / 2] = {};
  float p[32], ds[32];
  const int num_steps = loader.num_steps();
  for (int step = 0; step < num_steps; ++step) {
    const int stage = step % 2;
    const auto& rows = shared.rows[stage];
    const RowStats* stats = shared.stats[stage] + lane % 4 * 2;
    cp_async_wait<1>();  // the bias may be on its way
    fence_async_proxy();
    __syncthreads();  // the rows of this step have arrived, those of the last are no longer read
    pin(p);
    pin(ds);
    wgmma_fence();
    queue_abt<Config>(p, shared.key, rows.query);
    queue_abt<Config>(ds, shared.value, rows.dout);
    if (step + 1 < num_steps) loader.load(step + 1);
    cp_async_commit();
    loader.write_places(step + 2);
    loader.read_numbers();
    const unsigned visible = visible_pairs<kTileQ>(shared.bits[stage], first);

    wgmma_wait<1>();
    pin(p);
    cp_async_wait<1>();  // all but the rows of the next step
    __syncwarp();        // the bias has arrived
    bias.each(shared.bias_rows[step % 3], visible, [&](int n, int c, float2 pair) {
      const float4 both = *reinterpret_cast<const float4*>(&stats[n * 8]);  // of its two rows
      const float lse_log2 = c == 0 ? both.x : both.z;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& x = p[4 * n + 2 * i + c];
        const float shift = fmaf(i == 0 ? pair.x : pair.y, kLog2EFloat, -lse_log2);
        x = (visible >> (4 * n + 2 * c + i) & 1) != 0 ? exp2_approx(fmaf(x, params.scale_log2, shift)) : 0;
      }
    });
    __syncwarp();  // it is no longer read
    if (step + 1 < num_steps) bias.load(shared.bias_rows[(step + 1) % 3]);
    cp_async_commit();
    std::uint32_t p_operands[4][4];
    round_to_operands<Element>(p_operands, p, kProbabilityScale);
    pin(dv);
    wgmma_fence();
    queue_ab<Config>(dv, p_operands, rows.dout);

    wgmma_wait<1>();
    pin(ds);
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
      const float4 both = *reinterpret_cast<const float4*>(&stats[n * 8]);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float delta = c == 0 ? both.y : both.w;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int e = 4 * n + 2 * i + c;
          ds[e] = (visible >> (4 * n + 2 * c + i) & 1) != 0 ? p[e] * (ds[e] - delta) : 0;
        }
      }
    }
    std::uint32_t ds_operands[4][4];
    round_to_operands<Element>(ds_operands, ds);
    pin(dk);
    wgmma_fence();
    queue_ab<Config>(dk, ds_operands, rows.query);
    if (dense.dbias.present()) {
      const std::int64_t* dbias_rows = shared.dbias_rows[step % 3];
      const auto& pairs = reinterpret_cast<const float(&)[kNTiles][4]>(ds);
      if (stores_pairs) {
        sm80::store_pairs<Element, kNTiles>(dbias_keys, pairs, dbias_rows);
      } else {
        sm80::store_bias_grad<kNTiles>(dense.dbias, pairs, item.whole, key0, key1, item.first_key + first,
                                       geometry.seqlen_k, [&](int row) { return dbias_rows[row]; });
      }
    }
    wgmma_wait<0>();
    pin(dv);
    pin(dk);
  }
  cp_async_wait<0>();
  __syncthreads();  // K and V are no longer read
  put_gradient<Config>(shared.key, dk, line, params.scale);
  put_gradient<Config>(shared.value, dv, line, 1 / kProbabilityScale);
  __syncthreads();
  store_gradient<Config>(shared.key, params.dk, geometry, item, shared.keys, params.head_dim);
  store_gradient<Config>(shared.value, params.dv, geometry, item, shared.keys, params.head_dim);
}

}  // namespace flash_dmattn::cuda::sm90
