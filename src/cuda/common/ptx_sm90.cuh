// The instructions of compute capability 9.0a, as ptx.cuh has those of every GPU: barriers in shared memory,
// bulk copies, and matrix products of a warpgroup (128 threads, wgmma). tests/emulator has the same functions
// in plain C++.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/ptx.cuh"

namespace flash_dmattn::cuda {

// --- Barriers in shared memory (mbarrier): 8 bytes, aligned to 8 ---
//
// A phase ends when `count` threads have arrived and all bytes expected in it have been copied. Waiting for
// parity 0 waits for the first phase, 1 for the second, 0 for the third; waiting for parity 1 before the
// first phase has ended returns at once.

__device__ __forceinline__ void barrier_init(SharedAddress barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// After the last barrier_init of a thread, before the CTA's threads meet.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(SharedAddress barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and lets the phase expect `bytes` more of bulk_copy.
__device__ __forceinline__ void barrier_arrive_expect(SharedAddress barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// Arrives once all cp_async copies that the thread has begun are there.
__device__ __forceinline__ void barrier_arrive_after_copies(SharedAddress barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_wait(SharedAddress barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Copies contiguous bytes, global to shared memory, and counts them on the barrier. Addresses and size are
// multiples of 16.
__device__ __forceinline__ void bulk_copy(SharedAddress to, const void* from, int bytes,
                                          SharedAddress barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

// Between writes to shared memory by ordinary instructions or cp_async and their reading by wgmma or
// a bulk copy.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// --- Barriers of warps (bar): 16 of them, 0 is __syncthreads ---

// Waits until `threads` threads have come to the barrier, this one among them.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Comes to the barrier without waiting.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// All threads of a warpgroup give back registers, or wait until so many are free and take them.
template <int kRegisters>
__device__ __forceinline__ void register_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void register_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// --- Products of a warpgroup (wgmma) ---
//
// d += a * b: a [64 x 16], b [16 x kN], d [64 x kN] float32. Warp w of the warpgroup holds rows 16 w ..
// 16 w + 15 of a and d; with g = lane / 4 and c = 2 * (lane % 4), d[4 n .. 4 n + 3] are the elements (g, 8 n
// + c), (g, 8 n + c + 1), (g + 8, 8 n + c), (g + 8, 8 n + c + 1) of the warp's rows, and a in registers lies
// as in mma_m16n8k16.
//
// Operands in shared memory are tiles of rows of 128 bytes, 8 rows to an atom of 1024 bytes aligned to 1024,
// whose 16-byte chunk c of row r lies in the place c ^ (r % 8) (the 128-byte swizzle).
//   K-major:  the rows are those of a, or the columns of b; 16 elements of a row, 32 bytes, enter a product.
//   MN-major: the rows are the 16 k; a product reads two atoms for each 64 columns of b.
// Products are asynchronous: neither the registers nor the tiles may be touched before wgmma_wait.

// A tile of rows in shared memory. `atom_bytes` lie between neighbouring atoms of 8 rows, `column_bytes`
// (MN-major alone) between the atoms of neighbouring 64 columns; adding bytes, a multiple of 16, moves it.
struct Operand {
  std::uint32_t place;
  std::uint32_t layout;

  __device__ __forceinline__ Operand operator+(int bytes) const {
    return {place + static_cast<std::uint32_t>(bytes / 16), layout};
  }
  __device__ __forceinline__ std::uint64_t descriptor() const {
    return static_cast<std::uint64_t>(layout) << 32 | place;
  }
};
__device__ __forceinline__ Operand operand(SharedAddress tile, int atom_bytes, int column_bytes = 0) {
  constexpr std::uint32_t kSwizzle128 = 1u << 30;
  return {tile >> 4 | static_cast<std::uint32_t>(column_bytes / 16) << 16,
          kSwizzle128 | static_cast<std::uint32_t>(atom_bytes / 16)};
}

// Before the first product, and where registers that enter one have been written by other instructions.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Ends the warpgroup's group of products begun since the last commit.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most `kPending` of the latest groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving accesses to the registers of a product across this place.
template <int kCount>
__device__ __forceinline__ void pin(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// d = a * b, or d += a * b; a and b K-major in shared memory.
template <typename Element, int kN>
__device__ void wgmma(float (&d)[kN / 2], Operand a, Operand b, bool accumulate);
// The same with a in registers and b MN-major.
template <typename Element, int kN>
__device__ void wgmma(float (&d)[kN / 2], const std::uint32_t (&a)[4], Operand b, bool accumulate);

// FLASH_DMATTN_NAMES_n: the text of the operands 0 .. n - 1; FLASH_DMATTN_BIND_n binds them to d.
#define FLASH_DMATTN_NAMES_32                \
  "%0, %1, %2, %3, %4, %5, %6, %7, "         \
  "%8, %9, %10, %11, %12, %13, %14, %15, "   \
  "%16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define FLASH_DMATTN_BIND_32                                                                                \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),           \
      "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
      "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]),            \
      "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]),            \
      "+f"(d[30]), "+f"(d[31])
#define FLASH_DMATTN_NAMES_40 \
  FLASH_DMATTN_NAMES_32       \
  ", "                        \
  "%32, %33, %34, %35, %36, %37, %38, %39"
#define FLASH_DMATTN_BIND_40                                                                          \
  FLASH_DMATTN_BIND_32, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), \
      "+f"(d[38]), "+f"(d[39])
#define FLASH_DMATTN_NAMES_64                \
  FLASH_DMATTN_NAMES_40                      \
  ", "                                       \
  "%40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, " \
  "%56, %57, %58, %59, %60, %61, %62, %63"
#define FLASH_DMATTN_BIND_64                                                                          \
  FLASH_DMATTN_BIND_40, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), \
      "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]),      \
      "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]),      \
      "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define FLASH_DMATTN_NAMES_88                \
  FLASH_DMATTN_NAMES_64                      \
  ", "                                       \
  "%64, %65, %66, %67, %68, %69, %70, %71, " \
  "%72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87"
#define FLASH_DMATTN_BIND_88                                                                          \
  FLASH_DMATTN_BIND_64, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), \
      "+f"(d[70]), "+f"(d[71]), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]),      \
      "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]),      \
      "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])

// count: kN / 2 registers of d; A .. P: the numbers of the operands after them.
#define FLASH_DMATTN_WGMMA_SHARED(Element, type, kN, count, A, B, P)                             \
  template <>                                                                                    \
  __device__ __forceinline__ void wgmma<Element, kN>(float(&d)[count], Operand a, Operand b,     \
                                                     bool accumulate) {                          \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P                                         \
                 ", 0;\n"                                                                        \
                 "wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32." type "." type                \
                 " {" FLASH_DMATTN_NAMES_##count "}, %" #A ", %" #B ", p, 1, 1, 0, 0;\n}"        \
                 : FLASH_DMATTN_BIND_##count                                                     \
                 : "l"(a.descriptor()), "l"(b.descriptor()), "r"(static_cast<int>(accumulate))); \
  }
#define FLASH_DMATTN_WGMMA_REGISTERS(Element, type, kN, count, A0, A1, A2, A3, B, P)                 \
  template <>                                                                                        \
  __device__ __forceinline__ void wgmma<Element, kN>(float(&d)[count], const std::uint32_t(&a)[4],   \
                                                     Operand b, bool accumulate) {                   \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P                                             \
                 ", 0;\n"                                                                            \
                 "wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32." type "." type                    \
                 " {" FLASH_DMATTN_NAMES_##count "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B \
                                                 ", p, 1, 1, 1;\n}"                                  \
                 : FLASH_DMATTN_BIND_##count                                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor()),                  \
                   "r"(static_cast<int>(accumulate)));                                               \
  }

FLASH_DMATTN_WGMMA_SHARED(BFloat16, "bf16", 64, 32, 32, 33, 34)
FLASH_DMATTN_WGMMA_SHARED(Float16, "f16", 64, 32, 32, 33, 34)
FLASH_DMATTN_WGMMA_SHARED(BFloat16, "bf16", 80, 40, 40, 41, 42)
FLASH_DMATTN_WGMMA_SHARED(Float16, "f16", 80, 40, 40, 41, 42)
FLASH_DMATTN_WGMMA_SHARED(BFloat16, "bf16", 128, 64, 64, 65, 66)
FLASH_DMATTN_WGMMA_SHARED(Float16, "f16", 128, 64, 64, 65, 66)
FLASH_DMATTN_WGMMA_SHARED(BFloat16, "bf16", 176, 88, 88, 89, 90)
FLASH_DMATTN_WGMMA_SHARED(Float16, "f16", 176, 88, 88, 89, 90)
FLASH_DMATTN_WGMMA_REGISTERS(BFloat16, "bf16", 64, 32, 32, 33, 34, 35, 36, 37)
FLASH_DMATTN_WGMMA_REGISTERS(Float16, "f16", 64, 32, 32, 33, 34, 35, 36, 37)
FLASH_DMATTN_WGMMA_REGISTERS(BFloat16, "bf16", 128, 64, 64, 65, 66, 67, 68, 69)
FLASH_DMATTN_WGMMA_REGISTERS(Float16, "f16", 128, 64, 64, 65, 66, 67, 68, 69)

#undef FLASH_DMATTN_NAMES_32
#undef FLASH_DMATTN_BIND_32
#undef FLASH_DMATTN_NAMES_40
#undef FLASH_DMATTN_BIND_40
#undef FLASH_DMATTN_NAMES_64
#undef FLASH_DMATTN_BIND_64
#undef FLASH_DMATTN_NAMES_88
#undef FLASH_DMATTN_BIND_88
#undef FLASH_DMATTN_WGMMA_SHARED
#undef FLASH_DMATTN_WGMMA_REGISTERS

}  // namespace flash_dmattn::cuda
