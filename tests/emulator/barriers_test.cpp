// The emulator's barriers and the copies that count on them: rings of producers and consumers work in every
// order of threads, and mistakes are found.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "cuda/common/ptx_sm90.cuh"
#include "emulator_fixture.h"

namespace {

using namespace emulator_test;
using namespace flash_dmattn::cuda;

enum class Mistake {
  kNone,
  kNoWaitForFull,
  kNoWaitForEmpty,
  kWrongParity,
  kTooManyArrivals,
  kTooFewBytes,
  kNoFence
};

constexpr int kStages = 3;
constexpr int kTile = 64;  // floats

struct Ring {
  float tiles[kStages][kTile];
  std::uint64_t full[kStages], empty[kStages];

  __device__ void initialise(int producers, int consumers, bool fence) {
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        barrier_init(shared_address(&full[stage]), producers);
        barrier_init(shared_address(&empty[stage]), consumers);
      }
      if (fence) fence_barrier_init();
    }
    __syncthreads();
  }
};

// Warp 0 copies the tiles, the 64 threads after it add them.
template <Mistake kMistake>
__global__ void add_tiles(const float* from, int num_tiles, float* to) {
  Ring& ring = *reinterpret_cast<Ring*>(dynamic_shared_memory());
  ring.initialise(1, 64, kMistake != Mistake::kNoFence);
  const int consumer = static_cast<int>(threadIdx.x) - 32;
  float sum = 0;
  for (int tile = 0; tile < num_tiles; ++tile) {
    const int stage = tile % kStages;
    const int parity = tile / kStages % 2;
    const SharedAddress full = shared_address(&ring.full[stage]);
    const SharedAddress empty = shared_address(&ring.empty[stage]);
    if (consumer < 0) {
      if (kMistake != Mistake::kNoWaitForEmpty) barrier_wait(empty, parity ^ 1);
      __syncwarp();
      if (threadIdx.x == 0) {
        const int bytes = kTile * sizeof(float);
        barrier_arrive_expect(full, kMistake == Mistake::kTooFewBytes ? bytes / 2 : bytes);
        if (kMistake == Mistake::kTooManyArrivals) barrier_arrive(full);
        bulk_copy(shared_address(ring.tiles[stage]), from + tile * kTile, bytes, full);
      }
    } else {
      if (kMistake != Mistake::kNoWaitForFull) barrier_wait(full, parity);
      if (kMistake == Mistake::kWrongParity) barrier_wait(full, parity ^ 1);
      sum += ring.tiles[stage][consumer];
      barrier_arrive(empty);
    }
  }
  if (consumer >= 0) to[consumer] = sum;
}

template <Mistake kMistake>
std::vector<float> sums(int num_tiles) {
  alignas(16) static float from[16 * kTile];
  std::iota(std::begin(from), std::end(from), 0.0f);
  std::vector<float> to(64);
  run(add_tiles<kMistake>, 1, 96, sizeof(Ring), static_cast<const float*>(from), num_tiles, to.data());
  return to;
}

using Barriers = Emulator;
using BarriersDeathTest = EmulatorDeathTest;

TEST_F(Barriers, Ring) {
  in_every_order([] {
    for (const int tiles : {1, 3, 4, 16}) {
      const std::vector<float> got = sums<Mistake::kNone>(tiles);
      for (int i = 0; i < 64; ++i) {
        EXPECT_EQ(got[i], static_cast<float>(tiles * i + kTile * tiles * (tiles - 1) / 2)) << i;
      }
    }
  });
}

TEST_F(BarriersDeathTest, RingWithMistakes) {
  EXPECT_DEATH(sums<Mistake::kNoWaitForFull>(1),
               "bulk_copy at .*nobody has waited for this copy of thread 0");
  EXPECT_DEATH(sums<Mistake::kNoWaitForEmpty>(4), "barrier_arrive_expect at .* has its 1 arrivals already");
  EXPECT_DEATH(
      sums<Mistake::kTooManyArrivals>(1),
      "barrier_arrive at .*: thread 0 arrives when phase 0 of the barrier .* has its 1 arrivals already");
  EXPECT_DEATH(
      sums<Mistake::kWrongParity>(1),
      "deadlock(.|\n)*32 threads, the first of them 0: ended(.|\n)*64 threads, the first of them 32: "
      "wait in barrier_wait at .*barriers_test.cpp:[0-9]+, .*for parity 1 of the barrier at shared "
      "address 768(.|\n)*address 768 is in phase 1, with 1 of 1 arrivals and 0 bytes missing");
  EXPECT_DEATH(sums<Mistake::kTooFewBytes>(1),
               "for parity 0 of the barrier at shared address 768(.|\n)*in phase 0, with 0 of 1 arrivals and "
               "-128 bytes missing");
  EXPECT_DEATH(sums<Mistake::kNoFence>(1),
               "thread 0 has initialised the barrier .* without fence_barrier_init");
}

// Each lane of warp 0 copies its own four floats; warp 1 doubles them.
__global__ void copy_by_threads(const float* from, float* to) {
  auto* tile = reinterpret_cast<float*>(dynamic_shared_memory());
  auto* full = reinterpret_cast<std::uint64_t*>(tile + 128);
  if (threadIdx.x == 40) {
    barrier_init(shared_address(full), 32);
    fence_barrier_init();
  }
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x % 32);
  if (threadIdx.x < 32) {
    cp_async_16(shared_address(tile + 4 * lane), from + 4 * lane);
    barrier_arrive_after_copies(shared_address(full));
    return;  // the copies go on
  }
  barrier_wait(shared_address(full), 0);
  for (int i = 0; i < 128; i += 32) to[i + lane] = 2 * tile[i + lane];
}

TEST_F(Barriers, ArrivalAfterCopies) {
  alignas(16) float from[128];
  std::iota(std::begin(from), std::end(from), 0.0f);
  in_every_order([&] {
    float to[128];
    run(copy_by_threads, 1, 64, 128 * sizeof(float) + 8, from, to);
    for (int i = 0; i < 128; ++i) EXPECT_EQ(to[i], 2 * from[i]);
  });
}

// The copy to the first barrier is done before anyone expects it.
__global__ void expect_afterwards(const float* from, float* to) {
  auto* tile = reinterpret_cast<float*>(dynamic_shared_memory());
  const SharedAddress early = shared_address(tile + 64);
  const SharedAddress late = early + 8;
  barrier_init(early, 1);
  barrier_init(late, 1);
  fence_barrier_init();
  bulk_copy(shared_address(tile), from, 128, early);
  barrier_arrive_expect(late, 128);
  bulk_copy(shared_address(tile + 32), from + 32, 128, late);
  barrier_wait(early, 1);  // at once
  to[0] = tile[0];
  barrier_wait(late, 0);
  to[1] = tile[63];
  barrier_arrive_expect(early, 128);
  barrier_wait(early, 0);
  to[2] = tile[31];
}

TEST_F(Barriers, ExpectationsMayComeAfterTheCopies) {
  alignas(16) float from[64];
  std::iota(std::begin(from), std::end(from), 0.0f);
  float to[3];
  run(expect_afterwards, 1, 1, 64 * sizeof(float) + 16, from, to);
  EXPECT_TRUE(std::isnan(to[0]));
  EXPECT_EQ(to[1], 63);
  EXPECT_EQ(to[2], 31);
}

enum class Misuse {
  kNone,
  kNotInitialised,
  kOverwritten,
  kTwice,
  kNoFence,
  kMisaligned,
  kBeyond,
  kWritten,
  kNoWait
};

template <Misuse kMisuse>
__global__ void copy_one(const float* from, float* to) {
  auto* tile = reinterpret_cast<float*>(dynamic_shared_memory());
  const SharedAddress barrier = shared_address(tile + 32);
  if (kMisuse != Misuse::kNotInitialised) barrier_init(barrier, 1);
  if (kMisuse == Misuse::kTwice) barrier_init(barrier, 1);
  if (kMisuse == Misuse::kOverwritten) tile[32] = 0;
  if (kMisuse != Misuse::kNoFence) fence_barrier_init();
  barrier_arrive_expect(barrier, 64);
  bulk_copy(shared_address(tile) + (kMisuse == Misuse::kBeyond ? 96 : 0),
            from + (kMisuse == Misuse::kMisaligned), 64, barrier);
  if (kMisuse == Misuse::kWritten) tile[3] = 0;
  if (kMisuse != Misuse::kNoWait) barrier_wait(barrier, 0);
  to[0] = tile[0];
}

template <Misuse kMisuse>
float copied() {
  alignas(16) float from[32] = {1};
  float to[1];
  run(copy_one<kMisuse>, 1, 1, 136, from, to);
  return to[0];
}

TEST_F(BarriersDeathTest, Misuse) {
  EXPECT_EQ(copied<Misuse::kNone>(), 1);
  EXPECT_DEATH(copied<Misuse::kNotInitialised>(), "barrier at shared address 128 has not been initialised");
  EXPECT_DEATH(copied<Misuse::kOverwritten>(), "barrier at shared address 128 has been overwritten");
  EXPECT_DEATH(copied<Misuse::kTwice>(), "barrier at shared address 128 has been initialised before");
  EXPECT_DEATH(copied<Misuse::kNoFence>(), "has not been followed by fence_barrier_init");
  EXPECT_DEATH(copied<Misuse::kMisaligned>(), "bulk_copy at .* must be multiples of 16");
  EXPECT_DEATH(copied<Misuse::kBeyond>(), "shared address 96 is beyond the CTA's 136 bytes");
  EXPECT_DEATH(copied<Misuse::kWritten>(),
               "bulk_copy at .*: the destination, .* was written before the copy was done");
  EXPECT_DEATH(copied<Misuse::kNoWait>(), "bulk_copy at .*: the CTA has ended, and nobody has waited");
  setenv("FLASH_DMATTN_EMULATOR_CAPABILITY", "86", 1);
  EXPECT_DEATH(copied<Misuse::kNone>(), "bulk_copy at .*: needs compute capability 9.0, the device has 8.6");
}

// Two groups of warps take turns: each waits for its own barrier and comes to the other's.
template <int kTogether>
__global__ void take_turns(int* order) {
  __shared__ int next;
  const int group = static_cast<int>(threadIdx.x / 64);
  if (threadIdx.x == 0) next = 0;
  named_barrier_sync(0, 128);
  if (group == 1) named_barrier_arrive(1, kTogether);
  for (int turn = 0; turn < 3; ++turn) {
    named_barrier_sync(1 + group, 128);
    if (threadIdx.x % 64 == 0) order[next++] = group;
    if (turn < 2 || group == 0) named_barrier_arrive(2 - group, 128);
  }
}

TEST_F(Barriers, Turns) {
  in_every_order([] {
    std::vector<int> order(6, -1);
    run(take_turns<128>, 1, 128, 0, order.data());
    EXPECT_EQ(order, (std::vector<int>{0, 1, 0, 1, 0, 1}));
  });
}

template <int kId, int kCount, bool kTwice>
__global__ void come_to_barrier() {
  if (kTwice) named_barrier_arrive(kId, 64);
  named_barrier_sync(kId, kCount);
}
__global__ void come_with_half_warps() {
  if (threadIdx.x % 2 == 0) named_barrier_sync(1, 32);
}

TEST_F(BarriersDeathTest, NamedBarriers) {
  int order[6];
  EXPECT_DEATH(run(take_turns<96>, 1, 128, 0, order),
               "barrier 1 of (128|96) threads, others have come to it for (96|128)");
  EXPECT_DEATH(run(come_to_barrier<16, 64, false>, 1, 64, 0), "barrier 16, which must be 0 .. 15");
  EXPECT_DEATH(run(come_to_barrier<3, 40, false>, 1, 64, 0), "40 threads, which must be a multiple of 32");
  EXPECT_DEATH(run(come_to_barrier<0, 32, false>, 1, 64, 0), "barrier 0 is __syncthreads");
  EXPECT_DEATH(run(come_to_barrier<3, 64, true>, 1, 64, 0), "comes to barrier 3 again before all have come");
  EXPECT_DEATH(
      run(come_to_barrier<5, 64, false>, 1, 96, 0),
      "deadlock(.|\n)*32 threads, the first of them 64: wait in named_barrier_sync at .*, for barrier 5");
  EXPECT_DEATH(run(come_with_half_warps, 1, 64, 0),
               "of warp 0 only the lanes 55555555 have come to barrier 1");
}

}  // namespace
