// The two kernels of decode: the list of the keys that some row sees, and the attention of all rows to one
// split of it.
//
//   list_keys      a CTA looks through kDecodeListTile keys and lists those that count, by index
//   decode_kernel  a CTA takes a split of one head's list and 16 rows times heads. Its four warps divide each
//                  tile of keys; their sums meet in shared memory, those of the splits in global memory,
//                  where the CTA that finishes last adds them up, in the order of the splits.
#pragma once

#include <cmath>
#include <cub/block/block_scan.cuh>

#include "cuda/common/log2.h"
#include "cuda/sm80/decode.h"
#include "cuda/sm80/logits.cuh"
#include "cuda/sm80/params.h"
#include "cuda/sm80/softmax_rows.cuh"
#include "cuda/sm80/tile.cuh"

namespace flash_dmattn::cuda::sm80 {

template <typename Element>
struct DecodeParams {
  Geometry geometry;
  DecodeBuffers buffers;
  RowsTensor<const Element> query, key, value;
  RowsTensor<Element> out;
  VectorTensor<float> lse;         // optional
  VectorTensor<const float> bias;  // optional
  VectorTensor<const int> expiry;  // optional
  int head_dim;
  float scale_log2;  // scale * log2(e)
  bool causal;

  // Where a row of the sequence stands.
  __device__ int position(int row) const {
    return causal ? geometry.seqlen_k - geometry.seqlen_q + row : geometry.seqlen_k - 1;
  }
};

constexpr int kListThreads = 512;

template <typename Element>
__global__ void __launch_bounds__(kListThreads, 4)
    list_keys(const __grid_constant__ DecodeParams<Element> params) {
  constexpr int kGroups = kDecodeListTile / kListThreads / 4;  // of four neighbouring keys, of a thread
  constexpr int kWarps = kListThreads / 32;
  static_assert(kGroups == 4 && kWarps <= 32, "counts of four groups share a word, a lane adds for a warp");
  __shared__ int listed_by[kWarps];
  let_next_kernel_start();
  const Geometry& geometry = params.geometry;
  const DecodeBuffers& buffers = params.buffers;
  const int list = static_cast<int>(blockIdx.x % buffers.sizes.lists);
  const std::int64_t line = blockIdx.x / buffers.sizes.lists;
  const int sequence = static_cast<int>(line / geometry.heads_kv);
  const int head = static_cast<int>(line % geometry.heads_kv);
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int first = list * kDecodeListTile;
  const int own = first + warp * (32 * 4 * kGroups) + lane * 4;  // the first key of the thread's first group
  const int* expiry = params.expiry.present() ? params.expiry.head(geometry, sequence, 0, head) : nullptr;
  const float* bias = params.bias.present() ? params.bias.head(geometry, sequence, 0, head) : nullptr;
  const bool vectors = expiry != nullptr && params.expiry.stride == 1 &&
                       first + kDecodeListTile <= geometry.seqlen_k &&
                       reinterpret_cast<std::uintptr_t>(expiry + first) % 16 == 0;
  const auto until = [&](int key) {
    if (key >= geometry.seqlen_k) return 0;
    return expiry == nullptr ? geometry.seqlen_k : min(expiry[key * params.expiry.stride], geometry.seqlen_k);
  };
  int4 groups[kGroups];
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int key = own + g * (32 * 4);
    groups[g] = vectors ? *reinterpret_cast<const int4*>(expiry + key)
                        : make_int4(until(key), until(key + 1), until(key + 2), until(key + 3));
  }
  const int first_position = params.position(0);
  unsigned listed = 0;  // bit 4 * g + i: key i of group g
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int ends[4] = {groups[g].x, groups[g].y, groups[g].z, groups[g].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      listed |= ends[i] > max(own + g * (32 * 4) + i, first_position) ? 1u << (4 * g + i) : 0;
    }
  }
  if (bias != nullptr && listed != 0) {
    float values[4 * kGroups];  // all on the way at once
#pragma unroll
    for (int i = 0; i < 4 * kGroups; ++i) {
      const int key = own + i / 4 * (32 * 4) + i % 4;
      values[i] = (listed >> i & 1) != 0 ? bias[key * params.bias.stride] : 0;
    }
#pragma unroll
    for (int i = 0; i < 4 * kGroups; ++i) listed &= values[i] == -INFINITY ? ~(1u << i) : ~0u;
  }
  unsigned counts = 0;  // byte g: of group g
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    counts |= static_cast<unsigned>(__popc(listed >> (4 * g) & 15u)) << (8 * g);
  }
  unsigned until_lane = counts;  // of this lane and those before it
  for (int step = 1; step < 32; step *= 2) {
    const unsigned before = __shfl_up_sync(0xffffffffu, until_lane, step);
    if (lane >= step) until_lane += before;
  }
  const unsigned of_warp = __shfl_sync(0xffffffffu, until_lane, 31);
  int place = 0;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) place += static_cast<int>(of_warp >> (8 * g) & 0xff);
  if (lane == 0) listed_by[warp] = place;
  __syncthreads();
  const int before = __reduce_add_sync(0xffffffffu, lane < min(warp, kWarps) ? listed_by[lane] : 0);
  if (thread == kListThreads - 1) buffers.counts[blockIdx.x] = before + place;
  place = before;
  PlanEntry* const entries = buffers.entries + line * geometry.seqlen_k + first;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    int at = place + static_cast<int>((until_lane - counts) >> (8 * g) & 0xff);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((listed >> (4 * g + i) & 1) == 0) continue;
      const int key = own + g * (32 * 4) + i;
      entries[at++] = {key, until(key)};
    }
    place += static_cast<int>(of_warp >> (8 * g) & 0xff);
  }
  if (list != 0) return;
  for (int tile = thread; tile < buffers.sizes.tiles_m; tile += kListThreads) {
    buffers.finished[line * buffers.sizes.tiles_m + tile] = 0;
  }
}

template <typename Element_, int kHeadDim_, int kTileN_, int kCtasPerSm_>
struct DecodeConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kTileN = kTileN_;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kWarpN = kTileN / kWarps;  // keys of a warp in each tile
  static constexpr int kCtasPerSm = kCtasPerSm_;

  struct KeysAndValues {
    Element key[kTileN * kHeadDim];
    Element value[kTileN * kHeadDim];
  };
  struct WarpSums {
    float out[kWarps][kDecodeTileM][kHeadDim + 8];  // rows begin in different banks
  };
  struct SharedMemory {
    Element query[kDecodeTileM * kHeadDim];
    union {
      KeysAndValues tiles;
      WarpSums sums;                                 // of the warps, once the tiles are done
      float2 stats[kDecodeMaxSplits][kDecodeTileM];  // of the splits, in the last CTA; later x is the weight
    };
    KeySlot<kWarpN> slots[kWarps];  // of the tile's keys, those of each warp
    RowPlace places[kDecodeTileM];
    float max[kWarps][kDecodeTileM];
    float sum[kWarps][kDecodeTileM];
    typename cub::BlockScan<int, kThreads>::TempStorage scan;
    int first_entry[kDecodeMaxLists];  // of each list, among all of the head
    bool is_last;
  };
};

// The keys of a head as one row of entries, whatever lists they are in.
template <int kThreads>
class DecodeList {
 public:
  int size;  // keys

  template <typename Params, typename SharedMemory>
  __device__ DecodeList(const Params& params, std::int64_t line, SharedMemory& shared)
      : size(params.geometry.seqlen_k),
        seqlen_k_(params.geometry.seqlen_k),
        lists_(params.buffers.sizes.lists),
        first_entry_(shared.first_entry) {
    if (lists_ == 0) return;
    entries_ = params.buffers.entries + line * seqlen_k_;
    const int* counts = params.buffers.counts + line * lists_;
    const int per_thread = static_cast<int>(ceil_div(lists_, kThreads));
    const int begin = min(static_cast<int>(threadIdx.x) * per_thread, lists_);
    const int end = min(begin + per_thread, lists_);
    int sum = 0;
    for (int list = begin; list < end; ++list) sum += counts[list];
    int before;
    cub::BlockScan<int, kThreads>(shared.scan).ExclusiveSum(sum, before, size);
    for (int list = begin; list < end; ++list) {
      shared.first_entry[list] = before;
      before += counts[list];
    }
    __syncthreads();
  }

  __device__ PlanEntry entry(int index) const {
    if (lists_ == 0) return {index, seqlen_k_};
    const int list = owner_of(index, lists_, [this](int at) { return first_entry_[at]; });
    return entries_[static_cast<std::int64_t>(list) * kDecodeListTile + index - first_entry_[list]];
  }

 private:
  int seqlen_k_;
  int lists_;
  const int* first_entry_;
  const PlanEntry* entries_ = nullptr;
};

// Keys of a split. Where the list decides, those do that the first row sees: no later token changes them, nor
// so the order in which sums are added. All threads call.
template <typename Params, typename List>
__device__ int split_length(const Params& params, const List& list) {
  const DecodeSizes& sizes = params.buffers.sizes;
  if (sizes.split_keys > 0) return sizes.split_keys;
  const int rows_behind = params.causal ? params.geometry.seqlen_q - 1 : 0;
  int size = list.size + kDecodeMaxRows - 1;  // with room for the keys of further rows
  if (rows_behind > 0) {
    const int thread = static_cast<int>(threadIdx.x);
    const bool looks = thread < min(rows_behind, list.size);
    const bool is_behind = looks && list.entry(list.size - 1 - thread).key > params.position(0);
    size -= __syncthreads_count(is_behind);
  }
  constexpr int kUnit = kDecodeLeastSplit * kDecodeUnknownSplits;
  return max(static_cast<int>(ceil_div(size, kUnit)), 1) * kDecodeLeastSplit;
}

// The weights of the splits in each of the 16 rows, in shared.stats[split][row].x, and lse. A warp takes a
// row, its lanes the splits.
template <typename Config>
__device__ void weigh_splits(const DecodeParams<typename Config::Element>& params, int sequence,
                             int first_head, const float2* stats, int splits,
                             typename Config::SharedMemory& shared) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int m = static_cast<int>(threadIdx.x / 32); m < kDecodeTileM; m += Config::kWarps) {
    const RowPlace place = shared.places[m];
    if (place.row < 0) continue;
    float max = -INFINITY;
    for (int split = lane; split < splits; split += 32) {
      const float2 stat = stats[split * kDecodeTileM + m];
      shared.stats[split][m] = stat;
      max = fmaxf(max, stat.x);
    }
    for (int step = 16; step > 0; step /= 2) max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, step));
    // No split saw a key: subtract 0, since (-inf) - (-inf) is NaN.
    const float base = max == -INFINITY ? 0 : max;
    float sum = 0;
    for (int split = lane; split < splits; split += 32) {
      float2& stat = shared.stats[split][m];
      stat.x = exp2_approx(stat.x - base);
      sum = fmaf(stat.x, stat.y, sum);
    }
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane != 0) continue;
    shared.sum[0][m] = sum == 0 ? 0 : 1 / sum;
    if (params.lse.present()) {
      params.lse.head(params.geometry, sequence, 0, first_head + place.head)[place.row * params.lse.stride] =
          sum == 0 ? -INFINITY : (max + log2f(sum)) * kLn2;
    }
  }
  __syncthreads();
}

// out and lse of the 16 rows from the results of all splits, which one CTA reads with many loads in flight. A
// thread takes four columns of a row.
template <typename Config>
__device__ void combine_splits(const DecodeParams<typename Config::Element>& params, int sequence,
                               int first_head, std::int64_t first_partial, int splits,
                               typename Config::SharedMemory& shared) {
  using Element = typename Config::Element;
  constexpr int kHeadDim = Config::kHeadDim;
  constexpr int kQuads = kHeadDim / 4;
  constexpr int kBatch = 20;  // splits loaded at a time: those of a window of 2048 keys and 16 rows are 17
  const auto* partials =
      reinterpret_cast<const float4*>(params.buffers.partials) + first_partial * (kDecodeTileM * kQuads);
  float4 parts[kBatch];
  const auto load = [&](int unit, int first) {
#pragma unroll
    for (int s = 0; s < kBatch; ++s) {
      const bool there = first + s < splits && shared.places[unit / kQuads].row >= 0;
      parts[s] = there ? partials[(first + s) * static_cast<std::int64_t>(kDecodeTileM * kQuads) + unit]
                       : make_float4(0, 0, 0, 0);
    }
  };
  const int thread = static_cast<int>(threadIdx.x);
  load(thread, 0);  // on the way while the splits are weighed
  weigh_splits<Config>(params, sequence, first_head, params.buffers.stats + first_partial * kDecodeTileM,
                       splits, shared);
  for (int unit = thread; unit < kDecodeTileM * kQuads; unit += Config::kThreads) {
    const int row = unit / kQuads;
    const RowPlace place = shared.places[row];
    if (place.row < 0) break;  // the rows behind are none either
    float sums[4] = {};
    for (int first = 0; first < splits; first += kBatch) {
      if (unit != thread || first != 0) load(unit, first);
#pragma unroll
      for (int s = 0; s < kBatch; ++s) {
        if (first + s >= splits) break;
        const float weight = shared.stats[first + s][row].x;
        sums[0] = fmaf(weight, parts[s].x, sums[0]);
        sums[1] = fmaf(weight, parts[s].y, sums[1]);
        sums[2] = fmaf(weight, parts[s].z, sums[2]);
        sums[3] = fmaf(weight, parts[s].w, sums[3]);
      }
    }
    Element* out = params.out.head(params.geometry, sequence, 0, first_head + place.head) +
                   place.row * params.out.row_stride;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int column = unit % kQuads * 4 + c;
      const std::uint32_t bits = pack<Element>(sums[c] * shared.sum[0][row], 0);
      if (column < params.head_dim) out[column] = Element{static_cast<std::uint16_t>(bits)};
    }
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    decode_kernel(const __grid_constant__ DecodeParams<typename Config::Element> params) {
  using Element = typename Config::Element;
  constexpr int kHeadDim = Config::kHeadDim;
  constexpr int kTileN = Config::kTileN;
  constexpr int kThreads = Config::kThreads;
  constexpr int kNTiles = Config::kWarpN / 8;
  auto& shared = *reinterpret_cast<typename Config::SharedMemory*>(dynamic_shared_memory());
  const Geometry& geometry = params.geometry;
  const DecodeSizes& sizes = params.buffers.sizes;
  const int split = static_cast<int>(blockIdx.x % sizes.splits);
  const int tile_m = static_cast<int>(blockIdx.x / sizes.splits % sizes.tiles_m);
  const std::int64_t line = blockIdx.x / sizes.splits / sizes.tiles_m;
  const int sequence = static_cast<int>(line / geometry.heads_kv);
  const int head_kv = static_cast<int>(line % geometry.heads_kv);
  const int first_head = head_kv * geometry.group();

  // Q, which may be read while list_keys, which started in order, runs.
  const RowCopy<kHeadDim, kThreads> copy(params.head_dim);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kDecodeTileM) {
    const int row_and_head = tile_m * kDecodeTileM + thread;
    const int row = row_and_head / geometry.group();
    shared.places[thread] = {row < geometry.seqlen_q ? row : -1, row_and_head % geometry.group()};
  }
  __syncthreads();
  const Element* query = params.query.head(geometry, sequence, 0, first_head);
  copy.template load<kDecodeTileM>(
      shared_address(shared.query),
      [&](int m) {
        const RowPlace place = shared.places[m];
        return reinterpret_cast<const char*>(query + max(place.row, 0) * params.query.row_stride +
                                             place.head * params.query.head_stride);
      },
      [&](int m) { return shared.places[m].row >= 0; });
  cp_async_commit();

  wait_for_previous_kernel();
  const DecodeList<kThreads> list(params, line, shared);
  const int split_keys = split_length(params, list);
  // The last split takes what is left: a selection of the caller's own may be longer than its window.
  const int splits = max(min(static_cast<int>(ceil_div(list.size, split_keys)), sizes.splits), 1);
  if (split >= splits) {
    cp_async_wait<0>();
    return;
  }
  const int begin = split * split_keys;
  const int end = split == splits - 1 ? list.size : begin + split_keys;

  const SharedAddress query_tile = shared_address(shared.query);
  const SharedAddress key_tile = shared_address(shared.tiles.key);
  const SharedAddress value_tile = shared_address(shared.tiles.value);
  const Element* key = params.key.head(geometry, sequence, 0, head_kv);
  const Element* value = params.value.head(geometry, sequence, 0, head_kv);
  const float* bias = params.bias.present() ? params.bias.head(geometry, sequence, 0, head_kv) : nullptr;
  const int key_bytes = static_cast<int>(params.key.row_stride * sizeof(Element));
  const int value_bytes = static_cast<int>(params.value.row_stride * sizeof(Element));
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int first_n = warp * Config::kWarpN;  // of the warp's keys in a tile
  int position[1][2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = shared.places[i * 8 + lane / 4].row;
    position[0][i] = row < 0 ? -1 : params.position(row);
  }

  float acc[1][kHeadDim / 8][4];
  clear(acc);
  SoftmaxRows<1> softmax;
  softmax.start();
  for (int first = begin; first < end; first += kTileN) {
    const int count = min(kTileN, end - first);
    __syncthreads();  // the last tile is no longer read
    const bool has_key = thread < kTileN;
    const PlanEntry own = has_key && thread < count ? list.entry(first + thread) : PlanEntry{0, 0};
    KeySlot<Config::kWarpN>& own_slot = shared.slots[has_key ? thread / Config::kWarpN : 0];
    if (has_key) own_slot.entries[thread % Config::kWarpN] = own;
    __syncthreads();
    const auto gather = [&](SharedAddress tile, const Element* rows, int row_bytes) {
      copy.template load<kTileN>(
          tile,
          [&](int n) {
            const int row = shared.slots[n / Config::kWarpN].entries[n % Config::kWarpN].key;
            return reinterpret_cast<const char*>(rows) + static_cast<std::int64_t>(row) * row_bytes;
          },
          [&](int n) { return n < count; });
    };
    gather(key_tile, key, key_bytes);
    gather(value_tile, value, value_bytes);
    cp_async_commit();
    if (bias != nullptr && has_key) {
      own_slot.bias[thread % Config::kWarpN] =
          thread < count ? bias[own.key * params.bias.stride] * static_cast<float>(kLog2E) : 0;
    }
    cp_async_wait<0>();
    __syncthreads();

    float s[1][kNTiles][4];
    clear(s);
    multiply_abt<Element, kHeadDim>(s, query_tile, key_tile + first_n * (2 * kHeadDim));
    make_logits(s, params.scale_log2, bias != nullptr, shared.slots[warp]);
    hide_keys(s, position, shared.slots[warp]);
    softmax.step(s, acc);
    std::uint32_t p[1][kNTiles / 2][4];
    round_to_fragments<Element>(p, s);
    multiply_ab<Element, kHeadDim>(acc, p, value_tile + first_n * (2 * kHeadDim));
  }
  cp_async_wait<0>();
  softmax.finish();
  __syncthreads();  // the tiles are no longer read

  // The sums of the warps become those of the split.
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = i * 8 + lane / 4;
    if (shared.places[row].row < 0) continue;
    if (lane % 4 == 0) {
      shared.max[warp][row] = softmax.max[0][i];
      shared.sum[warp][row] = softmax.sum[0][i];
    }
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      *reinterpret_cast<float2*>(&shared.sums.out[warp][row][n * 8 + lane % 4 * 2]) =
          make_float2(acc[0][n][2 * i], acc[0][n][2 * i + 1]);
    }
  }
  __syncthreads();
  const std::int64_t first_partial = (line * sizes.tiles_m + tile_m) * sizes.splits;
  float* partials = params.buffers.partials +
                    (first_partial + split) * (kDecodeTileM * static_cast<std::int64_t>(kHeadDim));
  for (int index = thread; index < kDecodeTileM * kHeadDim; index += kThreads) {
    const int row = index / kHeadDim;
    if (shared.places[row].row < 0) continue;
    float max = -INFINITY;
#pragma unroll
    for (int w = 0; w < Config::kWarps; ++w) max = fmaxf(max, shared.max[w][row]);
    const float base = max == -INFINITY ? 0 : max;
    float out = 0;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < Config::kWarps; ++w) {
      const float weight = exp2_approx(shared.max[w][row] - base);
      out = fmaf(weight, shared.sums.out[w][row][index % kHeadDim], out);
      sum = fmaf(weight, shared.sum[w][row], sum);
    }
    partials[index] = out;
    if (index % kHeadDim == 0) {
      params.buffers.stats[(first_partial + split) * kDecodeTileM + row] = make_float2(max, sum);
    }
  }
  __threadfence();  // the split's results are written before it counts as finished
  __syncthreads();
  if (thread == 0) {
    unsigned* finished = params.buffers.finished + line * sizes.tiles_m + tile_m;
    shared.is_last = atomicAdd(finished, 1u) == static_cast<unsigned>(splits) - 1;
    __threadfence();
  }
  __syncthreads();
  if (shared.is_last) combine_splits<Config>(params, sequence, first_head, first_partial, splits, shared);
}

}  // namespace flash_dmattn::cuda::sm80
