// The machine that kernels run on: one CTA after another, each CUDA thread a fiber with a stack of its own,
// which runs until it waits for others. A wait that cannot end stops the program with a message that names
// the places.
//
// Environment variables, read at every launch:
//   FLASH_DMATTN_EMULATOR_SEED              other than 0: threads and CTAs run in a random order
//   FLASH_DMATTN_EMULATOR_SHARED_BYTES      the most dynamic shared memory a CTA may have; default 232448
//   FLASH_DMATTN_EMULATOR_CAPABILITY        the device's compute capability, 10 * major + minor; default 90
//   FLASH_DMATTN_EMULATOR_MULTIPROCESSORS   how many it has; default 132
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <type_traits>

namespace emulator {

using Site = std::source_location;

// An instruction that a thread executes or waits in, for messages.
struct Wait {
  const char* what = nullptr;
  Site site;
  const char* of = nullptr;  // what it waits for, with its number, if there are several
  unsigned number = 0;
};

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 1024;
constexpr unsigned char kPoison =
    0xff;  // what memory holds before a kernel writes it: NaN in every floating type

struct Launch {
  const void* kernel = nullptr;
  unsigned grid = 0;
  unsigned threads = 0;
  std::size_t shared_bytes = 0;
  bool early = false;                     // on a GPU it may start before the kernel before it has ended
  void (*body)(void* context) = nullptr;  // the kernel, for the current thread
  void* context = nullptr;
};

// Runs the launch to its end. Launches of several host threads run one after another.
void run(const Launch& launch);

// Every thread of an early launch must have called this when it ends.
void wait_for_previous_kernel();

std::size_t shared_bytes_limit();
int compute_capability();
int multiprocessors();

// Stops the program; the message goes on with the kernel, the CTA and the thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
// The message begins with the instruction.
[[noreturn]] void fail_at(const Wait& at, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Lets other threads run first, now and then, if the order is random.
void maybe_yield();

unsigned char* dynamic_shared_memory();

// Of the dynamic shared memory: the offset in it, and the `bytes` bytes at an offset, both checked.
std::uint32_t shared_address(const void* pointer);
unsigned char* shared_pointer(std::uint32_t address, std::size_t bytes);

// Rendezvous of the threads of `mask`, or of the CTA. The last to arrive gets true, does the work for all,
// with the arguments that each has left at its exchange pointer, and releases them; the others get false when
// released.
bool arrive_at_warp(unsigned mask, const char* what, const Site& site, void* exchange);
void release_warp(unsigned mask);
void* const* warp_exchange();  // [kWarpSize]
bool arrive_at_block(const char* what, const Site& site, void* exchange);
void release_block();
void free_storage();            // a barrier: all temporary storage (below) may be used again
void* const* block_exchange();  // [number of threads]

template <typename Exchange>
struct Peers {
  void* const* exchange;

  Exchange& operator[](unsigned index) const { return *static_cast<Exchange*>(exchange[index]); }
};

// complete(Peers<Exchange>): computes the results of all lanes of `mask`.
template <typename Exchange, typename Complete>
void warp_collective(unsigned mask, const char* what, const Site& site, Exchange& mine, Complete&& complete) {
  if (!arrive_at_warp(mask, what, site, &mine)) return;
  complete(Peers<Exchange>{warp_exchange()});
  release_warp(mask);
}

template <typename Exchange, typename Complete>
void block_collective(const char* what, const Site& site, Exchange& mine, Complete&& complete) {
  if (!arrive_at_block(what, site, &mine)) return;
  complete(Peers<Exchange>{block_exchange()});
  release_block();
}

// Temporary storage of a block-wide primitive: used by all threads from the first arrival to the last
// departure, and not free for another use before the next __syncthreads(). What it holds is overwritten at
// both ends.
void enter_storage(void* storage, std::size_t bytes, const char* what, const Site& site);
void leave_storage(void* storage, std::size_t bytes);

// The thread's asynchronous copies, done when waited for; the destination holds poison until then.
void begin_copy(void* to, const void* from, unsigned bytes, unsigned valid);
void commit_copies();
void wait_for_copies(unsigned pending_groups);

}  // namespace emulator
