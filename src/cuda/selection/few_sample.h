// The sample of its keys that bounds a selection for few rows: which keys it takes, and which of them stand
// for the window's last. No result depends on it: the counts that follow show whether a bound holds.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace flash_dmattn::cuda {

struct FewSample {
  static constexpr int kMost = 4096;

  int size = 0;
  std::uint64_t step = 0;  // keys for each one of the sample, times 2^32
  // Places in the order of the sample, 1 the best; behind the sample's end: there is no bound.
  unsigned lower_place = 0;  // nearly surely enough keys reach its score
  unsigned upper_place = 0;  // nearly surely few enough do; 0: there is no bound
  unsigned tolerance = 0;    // places by which either may be missed

  // The window's best `window` keys of `prefix` are sought, and the best `safe` of them need no order.
  static FewSample make(int prefix, int window, int safe) {
    FewSample sample;
    sample.size = std::min(prefix, kMost);
    if (sample.size == 0) return sample;
    sample.step = (static_cast<std::uint64_t>(prefix) << 32) / static_cast<std::uint64_t>(sample.size);
    // A sample of n of N keys holds n k / N of the best k on average, give or take the root of it. Four times
    // that and a little is not enough for one head in some fifty thousand.
    const double share = static_cast<double>(sample.size) / prefix;
    const auto spread = [&](double place) { return share == 1 ? 16 : 4 * std::sqrt(place) + 4; };
    const double lower = window * share;
    const double upper = safe * share;
    sample.lower_place = static_cast<unsigned>(std::ceil(lower + spread(lower)));
    sample.upper_place = static_cast<unsigned>(std::max(std::floor(upper - spread(upper)), 0.0));
    sample.tolerance = static_cast<unsigned>(spread(lower) / 8);
    return sample;
  }

  // One key of each of `size` equal parts, now here, now there in it, so that no period of the scores is
  // followed.
  __host__ __device__ int key(int index) const {
    const std::uint64_t begin = static_cast<std::uint64_t>(index) * step >> 32;
    const std::uint64_t scattered = static_cast<std::uint32_t>(index) * std::uint32_t{0x9e3779b1};
    return static_cast<int>(begin + ((step >> 32) * scattered >> 32));
  }
};

}  // namespace flash_dmattn::cuda
