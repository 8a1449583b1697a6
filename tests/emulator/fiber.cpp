#include "fiber.h"

#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// Saves the registers that a call preserves on the stack, and takes the other fiber's from its stack.
extern "C" void emulator_switch_stack(void** save, void* restore);
asm(R"(
.text
.type emulator_switch_stack, @function
.hidden emulator_switch_stack
.globl emulator_switch_stack
emulator_switch_stack:
  .cfi_startproc
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmp *%rcx
  .cfi_endproc
.size emulator_switch_stack, . - emulator_switch_stack
)");
#endif

namespace emulator {

void prepare(Fiber& fiber, unsigned char* stack, unsigned char* top, void (*entry)()) {
  fiber.fake_stack = nullptr;
  fiber.stack = stack;
  fiber.stack_bytes = static_cast<std::size_t>(top - stack);
#if defined(__x86_64__)
  // Six registers, the entry, and what it would return to; the stack is then as at the start of a call.
  auto* words =
      reinterpret_cast<std::uintptr_t*>(reinterpret_cast<std::uintptr_t>(top) & ~std::uintptr_t{63});
  words -= 8;
  for (int i = 0; i < 6; ++i) words[i] = 0;
  words[6] = reinterpret_cast<std::uintptr_t>(entry);
  words[7] = 0;
  fiber.stack_pointer = words;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = fiber.stack_bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
}

void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool ends) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(ends ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
#if defined(__x86_64__)
  emulator_switch_stack(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void begin_fiber([[maybe_unused]] Fiber* from) {
#if defined(__SANITIZE_ADDRESS__)
  // Tells the extent of the stack that was left, which the host thread's fiber does not know by itself.
  __sanitizer_finish_switch_fiber(nullptr, from != nullptr ? &from->stack : nullptr,
                                  from != nullptr ? &from->stack_bytes : nullptr);
#endif
}

}  // namespace emulator
