#pragma once

#include "emulator/cub_common.h"

namespace cub {

// All 32 lanes take part. The result is the first lane's; the others' is undefined.
template <typename T>
class WarpReduce {
 public:
  using TempStorage = emulator::TempStorage<16>;

  explicit WarpReduce(TempStorage&, emulator::Site site = emulator::Site::current()) : site_(site) {}

  template <typename Op>
  T Reduce(T in, Op op, int num_valid = 32) {
    T mine = in;
    emulator::warp_collective(~0u, "cub::WarpReduce", site_, mine, [&](emulator::Peers<T> lanes) {
      T total = lanes[0];
      for (int lane = 1; lane < num_valid; ++lane) total = op(total, lanes[static_cast<unsigned>(lane)]);
      for (unsigned lane = 1; lane < 32; ++lane) lanes[lane] = emulator::undefined<T>();
      lanes[0] = total;
    });
    return mine;
  }
  T Sum(T in, int num_valid = 32) { return Reduce(in, emulator::Add{}, num_valid); }

 private:
  emulator::Site site_;
};

}  // namespace cub
