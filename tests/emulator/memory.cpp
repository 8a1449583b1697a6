// Stacks, shared memory, the temporary storage of block-wide primitives, asynchronous copies.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "emulator/qualifiers.h"
#include "machine_state.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#include <link.h>
#endif

namespace emulator {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t kStackBytes = 1 << 19;
#else
constexpr std::size_t kStackBytes = 1 << 16;
#endif
constexpr std::size_t kGuardBytes = 4096;
constexpr unsigned char kGuard = 0xa5;
constexpr std::size_t kMaxSharedBytes = 232448;

unsigned char* map_pages(std::size_t bytes) {
  void* pages =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) {
    std::perror("emulator: mmap");
    std::abort();
  }
  return static_cast<unsigned char*>(pages);
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

}  // namespace

void map_memory() {
  if (machine.stacks != nullptr) return;
  machine.stacks = map_pages(kMaxThreads * kStackBytes);
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  for (int thread = 0; thread < kMaxThreads; ++thread) {
    mprotect(machine.stacks + thread * kStackBytes, page, PROT_NONE);
  }
  machine.shared = map_pages(kMaxSharedBytes + 2 * kGuardBytes) + kGuardBytes;
}

Stack stack_of(unsigned thread) { return {machine.stacks + thread * kStackBytes, kStackBytes}; }

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

std::size_t shared_bytes_limit() {
  return std::min(kMaxSharedBytes, environment("FLASH_DMATTN_EMULATOR_SHARED_BYTES", kMaxSharedBytes));
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

void finish(const Copy& copy, unsigned thread) {
  std::memcpy(copy.to, copy.from, copy.valid);
  std::memset(copy.to + copy.valid, 0, copy.bytes - copy.valid);
  machine.copied[static_cast<std::size_t>(copy.to - machine.shared) / 16] = {++machine.clock, thread};
}

}  // namespace

void begin_copy(void* to, const void* from, unsigned bytes, unsigned valid) {
  const Copy copy{static_cast<unsigned char*>(to), from, bytes, valid};
  std::memset(to, kPoison, bytes);
  machine.threads[threadIdx.x].copies.push_back(copy);
}

void commit_copies() {
  Thread& thread = machine.threads[threadIdx.x];
  thread.group_ends.push_back(thread.copies_done + thread.copies.size());
}

std::size_t copies_begun(unsigned thread) {
  return machine.threads[thread].copies_done + machine.threads[thread].copies.size();
}

void finish_copies(unsigned thread, std::size_t end) {
  Thread& its = machine.threads[thread];
  if (end <= its.copies_done) return;
  const std::size_t count = end - its.copies_done;
  for (std::size_t i = 0; i < count; ++i) finish(its.copies[i], thread);
  its.copies.erase(its.copies.begin(), its.copies.begin() + static_cast<std::ptrdiff_t>(count));
  its.copies_done = end;
}

void wait_for_copies(unsigned pending_groups) {
  Thread& thread = machine.threads[threadIdx.x];
  if (thread.group_ends.size() <= pending_groups) return;
  const std::size_t groups = thread.group_ends.size() - pending_groups;
  finish_copies(threadIdx.x, thread.group_ends[groups - 1]);
  thread.group_ends.erase(thread.group_ends.begin(),
                          thread.group_ends.begin() + static_cast<std::ptrdiff_t>(groups));
}

}  // namespace emulator
