#pragma once

#include "emulator/cub_common.h"

namespace cub {

template <typename Key, int kThreads, int kItems, typename Value = NullType, int kRadixBits = 4>
class BlockRadixSort {
 public:
  using TempStorage = emulator::TempStorage<std::max<std::size_t>(
      sizeof(std::conditional_t<(sizeof(Value) > sizeof(Key)), Value, Key>) * kThreads * kItems * 33 / 32,
      sizeof(int) * kThreads * ((1 << kRadixBits) / 2 + 1) + 256)>;

  explicit BlockRadixSort(TempStorage& storage, emulator::Site site = emulator::Site::current())
      : storage_(storage), site_(site) {}

  void Sort(Key (&keys)[kItems], int begin_bit = 0, int end_bit = kKeyBits) {
    sort<false, false>(keys, nullptr, begin_bit, end_bit);
  }
  void Sort(Key (&keys)[kItems], Value (&values)[kItems], int begin_bit = 0, int end_bit = kKeyBits) {
    sort<false, false>(keys, values, begin_bit, end_bit);
  }
  void SortDescending(Key (&keys)[kItems], int begin_bit = 0, int end_bit = kKeyBits) {
    sort<true, false>(keys, nullptr, begin_bit, end_bit);
  }
  void SortDescending(Key (&keys)[kItems], Value (&values)[kItems], int begin_bit = 0,
                      int end_bit = kKeyBits) {
    sort<true, false>(keys, values, begin_bit, end_bit);
  }
  void SortBlockedToStriped(Key (&keys)[kItems], int begin_bit = 0, int end_bit = kKeyBits) {
    sort<false, true>(keys, nullptr, begin_bit, end_bit);
  }
  void SortBlockedToStriped(Key (&keys)[kItems], Value (&values)[kItems], int begin_bit = 0,
                            int end_bit = kKeyBits) {
    sort<false, true>(keys, values, begin_bit, end_bit);
  }
  void SortDescendingBlockedToStriped(Key (&keys)[kItems], int begin_bit = 0, int end_bit = kKeyBits) {
    sort<true, true>(keys, nullptr, begin_bit, end_bit);
  }
  void SortDescendingBlockedToStriped(Key (&keys)[kItems], Value (&values)[kItems], int begin_bit = 0,
                                      int end_bit = kKeyBits) {
    sort<true, true>(keys, values, begin_bit, end_bit);
  }

 private:
  static constexpr int kKeyBits = 8 * sizeof(Key);
  static constexpr std::size_t kTotal = static_cast<std::size_t>(kThreads) * kItems;

  template <bool kDescending, bool kStriped>
  void sort(Key* keys, Value* values, int begin_bit, int end_bit) {
    struct Exchange {
      Key* keys;
      Value* values;
    } mine{keys, values};
    emulator::block_primitive<kThreads>(
        "cub::BlockRadixSort", site_, storage_, mine, [&](emulator::Peers<Exchange> threads) {
          std::vector<Key> all_keys(kTotal);
          std::vector<Value> all_values(kTotal);
          for (std::size_t i = 0; i < kTotal; ++i) {
            const Exchange& from = threads[static_cast<unsigned>(i / kItems)];
            all_keys[i] = from.keys[i % kItems];
            if (values != nullptr) all_values[i] = from.values[i % kItems];
          }
          const auto order = emulator::radix_order(all_keys, kDescending, begin_bit, end_bit);
          for (std::size_t i = 0; i < kTotal; ++i) {
            const std::size_t item = kStriped ? i / kThreads : i % kItems;
            const Exchange& to = threads[static_cast<unsigned>(kStriped ? i % kThreads : i / kItems)];
            to.keys[item] = all_keys[static_cast<std::size_t>(order[i])];
            if (values != nullptr) to.values[item] = all_values[static_cast<std::size_t>(order[i])];
          }
        });
  }

  TempStorage& storage_;
  emulator::Site site_;
};

}  // namespace cub
