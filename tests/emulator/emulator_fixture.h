// For the emulator's own tests: launches in the fixed order of threads and in random ones.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <functional>
#include <string>
#include <utility>

#include "cuda/common/launch.h"

namespace emulator_test {

inline void set_seed(int seed) { setenv("FLASH_DMATTN_EMULATOR_SEED", std::to_string(seed).c_str(), 1); }

class Emulator : public ::testing::Test {
 protected:
  void TearDown() override {
    set_seed(0);
    unsetenv("FLASH_DMATTN_EMULATOR_SHARED_BYTES");
    unsetenv("FLASH_DMATTN_EMULATOR_CAPABILITY");
  }
};
using EmulatorDeathTest = Emulator;

// In the fixed order and in random ones.
inline void in_every_order(const std::function<void()>& body) {
  for (int seed = 0; seed < 20; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    set_seed(seed);
    body();
  }
}

template <typename... Params, typename... Args>
void run(void (*kernel)(Params...), unsigned grid, unsigned threads, std::size_t shared_bytes,
         Args&&... args) {
  const cudaError_t status = flash_dmattn::cuda::launch(
      kernel, flash_dmattn::cuda::LaunchConfig{grid, threads, shared_bytes, nullptr},
      std::forward<Args>(args)...);
  ASSERT_EQ(status, cudaSuccess) << cudaGetErrorString(status);
}

}  // namespace emulator_test
