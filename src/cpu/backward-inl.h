// What the backward's two passes over query tiles share: a tile's rows, and P and dS of a block of keys.

#if defined(FLASH_DMATTN_CPU_BACKWARD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASH_DMATTN_CPU_BACKWARD_INL_H_
#undef FLASH_DMATTN_CPU_BACKWARD_INL_H_
#else
#define FLASH_DMATTN_CPU_BACKWARD_INL_H_
#endif

#include <algorithm>
#include <limits>
#include <numbers>

#include "cpu/backward.h"
#include "cpu/bugs.h"
#include "cpu/dense-inl.h"
#include "cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace flash_dmattn::cpu::HWY_NAMESPACE {

// Rows past the tile's end have lse = +inf and dout = 0: their weights and gradients are 0.
template <class T>
void load_tile(const BackwardProblem& problem, const QueryTile& tile, const BackwardScratch<T>& scratch) {
  const BackwardArgs& args = problem.args;
  const Layout& layout = problem.layout;
  load_transposed(layout, args.query, tile, scratch.row, scratch.q_transposed);
  load_transposed(layout, args.dout, tile, scratch.row, scratch.dout_transposed);
  load_positions(tile, scratch.position);
  std::fill_n(scratch.lse, tile.num_panels() * kPanel, std::numeric_limits<T>::infinity());
  std::fill_n(scratch.delta, tile.num_panels() * kPanel, T(0));
  for (std::int64_t in_group = 0; in_group < tile.group; ++in_group) {
    const std::int64_t head = tile.query_head(in_group);
    const Rows out = query_rows(layout, args.out, tile.sequence, head);
    const Rows dout = query_rows(layout, args.dout, tile.sequence, head);
    const auto lse = layout.per_query<const T>(args.lse, tile.sequence, head);
    const auto dlse = layout.per_query<const T>(args.dlse, tile.sequence, head);
    for (std::int64_t i = tile.row_begin; i < tile.row_end; ++i) {
      const std::int64_t r = tile.tile_row(i, in_group);
      if (lse[i] == -std::numeric_limits<T>::infinity()) continue;
      const T* dout_row = read_row(dout, i, layout.head_dim, scratch.row);
      const T* out_row = read_row(out, i, layout.head_dim, scratch.out_row);
      const T row_delta = dot(dout_row, out_row, layout.head_dim);
      const bool with_dlse = dlse.present() && !injected(Bug::kDlseIgnored);
      scratch.delta[r] = row_delta * T(injected(Bug::kDeltaOff) ? 1.01 : 1) - (with_dlse ? dlse[i] : T(0));
      scratch.lse[r] = (lse[i] + T(injected(Bug::kBackwardLseOff) ? 1e-3 : 0)) * std::numbers::log2e_v<T>;
    }
  }
}

template <class T>
void gather(const BackwardProblem& problem, const QueryTile& tile, const BackwardScratch<T>& scratch,
            int num_keys) {
  const std::int64_t head_dim = problem.layout.head_dim;
  const Rows key = key_rows(problem.layout, problem.args.key, tile.sequence, tile.kv_head);
  const Rows value = key_rows(problem.layout, problem.args.value, tile.sequence, tile.kv_head);
  for_each_gathered(key, value, head_dim, scratch.entries, num_keys, [&](int n, std::int32_t j) {
    T* key_row = scratch.keys + n * head_dim;
    load_row(key, j, head_dim, key_row);
    scatter_to_panels(key_row, head_dim, head_dim, n, kTileN * kPanel, scratch.key_panels);
    load_row(value, j, head_dim, scratch.values + n * head_dim);
  });
  const auto bias = key_only<const T>(problem.layout, problem.args.bias, tile.sequence, tile.kv_head);
  gather_bias(bias, scratch.entries, num_keys, scratch.bias);
}

// P^T of 16 rows and all keys of the block.
template <class T, Visibility kVisibility>
void weight_panel(const TileShape& shape, const BackwardScratch<T>& scratch, std::int64_t panel, T scale_log2,
                  int num_keys) {
  constexpr Tag<T> d;
  const T* q_panel = scratch.q_transposed + panel * shape.head_dim * kPanel;
  const PanelVisibility<T> visibility(scratch.position + panel * kPanel);
  const Vec<T> scale = hn::Set(d, scale_log2);
  Vec<T> lse[kVecs<T>];
  for (int v = 0; v < kVecs<T>; ++v) lse[v] = hn::Load(d, scratch.lse + panel * kPanel + v * kLanes<T>);
  for (int n0 = 0; n0 < num_keys; n0 += kTileM<T>) {
    Vec<T> acc[kTileM<T>][kVecs<T>];
    multiply<Lhs::kRowMajor>(scratch.keys + n0 * shape.head_dim, shape.head_dim, q_panel, shape.head_dim,
                             acc);
    const int valid = HWY_MIN(kTileM<T>, num_keys - n0);
    T* HWY_RESTRICT row = scratch.weights + n0 * shape.score_stride + panel * kPanel;
#pragma GCC unroll 16
    for (int m = 0; m < kTileM<T>; ++m, row += shape.score_stride) {
      if (m >= valid) break;
      const Vec<T> bias = hn::Set(d, scratch.bias[n0 + m]);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs<T>; ++v) {
        Vec<T> logit = hn::MulAdd(acc[m][v], scale, bias);
        if constexpr (kVisibility == Visibility::kIntervals) {
          logit = visibility.mask(logit, v, scratch.entries[n0 + m]);
        }
        if constexpr (kVisibility == Visibility::kDense) {
          const T* addend = scratch.dense.addend + (row - scratch.weights) + v * kLanes<T>;
          logit = dense_logit<T>(acc[m][v], scale, hn::Load(d, addend));
        }
        hn::Store(exp2_nonpositive<T>(hn::Sub(logit, lse[v])), d, row + v * kLanes<T>);
      }
    }
  }
}

// dS^T of 16 rows and all keys of the block, and its sums over the rows. Under a mask or dense bias pairs
// that are not visible get 0 even where the key's values are not finite.
template <class T, bool kDense>
void dscore_panel(const TileShape& shape, const BackwardScratch<T>& scratch, std::int64_t panel,
                  int num_keys) {
  constexpr Tag<T> d;
  const T* dout_panel = scratch.dout_transposed + panel * shape.head_dim * kPanel;
  Vec<T> delta[kVecs<T>];
  for (int v = 0; v < kVecs<T>; ++v) delta[v] = hn::Load(d, scratch.delta + panel * kPanel + v * kLanes<T>);
  for (int n0 = 0; n0 < num_keys; n0 += kTileM<T>) {
    Vec<T> acc[kTileM<T>][kVecs<T>];
    multiply<Lhs::kRowMajor>(scratch.values + n0 * shape.head_dim, shape.head_dim, dout_panel, shape.head_dim,
                             acc);
    const int valid = HWY_MIN(kTileM<T>, num_keys - n0);
    const std::int64_t place = n0 * shape.score_stride + panel * kPanel;
#pragma GCC unroll 16
    for (int m = 0; m < kTileM<T>; ++m) {
      if (m >= valid) break;
#pragma GCC unroll 8
      for (int v = 0; v < kVecs<T>; ++v) {
        const std::int64_t lanes = place + m * shape.score_stride + v * kLanes<T>;
        Vec<T> dscore = hn::Mul(hn::Load(d, scratch.weights + lanes), hn::Sub(acc[m][v], delta[v]));
        if constexpr (kDense) {
          const Vec<T> addend = hn::Load(d, scratch.dense.addend + lanes);
          dscore =
              hn::IfThenZeroElse(hn::Eq(addend, hn::Set(d, -std::numeric_limits<T>::infinity())), dscore);
        }
        hn::Store(dscore, d, scratch.dscores + lanes);
        T* sum = scratch.dbias + (n0 + m) * kPanel + v * kLanes<T>;
        hn::Store(panel == 0 ? dscore : hn::Add(hn::Load(d, sum), dscore), d, sum);
      }
    }
  }
}

// P^T of a block.
template <class T>
void weigh_block(const BackwardProblem& problem, const QueryTile& tile, const BackwardScratch<T>& scratch,
                 Visibility visibility, int num_keys) {
  const T scale_log2 = static_cast<T>(problem.args.scale * std::numbers::log2e);
  const auto weigh = visibility == Visibility::kDense       ? weight_panel<T, Visibility::kDense>
                     : visibility == Visibility::kIntervals ? weight_panel<T, Visibility::kIntervals>
                                                            : weight_panel<T, Visibility::kAll>;
  for (std::int64_t panel = 0; panel < tile.num_panels(); ++panel) {
    weigh(problem.tile_shape, scratch, panel, scale_log2, num_keys);
  }
}

// dS^T of a block whose P^T is there.
template <class T>
void differentiate_block(const BackwardProblem& problem, const QueryTile& tile,
                         const BackwardScratch<T>& scratch, Visibility visibility, int num_keys) {
  const auto differentiate =
      visibility == Visibility::kDense ? dscore_panel<T, true> : dscore_panel<T, false>;
  for (std::int64_t panel = 0; panel < tile.num_panels(); ++panel) {
    differentiate(problem.tile_shape, scratch, panel, num_keys);
  }
}

// Sum of the dS of `count` neighbouring heads, which share a dense bias.
template <class T>
HWY_INLINE T sum_of_heads(const T* dscores, std::int64_t count) {
  T sum = dscores[0];
  for (std::int64_t head = 1; head < count; ++head) sum += dscores[head];
  return sum;
}

}  // namespace flash_dmattn::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // toggle
