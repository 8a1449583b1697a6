// Every instruction that C++ cannot say, each behind a function named after it. Shared memory is addressed by
// the 32-bit numbers that these instructions take. tests/emulator has the same functions in plain C++, so
// that the kernels also run, slowly, where there is no GPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace flash_dmattn::cuda {

using SharedAddress = std::uint32_t;

// Kernels that follow one another (LaunchConfig::early, in launch.h). The first waits until the kernels
// before have ended and what they wrote can be seen; the second lets the next kernel start once all CTAs have
// called it or ended. A kernel waits for the one before alone, and thereby for all before, since that one
// waits too. Nothing before compute capability 9.0, where kernels start in order.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// The CTA's dynamic shared memory.
__device__ __forceinline__ unsigned char* dynamic_shared_memory() {
  extern __shared__ __align__(1024) unsigned char flash_dmattn_dynamic_shared_memory[];
  return flash_dmattn_dynamic_shared_memory;
}

// pointer: into the dynamic shared memory.
__device__ __forceinline__ SharedAddress shared_address(const void* pointer) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
}

// Asynchronous copies, global to shared memory: `valid` bytes are copied, the rest of the 16, 8 or 4 is
// filled with zeros. Source and destination are aligned to the size.
__device__ __forceinline__ void cp_async_16(SharedAddress to, const void* from, int valid = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid));
}
__device__ __forceinline__ void cp_async_8(SharedAddress to, const void* from, int valid = 8) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(valid));
}
__device__ __forceinline__ void cp_async_4(SharedAddress to, const void* from, int valid = 4) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(valid));
}

// All 16 or 8 bytes, or zeros in their place. A size that only the running kernel knows costs a dozen
// instructions more than this.
__device__ __forceinline__ void cp_async_16_or_zero(SharedAddress to, const void* from, bool copies) {
  asm volatile(
      "{\n"
      ".reg .pred zero;\n"
      "setp.eq.u32 zero, %2, 0;\n"
      "cp.async.cg.shared.global [%0], [%1], 16, zero;\n"
      "}" ::"r"(to),
      "l"(from), "r"(static_cast<int>(copies)));
}
__device__ __forceinline__ void cp_async_8_or_zero(SharedAddress to, const void* from, bool copies) {
  asm volatile(
      "{\n"
      ".reg .pred zero;\n"
      "setp.eq.u32 zero, %2, 0;\n"
      "cp.async.ca.shared.global [%0], [%1], 8, zero;\n"
      "}" ::"r"(to),
      "l"(from), "r"(static_cast<int>(copies)));
}

// Begins to bring the 32 bytes that hold this address into the L2 cache.
__device__ __forceinline__ void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// Ends the thread's group of copies begun since the last commit.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `kPending` of the thread's latest groups are unfinished. Other threads see the data
// after a barrier.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8. Register m
// of lane l holds the elements (l / 4, 2 * (l % 4)) and (l / 4, 2 * (l % 4) + 1) of matrix m, transposed for
// _trans.
__device__ __forceinline__ void ldmatrix_x4(std::uint32_t (&to)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row));
}
__device__ __forceinline__ void ldmatrix_x4_trans(std::uint32_t (&to)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row));
}

// The 16-bit element types as they lie in memory.
struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

// Two floats rounded to Element, `low` in the low half.
template <typename Element>
__device__ std::uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ std::uint32_t pack<BFloat16>(float low, float high) {
  std::uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
template <>
__device__ __forceinline__ std::uint32_t pack<Float16>(float low, float high) {
  std::uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(BFloat16 value) {
  return __uint_as_float(static_cast<std::uint32_t>(value.bits) << 16);
}
__device__ __forceinline__ float to_float(Float16 value) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
}

// d += a * b: a [16 x 16] row-major and b [16 x 8] column-major of Element, d [16 x 8] float32. With g = lane
// / 4 and c = 2 * (lane % 4): a holds the pairs at (g, c), (g + 8, c), (g, c + 8), (g + 8, c + 8); b the
// pairs of rows c and c + 8 of column g; d the pairs at (g, c) and (g + 8, c).
template <typename Element>
__device__ void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1);
template <>
__device__ __forceinline__ void mma_m16n8k16<BFloat16>(float (&d)[4], const std::uint32_t (&a)[4],
                                                       std::uint32_t b0, std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<Float16>(float (&d)[4], const std::uint32_t (&a)[4],
                                                      std::uint32_t b0, std::uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 2^x to 2 ulp; exactly 0 for -inf, and for x below the least normal number.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace flash_dmattn::cuda
