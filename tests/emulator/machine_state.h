// What the parts of the machine share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "emulator/machine.h"
#include "emulator/warpgroups.h"
#include "fiber.h"

namespace emulator {

struct Copy {
  unsigned char* to;
  const void* from;
  unsigned bytes;
  unsigned valid;
};

struct Thread {
  Fiber fiber;
  bool ended = false;
  bool waits = false;  // in `wait`; meetings of a warp and of the CTA have their own
  Wait wait;
  bool waited = false;                  // for the kernel before
  std::vector<Copy> copies;             // not yet done, oldest first
  std::size_t copies_done = 0;          // before them
  std::vector<std::size_t> group_ends;  // of the groups committed, counted in copies from the first
  std::uint32_t fence_time = 0;         // of its latest fence_async_proxy
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

// Who has last written 16 bytes of shared memory by cp_async, and when; at 0: nobody.
struct CopiedChunk {
  std::uint32_t time = 0;
  std::uint32_t thread = 0;
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
  std::vector<CopiedChunk> copied;
  std::uint32_t clock = 0;  // counts copies and fences of the CTA
  unsigned char* stacks = nullptr;
  unsigned char* shared = nullptr;  // between two guards
  std::uint64_t random = 0;         // 0: the order is fixed
  int compute_capability = 0;

  std::uint64_t next_random() {
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    return random * 0x2545f4914f6cdd1dull >> 32;
  }
};

extern Machine& machine;

// An environment variable that holds a number.
std::size_t environment(const char* name, std::size_t otherwise);

// Blocks the current thread until another one wakes it.
void wait_here(const Wait& wait);
void wake(unsigned thread);

// Stops the program if the device is older.
void require_capability(int capability, const Wait& at);

// memory.cpp. The stack of a thread is `bytes` long and ends, at its low end, in a page that cannot be
// touched.
struct Stack {
  unsigned char* begin;
  std::size_t bytes;
};
void map_memory();
Stack stack_of(unsigned thread);
void poison_shared_memory();  // what the last CTA has left is gone, and reading what is not written gives NaN
void check_guards();
// Does the thread's copies up to the `end`th.
void finish_copies(unsigned thread, std::size_t end);
std::size_t copies_begun(unsigned thread);

// barriers.cpp
void reset_barriers();
void check_barriers();  // at the end of a CTA
bool has_pending_copies();
void finish_pending_copy();
void print_barriers();  // those that threads wait for

// warpgroups.cpp
void reset_warpgroups();
void check_warpgroups();  // at the end of a CTA

// products.cpp. Tiles in shared memory as descriptors give them.
struct Operands {
  std::uint16_t a[64 * 16];                  // [m][k]
  std::uint16_t b[16 * kMaxProductColumns];  // [n][k] if K-major, else [k][n]
};
void read_rows(const Product& product, int first_row, int num_rows, Operands& to, std::uint32_t fence_time);
void read_columns(const Product& product, Operands& to, std::uint32_t fence_time);
void multiply(const Product& product, const Operands& operands, float* sum);  // [64][columns]

// places.cpp
[[noreturn]] void stop_in_deadlock();
// A thread has arrived at `wait`, and others wait for it elsewhere.
[[noreturn]] void stop_at_other_place(const char* who, const Wait& wait);
inline bool same(const Wait& a, const Wait& b) {
  const char* const files[] = {a.site.file_name(), b.site.file_name()};
  return a.site.line() == b.site.line() && a.site.column() == b.site.column() && a.of == b.of &&
         a.number == b.number && (files[0] == files[1] || std::strcmp(files[0], files[1]) == 0);
}

}  // namespace emulator
