#include "emulator/machine.h"

#include <bit>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <utility>
#include <vector>

#include "emulator/intrinsics.h"
#include "machine_state.h"

uint3 threadIdx{};
uint3 blockIdx{};
dim3 blockDim{};
dim3 gridDim{};

namespace emulator {

Machine& machine = *new Machine;  // never destroyed: kernels may run while the program ends

namespace {

unsigned pick_bit(unsigned bits) {
  if (machine.random == 0) return static_cast<unsigned>(std::countr_zero(bits));
  for (auto skip = static_cast<int>(machine.next_random() % static_cast<unsigned>(std::popcount(bits)));
       skip > 0; --skip) {
    bits &= bits - 1;
  }
  return static_cast<unsigned>(std::countr_zero(bits));
}

// A thread that can run: of the current warp if it has one, else of the next.
unsigned pick_thread() {
  if (machine.random != 0 && has_pending_copies() && machine.next_random() % 8 == 0) finish_pending_copy();
  while (machine.ready_warps == 0) {
    if (!has_pending_copies()) stop_in_deadlock();
    finish_pending_copy();
  }
  unsigned warp = threadIdx.x / kWarpSize;
  if (machine.random != 0) {
    warp = pick_bit(machine.ready_warps);
  } else if (machine.warps[warp].ready == 0) {
    const unsigned later = machine.ready_warps & ~((2u << warp) - 1u);
    warp = pick_bit(later != 0 ? later : machine.ready_warps);
  }
  return warp * kWarpSize + pick_bit(machine.warps[warp].ready);
}

void set_ready(unsigned warp, unsigned lanes) {
  machine.warps[warp].ready |= lanes;
  machine.ready_warps |= 1u << warp;
}

void clear_ready(unsigned thread) {
  Warp& warp = machine.warps[thread / kWarpSize];
  warp.ready &= ~(1u << thread % kWarpSize);
  if (warp.ready == 0) machine.ready_warps &= ~(1u << thread / kWarpSize);
}

void go_to(unsigned thread, Fiber& from, bool ends) {
  threadIdx.x = thread;
  machine.left = &from;
  switch_fiber(from, machine.threads[thread].fiber, ends);
}

// Runs others until this thread is ready and chosen.
void yield() {
  const unsigned self = threadIdx.x;
  const unsigned next = pick_thread();
  if (next != self) go_to(next, machine.threads[self].fiber, false);
}

__attribute__((no_sanitize("address"))) void thread_main() {
  begin_fiber(machine.left == &machine.host ? machine.left : nullptr);
  machine.launch.body(machine.launch.context);
  Thread& self = machine.threads[threadIdx.x];
  if (machine.launch.early && !self.waited) fail("a thread of an early launch ends and has not waited");
  self.ended = true;
  clear_ready(threadIdx.x);
  if (--machine.running == 0) {
    check_barriers();
    check_warpgroups();
    switch_fiber(self.fiber, machine.host, true);
  } else {
    go_to(pick_thread(), self.fiber, true);
  }
  std::abort();  // an ended thread has been resumed
}

void run_cta(unsigned cta) {
  const unsigned num_threads = machine.launch.threads;
  blockIdx = {cta, 0, 0};
  machine.running = num_threads;
  machine.block_arrived = 0;
  machine.ready_warps = 0;
  machine.storages.clear();
  machine.copied.assign(machine.launch.shared_bytes / 16 + 1, {});
  machine.clock = 0;
  reset_barriers();
  reset_warpgroups();
  for (unsigned t = 0; t < num_threads; ++t) {
    Thread& thread = machine.threads[t];
    thread.ended = false;
    thread.waits = false;
    thread.waited = false;
    thread.copies.clear();
    thread.copies_done = 0;
    thread.group_ends.clear();
    thread.fence_time = 0;
    // Equal variables of different threads lie in different sets of the cache.
    const Stack stack = stack_of(t);
    prepare(thread.fiber, stack.begin, stack.begin + stack.bytes - t % 64 * 320, thread_main);
    if (t % kWarpSize == 0) {
      Warp& warp = machine.warps[t / kWarpSize];
      for (Meeting& meeting : warp.meetings) meeting.arrived = 0;
      machine.block_waiting[t / kWarpSize] = 0;
      warp.ready = 0;
    }
    set_ready(t / kWarpSize, 1u << t % kWarpSize);
  }
  poison_shared_memory();
  threadIdx = {0, 0, 0};
  go_to(pick_thread(), machine.host, false);
  check_guards();
}

}  // namespace

std::size_t environment(const char* name, std::size_t otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr || *value == '\0' ? otherwise : std::strtoull(value, nullptr, 10);
}

void run(const Launch& launch) {
  const std::lock_guard lock(machine.mutex);
  map_memory();
  machine.compute_capability = compute_capability();
  machine.launch = launch;
  machine.random = environment("FLASH_DMATTN_EMULATOR_SEED", 0) * 0x9e3779b97f4a7c15ull;
  gridDim = dim3(launch.grid);
  blockDim = dim3(launch.threads);
  if (machine.random == 0) {
    for (unsigned cta = 0; cta < launch.grid; ++cta) run_cta(cta);
    return;
  }
  std::vector<unsigned> order(launch.grid);
  std::iota(order.begin(), order.end(), 0u);
  for (std::size_t left = order.size(); left > 1; --left) {
    std::swap(order[left - 1], order[machine.next_random() % left]);
  }
  for (const unsigned cta : order) run_cta(cta);
}

int compute_capability() { return static_cast<int>(environment("FLASH_DMATTN_EMULATOR_CAPABILITY", 90)); }

int multiprocessors() { return static_cast<int>(environment("FLASH_DMATTN_EMULATOR_MULTIPROCESSORS", 132)); }

void require_capability(int capability, const Wait& at) {
  if (machine.compute_capability >= capability) return;
  const int device = machine.compute_capability;
  fail_at(at, "needs compute capability %d.%d, the device has %d.%d", capability / 10, capability % 10,
          device / 10, device % 10);
}

void wait_here(const Wait& wait) {
  Thread& self = machine.threads[threadIdx.x];
  self.wait = wait;
  self.waits = true;
  clear_ready(threadIdx.x);
  yield();
}

void wake(unsigned thread) {
  machine.threads[thread].waits = false;
  set_ready(thread / kWarpSize, 1u << thread % kWarpSize);
}
void wait_for_previous_kernel() { machine.threads[threadIdx.x].waited = true; }

void maybe_yield() {
  if (machine.random != 0 && machine.next_random() % 4 == 0) yield();
}

bool arrive_at_warp(unsigned mask, const char* what, const Site& site, void* exchange) {
  const unsigned self = threadIdx.x;
  const unsigned bit = 1u << self % kWarpSize;
  Warp& warp = machine.warps[self / kWarpSize];
  if ((mask & bit) == 0)
    fail("%s at line %u: the thread's own lane is not in the mask %08x", what, site.line(), mask);
  Meeting& meeting = warp.meetings[std::countr_zero(mask)];
  if (meeting.arrived == 0) {
    meeting.mask = mask;
    meeting.wait = {what, site};
  } else if (meeting.mask != mask || !same(meeting.wait, {what, site})) {
    stop_at_other_place("lanes of a warp", {what, site});
  }
  warp.exchange[self % kWarpSize] = exchange;
  meeting.arrived |= bit;
  if (meeting.arrived == mask) return true;
  clear_ready(self);
  yield();
  return false;
}

void* const* warp_exchange() { return machine.warps[threadIdx.x / kWarpSize].exchange; }

void release_warp(unsigned mask) {
  const unsigned warp = threadIdx.x / kWarpSize;
  machine.warps[warp].meetings[std::countr_zero(mask)].arrived = 0;
  set_ready(warp, mask);
  if (machine.random != 0) yield();
}

bool arrive_at_block(const char* what, const Site& site, void* exchange) {
  const unsigned self = threadIdx.x;
  if (machine.block_arrived == 0) {
    machine.block_wait = {what, site};
  } else if (!same(machine.block_wait, {what, site})) {
    stop_at_other_place("threads of a CTA", {what, site});
  }
  machine.exchange[self] = exchange;
  machine.block_waiting[self / kWarpSize] |= 1u << self % kWarpSize;
  if (++machine.block_arrived == machine.launch.threads) return true;
  clear_ready(self);
  yield();
  return false;
}

void* const* block_exchange() { return machine.exchange; }

void release_block() {
  machine.block_arrived = 0;
  for (unsigned warp = 0; warp * kWarpSize < machine.launch.threads; ++warp) {
    set_ready(warp, std::exchange(machine.block_waiting[warp], 0u));
  }
  if (machine.random != 0) yield();
}

}  // namespace emulator
