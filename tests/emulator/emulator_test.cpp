// The emulator: what kernels compute on it, and that it finds what must not happen.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "core/numeric.h"
#include "cub/cub.cuh"
#include "cuda/common/launch.h"
#include "cuda/common/ptx.cuh"
#include "emulator_fixture.h"

namespace {

using namespace emulator_test;
using flash_dmattn::cuda::BFloat16;
using flash_dmattn::cuda::Float16;
using flash_dmattn::cuda::LaunchConfig;

constexpr unsigned kAll = 0xffffffffu;

__global__ void shuffles(int* to) {
  const int lane = threadIdx.x % 32;
  int* mine = to + threadIdx.x * 8;
  mine[0] = __shfl_sync(kAll, lane, 5);
  mine[1] = __shfl_sync(kAll, lane, 1, 8);
  mine[2] = __shfl_up_sync(kAll, lane, 3);
  mine[3] = __shfl_down_sync(kAll, lane, 3);
  mine[4] = __shfl_xor_sync(kAll, lane, 16);
  mine[5] = static_cast<int>(__ballot_sync(kAll, lane % 3 == 0));
  mine[6] = __reduce_max_sync(kAll, lane * 7 % 32);
  mine[7] = static_cast<int>(__match_any_sync(kAll, lane / 8));
}

TEST_F(Emulator, Shuffles) {
  in_every_order([] {
    std::vector<int> results(64 * 8);
    run(shuffles, 1, 64, 0, results.data());
    for (int thread = 0; thread < 64; ++thread) {
      const int lane = thread % 32;
      unsigned thirds = 0;
      for (int bit = 0; bit < 32; bit += 3) thirds |= 1u << bit;
      const std::vector<int> expected = {5,
                                         lane / 8 * 8 + 1,
                                         lane < 3 ? lane : lane - 3,
                                         lane > 28 ? lane : lane + 3,
                                         lane ^ 16,
                                         static_cast<int>(thirds),
                                         31,
                                         static_cast<int>(0xffu << lane / 8 * 8)};
      const std::vector<int> got(results.begin() + thread * 8, results.begin() + thread * 8 + 8);
      EXPECT_EQ(got, expected) << "thread " << thread;
    }
  });
}

__global__ void halves(int* to) {
  const bool upper = threadIdx.x % 32 >= 16;
  const unsigned mask = upper ? 0xffff0000u : 0x0000ffffu;
  int sum = static_cast<int>(threadIdx.x);
  if (upper) {
    for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(mask, sum, step);
  } else {
    sum = __reduce_add_sync(mask, sum);
  }
  to[threadIdx.x] = sum;
}

TEST_F(Emulator, PartsOfAWarpMeetByThemselves) {
  in_every_order([] {
    std::vector<int> sums(32);
    run(halves, 1, 32, 0, sums.data());
    for (int lane = 0; lane < 32; ++lane) EXPECT_EQ(sums[lane], lane < 16 ? 120 : 376);
  });
}

template <bool kBarrier>
__global__ void reverse(const int* from, int* to) {
  __shared__ int values[256];
  values[threadIdx.x] = from[blockIdx.x * 256 + threadIdx.x];
  if (kBarrier) __syncthreads();
  to[blockIdx.x * 256 + threadIdx.x] = values[255 - threadIdx.x];
}

TEST_F(Emulator, Barriers) {
  std::vector<int> from(4 * 256);
  std::iota(from.begin(), from.end(), 0);
  const auto wrong = [&](auto kernel) {
    std::vector<int> to(from.size());
    run(kernel, 4, 256, 0, from.data(), to.data());
    int count = 0;
    for (int i = 0; i < 1024; ++i) count += to[i] != i / 256 * 256 + 255 - i % 256;
    return count;
  };
  in_every_order([&] {
    EXPECT_EQ(wrong(reverse<true>), 0);
    EXPECT_GT(wrong(reverse<false>), 0);
  });
}

__global__ void count_even(int* to) {
  const int value = static_cast<int>(threadIdx.x);
  to[0] = __syncthreads_count(value % 2 == 0);
  to[1] = __syncthreads_or(value == 95);
  to[2] = __syncthreads_and(value < 95);
  atomicAdd(&to[3], value);
  atomicMax(&to[4], value);
}

TEST_F(Emulator, BarrierReductionsAndAtomics) {
  in_every_order([] {
    std::vector<int> results(5);
    run(count_even, 1, 96, 0, results.data());
    EXPECT_EQ(results, (std::vector<int>{48, 1, 0, 96 * 95 / 2, 95}));
  });
}

constexpr int kSortThreads = 64;
constexpr int kSortItems = 3;

struct Sorted {
  float keys[kSortThreads * kSortItems];
  int values[kSortThreads * kSortItems];
  int before[kSortThreads];
  int total;
};

__global__ void sort_and_scan(const float* keys, Sorted* to) {
  using Sort = cub::BlockRadixSort<float, kSortThreads, kSortItems, int>;
  using Scan = cub::BlockScan<int, kSortThreads>;
  __shared__ union {
    typename Sort::TempStorage sort;
    typename Scan::TempStorage scan;
  } storage;
  float key[kSortItems];
  int value[kSortItems];
  for (int i = 0; i < kSortItems; ++i) {
    value[i] = static_cast<int>(threadIdx.x) * kSortItems + i;
    key[i] = keys[value[i]];
  }
  Sort(storage.sort).SortDescending(key, value);
  __syncthreads();
  Scan(storage.scan).ExclusiveSum(value[0], to->before[threadIdx.x], to->total);
  for (int i = 0; i < kSortItems; ++i) {
    to->keys[threadIdx.x * kSortItems + i] = key[i];
    to->values[threadIdx.x * kSortItems + i] = value[i];
  }
}

TEST_F(Emulator, SortAndScan) {
  std::mt19937 random(1);
  std::vector<float> keys(kSortThreads * kSortItems);
  for (float& key : keys) key = static_cast<float>(static_cast<int>(random() % 21) - 10);
  std::vector<int> order(keys.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return keys[a] > keys[b]; });
  in_every_order([&] {
    Sorted sorted;
    run(sort_and_scan, 1, kSortThreads, 0, keys.data(), &sorted);
    int before = 0;
    for (int i = 0; i < kSortThreads * kSortItems; ++i) {
      EXPECT_EQ(sorted.values[i], order[i]);
      EXPECT_EQ(sorted.keys[i], keys[order[i]]);
      if (i % kSortItems != 0) continue;
      EXPECT_EQ(sorted.before[i / kSortItems], before);
      before += order[i];
    }
    EXPECT_EQ(sorted.total, before);
  });
}

// Loads a [16 x 16] (a), b [16 x 8] and adds a * b to d [16 x 8], all row-major.
template <typename Element>
__global__ void multiply(const Element* a, const Element* b, float* d) {
  using namespace flash_dmattn::cuda;
  auto* tile_a = reinterpret_cast<Element*>(dynamic_shared_memory());
  Element* tile_b = tile_a + 16 * 16;  // [16 x 16], its right half is not used
  const unsigned lane = threadIdx.x;
  cp_async_16(shared_address(tile_a + lane * 8), a + lane * 8);
  if (lane < 16) cp_async_16(shared_address(tile_b + lane * 16), b + lane * 8);
  if (lane < 16) cp_async_16(shared_address(tile_b + lane * 16 + 8), b, 0);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  std::uint32_t a_fragment[4];
  std::uint32_t b_fragment[4];
  ldmatrix_x4(a_fragment, shared_address(tile_a + lane % 16 * 16 + lane / 16 * 8));
  ldmatrix_x4_trans(b_fragment, shared_address(tile_b + lane % 16 * 16 + lane / 16 * 8));
  float acc[4];
  const unsigned g = lane / 4;
  const unsigned c = 2 * (lane % 4);
  for (unsigned i = 0; i < 4; ++i) acc[i] = d[(g + 8 * (i / 2)) * 8 + c + i % 2];
  mma_m16n8k16<Element>(acc, a_fragment, b_fragment[0], b_fragment[1]);
  for (unsigned i = 0; i < 4; ++i) d[(g + 8 * (i / 2)) * 8 + c + i % 2] = acc[i];
}

template <typename Element>
void check_multiply() {
  using flash_dmattn::cuda::to_float;
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  const auto rounded = [&] {
    return Element{static_cast<std::uint16_t>(flash_dmattn::cuda::pack<Element>(normal(random), 0))};
  };
  alignas(16) Element a[16 * 16];
  alignas(16) Element b[16 * 8];
  float start[16 * 8];
  for (Element& element : a) element = rounded();
  for (Element& element : b) element = rounded();
  for (float& element : start) element = normal(random);
  in_every_order([&] {
    float d[16 * 8];
    std::copy(std::begin(start), std::end(start), d);
    run(multiply<Element>, 1, 32, 2 * 16 * 16 * sizeof(Element), a, b, d);
    for (int m = 0; m < 16; ++m) {
      for (int n = 0; n < 8; ++n) {
        double sum = start[m * 8 + n];
        for (int k = 0; k < 16; ++k) sum += double{to_float(a[m * 16 + k])} * double{to_float(b[k * 8 + n])};
        EXPECT_NEAR(d[m * 8 + n], sum, 1e-5) << m << ", " << n;
      }
    }
  });
}

TEST_F(Emulator, MatrixProduct) {
  check_multiply<BFloat16>();
  check_multiply<Float16>();
}

// kPending: of three groups of four bytes per thread, how many may be unfinished when they are read.
template <int kPending>
__global__ void copy_groups(const float* from, float* to) {
  using namespace flash_dmattn::cuda;
  auto* tile = reinterpret_cast<float*>(dynamic_shared_memory());
  for (unsigned group = 0; group < 3; ++group) {
    const unsigned i = group * 32 + threadIdx.x;
    cp_async_4(shared_address(tile + i), from + i);
    cp_async_commit();
  }
  cp_async_wait<kPending>();
  for (unsigned i = threadIdx.x; i < 96; i += 32) to[i] = tile[i];
}

TEST_F(Emulator, CopiesAreDoneWhenWaitedForAndNotBefore) {
  std::vector<float> from(96, 1.0f);
  const auto arrived = [&](auto kernel) {
    std::vector<float> to(96);
    run(kernel, 1, 32, 96 * sizeof(float), from.data(), to.data());
    return std::count(to.begin(), to.end(), 1.0f);
  };
  EXPECT_EQ(arrived(copy_groups<0>), 96);
  EXPECT_EQ(arrived(copy_groups<1>), 64);
  EXPECT_EQ(arrived(copy_groups<2>), 32);
  EXPECT_EQ(arrived(copy_groups<3>), 0);
}

__global__ void read_unwritten(float* dynamic, float* fixed) {
  __shared__ float value;
  const auto* first = reinterpret_cast<const float*>(flash_dmattn::cuda::dynamic_shared_memory());
  dynamic[blockIdx.x] = *first;
  fixed[blockIdx.x] = *const_cast<volatile float*>(&value);
  __syncthreads();
  value = 1.0f;
  std::memset(flash_dmattn::cuda::dynamic_shared_memory(), 0, 4);
}

TEST_F(Emulator, SharedMemoryStartsAsNaNInEveryCta) {
  float dynamic[3];
  float fixed[3];
  run(read_unwritten, 3, 32, 16, dynamic, fixed);
  for (int cta = 0; cta < 3; ++cta) {
    EXPECT_TRUE(std::isnan(dynamic[cta]));
#if !defined(__SANITIZE_ADDRESS__)
    EXPECT_TRUE(std::isnan(fixed[cta]));
#endif
  }
}

__global__ void nothing() {}

TEST_F(Emulator, LaunchesThatADeviceRefuses) {
  const auto status = [](unsigned threads, std::size_t shared_bytes) {
    return flash_dmattn::cuda::launch(nothing, LaunchConfig{1, threads, shared_bytes, nullptr});
  };
  EXPECT_EQ(status(1024, 232448), cudaSuccess);
  EXPECT_EQ(status(1025, 0), cudaErrorInvalidConfiguration);
  EXPECT_EQ(status(32, 232449), cudaErrorInvalidValue);
  setenv("FLASH_DMATTN_EMULATOR_SHARED_BYTES", "101376", 1);
  int limit = 0;
  EXPECT_EQ(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0), cudaSuccess);
  EXPECT_EQ(limit, 101376);
  EXPECT_EQ(status(32, 101376), cudaSuccess);
  EXPECT_EQ(status(32, 101377), cudaErrorInvalidValue);
  EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidValue);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
}

TEST_F(Emulator, ComputeCapability) {
  const auto capability = [] {
    int major = 0;
    int minor = 0;
    EXPECT_EQ(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), cudaSuccess);
    EXPECT_EQ(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0), cudaSuccess);
    return 10 * major + minor;
  };
  EXPECT_EQ(capability(), 90);
  setenv("FLASH_DMATTN_EMULATOR_CAPABILITY", "86", 1);
  EXPECT_EQ(capability(), 86);
}

__global__ void barrier_of_some() {
  if (threadIdx.x < 40) __syncthreads();
}
__global__ void barrier_or_shuffle() {
  if (threadIdx.x != 7) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}
__global__ void two_barriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void two_shuffles(int* to) {
  const bool even = threadIdx.x % 2 == 0;
  to[threadIdx.x] = even ? __shfl_sync(kAll, 1, 0) : __shfl_sync(kAll, 2, 0);
}
__global__ void storage_twice(int* to) {
  using Scan = cub::BlockScan<int, 64>;
  __shared__ typename Scan::TempStorage storage;
  int sum = 1;
  Scan(storage).InclusiveSum(sum, sum);
  Scan(storage).InclusiveSum(sum, sum);
  to[threadIdx.x] = sum;
}
__global__ void write_beyond() { flash_dmattn::cuda::dynamic_shared_memory()[100 + threadIdx.x] = 1; }
__global__ void copy_misaligned(const char* from) { flash_dmattn::cuda::cp_async_16(0, from + 4); }
__global__ void matrix_beyond() {
  std::uint32_t fragment[4];
  flash_dmattn::cuda::ldmatrix_x4(fragment, threadIdx.x * 16);
}

__global__ void wait_in_threads_before(unsigned end, int* to) {
  if (threadIdx.x < end) flash_dmattn::cuda::wait_for_previous_kernel();
  to[threadIdx.x] = 1;
}

TEST_F(EmulatorDeathTest, EarlyLaunchWithoutWait) {
  int results[64] = {};
  const LaunchConfig early{1, 64, 0, nullptr, true};
  EXPECT_EQ(flash_dmattn::cuda::launch(wait_in_threads_before, early, 64u, results), cudaSuccess);
  EXPECT_EQ(std::count(results, results + 64, 1), 64);
  EXPECT_DEATH(flash_dmattn::cuda::launch(wait_in_threads_before, early, 63u, results),
               "an early launch ends and has not waited(.|\n)*wait_in_threads_before");
}

TEST_F(EmulatorDeathTest, RendezvousThatCannotEnd) {
  int results[64];
  EXPECT_DEATH(
      run(barrier_of_some, 3, 64, 0),
      "deadlock(.|\n)*barrier_of_some\\(\\), CTA 0 of 3(.|\n)*40 threads, the first of them 0: wait in "
      "__syncthreads at .*emulator_test.cpp:[0-9]+(.|\n)*24 threads, the first of them 40: ended");
  EXPECT_DEATH(run(barrier_or_shuffle, 1, 32, 0),
               "deadlock(.|\n)*31 threads(.|\n)*__syncthreads(.|\n)*1 thread, the first of them 7: wait in "
               "__syncwarp");
  EXPECT_DEATH(run(two_barriers, 1, 64, 0),
               "meet in different places(.|\n)*32 threads, the first of them 0(.|\n)*32 threads, the first "
               "of them 32");
  EXPECT_DEATH(run(two_shuffles, 1, 64, 0, results),
               "lanes of a warp meet in different places(.|\n)*__shfl_sync");
}

TEST_F(EmulatorDeathTest, MisuseOfSharedMemory) {
  alignas(16) char memory[64] = {};
  int results[64];
  EXPECT_DEATH(run(storage_twice, 1, 64, 0, results), "cub::BlockScan at .* uses temporary storage again");
#if defined(__SANITIZE_ADDRESS__)
  EXPECT_DEATH(run(write_beyond, 1, 32, 100), "AddressSanitizer");
#else
  EXPECT_DEATH(run(write_beyond, 1, 32, 100), "written at offset 100 of its 100 bytes(.|\n)*write_beyond");
#endif
  EXPECT_DEATH(run(copy_misaligned, 1, 32, 100, memory),
               "cp_async_16: (.|\n)*multiples of 16(.|\n)*copy_misaligned");
  EXPECT_DEATH(run(matrix_beyond, 1, 32, 256), "shared address 256 is beyond the CTA's 256 bytes");
}

}  // namespace
