#include "emulator/machine.h"

#include <sys/mman.h>
#include <unistd.h>

#include <bit>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <utility>
#include <vector>

#include "emulator/intrinsics.h"
#include "fiber.h"
#include "kernel_name.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#include <link.h>
#endif

uint3 threadIdx{};
uint3 blockIdx{};
dim3 blockDim{};
dim3 gridDim{};

namespace emulator {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t kStackBytes = 1 << 19;
#else
constexpr std::size_t kStackBytes = 1 << 16;
#endif
constexpr std::size_t kGuardBytes = 4096;
constexpr unsigned char kGuard = 0xa5;
constexpr int kMaxSharedBytes = 232448;

struct Wait {
  const char* what = nullptr;
  Site site;
};

struct Copy {
  unsigned char* to;
  const void* from;
  unsigned bytes;
  unsigned valid;
};

struct Thread {
  Fiber fiber;
  bool ended = false;
  std::vector<Copy> copies;             // not yet done, oldest first
  std::vector<std::size_t> group_ends;  // in copies, of the groups committed
};

// The lanes of a warp that meet, found by the lowest of them. Where, the first to arrive has said.
struct Meeting {
  unsigned mask = 0;
  unsigned arrived = 0;
  Wait wait;
};

struct Warp {
  unsigned ready = 0;  // lanes that can run
  Meeting meetings[kWarpSize];
  void* exchange[kWarpSize];
};

struct Storage {
  const unsigned char* begin;
  const unsigned char* end;
  unsigned inside;
  bool left;
};

struct Machine {
  std::mutex mutex;
  Launch launch;
  Fiber host;
  Fiber* left = nullptr;  // by the last switch
  std::unique_ptr<Thread[]> threads{new Thread[kMaxThreads]};
  Warp warps[kMaxThreads / kWarpSize];
  unsigned ready_warps = 0;
  unsigned running = 0;  // threads of the CTA that have not ended
  unsigned block_arrived = 0;
  unsigned block_waiting[kMaxThreads / kWarpSize];  // lanes
  Wait block_wait;
  void* exchange[kMaxThreads];
  std::vector<Storage> storages;  // used since the last barrier
  unsigned char* stacks = nullptr;
  unsigned char* shared = nullptr;  // between two guards
  std::uint64_t random = 0;         // 0: the order is fixed

  std::uint64_t next_random() {
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    return random * 0x2545f4914f6cdd1dull >> 32;
  }
};

Machine& machine = *new Machine;  // never destroyed: kernels may run while the program ends

// ---- Errors ----

void print_place(unsigned thread) {
  std::fprintf(stderr, "  kernel %s, CTA %u of %u, thread %u of %u\n",
               kernel_name(machine.launch.kernel).c_str(), blockIdx.x, machine.launch.grid, thread,
               machine.launch.threads);
}

void print_wait(const Wait& wait) {
  std::fprintf(stderr, "%s at %s:%u, in %s\n", wait.what, wait.site.file_name(), wait.site.line(),
               wait.site.function_name());
}

bool same(const Wait& a, const Wait& b) {
  const char* const files[] = {a.site.file_name(), b.site.file_name()};
  return a.site.line() == b.site.line() && a.site.column() == b.site.column() &&
         (files[0] == files[1] || std::strcmp(files[0], files[1]) == 0);
}

// Null: the thread runs, or has ended.
const Wait* wait_of(unsigned thread) {
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
  std::abort();
}

// A thread has arrived at `wait`, and others wait for it elsewhere.
[[noreturn]] void stop_at_other_place(const char* who, const Wait& wait) {
  std::fprintf(
      stderr, "emulator: %s meet in different places, or with different masks; the last of them in\n  ", who);
  print_wait(wait);
  stop_with_places(threadIdx.x);
}

[[noreturn]] void deadlock() {
  std::fprintf(stderr, "emulator: deadlock: no thread of the CTA can go on\n");
  stop_with_places(threadIdx.x);
}

// ---- Order ----

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
  if (machine.ready_warps == 0) deadlock();
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
  self.ended = true;
  clear_ready(threadIdx.x);
  if (--machine.running == 0) {
    switch_fiber(self.fiber, machine.host, true);
  } else {
    go_to(pick_thread(), self.fiber, true);
  }
  std::abort();  // an ended thread has been resumed
}

// ---- Memory ----

unsigned char* map_pages(std::size_t bytes) {
  void* pages =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) {
    std::perror("emulator: mmap");
    std::abort();
  }
  return static_cast<unsigned char*>(pages);
}

// Every stack ends, at its low end, in a page that cannot be touched.
void map_memory() {
  if (machine.stacks != nullptr) return;
  machine.stacks = map_pages(kMaxThreads * kStackBytes);
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  for (int thread = 0; thread < kMaxThreads; ++thread) {
    mprotect(machine.stacks + thread * kStackBytes, page, PROT_NONE);
  }
  machine.shared = map_pages(kMaxSharedBytes + 2 * kGuardBytes) + kGuardBytes;
}

#if !defined(__SANITIZE_ADDRESS__)
thread_local char in_thread_local_storage;

// The thread-local block of this library or program: the kernels' static shared memory.
std::pair<unsigned char*, std::size_t> static_shared_memory() {
  static std::ptrdiff_t anchor = -1;  // of in_thread_local_storage in the block
  static std::size_t bytes = 0;
  auto* here = reinterpret_cast<unsigned char*>(&in_thread_local_storage);
  if (anchor < 0) {
    const auto find = [](dl_phdr_info* info, std::size_t, void* address) {
      const auto* begin = static_cast<unsigned char*>(info->dlpi_tls_data);
      for (int i = 0; begin != nullptr && i < info->dlpi_phnum; ++i) {
        if (info->dlpi_phdr[i].p_type != PT_TLS) continue;
        const auto offset = static_cast<unsigned char*>(address) - begin;
        if (offset < 0 || offset >= static_cast<std::ptrdiff_t>(info->dlpi_phdr[i].p_memsz)) continue;
        if (info->dlpi_phdr[i].p_filesz != 0) continue;  // holds initialised variables, no kernel's
        anchor = offset;
        bytes = info->dlpi_phdr[i].p_memsz;
        return 1;
      }
      return 0;
    };
    dl_iterate_phdr(find, here);
  }
  return {here - anchor, anchor < 0 ? 0 : bytes};
}
#endif

// What the last CTA has left is gone, and reading what this one has not written gives NaN.
void poison_shared_memory() {
  unsigned char* shared = machine.shared;
  const std::size_t bytes = machine.launch.shared_bytes;
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(shared - kGuardBytes, kMaxSharedBytes + 2 * kGuardBytes);
  std::memset(shared, kPoison, bytes);
  ASAN_POISON_MEMORY_REGION(shared - kGuardBytes, kGuardBytes);
  ASAN_POISON_MEMORY_REGION(shared + bytes, kMaxSharedBytes - bytes + kGuardBytes);
#else
  std::memset(shared - kGuardBytes, kGuard, kGuardBytes);
  std::memset(shared, kPoison, bytes);
  std::memset(shared + bytes, kGuard, kGuardBytes);
  const auto [begin, size] = static_shared_memory();
  std::memset(begin, kPoison, size);
#endif
}

void check_guards() {
#if !defined(__SANITIZE_ADDRESS__)
  const auto check = [](const unsigned char* guard) {
    for (std::size_t i = 0; i < kGuardBytes; ++i) {
      if (guard[i] == kGuard) continue;
      fail("the CTA has written at offset %td of its %zu bytes of dynamic shared memory",
           guard + i - machine.shared, machine.launch.shared_bytes);
    }
  };
  check(machine.shared - kGuardBytes);
  check(machine.shared + machine.launch.shared_bytes);
#endif
}

void run_cta(unsigned cta) {
  const unsigned num_threads = machine.launch.threads;
  blockIdx = {cta, 0, 0};
  machine.running = num_threads;
  machine.block_arrived = 0;
  machine.ready_warps = 0;
  machine.storages.clear();
  for (unsigned t = 0; t < num_threads; ++t) {
    Thread& thread = machine.threads[t];
    thread.ended = false;
    thread.copies.clear();
    thread.group_ends.clear();
    // Equal variables of different threads lie in different sets of the cache.
    unsigned char* stack = machine.stacks + t * kStackBytes;
    prepare(thread.fiber, stack, stack + kStackBytes - t % 64 * 320, thread_main);
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

std::uint64_t environment(const char* name, std::uint64_t otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr || *value == '\0' ? otherwise : std::strtoull(value, nullptr, 10);
}

}  // namespace

void run(const Launch& launch) {
  const std::lock_guard lock(machine.mutex);
  map_memory();
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

std::size_t shared_bytes_limit() {
  return static_cast<std::size_t>(environment("FLASH_DMATTN_EMULATOR_SHARED_BYTES", kMaxSharedBytes));
}

void fail(const char* format, ...) {
  std::fputs("emulator: ", stderr);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
  print_place(threadIdx.x);
  std::abort();
}

void maybe_yield() {
  if (machine.random != 0 && machine.next_random() % 4 == 0) yield();
}

unsigned char* dynamic_shared_memory() { return machine.shared; }

std::uint32_t shared_address(const void* pointer) {
  const auto offset = static_cast<const unsigned char*>(pointer) - machine.shared;
  if (offset < 0 || offset > static_cast<std::ptrdiff_t>(machine.launch.shared_bytes)) {
    fail("%p is not in the CTA's dynamic shared memory", pointer);
  }
  return static_cast<std::uint32_t>(offset);
}

unsigned char* shared_pointer(std::uint32_t address, std::size_t bytes) {
  if (address > machine.launch.shared_bytes || bytes > machine.launch.shared_bytes - address) {
    fail("shared address %u is beyond the CTA's %zu bytes of dynamic shared memory", address,
         machine.launch.shared_bytes);
  }
  return machine.shared + address;
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

void free_storage() { machine.storages.clear(); }

void enter_storage(void* storage, std::size_t bytes, const char* what, const Site& site) {
  auto* begin = static_cast<unsigned char*>(storage);
  for (Storage& used : machine.storages) {
    if (used.begin == begin && used.end == begin + bytes && !used.left) {
      ++used.inside;
      return;
    }
    if (used.begin < begin + bytes && begin < used.end) {
      fail("%s at %s:%u uses temporary storage again without a __syncthreads() in between", what,
           site.file_name(), site.line());
    }
  }
  machine.storages.push_back({begin, begin + bytes, 1, false});
  std::memset(storage, kPoison, bytes);
}

void leave_storage(void* storage, std::size_t bytes) {
  for (Storage& used : machine.storages) {
    if (used.begin != storage || used.end != used.begin + bytes) continue;
    used.left = true;
    if (--used.inside == 0) std::memset(storage, kPoison, bytes);
  }
}

namespace {

void finish(const Copy& copy) {
  std::memcpy(copy.to, copy.from, copy.valid);
  std::memset(copy.to + copy.valid, 0, copy.bytes - copy.valid);
}

}  // namespace

void begin_copy(void* to, const void* from, unsigned bytes, unsigned valid) {
  const Copy copy{static_cast<unsigned char*>(to), from, bytes, valid};
  std::memset(to, kPoison, bytes);
  machine.threads[threadIdx.x].copies.push_back(copy);
}

void commit_copies() {
  Thread& thread = machine.threads[threadIdx.x];
  thread.group_ends.push_back(thread.copies.size());
}

void wait_for_copies(unsigned pending_groups) {
  Thread& thread = machine.threads[threadIdx.x];
  if (thread.group_ends.size() <= pending_groups) return;
  const std::size_t groups = thread.group_ends.size() - pending_groups;
  const std::size_t end = thread.group_ends[groups - 1];
  for (std::size_t i = 0; i < end; ++i) finish(thread.copies[i]);
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<std::ptrdiff_t>(end));
  thread.group_ends.erase(thread.group_ends.begin(),
                          thread.group_ends.begin() + static_cast<std::ptrdiff_t>(groups));
  for (std::size_t& group_end : thread.group_ends) group_end -= end;
}

}  // namespace emulator
