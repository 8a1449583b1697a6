// The emulator's products of warpgroups: what they compute, and the mistakes that it finds around them.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "cuda/common/ptx_sm90.cuh"
#include "emulator_fixture.h"

namespace {

using namespace emulator_test;
using namespace flash_dmattn::cuda;

using Products = Emulator;
using ProductsDeathTest = EmulatorDeathTest;

// Where column c of row r lies in a tile whose atoms, of 8 rows of 64 16-bit elements, alternate with those
// of another tile.
constexpr int kAtomBytes = 2048;
int place(int r, int c) { return r / 8 * (kAtomBytes / 2) + r % 8 * 64 + (c / 8 ^ r % 8) * 8 + c % 8; }

// Calls visit(row, column, index) for the accumulators of this thread.
template <int kN, typename Visit>
void for_accumulators(Visit&& visit) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int row = static_cast<int>(threadIdx.x % 128 / 32) * 16 + lane / 4;
  for (int i = 0; i < kN / 2; ++i) visit(row + i / 2 % 2 * 8, i / 4 * 8 + lane % 4 * 2 + i % 2, i);
}

// d [64][kN] (+)= a [64][64] * b [kN][64] transposed, both copied into alternating tiles by ordinary stores.
template <typename Element, int kN>
__global__ void multiply_k_major(const Element* a, const Element* b, bool accumulate, float* d) {
  auto* tile_a = reinterpret_cast<Element*>(dynamic_shared_memory());
  Element* tile_b = tile_a + 8 * 64;
  for (int i = static_cast<int>(threadIdx.x); i < 64 * 64; i += 128) tile_a[place(i / 64, i % 64)] = a[i];
  for (int i = static_cast<int>(threadIdx.x); i < kN * 64; i += 128) tile_b[place(i / 64, i % 64)] = b[i];
  float sum[kN / 2];
  for_accumulators<kN>([&](int m, int n, int i) { sum[i] = d[m * kN + n]; });
  fence_async_proxy();
  __syncthreads();
  wgmma_fence();
  for (int k = 0; k < 64; k += 16) {
    wgmma<Element, kN>(sum, operand(shared_address(tile_a), kAtomBytes) + k * 2,
                       operand(shared_address(tile_b), kAtomBytes) + k * 2, accumulate || k > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  for_accumulators<kN>([&](int m, int n, int i) { d[m * kN + n] = sum[i]; });
}

// d [64][kN] (+)= a [64][64] * b [64][kN]: a in registers, b in alternating tiles of 64 columns.
template <typename Element, int kN>
__global__ void multiply_mn_major(const Element* a, const Element* b, bool accumulate, float* d) {
  auto* tile_b = reinterpret_cast<Element*>(dynamic_shared_memory());
  for (int i = static_cast<int>(threadIdx.x); i < 64 * kN; i += 128) {
    tile_b[i % kN / 64 * (8 * 64) + place(i / kN, i % kN % 64)] = b[i];
  }
  float sum[kN / 2];
  for_accumulators<kN>([&](int m, int n, int i) { sum[i] = d[m * kN + n]; });
  std::uint32_t fragments[4][4];
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int row = static_cast<int>(threadIdx.x / 32) * 16 + lane / 4;
  for (int k = 0; k < 4; ++k) {
    for (int i = 0; i < 4; ++i) {
      const int column = k * 16 + i / 2 * 8 + lane % 4 * 2;
      std::memcpy(&fragments[k][i], a + (row + i % 2 * 8) * 64 + column, 4);
    }
  }
  fence_async_proxy();
  __syncthreads();
  wgmma_fence();
  for (int k = 0; k < 4; ++k) {
    wgmma<Element, kN>(sum, fragments[k],
                       operand(shared_address(tile_b), kAtomBytes, 1024) + k * 2 * kAtomBytes,
                       accumulate || k > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  for_accumulators<kN>([&](int m, int n, int i) { d[m * kN + n] = sum[i]; });
}

template <typename Element>
std::vector<Element> random_elements(int count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<Element> elements(count);
  for (Element& element : elements) {
    element.bits = static_cast<std::uint16_t>(pack<Element>(normal(random), 0));
  }
  return elements;
}

template <typename Element, int kN, bool kKMajor>
void check_product() {
  const std::vector<Element> a = random_elements<Element>(64 * 64, 1);
  const std::vector<Element> b = random_elements<Element>(64 * kN, 2);
  for (const bool accumulate : {false, true}) {
    std::vector<float> d(64 * kN, 3.0f);
    run(kKMajor ? multiply_k_major<Element, kN> : multiply_mn_major<Element, kN>, 1, 128,
        2 * std::max(64, kN) * kAtomBytes / 8, a.data(), b.data(), accumulate, d.data());
    for (int m = 0; m < 64; ++m) {
      for (int n = 0; n < kN; ++n) {
        double sum = accumulate ? 3 : 0;
        for (int k = 0; k < 64; ++k) {
          sum += double{to_float(a[m * 64 + k])} * double{to_float(b[kKMajor ? n * 64 + k : k * kN + n])};
        }
        ASSERT_NEAR(d[m * kN + n], sum, 1e-4) << m << ", " << n;
      }
    }
  }
}

TEST_F(Products, KMajor) {
  check_product<BFloat16, 64, true>();
  check_product<Float16, 80, true>();
  check_product<BFloat16, 176, true>();
  in_every_order([] { check_product<BFloat16, 80, true>(); });
}

TEST_F(Products, MnMajor) {
  check_product<Float16, 64, false>();
  check_product<Float16, 128, false>();
  in_every_order([] { check_product<BFloat16, 128, false>(); });
}

enum class Mistake {
  kNone,
  kNoWait,
  kNoFence,
  kNoProxyFence,
  kTileWritten,
  kSumWritten,
  kFragmentWritten,
  kOperandsDiffer,
  kWarpAbsent,
  kSumsOverlap,
  kMisaligned,
};

// sum = a * b with ones everywhere: a [64][16] in registers, b [16][64] copied by cp_async. first, last: of
// the thread's accumulators.
template <Mistake kMistake>
__global__ void add_ones(const BFloat16* ones, float* first, float* last) {
  auto* tile = reinterpret_cast<BFloat16*>(dynamic_shared_memory());
  const int thread = static_cast<int>(threadIdx.x);
  cp_async_16(shared_address(tile + thread * 8), ones);
  cp_async_commit();
  cp_async_wait<0>();
  if (kMistake != Mistake::kNoProxyFence) fence_async_proxy();
  __syncthreads();
  std::uint32_t fragment[4];
  std::memcpy(fragment, ones, sizeof(fragment));
  float sum[34] = {};
  if (kMistake != Mistake::kNoFence) wgmma_fence();
  if (kMistake != Mistake::kWarpAbsent || thread < 96) {
    Operand b = operand(shared_address(tile), 1024);
    if (kMistake == Mistake::kOperandsDiffer && thread == 77) b = b + 16;
    if (kMistake == Mistake::kMisaligned) b = b + 16;
    wgmma<BFloat16, 64>(reinterpret_cast<float(&)[32]>(sum), fragment, b, false);
    if (kMistake == Mistake::kSumsOverlap) {
      wgmma<BFloat16, 64>(reinterpret_cast<float(&)[32]>(sum[2]), fragment, b, false);
    }
  }
  if (kMistake == Mistake::kTileWritten) tile[thread * 8].bits = 0;
  if (kMistake == Mistake::kSumWritten) sum[7] *= 0.5f;
  if (kMistake == Mistake::kFragmentWritten) fragment[3] = 0;
  wgmma_commit();
  if (kMistake != Mistake::kNoWait) wgmma_wait<0>();
  first[thread] = sum[0];
  last[thread] = sum[31];
}

template <Mistake kMistake>
void check_ones(float expected) {
  alignas(16) BFloat16 ones[8];
  for (BFloat16& one : ones) one.bits = 0x3f80;
  std::vector<float> first(128);
  std::vector<float> last(128);
  run(add_ones<kMistake>, 1, 128, 2048, static_cast<const BFloat16*>(ones), first.data(), last.data());
  for (const std::vector<float>& sums : {first, last}) {
    for (const float sum : sums)
      EXPECT_TRUE(sum == expected || (std::isnan(sum) && std::isnan(expected))) << sum;
  }
}

TEST_F(ProductsDeathTest, Mistakes) {
  check_ones<Mistake::kNone>(16);
  check_ones<Mistake::kNoWait>(NAN);
  EXPECT_DEATH(check_ones<Mistake::kNoFence>(16), "wgmma at .*: no wgmma_fence since the last wgmma_wait");
  EXPECT_DEATH(check_ones<Mistake::kNoProxyFence>(16),
               "which thread [0-9]+ wrote by cp_async, without fence_async_proxy between");
  EXPECT_DEATH(check_ones<Mistake::kTileWritten>(16), "wgmma at .*: b changed before the wait for it");
  EXPECT_DEATH(check_ones<Mistake::kSumWritten>(16),
               "wgmma at .*: accumulator 7 of thread 0 .* was written before the wait for it");
  EXPECT_DEATH(check_ones<Mistake::kFragmentWritten>(16), "wgmma at .*: a changed before the wait for it");
  EXPECT_DEATH(
      check_ones<Mistake::kOperandsDiffer>(16),
      "wgmma at .*: other threads of the warpgroup execute wgmma at .*, or this with other operands");
  EXPECT_DEATH(check_ones<Mistake::kWarpAbsent>(16),
               "wgmma at .*: other threads of the warpgroup execute wgmma_commit at");
  EXPECT_DEATH(check_ones<Mistake::kSumsOverlap>(16),
               "some of its accumulators are those of another product");
  EXPECT_DEATH(check_ones<Mistake::kMisaligned>(16),
               "of an MN-major tile the shared address 16 and .* must be multiples of 1024");
  setenv("FLASH_DMATTN_EMULATOR_CAPABILITY", "80", 1);
  EXPECT_DEATH(check_ones<Mistake::kNone>(16),
               "wgmma at .*: needs compute capability 9.0, the device has 8.0");
}

// Of two groups, one may be unfinished.
__global__ void wait_for_the_first(const BFloat16* ones, float* to) {
  auto* tile = reinterpret_cast<BFloat16*>(dynamic_shared_memory());
  for (int i = 0; i < 8; ++i) tile[threadIdx.x * 8 + i] = ones[i];
  fence_async_proxy();
  __syncthreads();
  std::uint32_t fragment[4];
  std::memcpy(fragment, ones, sizeof(fragment));
  float sums[2][32] = {};
  wgmma_fence();
  for (auto& sum : sums) {
    wgmma<BFloat16, 64>(sum, fragment, operand(shared_address(tile), 1024), true);
    wgmma<BFloat16, 64>(sum, fragment, operand(shared_address(tile), 1024), true);
    wgmma_commit();
  }
  wgmma_wait<1>();
  to[threadIdx.x * 4] = sums[0][5];
  to[threadIdx.x * 4 + 1] = sums[1][5];
  sums[0][5] = 1;
  wgmma_fence();
  wgmma<BFloat16, 64>(sums[0], fragment, operand(shared_address(tile), 1024), true);
  wgmma_commit();
  wgmma_wait<0>();
  to[threadIdx.x * 4 + 2] = sums[0][5];
  to[threadIdx.x * 4 + 3] = sums[1][5];
}

TEST_F(Products, GroupsAreDoneWhenWaitedForAndNotBefore) {
  alignas(16) BFloat16 ones[8];
  for (BFloat16& one : ones) one.bits = 0x3f80;
  in_every_order([&] {
    float to[256 * 4];
    run(wait_for_the_first, 1, 256, 4096, static_cast<const BFloat16*>(ones), to);
    for (int thread = 0; thread < 256; ++thread) {
      EXPECT_EQ(to[thread * 4], 32);
      EXPECT_TRUE(std::isnan(to[thread * 4 + 1]));
      EXPECT_EQ(to[thread * 4 + 2], 17);
      EXPECT_EQ(to[thread * 4 + 3], 32);
    }
  });
}

// A warpgroup gives registers to the other, which some of its threads do not take.
template <unsigned kTakers>
__global__ void move_registers() {
  if (threadIdx.x < 128) {
    register_decrease<24>();
  } else if (threadIdx.x < 128 + kTakers) {
    register_increase<240>();
  }
}

TEST_F(ProductsDeathTest, InstructionsOfWholeWarpgroups) {
  run(move_registers<128>, 1, 256, 0);
  EXPECT_DEATH(
      run(move_registers<96>, 1, 256, 0),
      "register_increase at .*: 96 threads of the warpgroup of thread 128 have executed it, the others "
      "have ended");
  EXPECT_DEATH(run(move_registers<64>, 1, 192, 0),
               "register_increase at .*: the thread is in no warpgroup of 128 threads");
}

}  // namespace
