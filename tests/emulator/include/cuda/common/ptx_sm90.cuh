// The functions of src/cuda/common/ptx_sm90.cuh, where they are described, in plain C++.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda/common/ptx.cuh"
#include "emulator/barriers.h"
#include "emulator/warpgroups.h"

namespace flash_dmattn::cuda {

// --- Barriers in shared memory ---

inline void barrier_init(SharedAddress barrier, int count, emulator::Site site = emulator::Site::current()) {
  emulator::initialise_barrier(barrier, count, {"barrier_init", site});
}
inline void fence_barrier_init() { emulator::fence_initialised_barriers(); }
inline void barrier_arrive(SharedAddress barrier, emulator::Site site = emulator::Site::current()) {
  emulator::arrive_at_barrier(barrier, 0, {"barrier_arrive", site});
}
inline void barrier_arrive_expect(SharedAddress barrier, int bytes,
                                  emulator::Site site = emulator::Site::current()) {
  emulator::arrive_at_barrier(barrier, bytes, {"barrier_arrive_expect", site});
}
inline void barrier_arrive_after_copies(SharedAddress barrier,
                                        emulator::Site site = emulator::Site::current()) {
  emulator::arrive_after_copies(barrier, {"barrier_arrive_after_copies", site});
}
inline void barrier_wait(SharedAddress barrier, int parity, emulator::Site site = emulator::Site::current()) {
  emulator::wait_at_barrier(barrier, parity, {"barrier_wait", site});
}

inline void bulk_copy(SharedAddress to, const void* from, int bytes, SharedAddress barrier,
                      emulator::Site site = emulator::Site::current()) {
  emulator::begin_bulk_copy(to, from, bytes, barrier, {"bulk_copy", site});
}

inline void fence_async_proxy() { emulator::fence_async_proxy(); }

// --- Barriers of warps ---

inline void named_barrier_sync(int id, int threads, emulator::Site site = emulator::Site::current()) {
  emulator::arrive_at_named_barrier(id, threads, true, {"named_barrier_sync", site});
}
inline void named_barrier_arrive(int id, int threads, emulator::Site site = emulator::Site::current()) {
  emulator::arrive_at_named_barrier(id, threads, false, {"named_barrier_arrive", site});
}

template <int kRegisters>
void register_decrease(emulator::Site site = emulator::Site::current()) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  emulator::change_registers(kRegisters, {"register_decrease", site});
}
template <int kRegisters>
void register_increase(emulator::Site site = emulator::Site::current()) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  emulator::change_registers(kRegisters, {"register_increase", site});
}

// --- Products of a warpgroup ---

struct Operand {
  std::uint32_t place;
  std::uint32_t layout;

  Operand operator+(int bytes) const { return {place + static_cast<std::uint32_t>(bytes / 16), layout}; }
  std::uint64_t descriptor() const { return static_cast<std::uint64_t>(layout) << 32 | place; }
};
inline Operand operand(SharedAddress tile, int atom_bytes, int column_bytes = 0) {
  constexpr std::uint32_t kSwizzle128 = 1u << 30;
  return {tile >> 4 | static_cast<std::uint32_t>(column_bytes / 16) << 16,
          kSwizzle128 | static_cast<std::uint32_t>(atom_bytes / 16)};
}

inline void wgmma_fence(emulator::Site site = emulator::Site::current()) {
  emulator::fence_products({"wgmma_fence", site});
}
inline void wgmma_commit(emulator::Site site = emulator::Site::current()) {
  emulator::commit_products({"wgmma_commit", site});
}
template <int kPending>
void wgmma_wait(emulator::Site site = emulator::Site::current()) {
  emulator::wait_for_products(kPending, {"wgmma_wait", site});
}
// The machine has the addresses of a product's registers: no access to them moves past a wait.
template <int kCount>
void pin(float (&)[kCount]) {}

template <typename Element>
constexpr emulator::HalfType kHalfType =
    std::is_same_v<Element, BFloat16> ? emulator::HalfType::kBFloat16 : emulator::HalfType::kFloat16;

template <typename Element, int kN>
void wgmma(float (&d)[kN / 2], Operand a, Operand b, bool accumulate,
           emulator::Site site = emulator::Site::current()) {
  static_assert(kN % 8 == 0 && kN <= emulator::kMaxProductColumns);
  emulator::begin_product({kHalfType<Element>, kN, accumulate, a.descriptor(), b.descriptor()}, d, nullptr,
                          {"wgmma", site});
}
template <typename Element, int kN>
void wgmma(float (&d)[kN / 2], const std::uint32_t (&a)[4], Operand b, bool accumulate,
           emulator::Site site = emulator::Site::current()) {
  static_assert(kN % 8 == 0 && kN <= emulator::kMaxProductColumns);
  emulator::begin_product({kHalfType<Element>, kN, accumulate, 0, b.descriptor()}, d, a, {"wgmma", site});
}

}  // namespace flash_dmattn::cuda
