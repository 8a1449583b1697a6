// What the kernels with keys down and rows across do with a dense bias: a thread has two neighbouring keys of
// each of its rows.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/log2.h"
#include "cuda/sm80/dense_rows.cuh"

namespace flash_dmattn::cuda::sm80 {

// From products to logits times log2(e). first: the thread's first key in its block. offset(column, i): where
// the bias of a pair lies; sees(column): bit i: the row sees key i of the thread. Without a staged tile the
// bias of pairs that are not visible is left out.
template <int kNTiles, typename Offset, typename Sees>
__device__ __forceinline__ void make_pair_logits(float (&s)[kNTiles][4], float scale_log2,
                                                 const PairTensor& bias, const unsigned char* staged,
                                                 int first, Offset&& offset, Sees&& sees) {
  constexpr float kLog2EFloat = static_cast<float>(kLog2E);
  const auto each_column = [&](auto&& read) {
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float2 pair = read(n * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + c);
        s[n][c] = fmaf(s[n][c], scale_log2, pair.x * kLog2EFloat);
        s[n][2 + c] = fmaf(s[n][2 + c], scale_log2, pair.y * kLog2EFloat);
      }
    }
  };
  const auto read_16 = [&](int column) {
    return *reinterpret_cast<const std::uint32_t*>(staged + bias_address<2>(0, column, first / 8) +
                                                   first % 8 * 2);
  };
  if (bias.type == PairType::kNone) {
    each_column([](int) { return make_float2(0, 0); });
  } else if (staged == nullptr) {
    each_column([&](int column) {
      const unsigned visible = sees(column);
      return make_float2((visible & 1) != 0 ? bias_element(bias, offset(column, 0)) : 0,
                         (visible & 2) != 0 ? bias_element(bias, offset(column, 1)) : 0);
    });
  } else if (bias.type == PairType::kFloat32) {
    each_column([&](int column) {
      return *reinterpret_cast<const float2*>(staged + bias_address<4>(0, column, first / 4) + first % 4 * 4);
    });
  } else if (bias.type == PairType::kBFloat16) {
    each_column([&](int column) { return unpack_pair(read_16(column), true); });
  } else {
    each_column([&](int column) { return unpack_pair(read_16(column), false); });
  }
}

__device__ __forceinline__ void store_element(const PairTensor& tensor, std::int64_t index, float value) {
  if (tensor.type == PairType::kFloat32) {
    reinterpret_cast<float*>(tensor.data)[index] = value;
  } else {
    const std::uint32_t packed =
        tensor.type == PairType::kBFloat16 ? pack<BFloat16>(value, 0) : pack<Float16>(value, 0);
    reinterpret_cast<std::uint16_t*>(tensor.data)[index] = static_cast<std::uint16_t>(packed & 0xffff);
  }
}

// Stores dS of the thread's pairs of keys; rows: where the row of each column begins, -1: nowhere. The
// common case, with fewer instructions than the general one.
template <typename Element, int kNTiles>
__device__ __forceinline__ void store_pairs(Element* keys, const float (&ds)[kNTiles][4],
                                            const std::int64_t* rows) {
#pragma unroll
  for (int n = 0; n < kNTiles; ++n) {
    const longlong2 begins =
        *reinterpret_cast<const longlong2*>(rows + n * 8 + static_cast<int>(threadIdx.x) % 4 * 2);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const std::int64_t begin = c == 0 ? begins.x : begins.y;
      if (begin >= 0) *reinterpret_cast<std::uint32_t*>(keys + begin) = pack<Element>(ds[n][c], ds[n][2 + c]);
    }
  }
}

// Stores dS of the thread's pairs. Of a whole block, where `vectors` allows it, two keys at a time, `first`
// and the next; else the keys key0 and key1, unless -1. row(column): where the row begins, -1: nowhere.
template <int kNTiles, typename Row>
__device__ __forceinline__ void store_bias_grad(const PairTensor& dbias, const float (&ds)[kNTiles][4],
                                                bool whole, int key0, int key1, int first, int seqlen_k,
                                                Row&& row) {
  const bool pairs = whole && dbias.vectors && first + 1 < seqlen_k;
  if (whole) {  // keys of a whole block that nobody sees get their zeros too
    key0 = first < seqlen_k ? first : -1;
    key1 = first + 1 < seqlen_k ? first + 1 : -1;
  }
#pragma unroll
  for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const std::int64_t begin = row(n * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + c);
      if (begin < 0) continue;
      const float low = ds[n][c];
      const float high = ds[n][2 + c];
      if (!pairs) {
        if (key0 >= 0) store_element(dbias, begin + key0 * dbias.key_stride, low);
        if (key1 >= 0) store_element(dbias, begin + key1 * dbias.key_stride, high);
      } else if (dbias.type == PairType::kFloat32) {
        *reinterpret_cast<float2*>(dbias.data + (begin + first) * 4) = make_float2(low, high);
      } else {
        *reinterpret_cast<std::uint32_t*>(dbias.data + (begin + first) * 2) =
            dbias.type == PairType::kBFloat16 ? pack<BFloat16>(low, high) : pack<Float16>(low, high);
      }
    }
  }
}

}  // namespace flash_dmattn::cuda::sm80
