// The functions of src/cuda/common/ptx.cuh, where they are described, in plain C++. A shared address is an
// offset into the CTA's dynamic shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "core/numeric.h"

namespace flash_dmattn::cuda {

using SharedAddress = std::uint32_t;

inline void wait_for_previous_kernel() { emulator::wait_for_previous_kernel(); }
inline void let_next_kernel_start() {}

inline unsigned char* dynamic_shared_memory() { return emulator::dynamic_shared_memory(); }

inline SharedAddress shared_address(const void* pointer) { return emulator::shared_address(pointer); }

inline void cp_async(SharedAddress to, const void* from, unsigned bytes, int valid) {
  if (to % bytes != 0 || reinterpret_cast<std::uintptr_t>(from) % bytes != 0) {
    emulator::fail("cp_async_%u: shared address %u and global address %p must be multiples of %u", bytes, to,
                   from, bytes);
  }
  if (valid < 0 || valid > static_cast<int>(bytes)) {
    emulator::fail("cp_async_%u: %d valid bytes", bytes, valid);
  }
  emulator::begin_copy(emulator::shared_pointer(to, bytes), from, bytes, static_cast<unsigned>(valid));
}
inline void cp_async_16(SharedAddress to, const void* from, int valid = 16) { cp_async(to, from, 16, valid); }
inline void cp_async_8(SharedAddress to, const void* from, int valid = 8) { cp_async(to, from, 8, valid); }
inline void cp_async_4(SharedAddress to, const void* from, int valid = 4) { cp_async(to, from, 4, valid); }
inline void cp_async_16_or_zero(SharedAddress to, const void* from, bool copies) {
  cp_async(to, from, 16, copies ? 16 : 0);
}
inline void cp_async_8_or_zero(SharedAddress to, const void* from, bool copies) {
  cp_async(to, from, 8, copies ? 8 : 0);
}
inline void prefetch_l2(const void* address) { static_cast<void>(address); }
inline void cp_async_commit() { emulator::commit_copies(); }
template <int kPending>
void cp_async_wait() {
  emulator::wait_for_copies(kPending);
}

template <bool kTransposed>
void ldmatrix(const char* what, std::uint32_t (&to)[4], SharedAddress row, const emulator::Site& site) {
  if (row % 16 != 0) emulator::fail("%s: the shared address %u is no multiple of 16", what, row);
  struct Exchange {
    const unsigned char* row;
    std::uint32_t* to;
  } mine{emulator::shared_pointer(row, 16), to};
  emulator::warp_collective(~0u, what, site, mine, [](emulator::Peers<Exchange> lanes) {
    for (unsigned matrix = 0; matrix < 4; ++matrix) {
      const auto element = [&](unsigned i, unsigned j) {
        std::uint16_t bits;
        std::memcpy(&bits, lanes[8 * matrix + i].row + 2 * j, 2);
        return bits;
      };
      for (unsigned lane = 0; lane < 32; ++lane) {
        const unsigned i = lane / 4;
        const unsigned j = 2 * (lane % 4);
        const std::uint32_t low = kTransposed ? element(j, i) : element(i, j);
        const std::uint32_t high = kTransposed ? element(j + 1, i) : element(i, j + 1);
        lanes[lane].to[matrix] = low | high << 16;
      }
    }
  });
}
inline void ldmatrix_x4(std::uint32_t (&to)[4], SharedAddress row,
                        emulator::Site site = emulator::Site::current()) {
  ldmatrix<false>("ldmatrix_x4", to, row, site);
}
inline void ldmatrix_x4_trans(std::uint32_t (&to)[4], SharedAddress row,
                              emulator::Site site = emulator::Site::current()) {
  ldmatrix<true>("ldmatrix_x4_trans", to, row, site);
}

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

template <typename Element>
std::uint32_t pack(float low, float high);
template <>
inline std::uint32_t pack<BFloat16>(float low, float high) {
  return float_to_bfloat16(low) | static_cast<std::uint32_t>(float_to_bfloat16(high)) << 16;
}
template <>
inline std::uint32_t pack<Float16>(float low, float high) {
  return float_to_float16(low) | static_cast<std::uint32_t>(float_to_float16(high)) << 16;
}

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) { return bfloat16_to_float(value.bits); }
inline float to_float(Float16 value) { return float16_to_float(value.bits); }

// Products are exact; they are added in float32, one after another.
template <typename Element>
void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
                  emulator::Site site = emulator::Site::current()) {
  struct Exchange {
    float* d;
    const std::uint32_t* a;
    std::uint32_t b[2];
  } mine{d, a, {b0, b1}};
  emulator::warp_collective(~0u, "mma_m16n8k16", site, mine, [](emulator::Peers<Exchange> lanes) {
    const auto low = [](std::uint32_t pair) { return to_float(Element{static_cast<std::uint16_t>(pair)}); };
    const auto high = [](std::uint32_t pair) {
      return to_float(Element{static_cast<std::uint16_t>(pair >> 16)});
    };
    float left[16][16];  // [m][k]
    float right[16][8];  // [k][n]
    float sum[16][8];    // [m][n]
    for (unsigned lane = 0; lane < 32; ++lane) {
      const unsigned g = lane / 4;
      const unsigned c = 2 * (lane % 4);
      const Exchange& its = lanes[lane];
      for (unsigned part = 0; part < 4; ++part) {
        left[g + 8 * (part % 2)][c + 8 * (part / 2)] = low(its.a[part]);
        left[g + 8 * (part % 2)][c + 8 * (part / 2) + 1] = high(its.a[part]);
      }
      for (unsigned part = 0; part < 2; ++part) {
        right[c + 8 * part][g] = low(its.b[part]);
        right[c + 8 * part + 1][g] = high(its.b[part]);
        sum[g + 8 * part][c] = its.d[2 * part];
        sum[g + 8 * part][c + 1] = its.d[2 * part + 1];
      }
    }
    for (int m = 0; m < 16; ++m) {
      for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < 8; ++n) sum[m][n] += left[m][k] * right[k][n];
      }
    }
    for (unsigned lane = 0; lane < 32; ++lane) {
      const unsigned g = lane / 4;
      const unsigned c = 2 * (lane % 4);
      for (unsigned part = 0; part < 2; ++part) {
        lanes[lane].d[2 * part] = sum[g + 8 * part][c];
        lanes[lane].d[2 * part + 1] = sum[g + 8 * part][c + 1];
      }
    }
  });
}

inline float exp2_approx(float x) { return x < -126.0f ? 0.0f : exp2f(x); }

}  // namespace flash_dmattn::cuda
