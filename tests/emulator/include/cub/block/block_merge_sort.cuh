#pragma once

#include "emulator/cub_common.h"

namespace cub {

template <typename Key, int kThreads, int kItems, typename Value = NullType>
class BlockMergeSort {
 public:
  using TempStorage =
      emulator::TempStorage<sizeof(std::conditional_t<(sizeof(Value) > sizeof(Key)), Value, Key>) *
                            (static_cast<std::size_t>(kThreads) * kItems + 1)>;

  explicit BlockMergeSort(TempStorage& storage, emulator::Site site = emulator::Site::current())
      : storage_(storage), site_(site) {}

  template <typename Less>
  void Sort(Key (&keys)[kItems], Less less) {
    sort(keys, nullptr, less, kTotal, nullptr);
  }
  template <typename Less>
  void Sort(Key (&keys)[kItems], Less less, int num_valid, Key beyond) {
    sort(keys, nullptr, less, num_valid, &beyond);
  }
  template <typename Less>
  void Sort(Key (&keys)[kItems], Value (&values)[kItems], Less less) {
    sort(keys, values, less, kTotal, nullptr);
  }
  template <typename Less>
  void Sort(Key (&keys)[kItems], Value (&values)[kItems], Less less, int num_valid, Key beyond) {
    sort(keys, values, less, num_valid, &beyond);
  }
  template <typename... Args>
  void StableSort(Args&&... args) {
    Sort(std::forward<Args>(args)...);
  }

 private:
  static constexpr int kTotal = kThreads * kItems;

  // Keys from num_valid on are taken for *beyond, which no valid key exceeds.
  template <typename Less>
  void sort(Key* keys, Value* values, Less less, int num_valid, const Key* beyond) {
    struct Exchange {
      Key* keys;
      Value* values;
    } mine{keys, values};
    emulator::block_primitive<kThreads>(
        "cub::BlockMergeSort", site_, storage_, mine, [&](emulator::Peers<Exchange> threads) {
          struct Item {
            Key key;
            Value value;
          };
          std::vector<Item> items(kTotal);
          for (int i = 0; i < kTotal; ++i) {
            const Exchange& from = threads[static_cast<unsigned>(i / kItems)];
            Item& item = items[static_cast<std::size_t>(i)];
            item.key = i < num_valid ? from.keys[i % kItems] : *beyond;
            if (values != nullptr) item.value = from.values[i % kItems];
          }
          std::stable_sort(items.begin(), items.end(),
                           [&](const Item& a, const Item& b) { return less(a.key, b.key); });
          for (int i = 0; i < kTotal; ++i) {
            const Exchange& to = threads[static_cast<unsigned>(i / kItems)];
            to.keys[i % kItems] = items[static_cast<std::size_t>(i)].key;
            if (values != nullptr) to.values[i % kItems] = items[static_cast<std::size_t>(i)].value;
          }
        });
  }

  TempStorage& storage_;
  emulator::Site site_;
};

}  // namespace cub
