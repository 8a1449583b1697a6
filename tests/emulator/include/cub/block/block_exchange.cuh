#pragma once

#include "emulator/cub_common.h"

namespace cub {

template <typename T, int kThreads, int kItems>
class BlockExchange {
 public:
  using TempStorage = emulator::TempStorage<sizeof(T) * kThreads * kItems * 33 / 32 + 16>;

  explicit BlockExchange(TempStorage& storage, emulator::Site site = emulator::Site::current())
      : storage_(storage), site_(site) {}

  void StripedToBlocked(T (&in)[kItems], T (&out)[kItems]) {
    exchange(in, out, [](int thread, int item) { return item * kThreads + thread; }, false);
  }
  void BlockedToStriped(T (&in)[kItems], T (&out)[kItems]) {
    exchange(in, out, [](int thread, int item) { return thread * kItems + item; }, true);
  }
  template <typename Rank>
  void ScatterToBlocked(T (&in)[kItems], T (&out)[kItems], Rank (&ranks)[kItems]) {
    exchange(in, out, [&](int, int item) { return static_cast<int>(ranks[item]); }, false);
  }
  template <typename Rank>
  void ScatterToStriped(T (&in)[kItems], T (&out)[kItems], Rank (&ranks)[kItems]) {
    exchange(in, out, [&](int, int item) { return static_cast<int>(ranks[item]); }, true);
  }

 private:
  // rank(thread, item): where the item goes in the order of the CTA.
  template <typename Rank>
  void exchange(T (&in)[kItems], T (&out)[kItems], Rank rank, bool striped) {
    struct Exchange {
      T in[kItems];
      int ranks[kItems];
      T* out;
    } mine;
    mine.out = out;
    for (int i = 0; i < kItems; ++i) {
      mine.in[i] = in[i];
      mine.ranks[i] = rank(static_cast<int>(threadIdx.x), i);
    }
    emulator::block_primitive<kThreads>(
        "cub::BlockExchange", site_, storage_, mine, [&](emulator::Peers<Exchange> threads) {
          for (unsigned t = 0; t < kThreads; ++t) {
            for (int i = 0; i < kItems; ++i) {
              const auto to = static_cast<unsigned>(threads[t].ranks[i]);
              if (to >= kThreads * kItems) emulator::fail("cub::BlockExchange: rank %u", to);
              threads[striped ? to % kThreads : to / kItems].out[striped ? to / kThreads : to % kItems] =
                  threads[t].in[i];
            }
          }
        });
  }

  TempStorage& storage_;
  emulator::Site site_;
};

}  // namespace cub
