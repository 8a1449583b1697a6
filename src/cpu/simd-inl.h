// The vector pieces of the CPU kernels, compiled once per instruction set: register-tiled products, exp2, and
// rows in and out of packed tiles.
//
// T is the arithmetic type, float or double. A panel is kPanel columns of a matrix, stored [depth][kPanel]:
// the layout in which the right-hand side of a product is read. kTileM rows times one panel fill the register
// file.

#if defined(FLASH_DMATTN_CPU_SIMD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASH_DMATTN_CPU_SIMD_INL_H_
#undef FLASH_DMATTN_CPU_SIMD_INL_H_
#else
#define FLASH_DMATTN_CPU_SIMD_INL_H_
#endif

#include <hwy/cache_control.h>
#include <hwy/highway.h>

#include <cstddef>
#include <cstdint>
#include <limits>

#include "core/numeric.h"
#include "cpu/config.h"
#include "cpu/rows.h"
#include "flash_dmattn/tensor_view.h"

HWY_BEFORE_NAMESPACE();
namespace flash_dmattn::cpu::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

template <class T>
using Tag = hn::CappedTag<T, kPanel>;
template <class T>
using Vec = hn::Vec<Tag<T>>;
template <class T>
using IntTag = hn::RebindToSigned<Tag<T>>;

template <class T>
inline constexpr int kLanes = HWY_MIN(HWY_LANES(T), kPanel);
template <class T>
inline constexpr int kVecs = kPanel / kLanes<T>;

// Accumulators take 12 of 16 vector registers (SSE, AVX2) or 24 of 32 (AVX-512, NEON), and 12 rows suffice to
// hide the latency of the multiply-add.
inline constexpr int kAccumulators = (HWY_TARGET == HWY_AVX3 || HWY_ARCH_ARM) ? 24 : 12;
template <class T>
inline constexpr int kTileM = HWY_MAX(1, HWY_MIN(12, kAccumulators / kVecs<T>));
static_assert(kMaxTileM >= kTileM<float> && kMaxTileM >= kTileM<double>);

// How the left-hand side is stored: kRowMajor a[m * lda + k], kColMajor a[k * lda + m].
enum class Lhs { kRowMajor, kColMajor };

// acc[m][:] = sum over k of a(m, k) * panel[k][:], m < kTileM, summed in the order of k in every lane.
template <Lhs kLhs, class T>
HWY_INLINE void multiply(const T* HWY_RESTRICT a, std::size_t lda, const T* HWY_RESTRICT panel,
                         std::size_t depth, Vec<T> (&acc)[kTileM<T>][kVecs<T>]) {
  constexpr Tag<T> d;
#pragma GCC unroll 16
  for (int m = 0; m < kTileM<T>; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs<T>; ++v) acc[m][v] = hn::Zero(d);
  }
  for (std::size_t k = 0; k < depth; ++k) {
    Vec<T> b[kVecs<T>];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs<T>; ++v) b[v] = hn::Load(d, panel + k * kPanel + v * kLanes<T>);
#pragma GCC unroll 16
    for (int m = 0; m < kTileM<T>; ++m) {
      const Vec<T> x = hn::Set(d, kLhs == Lhs::kRowMajor ? a[m * lda + k] : a[k * lda + m]);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs<T>; ++v) acc[m][v] = hn::MulAdd(x, b[v], acc[m][v]);
    }
  }
}

// c_rows[m][0 .. kPanel) += a(m, :) * panel
template <Lhs kLhs, class T>
HWY_INLINE void multiply_add(const T* HWY_RESTRICT a, std::size_t lda, const T* HWY_RESTRICT panel,
                             std::size_t depth, T* const* c_rows, std::size_t column) {
  constexpr Tag<T> d;
  Vec<T> acc[kTileM<T>][kVecs<T>];
  multiply<kLhs>(a, lda, panel, depth, acc);
#pragma GCC unroll 16
  for (int m = 0; m < kTileM<T>; ++m) {
    T* HWY_RESTRICT c = c_rows[m] + column;
#pragma GCC unroll 8
    for (int v = 0; v < kVecs<T>; ++v) {
      hn::Store(hn::Add(hn::Load(d, c + v * kLanes<T>), acc[m][v]), d, c + v * kLanes<T>);
    }
  }
}

// 2^n for whole n in the range of normal exponents.
template <class T>
HWY_INLINE Vec<T> pow2_of_whole(Vec<T> n) {
  constexpr Tag<T> d;
  constexpr IntTag<T> di;
  constexpr int kMantissa = std::numeric_limits<T>::digits - 1;
  constexpr int kBias = std::numeric_limits<T>::max_exponent - 1;
  const auto exponent = hn::Add(hn::ConvertTo(di, n), hn::Set(di, kBias));
  return hn::BitCast(d, hn::ShiftLeft<kMantissa>(exponent));
}

// 2^x for x <= 0 (a little above is fine). 2^0 is exactly 1, -inf gives 0, NaN stays NaN; results below the
// smallest normal number become 0. Relative error, measured with AVX2: float 8.5e-8 (every third number of
// the range), double 1.5e-16 (16 million random ones).
template <class T>
HWY_INLINE Vec<T> exp2_nonpositive(Vec<T> x) {
  constexpr Tag<T> d;
  const Vec<T> lowest = hn::Set(d, T(std::numeric_limits<T>::min_exponent - 1));
  const auto underflow = hn::Lt(x, lowest);
  const Vec<T> clamped = hn::IfThenElse(underflow, lowest, x);
  const Vec<T> whole = hn::Round(clamped);
  const Vec<T> f = hn::Sub(clamped, whole);  // in [-1/2, 1/2]
  Vec<T> p;
  if constexpr (sizeof(T) == 4) {
    // Minimax for the relative error with the constant term held at 1: 2.6e-9 before rounding.
    p = hn::Set(d, T(1.55946770151e-4));
    p = hn::MulAdd(p, f, hn::Set(d, T(1.34066438475e-3)));
    p = hn::MulAdd(p, f, hn::Set(d, T(9.61769297614e-3)));
    p = hn::MulAdd(p, f, hn::Set(d, T(5.55031055121e-2)));
    p = hn::MulAdd(p, f, hn::Set(d, T(2.40226527829e-1)));
    p = hn::MulAdd(p, f, hn::Set(d, T(6.93147214968e-1)));
    p = hn::MulAdd(p, f, hn::Set(d, T(1)));
  } else {
    // Taylor series of exp(f ln 2): the first term left out is 4e-18.
    constexpr double kLn2 = 0.693147180559945309417;
    const Vec<T> y = hn::Mul(f, hn::Set(d, T(kLn2)));
    constexpr double kInverseFactorial[] = {1.0,
                                            1.0,
                                            1.0 / 2,
                                            1.0 / 6,
                                            1.0 / 24,
                                            1.0 / 120,
                                            1.0 / 720,
                                            1.0 / 5040,
                                            1.0 / 40320,
                                            1.0 / 362880,
                                            1.0 / 3628800,
                                            1.0 / 39916800,
                                            1.0 / 479001600,
                                            1.0 / 6227020800};
    p = hn::Set(d, T(kInverseFactorial[13]));
    for (int term = 12; term >= 0; --term) p = hn::MulAdd(p, y, hn::Set(d, T(kInverseFactorial[term])));
  }
  return hn::IfThenZeroElse(underflow, hn::Mul(p, pow2_of_whole<T>(whole)));
}

// Whether rows can be read and written as they are, without a change of type.
template <class T>
HWY_INLINE bool holds(const Rows& rows) {
  return rows.unit_stride() && rows.dtype == (sizeof(T) == sizeof(float) ? DType::kFloat32 : DType::kFloat64);
}

template <class T>
HWY_INLINE void copy_values(const T* src, std::size_t count, T* HWY_RESTRICT dst) {
  constexpr Tag<T> d;
  std::size_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) hn::StoreU(hn::LoadU(d, src + i), d, dst + i);
  for (; i < count; ++i) dst[i] = src[i];
}

// dst[0 .. count) = one row of a matrix in the arithmetic type.
template <class T>
HWY_INLINE void load_row(const Rows& rows, std::int64_t index, std::size_t count, T* HWY_RESTRICT dst) {
  const std::byte* src = rows.row(index);
  const bool widens = sizeof(T) == sizeof(float) && dtype_size(rows.dtype) == 2;
  if (!rows.unit_stride() || !(holds<T>(rows) || widens)) {
    for (std::size_t i = 0; i < count; ++i) {
      dst[i] = load_element<T>(src + static_cast<std::int64_t>(i) * rows.column_bytes, rows.dtype);
    }
  } else if (holds<T>(rows)) {
    copy_values(reinterpret_cast<const T*>(src), count, dst);
  } else if constexpr (sizeof(T) == sizeof(float)) {
    constexpr Tag<float> d;
    constexpr hn::Rebind<std::uint16_t, Tag<float>> d16;
    const auto* half = reinterpret_cast<const std::uint16_t*>(src);
    std::size_t i = 0;
    if (rows.dtype == DType::kBFloat16) {
      constexpr hn::Rebind<std::uint32_t, Tag<float>> d32;
      for (; i + kLanes<float> <= count; i += kLanes<float>) {
        const auto bits = hn::PromoteTo(d32, hn::LoadU(d16, half + i));
        hn::StoreU(hn::BitCast(d, hn::ShiftLeft<16>(bits)), d, dst + i);
      }
      for (; i < count; ++i) dst[i] = bfloat16_to_float(half[i]);
    } else {
      constexpr hn::Rebind<hwy::float16_t, Tag<float>> df16;
      for (; i + kLanes<float> <= count; i += kLanes<float>) {
        hn::StoreU(hn::PromoteTo(d, hn::BitCast(df16, hn::LoadU(d16, half + i))), d, dst + i);
      }
      for (; i < count; ++i) dst[i] = float16_to_float(half[i]);
    }
  }
}

// One row of a matrix in the arithmetic type: in place if possible, otherwise in `buffer`.
template <class T>
HWY_INLINE const T* read_row(const Rows& rows, std::int64_t index, std::size_t count,
                             T* HWY_RESTRICT buffer) {
  if (holds<T>(rows)) return reinterpret_cast<const T*>(rows.row(index));
  load_row(rows, index, count, buffer);
  return buffer;
}

// Asks for a row that is about to be gathered: gathered rows lie anywhere, so the hardware cannot foresee
// them.
HWY_INLINE void prefetch_row(const Rows& rows, std::int64_t index, std::size_t count) {
  constexpr std::size_t kCacheLine = 64;
  if (!rows.unit_stride()) return;
  const std::byte* row = rows.row(index);
  for (std::size_t byte = 0; byte < count * rows.column_bytes; byte += kCacheLine) hwy::Prefetch(row + byte);
}

// One row of a matrix = src[0 .. count) * factor, rounded to nearest even.
template <class T>
HWY_INLINE void store_row(const T* HWY_RESTRICT src, T factor, std::size_t count, const Rows& rows,
                          std::int64_t index) {
  std::byte* dst = rows.row(index);
  if (!rows.unit_stride()) {
    for (std::size_t i = 0; i < count; ++i) {
      store_element(src[i] * factor, rows.dtype, dst + static_cast<std::int64_t>(i) * rows.column_bytes);
    }
  } else if (rows.dtype == DType::kBFloat16) {
    auto* HWY_RESTRICT out = reinterpret_cast<std::uint16_t*>(dst);
    for (std::size_t i = 0; i < count; ++i) out[i] = float_to_bfloat16(static_cast<float>(src[i] * factor));
  } else if (rows.dtype == DType::kFloat16) {
    auto* HWY_RESTRICT out = reinterpret_cast<std::uint16_t*>(dst);
    for (std::size_t i = 0; i < count; ++i) out[i] = float_to_float16(static_cast<float>(src[i] * factor));
  } else {
    auto* HWY_RESTRICT out = reinterpret_cast<T*>(dst);
    for (std::size_t i = 0; i < count; ++i) out[i] = src[i] * factor;
  }
}

// Copies the first `count` of a row's `width` values into the panels that cover the row, and 0 after them:
// panel p holds the values [p * kPanel, ...), at panels + p * panel_stride + row * kPanel.
template <class T>
HWY_INLINE void scatter_to_panels(const T* HWY_RESTRICT values, std::size_t count, std::size_t width,
                                  std::size_t row, std::size_t panel_stride, T* HWY_RESTRICT panels) {
  constexpr Tag<T> d;
  T* dst = panels + row * kPanel;
  std::size_t i = 0;
  for (; i + kPanel <= count; i += kPanel, dst += panel_stride) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs<T>; ++v) {
      hn::Store(hn::LoadU(d, values + i + v * kLanes<T>), d, dst + v * kLanes<T>);
    }
  }
  for (; i < width; i += kPanel, dst += panel_stride) {
    for (std::size_t lane = 0; lane < kPanel; ++lane) dst[lane] = i + lane < count ? values[i + lane] : T(0);
  }
}

// Sum of a[i] * b[i].
template <class T>
HWY_INLINE T dot(const T* HWY_RESTRICT a, const T* HWY_RESTRICT b, std::size_t count) {
  constexpr Tag<T> d;
  Vec<T> sums[2] = {hn::Zero(d), hn::Zero(d)};
  std::size_t i = 0;
  for (; i + 2 * kLanes<T> <= count; i += 2 * kLanes<T>) {
    sums[0] = hn::MulAdd(hn::LoadU(d, a + i), hn::LoadU(d, b + i), sums[0]);
    sums[1] = hn::MulAdd(hn::LoadU(d, a + i + kLanes<T>), hn::LoadU(d, b + i + kLanes<T>), sums[1]);
  }
  T sum = hn::GetLane(hn::SumOfLanes(d, hn::Add(sums[0], sums[1])));
  for (; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

}  // namespace flash_dmattn::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // toggle
