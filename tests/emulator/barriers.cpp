// Barriers in shared memory. Their state is here; in shared memory lies only what tells that the barrier has
// been initialised and not been overwritten since.
#include "emulator/barriers.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <deque>
#include <vector>

#include "emulator/intrinsics.h"
#include "machine_state.h"

namespace emulator {
namespace {

constexpr int kMaxCount = (1 << 20) - 1;  // of arrivals, and of bytes

struct Barrier {
  std::uint32_t address;
  int count;    // arrivals in a phase
  int missing;  // of them
  long bytes;   // expected and not copied; below 0 while copies are ahead of those who expect them
  unsigned phase = 0;
  unsigned initialised_by;
  bool fenced = false;
  std::vector<unsigned> waiting{};  // threads
};

// What a barrier's 8 bytes hold.
struct Mark {
  std::uint32_t index;
  std::uint32_t address;
};
constexpr std::uint32_t kMark = 0x6d626172;  // is in both by exclusive or

// A copy that has begun, or an arrival after the thread's copies.
struct Pending {
  Wait at;
  unsigned thread;
  std::uint32_t barrier;
  std::size_t copies;  // of the thread, that the arrival waits for
  unsigned char* to;   // null: an arrival
  const void* from;
  std::size_t bytes;
};

struct NamedBarrier {
  int threads;  // that meet; 0: nobody has come
  int arrived;
  std::uint32_t come[kMaxThreads / kWarpSize];
  std::uint32_t waiting[kMaxThreads / kWarpSize];
};
constexpr int kNamedBarriers = 16;

struct Barriers {
  std::deque<Barrier> in_memory;
  std::deque<Pending> pending;
  NamedBarrier named[kNamedBarriers];
};
Barriers& barriers = *new Barriers;

Barrier* barrier_at(std::uint32_t address) {
  for (Barrier& barrier : barriers.in_memory) {
    if (barrier.address == address) return &barrier;
  }
  return nullptr;
}

// The barrier at the address, for the current thread.
Barrier& find(std::uint32_t address, const Wait& at) {
  Mark mark;
  std::memcpy(&mark, shared_pointer(address, sizeof(mark)), sizeof(mark));
  mark = {mark.index ^ kMark, mark.address ^ kMark};
  if (mark.address != address || mark.index >= barriers.in_memory.size() ||
      barriers.in_memory[mark.index].address != address) {
    fail_at(at, "the barrier at shared address %u has %s", address,
            barrier_at(address) == nullptr ? "not been initialised" : "been overwritten");
  }
  Barrier& barrier = barriers.in_memory[mark.index];
  if (!barrier.fenced && barrier.initialised_by != threadIdx.x) {
    fail_at(at, "thread %u has initialised the barrier at shared address %u without fence_barrier_init",
            barrier.initialised_by, address);
  }
  return barrier;
}

void end_phase_if_complete(Barrier& barrier) {
  if (barrier.missing != 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.missing = barrier.count;
  for (const unsigned thread : barrier.waiting) wake(thread);
  barrier.waiting.clear();
}

void arrive(Barrier& barrier, int expected_bytes, unsigned thread, const Wait& at) {
  if (barrier.missing == 0) {
    fail_at(at,
            "thread %u arrives when phase %u of the barrier at shared address %u has its %d arrivals already",
            thread, barrier.phase, barrier.address, barrier.count);
  }
  barrier.bytes += expected_bytes;
  --barrier.missing;
  end_phase_if_complete(barrier);
}

void copy(const Pending& pending) {
  const unsigned char* to = pending.to;
  if (*to != kPoison || std::memcmp(to, to + 1, pending.bytes - 1) != 0) {
    fail_at(pending.at, "the destination, shared address %td, was written before the copy was done",
            to - machine.shared);
  }
  std::memcpy(pending.to, pending.from, pending.bytes);
}

}  // namespace

void initialise_barrier(std::uint32_t address, int count, const Wait& at) {
  if (address % 8 != 0 || count < 1 || count > kMaxCount) {
    fail_at(at, "shared address %u, which must be a multiple of 8; %d arrivals, which must be 1 .. %d",
            address, count, kMaxCount);
  }
  if (barrier_at(address) != nullptr) {
    fail_at(at, "the barrier at shared address %u has been initialised before", address);
  }
  const Mark mark{static_cast<std::uint32_t>(barriers.in_memory.size()) ^ kMark, address ^ kMark};
  std::memcpy(shared_pointer(address, sizeof(mark)), &mark, sizeof(mark));
  barriers.in_memory.push_back(
      {.address = address, .count = count, .missing = count, .bytes = 0, .initialised_by = threadIdx.x});
}

void fence_initialised_barriers() {
  for (Barrier& barrier : barriers.in_memory) {
    if (barrier.initialised_by == threadIdx.x) barrier.fenced = true;
  }
}

void arrive_at_barrier(std::uint32_t address, int expected_bytes, const Wait& at) {
  maybe_yield();
  if (expected_bytes < 0 || expected_bytes > kMaxCount) {
    fail_at(at, "%d bytes", expected_bytes);
  }
  arrive(find(address, at), expected_bytes, threadIdx.x, at);
}

void arrive_after_copies(std::uint32_t address, const Wait& at) {
  maybe_yield();
  find(address, at);
  barriers.pending.push_back({.at = at,
                              .thread = threadIdx.x,
                              .barrier = address,
                              .copies = copies_begun(threadIdx.x),
                              .to = nullptr,
                              .from = nullptr,
                              .bytes = 0});
}

void wait_at_barrier(std::uint32_t address, int parity, Wait at) {
  maybe_yield();
  if (parity != 0 && parity != 1) {
    fail_at(at, "parity %d, which must be 0 or 1", parity);
  }
  Barrier& barrier = find(address, at);
  at.of =
      parity == 0 ? "parity 0 of the barrier at shared address" : "parity 1 of the barrier at shared address";
  at.number = address;
  while (static_cast<int>(barrier.phase & 1u) == parity) {
    barrier.waiting.push_back(threadIdx.x);
    wait_here(at);
  }
}

void begin_bulk_copy(std::uint32_t to, const void* from, int bytes, std::uint32_t barrier, const Wait& at) {
  require_capability(90, at);
  maybe_yield();
  if (to % 16 != 0 || reinterpret_cast<std::uintptr_t>(from) % 16 != 0 || bytes % 16 != 0 || bytes <= 0) {
    fail_at(at, "shared address %u, global address %p and %d bytes must be multiples of 16", to, from, bytes);
  }
  const auto count = static_cast<std::size_t>(bytes);
  unsigned char* destination = shared_pointer(to, count);
  if (!find(barrier, at).fenced) {
    fail_at(at, "the barrier at shared address %u has not been followed by fence_barrier_init", barrier);
  }
  std::memset(destination, kPoison, count);
  std::fill_n(machine.copied.begin() + to / 16, count / 16, CopiedChunk{});
  barriers.pending.push_back({.at = at,
                              .thread = threadIdx.x,
                              .barrier = barrier,
                              .copies = 0,
                              .to = destination,
                              .from = from,
                              .bytes = count});
}

bool has_pending_copies() { return !barriers.pending.empty(); }

void finish_pending_copy() {
  if (machine.random != 0) {
    std::swap(barriers.pending.front(), barriers.pending[machine.next_random() % barriers.pending.size()]);
  }
  const Pending pending = barriers.pending.front();
  barriers.pending.pop_front();
  Barrier& barrier = *barrier_at(pending.barrier);
  if (pending.to == nullptr) {
    finish_copies(pending.thread, pending.copies);
    arrive(barrier, 0, pending.thread, pending.at);
    return;
  }
  copy(pending);
  barrier.bytes -= static_cast<long>(pending.bytes);
  end_phase_if_complete(barrier);
}

namespace {

// All have come: those that wait go on.
void release(NamedBarrier& barrier, int id, const Wait& at) {
  const NamedBarrier complete = barrier;
  barrier = {};
  for (unsigned warp = 0; warp < kMaxThreads / kWarpSize; ++warp) {
    if (complete.come[warp] != 0 && complete.come[warp] != ~0u) {
      fail_at(at, "of warp %u only the lanes %08x have come to barrier %d", warp, complete.come[warp], id);
    }
    for_lanes(complete.waiting[warp],
              [&](int lane) { wake(warp * kWarpSize + static_cast<unsigned>(lane)); });
  }
}

}  // namespace

void arrive_at_named_barrier(int id, int threads, bool waits, Wait at) {
  maybe_yield();
  if (id < 0 || id >= kNamedBarriers || threads <= 0 || threads % kWarpSize != 0 ||
      threads > static_cast<int>(machine.launch.threads)) {
    fail_at(at, "barrier %d, which must be 0 .. 15, of %d threads, which must be a multiple of 32", id,
            threads);
  }
  if (id == 0) {  // __syncthreads
    if (!waits || threads != static_cast<int>(machine.launch.threads)) {
      fail_at(at, "barrier 0 is __syncthreads, for all threads to wait in");
    }
    int none = 0;
    block_collective(at.what, at.site, none, [](auto) { free_storage(); });
    return;
  }
  NamedBarrier& barrier = barriers.named[id];
  if (barrier.arrived != 0 && barrier.threads != threads) {
    fail_at(at, "barrier %d of %d threads, others have come to it for %d", id, threads, barrier.threads);
  }
  const unsigned warp = threadIdx.x / kWarpSize;
  const unsigned bit = 1u << threadIdx.x % kWarpSize;
  if ((barrier.come[warp] & bit) != 0) {
    fail_at(at, "the thread comes to barrier %d again before all have come", id);
  }
  barrier.threads = threads;
  barrier.come[warp] |= bit;
  if (++barrier.arrived == threads) {
    release(barrier, id, at);
    maybe_yield();
  } else if (waits) {
    barrier.waiting[warp] |= bit;
    at.of = "barrier";
    at.number = static_cast<unsigned>(id);
    wait_here(at);
  }
}

void reset_barriers() {
  barriers.in_memory.clear();
  barriers.pending.clear();
  std::fill(std::begin(barriers.named), std::end(barriers.named), NamedBarrier{});
}

void check_barriers() {
  for (const Pending& pending : barriers.pending) {
    if (pending.to == nullptr) continue;
    fail_at(pending.at, "the CTA has ended, and nobody has waited for this copy of thread %u",
            pending.thread);
  }
}

void print_barriers() {
  for (const Barrier& barrier : barriers.in_memory) {
    if (barrier.waiting.empty()) continue;
    std::fprintf(
        stderr,
        "  the barrier at shared address %u is in phase %u, with %d of %d arrivals and %ld bytes missing\n",
        barrier.address, barrier.phase, barrier.missing, barrier.count, barrier.bytes);
  }
}

}  // namespace emulator
