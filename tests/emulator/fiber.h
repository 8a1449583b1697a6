// A fiber: a stack of its own, and the place where it goes on. Switching costs a few nanoseconds on x86-64;
// elsewhere ucontext does it.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

struct Fiber {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* fake_stack = nullptr;  // AddressSanitizer's
  const void* stack = nullptr;
  std::size_t stack_bytes = 0;
};

// The next switch to the fiber calls `entry`, which must not return, on this stack. `top`: its end, or less.
void prepare(Fiber& fiber, unsigned char* stack, unsigned char* top, void (*entry)());

// Leaves `from` and goes on with `to`. `from` will not run again if `ends`.
void switch_fiber(Fiber& from, Fiber& to, bool ends);

// To be called first on a new fiber. from: the fiber that switched to it.
void begin_fiber(Fiber* from);

}  // namespace emulator
