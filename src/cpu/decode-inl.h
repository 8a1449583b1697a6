// The products of a decode call: a quad of rows of keys or values with one or two query rows. The rows of the
// quad lie where they are in memory. A row's bits do not depend on which other row it is paired with.

#if defined(FLASH_DMATTN_CPU_DECODE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASH_DMATTN_CPU_DECODE_INL_H_
#undef FLASH_DMATTN_CPU_DECODE_INL_H_
#else
#define FLASH_DMATTN_CPU_DECODE_INL_H_
#endif

#include <cstddef>
#include <cstdint>

#include "cpu/decode.h"
#include "cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace flash_dmattn::cpu::HWY_NAMESPACE {

// Calls take.template operator()<n>(r) for rows r, n of them at a time.
template <class Take>
HWY_INLINE void for_each_pair(std::int64_t num_rows, const Take& take) {
  std::int64_t r = 0;
  for (; r + 2 <= num_rows; r += 2) take.template operator()<2>(r);
  if (r < num_rows) take.template operator()<1>(r);
}

#if HWY_TARGET != HWY_SCALAR
// The lanes of v, four at a time, added.
template <class D>
HWY_INLINE hn::Vec<hn::CappedTag<float, 4>> add_blocks(D d, hn::Vec<D> v) {
  if constexpr (hn::MaxLanes(D()) <= 4) {
    return v;
  } else {
    const hn::Half<D> half;
    return add_blocks(half, hn::Add(hn::LowerHalf(half, v), hn::UpperHalf(half, v)));
  }
}

// sums[0 .. kQuad) = the sums of the lanes of v[0 .. kQuad): a 4 x 4 transposition in every block of four
// lanes, with the additions on the way; half the operations of four separate sums.
HWY_INLINE void store_sums(const Vec<float> (&v)[kQuad], float* HWY_RESTRICT sums) {
  static_assert(kQuad == 4);
  constexpr Tag<float> d;
  constexpr hn::Repartition<double, Tag<float>> d64;
  const auto add_interleaved = [d](Vec<float> a, Vec<float> b) HWY_ATTR {
    return hn::Add(hn::InterleaveLower(d, a, b), hn::InterleaveUpper(d, a, b));
  };
  const auto first = hn::BitCast(d64, add_interleaved(v[0], v[1]));   // 0 1 0 1
  const auto second = hn::BitCast(d64, add_interleaved(v[2], v[3]));  // 2 3 2 3
  const Vec<float> both = hn::Add(hn::BitCast(d, hn::InterleaveLower(d64, first, second)),
                                  hn::BitCast(d, hn::InterleaveUpper(d64, first, second)));  // 0 1 2 3
  hn::StoreU(add_blocks(d, both), hn::CappedTag<float, 4>(), sums);
}
#endif

template <class T>
HWY_INLINE void store_sums(const Vec<T> (&v)[kQuad], T* HWY_RESTRICT sums) {
  for (int m = 0; m < kQuad; ++m) sums[m] = hn::GetLane(hn::SumOfLanes(Tag<T>(), v[m]));
}

// scores[r][0 .. kQuad) = query[r] . keys, r < kRows
template <int kRows, class T>
HWY_INLINE void multiply_quad(const T* const (&keys)[kQuad], const T* HWY_RESTRICT query, std::size_t stride,
                              std::size_t head_dim, T* HWY_RESTRICT scores) {
  constexpr Tag<T> d;
  Vec<T> acc[kRows][kQuad];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int m = 0; m < kQuad; ++m) acc[r][m] = hn::Zero(d);
  }
  for (std::size_t i = 0; i < head_dim; i += kLanes<T>) {
    Vec<T> key[kQuad];
#pragma GCC unroll 8
    for (int m = 0; m < kQuad; ++m) key[m] = hn::LoadU(d, keys[m] + i);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> x = hn::Load(d, query + r * stride + i);
#pragma GCC unroll 8
      for (int m = 0; m < kQuad; ++m) acc[r][m] = hn::MulAdd(x, key[m], acc[r][m]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) store_sums(acc[r], scores + r * kBlockKeys);
}

// sums[r] += weights[r][0 .. kQuad) * values, key after key, r < kRows
template <int kRows, class T>
HWY_INLINE void accumulate_quad(const T* const (&values)[kQuad], const T* HWY_RESTRICT weights,
                                std::size_t stride, std::size_t head_dim, T* HWY_RESTRICT sums) {
  constexpr Tag<T> d;
  Vec<T> weight[kRows][kQuad];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int m = 0; m < kQuad; ++m) weight[r][m] = hn::Set(d, weights[r * kBlockKeys + m]);
  }
  for (std::size_t i = 0; i < head_dim; i += kLanes<T>) {
    Vec<T> value[kQuad];
#pragma GCC unroll 8
    for (int m = 0; m < kQuad; ++m) value[m] = hn::LoadU(d, values[m] + i);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      Vec<T> sum = hn::Load(d, sums + r * stride + i);
#pragma GCC unroll 8
      for (int m = 0; m < kQuad; ++m) sum = hn::MulAdd(weight[r][m], value[m], sum);
      hn::Store(sum, d, sums + r * stride + i);
    }
  }
}

}  // namespace flash_dmattn::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // toggle
