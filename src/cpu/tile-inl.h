// What the two passes do alike with a query tile: load its rows, and compute logits of the keys that it
// gathered.

#if defined(FLASH_DMATTN_CPU_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASH_DMATTN_CPU_TILE_INL_H_
#undef FLASH_DMATTN_CPU_TILE_INL_H_
#else
#define FLASH_DMATTN_CPU_TILE_INL_H_
#endif

#include <cstdint>
#include <limits>

#include "cpu/bugs.h"
#include "cpu/simd-inl.h"
#include "cpu/tile.h"

HWY_BEFORE_NAMESPACE();
namespace flash_dmattn::cpu::HWY_NAMESPACE {

// panels[row / kPanel][k][row % kPanel] = the tile's rows of `tensor`; padding rows are 0.
template <class T>
void load_transposed(const Layout& layout, const TensorView& tensor, const QueryTile& tile, T* row_buffer,
                     T* panels) {
  const std::int64_t head_dim = layout.head_dim;
  const std::int64_t panel_size = head_dim * kPanel;
  for (std::int64_t in_group = 0; in_group < tile.group; ++in_group) {
    const Rows rows = query_rows(layout, tensor, tile.sequence, tile.query_head(in_group));
    for (std::int64_t i = tile.row_begin; i < tile.row_end; ++i) {
      const std::int64_t r = tile.tile_row(i, in_group);
      const T* values = read_row(rows, i, head_dim, row_buffer);
      T* column = panels + r / kPanel * panel_size + r % kPanel;
      for (std::int64_t k = 0; k < head_dim; ++k) column[k * kPanel] = values[k];
    }
  }
  for (std::int64_t r = tile.num_rows(); r < tile.num_panels() * kPanel; ++r) {
    T* column = panels + r / kPanel * panel_size + r % kPanel;
    for (std::int64_t k = 0; k < head_dim; ++k) column[k * kPanel] = 0;
  }
}

// Position of every row of the tile; padding rows stand nowhere and see nothing of a masked block.
inline void load_positions(const QueryTile& tile, std::int32_t* position) {
  constexpr std::int32_t kNowhere = -1;
  for (std::int64_t r = 0; r < tile.num_panels() * kPanel; ++r) {
    const std::int64_t i = tile.row_begin + r / tile.group;
    position[r] = r < tile.num_rows() ? static_cast<std::int32_t>(i + tile.offset) : kNowhere;
  }
}

// Only for the bugs that lose precision.
template <class T>
HWY_INLINE Vec<T> round_to_bfloat16(Vec<T> x) {
  alignas(64) T lanes[kLanes<T>];
  hn::Store(x, Tag<T>(), lanes);
  for (T& lane : lanes) lane = bfloat16_to_float(float_to_bfloat16(static_cast<float>(lane)));
  return hn::Load(Tag<T>(), lanes);
}

// Which rows of a tile see the keys of a block: all of them; those of the keys' intervals; those that the
// mask or dense bias lets.
enum class Visibility { kAll, kIntervals, kDense };

// The visibility test of intervals, for the 16 rows of a panel: key <= position < expiry.
template <class T>
class PanelVisibility {
 public:
  explicit PanelVisibility(const std::int32_t* position) {
    constexpr hn::Rebind<std::int32_t, Tag<T>> d32;
    for (int v = 0; v < kVecs<T>; ++v) {
      const auto position32 = hn::Load(d32, position + v * kLanes<T>);
      if constexpr (sizeof(T) == sizeof(float)) {
        position_[v] = position32;
      } else {
        position_[v] = hn::PromoteTo(IntTag<T>(), position32);
      }
    }
  }

  // The logit where the row sees the key, -inf where not.
  HWY_INLINE Vec<T> mask(Vec<T> logit, int v, PlanEntry entry) const {
    constexpr Tag<T> d;
    constexpr IntTag<T> di;
    const std::int32_t before_birth = entry.key - (injected(Bug::kCausalOffByOne) ? 0 : 1);
    const std::int32_t expiry = entry.expiry + (injected(Bug::kKeySeenOnceTooLong) ? 1 : 0);
    const auto born = hn::Gt(position_[v], hn::Set(di, before_birth));
    const auto alive = hn::Lt(position_[v], hn::Set(di, expiry));
    const Vec<T> minus_infinity = hn::Set(d, -std::numeric_limits<T>::infinity());
    return hn::IfThenElse(hn::RebindMask(d, hn::And(born, alive)), logit, minus_infinity);
  }

 private:
  hn::Vec<IntTag<T>> position_[kVecs<T>];
};

// Calls take(n, key) for the keys of a block, whose rows are asked for a little ahead.
template <class Take>
HWY_INLINE void for_each_gathered(const Rows& key, const Rows& value, std::size_t head_dim,
                                  const PlanEntry* entries, int num_keys, const Take& take) {
  for (int n = 0; n < num_keys; ++n) {
    if (n + kPrefetchDistance < num_keys) {
      const std::int32_t ahead = entries[n + kPrefetchDistance].key;
      prefetch_row(key, ahead, head_dim);
      prefetch_row(value, ahead, head_dim);
    }
    take(n, entries[n].key);
  }
}

// Bias of the gathered keys, in units of log 2.
template <class T>
void gather_bias(VectorView<const T> bias, const PlanEntry* entries, int num_keys, T* gathered) {
  for (int n = 0; n < num_keys; ++n) {
    gathered[n] = bias.present() ? bias[entries[n].key] * std::numbers::log2e_v<T> : T(0);
  }
  if (injected(Bug::kBiasMissing) && num_keys > 7) gathered[7] = 0;
}

}  // namespace flash_dmattn::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // toggle
