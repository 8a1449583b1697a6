// Barriers, warp collectives, atomics and the integer and floating-point functions of device code.
#pragma once

#include <math.h>

#include <bit>
#include <cstdint>
#include <cstring>

#include "emulator/machine.h"
#include "emulator/qualifiers.h"

// ---- Barriers ----

namespace emulator {

template <typename Combine>
int barrier_reduce(const char* what, const Site& site, int predicate, int start, Combine combine) {
  struct Exchange {
    int predicate, result;
  } mine{predicate, 0};
  block_collective(what, site, mine, [&](Peers<Exchange> threads) {
    int result = start;
    for (unsigned t = 0; t < blockDim.x; ++t) result = combine(result, threads[t].predicate != 0);
    for (unsigned t = 0; t < blockDim.x; ++t) threads[t].result = result;
    free_storage();
  });
  return mine.result;
}

}  // namespace emulator

inline void __syncthreads(emulator::Site site = emulator::Site::current()) {
  int none = 0;
  emulator::block_collective("__syncthreads", site, none, [](auto) { emulator::free_storage(); });
}
inline int __syncthreads_count(int predicate, emulator::Site site = emulator::Site::current()) {
  return emulator::barrier_reduce("__syncthreads_count", site, predicate, 0,
                                  [](int a, int b) { return a + b; });
}
inline int __syncthreads_or(int predicate, emulator::Site site = emulator::Site::current()) {
  return emulator::barrier_reduce("__syncthreads_or", site, predicate, 0, [](int a, int b) { return a | b; });
}
inline int __syncthreads_and(int predicate, emulator::Site site = emulator::Site::current()) {
  return emulator::barrier_reduce("__syncthreads_and", site, predicate, 1,
                                  [](int a, int b) { return a & b; });
}
inline void __syncwarp(unsigned mask = 0xffffffffu, emulator::Site site = emulator::Site::current()) {
  int none = 0;
  emulator::warp_collective(mask, "__syncwarp", site, none, [](auto) {});
}

// ---- Warp collectives ----

namespace emulator {

inline int lane_of(unsigned thread) { return static_cast<int>(thread % kWarpSize); }

// Calls visit(lane) for the lanes of the mask, in order.
template <typename Visit>
void for_lanes(unsigned mask, Visit&& visit) {
  for (; mask != 0; mask &= mask - 1) visit(std::countr_zero(mask));
}

// A lane that is not in the mask gives poison.
template <typename T>
T shuffle(const char* what, const Site& site, unsigned mask, T value, int source) {
  static_assert(std::is_arithmetic_v<T>);
  struct Exchange {
    T value, result;
    int source;
  } mine{value, value, source};
  warp_collective(mask, what, site, mine, [mask](Peers<Exchange> lanes) {
    for_lanes(mask, [&](int lane) {
      const int from = lanes[lane].source;
      if ((mask >> from & 1u) != 0) {
        lanes[lane].result = lanes[from].value;
      } else {
        std::memset(&lanes[lane].result, kPoison, sizeof(T));
      }
    });
  });
  return mine.result;
}

template <typename T, typename Combine>
T reduce_lanes(const char* what, const Site& site, unsigned mask, T value, Combine combine) {
  T mine = value;
  warp_collective(mask, what, site, mine, [&](Peers<T> lanes) {
    T result = lanes[std::countr_zero(mask)];
    for_lanes(mask & (mask - 1), [&](int lane) { result = combine(result, lanes[lane]); });
    for_lanes(mask, [&](int lane) { lanes[lane] = result; });
  });
  return mine;
}

}  // namespace emulator

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              emulator::Site site = emulator::Site::current()) {
  const int lane = emulator::lane_of(threadIdx.x);
  return emulator::shuffle("__shfl_sync", site, mask, value, (lane & ~(width - 1)) + (source & (width - 1)));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 emulator::Site site = emulator::Site::current()) {
  const int lane = emulator::lane_of(threadIdx.x);
  const int source = lane - static_cast<int>(delta);
  return emulator::shuffle("__shfl_up_sync", site, mask, value,
                           source < (lane & ~(width - 1)) ? lane : source);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   emulator::Site site = emulator::Site::current()) {
  const int lane = emulator::lane_of(threadIdx.x);
  const int source = lane + static_cast<int>(delta);
  return emulator::shuffle("__shfl_down_sync", site, mask, value,
                           source > (lane | (width - 1)) ? lane : source);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32,
                  emulator::Site site = emulator::Site::current()) {
  const int lane = emulator::lane_of(threadIdx.x);
  const int source = lane ^ bits;
  return emulator::shuffle("__shfl_xor_sync", site, mask, value,
                           source > (lane | (width - 1)) ? lane : source);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, emulator::Site site = emulator::Site::current()) {
  const unsigned mine = predicate != 0 ? 1u << emulator::lane_of(threadIdx.x) : 0u;
  return emulator::reduce_lanes("__ballot_sync", site, mask, mine,
                                [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int predicate, emulator::Site site = emulator::Site::current()) {
  return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, emulator::Site site = emulator::Site::current()) {
  return __ballot_sync(mask, predicate, site) == mask;
}

template <typename T>
unsigned __match_any_sync(unsigned mask, T value, emulator::Site site = emulator::Site::current()) {
  struct Exchange {
    T value;
    unsigned result;
  } mine{value, 0};
  emulator::warp_collective(mask, "__match_any_sync", site, mine, [mask](emulator::Peers<Exchange> lanes) {
    emulator::for_lanes(mask, [&](int lane) {
      unsigned equal = 0;
      emulator::for_lanes(mask, [&](int other) {
        if (std::memcmp(&lanes[lane].value, &lanes[other].value, sizeof(T)) == 0) equal |= 1u << other;
      });
      lanes[lane].result = equal;
    });
  });
  return mine.result;
}

template <typename T>
T __reduce_add_sync(unsigned mask, T value, emulator::Site site = emulator::Site::current()) {
  const auto add = [](unsigned a, unsigned b) { return a + b; };
  return static_cast<T>(
      emulator::reduce_lanes("__reduce_add_sync", site, mask, static_cast<unsigned>(value), add));
}
template <typename T>
T __reduce_min_sync(unsigned mask, T value, emulator::Site site = emulator::Site::current()) {
  return emulator::reduce_lanes("__reduce_min_sync", site, mask, value,
                                [](T a, T b) { return a < b ? a : b; });
}
template <typename T>
T __reduce_max_sync(unsigned mask, T value, emulator::Site site = emulator::Site::current()) {
  return emulator::reduce_lanes("__reduce_max_sync", site, mask, value,
                                [](T a, T b) { return a > b ? a : b; });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value,
                                 emulator::Site site = emulator::Site::current()) {
  return emulator::reduce_lanes("__reduce_or_sync", site, mask, value,
                                [](unsigned a, unsigned b) { return a | b; });
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value,
                                  emulator::Site site = emulator::Site::current()) {
  return emulator::reduce_lanes("__reduce_and_sync", site, mask, value,
                                [](unsigned a, unsigned b) { return a & b; });
}

// ---- Atomics: one thread runs at a time ----

namespace emulator {

template <typename T, typename Update>
T atomic(T* address, Update update) {
  maybe_yield();
  const T old = *address;
  *address = update(old);
  return old;
}

}  // namespace emulator

template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return emulator::atomic(address, [=](T old) { return static_cast<T>(old + value); });
}
template <typename T>
T atomicSub(T* address, std::type_identity_t<T> value) {
  return emulator::atomic(address, [=](T old) { return static_cast<T>(old - value); });
}
template <typename T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return emulator::atomic(address, [=](T old) { return old > value ? old : value; });
}
template <typename T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return emulator::atomic(address, [=](T old) { return old < value ? old : value; });
}
template <typename T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return emulator::atomic(address, [=](T old) { return old | value; });
}
template <typename T>
T atomicAnd(T* address, std::type_identity_t<T> value) {
  return emulator::atomic(address, [=](T old) { return old & value; });
}
template <typename T>
T atomicXor(T* address, std::type_identity_t<T> value) {
  return emulator::atomic(address, [=](T old) { return old ^ value; });
}
template <typename T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return emulator::atomic(address, [=](T) { return value; });
}
template <typename T>
T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  return emulator::atomic(address, [=](T old) { return old == compare ? value : old; });
}

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { emulator::maybe_yield(); }
template <typename T>
T __ldg(const T* address) {
  return *address;
}

// ---- Integers ----

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (x >> bit & 1u) << (31 - bit);
  return reversed;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32);
}

#define EMULATOR_MIN_MAX(A, B, Result)                                               \
  constexpr Result min(A a, B b) {                                                   \
    return static_cast<Result>(a) < static_cast<Result>(b) ? static_cast<Result>(a)  \
                                                           : static_cast<Result>(b); \
  }                                                                                  \
  constexpr Result max(A a, B b) {                                                   \
    return static_cast<Result>(a) > static_cast<Result>(b) ? static_cast<Result>(a)  \
                                                           : static_cast<Result>(b); \
  }
EMULATOR_MIN_MAX(int, int, int)
EMULATOR_MIN_MAX(unsigned, unsigned, unsigned)
EMULATOR_MIN_MAX(int, unsigned, unsigned)
EMULATOR_MIN_MAX(unsigned, int, unsigned)
EMULATOR_MIN_MAX(long, long, long)
EMULATOR_MIN_MAX(unsigned long, unsigned long, unsigned long)
EMULATOR_MIN_MAX(long, unsigned long, unsigned long)
EMULATOR_MIN_MAX(unsigned long, long, unsigned long)
EMULATOR_MIN_MAX(long long, long long, long long)
EMULATOR_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
EMULATOR_MIN_MAX(long long, unsigned long long, unsigned long long)
EMULATOR_MIN_MAX(unsigned long long, long long, unsigned long long)
#undef EMULATOR_MIN_MAX
// Of two numbers, the one that is not a NaN.
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

// ---- Floating point ----

inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline int __float2int_rn(float x) { return static_cast<int>(rintf(x)); }
