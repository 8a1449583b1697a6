// Where the threads are, for the messages of the machine.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "emulator/intrinsics.h"
#include "kernel_name.h"
#include "machine_state.h"

namespace emulator {
namespace {

void print_place(unsigned thread) {
  std::fprintf(stderr, "  kernel %s, CTA %u of %u, thread %u of %u\n",
               kernel_name(machine.launch.kernel).c_str(), blockIdx.x, machine.launch.grid, thread,
               machine.launch.threads);
}

void print_wait(const Wait& wait) {
  std::fprintf(stderr, "%s at %s:%u, in %s", wait.what, wait.site.file_name(), wait.site.line(),
               wait.site.function_name());
  if (wait.of != nullptr) std::fprintf(stderr, ", for %s %u", wait.of, wait.number);
  std::fputc('\n', stderr);
}

// Null: the thread runs, or has ended.
const Wait* wait_of(unsigned thread) {
  if (machine.threads[thread].waits) return &machine.threads[thread].wait;
  const unsigned bit = 1u << thread % kWarpSize;
  for (const Meeting& meeting : machine.warps[thread / kWarpSize].meetings) {
    if ((meeting.arrived & bit) != 0) return &meeting.wait;
  }
  return (machine.block_waiting[thread / kWarpSize] & bit) != 0 ? &machine.block_wait : nullptr;
}

bool at_same_place(unsigned a, unsigned b) {
  const Wait* const waits[] = {wait_of(a), wait_of(b)};
  if (waits[0] != nullptr && waits[1] != nullptr) return same(*waits[0], *waits[1]);
  return waits[0] == waits[1] && machine.threads[a].ended == machine.threads[b].ended;
}

// Where the threads of the CTA are, equal places together.
[[noreturn]] void stop_with_places(unsigned thread) {
  print_place(thread);
  std::vector<bool> told(machine.launch.threads, false);
  for (unsigned first = 0; first < machine.launch.threads; ++first) {
    if (told[first]) continue;
    unsigned count = 0;
    for (unsigned other = first; other < machine.launch.threads; ++other) {
      if (told[other] || !at_same_place(first, other)) continue;
      told[other] = true;
      ++count;
    }
    std::fprintf(stderr, "  %u thread%s, the first of them %u: ", count, count == 1 ? "" : "s", first);
    if (const Wait* wait = wait_of(first); wait != nullptr) {
      std::fprintf(stderr, "wait in ");
      print_wait(*wait);
    } else {
      std::fprintf(stderr, machine.threads[first].ended ? "ended\n" : "running\n");
    }
  }
  print_barriers();
  std::abort();
}

}  // namespace

void stop_at_other_place(const char* who, const Wait& wait) {
  std::fprintf(
      stderr, "emulator: %s meet in different places, or with different masks; the last of them in\n  ", who);
  print_wait(wait);
  stop_with_places(threadIdx.x);
}

void stop_in_deadlock() {
  std::fprintf(stderr, "emulator: deadlock: no thread of the CTA can go on\n");
  stop_with_places(threadIdx.x);
}

namespace {

[[noreturn]] void stop(const char* format, va_list arguments) {
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  print_place(threadIdx.x);
  std::abort();
}

}  // namespace

void fail(const char* format, ...) {
  std::fputs("emulator: ", stderr);
  va_list arguments;
  va_start(arguments, format);
  stop(format, arguments);
}

void fail_at(const Wait& at, const char* format, ...) {
  std::fprintf(stderr, "emulator: %s at %s:%u: ", at.what, at.site.file_name(), at.site.line());
  va_list arguments;
  va_start(arguments, format);
  stop(format, arguments);
}

}  // namespace emulator
