#pragma once

#include "emulator/cub_common.h"

namespace cub {

enum BlockReduceAlgorithm {
  BLOCK_REDUCE_RAKING_COMMUTATIVE_ONLY,
  BLOCK_REDUCE_RAKING,
  BLOCK_REDUCE_WARP_REDUCTIONS,
};

// The result is the first thread's; the others' is undefined.
template <typename T, int kThreads, BlockReduceAlgorithm kAlgorithm = BLOCK_REDUCE_WARP_REDUCTIONS>
class BlockReduce {
 public:
  using TempStorage = emulator::TempStorage<sizeof(T) * (kThreads + 32)>;

  explicit BlockReduce(TempStorage& storage, emulator::Site site = emulator::Site::current())
      : storage_(storage), site_(site) {}

  template <typename Op>
  T Reduce(T in, Op op, int num_valid = kThreads) {
    T mine = in;
    emulator::block_primitive<kThreads>("cub::BlockReduce", site_, storage_, mine,
                                        [&](emulator::Peers<T> threads) {
                                          T total = threads[0];
                                          for (int t = 1; t < num_valid; ++t)
                                            total = op(total, threads[static_cast<unsigned>(t)]);
                                          for (unsigned t = 1; t < kThreads; ++t)
                                            threads[t] = emulator::undefined<T>();
                                          threads[0] = total;
                                        });
    return mine;
  }
  template <int kItems, typename Op>
  T Reduce(T (&in)[kItems], Op op) {
    T own = in[0];
    for (int i = 1; i < kItems; ++i) own = op(own, in[i]);
    return Reduce(own, op);
  }
  T Sum(T in, int num_valid = kThreads) { return Reduce(in, emulator::Add{}, num_valid); }
  template <int kItems>
  T Sum(T (&in)[kItems]) {
    return Reduce(in, emulator::Add{});
  }

 private:
  TempStorage& storage_;
  emulator::Site site_;
};

}  // namespace cub
