// Barriers in shared memory, the copies that count on them, and barriers of warps.
//
// A copy is done as late as can be: when no thread can go on without it, or with a seed at a random time
// before. Its destination holds poison until then. An arrival after copies is treated alike.
#pragma once

#include <cstdint>

#include "emulator/machine.h"

namespace emulator {

void initialise_barrier(std::uint32_t address, int count, const Wait& at);
void fence_initialised_barriers();
void arrive_at_barrier(std::uint32_t address, int expected_bytes, const Wait& at);
void arrive_after_copies(std::uint32_t address, const Wait& at);
void wait_at_barrier(std::uint32_t address, int parity, Wait at);
void begin_bulk_copy(std::uint32_t to, const void* from, int bytes, std::uint32_t barrier, const Wait& at);

void arrive_at_named_barrier(int id, int threads, bool waits, Wait at);

}  // namespace emulator
