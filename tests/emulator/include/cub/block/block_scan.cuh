#pragma once

#include "emulator/cub_common.h"

namespace cub {

enum BlockScanAlgorithm { BLOCK_SCAN_RAKING, BLOCK_SCAN_RAKING_MEMOIZE, BLOCK_SCAN_WARP_SCANS };

template <typename T, int kThreads, BlockScanAlgorithm kAlgorithm = BLOCK_SCAN_RAKING>
class BlockScan {
 public:
  using TempStorage = emulator::TempStorage<sizeof(T) * (kThreads + kThreads / 32 + 32)>;

  explicit BlockScan(TempStorage& storage, emulator::Site site = emulator::Site::current())
      : storage_(storage), site_(site) {}

  // Without an initial value the first result of an exclusive scan is undefined, as in CUB.
  template <typename Op>
  void InclusiveScan(T in, T& out, Op op) {
    T aggregate;
    scan<true, 1>({&in}, {&out}, nullptr, aggregate, op);
  }
  template <typename Op>
  void InclusiveScan(T in, T& out, Op op, T& aggregate) {
    scan<true, 1>({&in}, {&out}, nullptr, aggregate, op);
  }
  template <int kItems, typename Op>
  void InclusiveScan(T (&in)[kItems], T (&out)[kItems], Op op) {
    T aggregate;
    scan<true, kItems>({in}, {out}, nullptr, aggregate, op);
  }
  template <int kItems, typename Op>
  void InclusiveScan(T (&in)[kItems], T (&out)[kItems], Op op, T& aggregate) {
    scan<true, kItems>({in}, {out}, nullptr, aggregate, op);
  }
  template <typename Op>
  void ExclusiveScan(T in, T& out, Op op) {
    T aggregate;
    scan<false, 1>({&in}, {&out}, nullptr, aggregate, op);
  }
  template <typename Op>
  void ExclusiveScan(T in, T& out, std::type_identity_t<T> initial, Op op) {
    T aggregate;
    scan<false, 1>({&in}, {&out}, &initial, aggregate, op);
  }
  template <typename Op>
  void ExclusiveScan(T in, T& out, std::type_identity_t<T> initial, Op op, T& aggregate) {
    scan<false, 1>({&in}, {&out}, &initial, aggregate, op);
  }
  template <int kItems, typename Op>
  void ExclusiveScan(T (&in)[kItems], T (&out)[kItems], std::type_identity_t<T> initial, Op op) {
    T aggregate;
    scan<false, kItems>({in}, {out}, &initial, aggregate, op);
  }
  template <int kItems, typename Op>
  void ExclusiveScan(T (&in)[kItems], T (&out)[kItems], std::type_identity_t<T> initial, Op op,
                     T& aggregate) {
    scan<false, kItems>({in}, {out}, &initial, aggregate, op);
  }

  void InclusiveSum(T in, T& out) { InclusiveScan(in, out, emulator::Add{}); }
  void InclusiveSum(T in, T& out, T& aggregate) { InclusiveScan(in, out, emulator::Add{}, aggregate); }
  template <int kItems>
  void InclusiveSum(T (&in)[kItems], T (&out)[kItems]) {
    InclusiveScan(in, out, emulator::Add{});
  }
  template <int kItems>
  void InclusiveSum(T (&in)[kItems], T (&out)[kItems], T& aggregate) {
    InclusiveScan(in, out, emulator::Add{}, aggregate);
  }
  void ExclusiveSum(T in, T& out) { ExclusiveScan(in, out, T{}, emulator::Add{}); }
  void ExclusiveSum(T in, T& out, T& aggregate) { ExclusiveScan(in, out, T{}, emulator::Add{}, aggregate); }
  template <int kItems>
  void ExclusiveSum(T (&in)[kItems], T (&out)[kItems]) {
    ExclusiveScan(in, out, T{}, emulator::Add{});
  }
  template <int kItems>
  void ExclusiveSum(T (&in)[kItems], T (&out)[kItems], T& aggregate) {
    ExclusiveScan(in, out, T{}, emulator::Add{}, aggregate);
  }

 private:
  struct In {
    const T* items;
  };
  struct Out {
    T* items;
  };

  // The aggregate is that of the items, without the initial value.
  template <bool kInclusive, int kItems, typename Op>
  void scan(In in, Out out, const T* initial, T& aggregate, Op op) {
    struct Exchange {
      T items[kItems];
      T aggregate;
    } mine;
    std::copy_n(in.items, kItems, mine.items);
    emulator::block_primitive<kThreads>("cub::BlockScan", site_, storage_, mine,
                                        [&](emulator::Peers<Exchange> threads) {
                                          T before = initial != nullptr ? *initial : emulator::undefined<T>();
                                          T total = before;
                                          for (unsigned i = 0; i < kThreads * kItems; ++i) {
                                            T& item = threads[i / kItems].items[i % kItems];
                                            const T value = item;
                                            total = i == 0 ? value : op(total, value);
                                            if (kInclusive) before = total;
                                            item = before;
                                            if (!kInclusive)
                                              before = initial != nullptr ? op(before, value) : total;
                                          }
                                          for (unsigned t = 0; t < kThreads; ++t)
                                            threads[t].aggregate = total;
                                        });
    std::copy_n(mine.items, kItems, out.items);
    aggregate = mine.aggregate;
  }

  TempStorage& storage_;
  emulator::Site site_;
};

}  // namespace cub
