// The instruction sets that the kernels are compiled for: AVX-512, AVX2, NEON, and what the compiler may
// assume anywhere. Those left out gain little over one of these and would each add to the time of
// compilation; the scalable ones have no vector length at compile time, which register tiles need.
//
// Include before <hwy/foreach_target.h>.
#pragma once

// HWY_AVX3 - 1: every x86 set above it, under whatever name.
#define HWY_DISABLED_TARGETS \
  ((HWY_AVX3 - 1) | HWY_SSE4 | HWY_SSSE3 | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
