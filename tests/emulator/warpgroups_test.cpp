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

// Where column c of row r lies in a tile of rows of 64 16-bit elements.
int place(int r, int c) { return r * 64 + (c / 8 ^ r % 8) * 8 + c % 8; }

// Calls visit(row, column, index) for the accumulators of this thread.
template <int kN, typename Visit>
void for_accumulators(Visit&& visit) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int row = static_cast<int>(threadIdx.x % 128 / 32) * 16 + lane / 4;
  for (int i = 0; i < kN / 2; ++i) visit(row + i / 2 % 2 * 8, i / 4 * 8 + lane % 4 * 2 + i % 2, i);
}

// d [64][kN] (+)= a [64][64] * b [kN][64] transposed, both copied into swizzled tiles by ordinary stores.
template <typename Element, int kN>
__global__ void multiply_k_major(const Element* a, const Element* b, bool accumulate, float* d) {
  auto* tile_a = reinterpret_cast<Element*>(dynamic_shared_memory());
  Element* tile_b = tile_a + 64 * 64;
  for (int i = static_cast<int>(threadIdx.x); i < 64 * 64; i += 128) tile_a[place(i / 64, i % 64)] = a[i];
  for (int i = static_cast<int>(threadIdx.x); i < kN * 64; i += 128) tile_b[place(i / 64, i % 64)] = b[i];
  float sum[kN / 2];
  for_accumulators<kN>([&](int m, int n, int i) { sum[i] = d[m * kN + n]; });
  fence_async_proxy();
  __syncthreads();
  wgmma_fence();
  for (int k = 0; k < 64; k += 16) {
    wgmma<Element, kN>(sum, operand(shared_address(tile_a)) + k * 2 / 16,
                       operand(shared_address(tile_b)) + k * 2 / 16, accumulate || k > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  for_accumulators<kN>([&](int m, int n, int i) { d[m * kN + n] = sum[i]; });
}

// d [64][kN] (+)= a [64][64] * b [64][kN]: a in registers, b in tiles of 64 columns.
template <typename Element, int kN>
__global__ void multiply_mn_major(const Element* a, const Element* b, bool accumulate, float* d) {
  auto* tile_b = reinterpret_cast<Element*>(dynamic_shared_memory());
  for (int i = static_cast<int>(threadIdx.x); i < 64 * kN; i += 128) {
    tile_b[i % kN / 64 * (64 * 64) + place(i / kN, i % kN % 64)] = b[i];
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
    wgmma<Element, kN>(sum, fragments[k], operand(shared_address(tile_b), 64 * 128) + k * 2048 / 16,
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
    run(kKMajor ? multiply_k_major<Element, kN> : multiply_mn_major<Element, kN>, 1, 128, 2 * 64 * (64 + kN),
        a.data(), b.data(), accumulate, d.data());
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

}  // namespace
