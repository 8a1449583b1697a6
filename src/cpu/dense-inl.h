// The keys of a query tile under a mask or a bias with a query axis, which hide keys from single rows. The
// tile takes, of the keys that the plan gives it, those that some row of it sees, and no other: what is
// stored for a key that no row sees is never read. What is added to the logits is laid out like the score
// tile, keys by rows.

#if defined(FLASH_DMATTN_CPU_DENSE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef FLASH_DMATTN_CPU_DENSE_INL_H_
#undef FLASH_DMATTN_CPU_DENSE_INL_H_
#else
#define FLASH_DMATTN_CPU_DENSE_INL_H_
#endif

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numbers>

#include "cpu/bugs.h"
#include "cpu/simd-inl.h"
#include "cpu/tile.h"

HWY_BEFORE_NAMESPACE();
namespace flash_dmattn::cpu::HWY_NAMESPACE {

template <class T>
class DenseKeys {
 public:
  // Args: ForwardArgs or BackwardArgs; Scratch: ForwardScratch<T> or BackwardScratch<T>.
  template <class Args, class Scratch>
  DenseKeys(const Args& args, const Layout& layout, const TileShape& shape, const QueryTile& tile,
            const TileKeys& keys, const Scratch& scratch)
      : layout_(layout),
        tile_(tile),
        mask_(args.mask),
        bias_(is_dense(args.bias) ? args.bias : TensorView{}),
        key_bias_(key_only<const T>(layout, args.bias, tile.sequence, tile.kv_head)),
        stride_(shape.score_stride),
        keys_(keys),
        entries_(scratch.entries),
        places_(scratch.places),
        dense_(scratch.dense) {}

  // The next keys that some row sees: their entries, places and addends begin the arrays of the scratch. At
  // most kTileN; 0 when there are no more.
  int next() {
    if (tile_.group == 0) return 0;
    for (int n = taken_; n < pending_; ++n) move_key<true>(n, n - taken_);
    pending_ -= taken_;
    while (pending_ < kTileN) {
      bool partial;
      const int found = keys_.next(key_bias_, kTileN, entries_ + pending_, places_ + pending_, &partial);
      if (found == 0) break;
      pending_ += admit(pending_, found, partial);
    }
    taken_ = std::min(pending_, kTileN);
    return taken_;
  }

 private:
  // Of the `count` keys from `first` on, keeps those that some row sees, and returns their number. partial:
  // the intervals of the keys hide some of them from some rows.
  int admit(int first, int count, bool partial) {
    if (mask_.present()) {
      find_unmasked(first, count);
      count = keep_seen<false>(first, count);
      if (count == 0) return 0;
    }
    fill_addends(first, count, partial);
    find_seen(first, count);
    return keep_seen<true>(first, count);
  }

  template <bool kWithAddend>
  int keep_seen(int first, int count) {
    int kept = first;
    for (int n = 0; n < count; ++n) {
      if (dense_.seen[n] != 0) move_key<kWithAddend>(first + n, kept++);
    }
    return kept - first;
  }

  template <bool kWithAddend>
  void move_key(int from, int to) {
    if (from == to) return;
    entries_[to] = entries_[from];
    places_[to] = places_[from];
    if constexpr (kWithAddend) {
      copy_values(dense_.addend + from * stride_, tile_.num_panels() * kPanel, dense_.addend + to * stride_);
    }
  }

  // Ascending keys without a gap can be read like a row.
  bool consecutive(int first, int count) const {
    return entries_[first + count - 1].key - entries_[first].key == count - 1;
  }

  // seen[n]: the mask lets some row see key first + n.
  void find_unmasked(int first, int count) {
    std::uint8_t* HWY_RESTRICT seen = dense_.seen;
    std::fill_n(seen, count, std::uint8_t{0});
    const PlanEntry* entries = entries_ + first;
    const bool in_a_row = consecutive(first, count);
    const std::int64_t heads = layout_.tells_heads_apart(mask_) ? tile_.group : 1;
    for (std::int64_t in_group = 0; in_group < heads; ++in_group) {
      const Rows mask = dense_rows(layout_, mask_, tile_.sequence, tile_.query_head(in_group));
      const std::int64_t row_end = mask.row_bytes == 0 ? tile_.row_begin + 1 : tile_.row_end;
      for (std::int64_t i = tile_.row_begin; i < row_end; ++i) {
        const auto* row = reinterpret_cast<const std::uint8_t*>(mask.row(i));
        if (in_a_row && mask.unit_stride()) {
          const std::uint8_t* values = row + entries[0].key;
          for (int n = 0; n < count; ++n) seen[n] |= values[n];
        } else {
          for (int n = 0; n < count; ++n) seen[n] |= row[entries[n].key * mask.column_bytes];
        }
      }
    }
  }

  // The addends of the keys from `first` on. Padding rows see nothing.
  void fill_addends(int first, int count, bool partial) {
    const bool heads_apart = layout_.tells_heads_apart(mask_) || layout_.tells_heads_apart(bias_);
    const std::int64_t heads = heads_apart ? tile_.group : 1;
    const std::int64_t copies = tile_.group / heads;
    for (std::int64_t in_group = 0; in_group < heads; ++in_group) {
      const std::int64_t head = tile_.query_head(injected(Bug::kDenseBiasWrongHead) ? 0 : in_group);
      const Rows mask = dense_rows(layout_, mask_, tile_.sequence, tile_.query_head(in_group));
      const Rows bias = dense_rows(layout_, bias_, tile_.sequence, head);
      for (std::int64_t i = tile_.row_begin; i < tile_.row_end; ++i) {
        load_bias(bias, i, first, count);
        hide(visible_keys(mask, i, first, count, partial), count);
        T* column = dense_.addend + first * stride_ + tile_.tile_row(i, in_group);
        for (int n = 0; n < count; ++n, column += stride_) {
          for (std::int64_t copy = 0; copy < copies; ++copy) column[copy] = dense_.values[n];
        }
      }
    }
    const std::int64_t num_rows = tile_.num_rows();
    for (int n = first; n < first + count; ++n) {
      std::fill_n(dense_.addend + n * stride_ + num_rows, tile_.num_panels() * kPanel - num_rows, kHidden);
    }
  }

  // seen[n]: some row sees key first + n.
  void find_seen(int first, int count) {
    constexpr Tag<T> d;
    for (int n = 0; n < count; ++n) {
      const T* addend = dense_.addend + (first + n) * stride_;
      auto hidden = hn::Eq(hn::Set(d, kHidden), hn::Set(d, kHidden));
      for (std::int64_t r = 0; r < tile_.num_panels() * kPanel; r += kLanes<T>) {
        hidden = hn::And(hidden, hn::Eq(hn::Load(d, addend + r), hn::Set(d, kHidden)));
      }
      dense_.seen[n] = !hn::AllTrue(d, hidden);
    }
  }

  // values[n] = the bias that row i adds to key first + n.
  void load_bias(const Rows& bias, std::int64_t i, int first, int count) {
    T* values = dense_.values;
    const PlanEntry* entries = entries_ + first;
    if (!bias.present()) {
      for (int n = 0; n < count; ++n) values[n] = key_bias_.present() ? key_bias_[entries[n].key] : T(0);
    } else if (consecutive(first, count)) {
      Rows from_first = bias;
      from_first.data += entries[0].key * bias.column_bytes;
      load_row(from_first, i, count, values);
    } else {
      for (int n = 0; n < count; ++n) values[n] = load_element<T>(bias.at(i, entries[n].key), bias.dtype);
    }
  }

  // [n]: whether mask and intervals let row i see key first + n; null: all of them.
  const std::uint8_t* visible_keys(const Rows& mask, std::int64_t i, int first, int count, bool partial) {
    if (!mask.present() && !partial) return nullptr;
    const PlanEntry* entries = entries_ + first;
    std::uint8_t* HWY_RESTRICT sees = dense_.sees;
    std::fill_n(sees, count, std::uint8_t{1});
    if (mask.present()) {
      const std::int64_t mask_row = injected(Bug::kMaskRowBefore) && i > 0 ? i - 1 : i;
      const auto* row = reinterpret_cast<const std::uint8_t*>(mask.row(mask_row));
      if (mask.unit_stride() && consecutive(first, count)) {
        if (!partial) return row + entries[0].key;
        std::copy_n(row + entries[0].key, count, sees);
      } else {
        for (int n = 0; n < count; ++n) sees[n] = row[entries[n].key * mask.column_bytes];
      }
    }
    if (partial) {
      const auto position = static_cast<std::int32_t>(i + tile_.offset);
      for (int n = 0; n < count; ++n) {
        if (entries[n].key > position || entries[n].expiry <= position) sees[n] = 0;
      }
    }
    return sees;
  }

  // values[n] = the addend of a key: from its bias, or -inf.
  void hide(const std::uint8_t* HWY_RESTRICT sees, int count) {
    T* HWY_RESTRICT values = dense_.values;
    for (int n = 0; n < count; ++n) values[n] *= std::numbers::log2e_v<T>;
    if (sees == nullptr) return;
    for (int n = 0; n < count; ++n) values[n] = sees[n] != 0 ? values[n] : kHidden;
  }

  static constexpr T kHidden = -std::numeric_limits<T>::infinity();

  const Layout& layout_;
  const QueryTile& tile_;
  TensorView mask_, bias_;  // absent where there is none; the bias also where it is key-only
  VectorView<const T> key_bias_;
  std::int64_t stride_;
  TileKeys keys_;
  PlanEntry* entries_;
  std::int32_t* places_;
  DenseScratch<T> dense_;
  int pending_ = 0;  // keys in the arrays
  int taken_ = 0;    // of these, what the last call returned
};

// The logit of a pair: -inf where the row does not see the key, whatever the key holds.
template <class T>
HWY_INLINE Vec<T> dense_logit(Vec<T> product, Vec<T> scale, Vec<T> addend) {
  const auto hidden = hn::Eq(addend, hn::Set(Tag<T>(), -std::numeric_limits<T>::infinity()));
  return hn::IfThenElse(hidden, addend, hn::MulAdd(product, scale, addend));
}

}  // namespace flash_dmattn::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // toggle
