#pragma once

#include "emulator/cub_common.h"

namespace cub {

// All 32 lanes take part.
template <typename T>
class WarpScan {
 public:
  using TempStorage = emulator::TempStorage<16>;

  explicit WarpScan(TempStorage&, emulator::Site site = emulator::Site::current()) : site_(site) {}

  template <typename Op>
  void InclusiveScan(T in, T& out, Op op) {
    T aggregate;
    InclusiveScan(in, out, op, aggregate);
  }
  template <typename Op>
  void InclusiveScan(T in, T& out, Op op, T& aggregate) {
    scan(
        in, out, aggregate, [&](T before, bool first, T value) { return first ? value : op(before, value); },
        nullptr);
  }
  template <typename Op>
  void ExclusiveScan(T in, T& out, std::type_identity_t<T> initial, Op op) {
    T aggregate;
    ExclusiveScan(in, out, initial, op, aggregate);
  }
  template <typename Op>
  void ExclusiveScan(T in, T& out, std::type_identity_t<T> initial, Op op, T& aggregate) {
    scan(
        in, out, aggregate, [&](T before, bool first, T value) { return first ? value : op(before, value); },
        [&](bool first, T before) { return first ? initial : op(initial, before); });
  }
  void InclusiveSum(T in, T& out) { InclusiveScan(in, out, emulator::Add{}); }
  void InclusiveSum(T in, T& out, T& aggregate) { InclusiveScan(in, out, emulator::Add{}, aggregate); }
  void ExclusiveSum(T in, T& out) { ExclusiveScan(in, out, T{}, emulator::Add{}); }
  void ExclusiveSum(T in, T& out, T& aggregate) { ExclusiveScan(in, out, T{}, emulator::Add{}, aggregate); }

 private:
  // extend(total, first, value): the total with one more value. exclude(first, total before): an exclusive
  // result.
  template <typename Extend, typename Exclude>
  void scan(T in, T& out, T& aggregate, Extend extend, Exclude exclude) {
    struct Exchange {
      T item, aggregate;
    } mine{in, in};
    emulator::warp_collective(~0u, "cub::WarpScan", site_, mine, [&](emulator::Peers<Exchange> lanes) {
      T total{};
      for (unsigned lane = 0; lane < 32; ++lane) {
        const T before = total;
        total = extend(before, lane == 0, lanes[lane].item);
        if constexpr (std::is_null_pointer_v<Exclude>) {
          lanes[lane].item = total;
        } else {
          lanes[lane].item = exclude(lane == 0, before);
        }
      }
      for (unsigned lane = 0; lane < 32; ++lane) lanes[lane].aggregate = total;
    });
    out = mine.item;
    aggregate = mine.aggregate;
  }

  emulator::Site site_;
};

}  // namespace cub
