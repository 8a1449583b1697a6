#pragma once

#include "emulator/cub_common.h"

namespace cub {

struct DeviceSegmentedRadixSort {
  template <typename Key, typename Count, typename Begin, typename End>
  static cudaError_t SortKeys(void* scratch, std::size_t& bytes, const Key* keys_in, Key* keys_out,
                              Count num_items, Count num_segments, Begin begins, End ends, int begin_bit = 0,
                              int end_bit = 8 * sizeof(Key), cudaStream_t = nullptr) {
    const NullType* no_values = nullptr;
    return sort<false>(scratch, bytes, keys_in, keys_out, no_values, static_cast<NullType*>(nullptr),
                       num_items, num_segments, begins, ends, begin_bit, end_bit);
  }
  template <typename Key, typename Count, typename Begin, typename End>
  static cudaError_t SortKeysDescending(void* scratch, std::size_t& bytes, const Key* keys_in, Key* keys_out,
                                        Count num_items, Count num_segments, Begin begins, End ends,
                                        int begin_bit = 0, int end_bit = 8 * sizeof(Key),
                                        cudaStream_t = nullptr) {
    const NullType* no_values = nullptr;
    return sort<true>(scratch, bytes, keys_in, keys_out, no_values, static_cast<NullType*>(nullptr),
                      num_items, num_segments, begins, ends, begin_bit, end_bit);
  }
  template <typename Key, typename Value, typename Count, typename Begin, typename End>
  static cudaError_t SortPairs(void* scratch, std::size_t& bytes, const Key* keys_in, Key* keys_out,
                               const Value* values_in, Value* values_out, Count num_items, Count num_segments,
                               Begin begins, End ends, int begin_bit = 0, int end_bit = 8 * sizeof(Key),
                               cudaStream_t = nullptr) {
    return sort<false>(scratch, bytes, keys_in, keys_out, values_in, values_out, num_items, num_segments,
                       begins, ends, begin_bit, end_bit);
  }
  template <typename Key, typename Value, typename Count, typename Begin, typename End>
  static cudaError_t SortPairsDescending(void* scratch, std::size_t& bytes, const Key* keys_in, Key* keys_out,
                                         const Value* values_in, Value* values_out, Count num_items,
                                         Count num_segments, Begin begins, End ends, int begin_bit = 0,
                                         int end_bit = 8 * sizeof(Key), cudaStream_t = nullptr) {
    return sort<true>(scratch, bytes, keys_in, keys_out, values_in, values_out, num_items, num_segments,
                      begins, ends, begin_bit, end_bit);
  }

 private:
  template <bool kDescending, typename Key, typename Value, typename Count, typename Begin, typename End>
  static cudaError_t sort(void* scratch, std::size_t& bytes, const Key* keys_in, Key* keys_out,
                          const Value* values_in, Value* values_out, Count num_items, Count num_segments,
                          Begin begins, End ends, int begin_bit, int end_bit) {
    if (emulator::measures(scratch, bytes, static_cast<std::size_t>(num_items) * sizeof(Key)))
      return cudaSuccess;
    for (Count segment = 0; segment < num_segments; ++segment) {
      const auto begin = begins[segment];
      const auto end = ends[segment];
      if (end <= begin) continue;
      const std::vector<Key> keys(keys_in + begin, keys_in + end);
      const auto order = emulator::radix_order(keys, kDescending, begin_bit, end_bit);
      std::vector<Value> values;
      if (values_in != nullptr) values.assign(values_in + begin, values_in + end);
      for (std::size_t i = 0; i < keys.size(); ++i) {
        keys_out[begin + static_cast<decltype(begin)>(i)] = keys[static_cast<std::size_t>(order[i])];
        if (values_in == nullptr) continue;
        values_out[begin + static_cast<decltype(begin)>(i)] = values[static_cast<std::size_t>(order[i])];
      }
    }
    return cudaSuccess;
  }
};

}  // namespace cub
