// What the parts of the machine share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "emulator/machine.h"
#include "fiber.h"

namespace emulator {

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
  bool waited = false;                  // for the kernel before
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

extern Machine& machine;

// An environment variable that holds a number.
std::size_t environment(const char* name, std::size_t otherwise);

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

// places.cpp
[[noreturn]] void stop_in_deadlock();
// A thread has arrived at `wait`, and others wait for it elsewhere.
[[noreturn]] void stop_at_other_place(const char* who, const Wait& wait);
bool same(const Wait& a, const Wait& b);

}  // namespace emulator
