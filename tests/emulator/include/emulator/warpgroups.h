// Instructions that the 128 threads of a warpgroup execute together. Only a wait makes them wait for each
// other; that they execute the same instructions in the same order is checked as they come.
//
// A product is computed when a wait makes it due. Until then its accumulators are with the machine, and the
// threads' registers hold a signalling NaN, which no arithmetic leaves as it is: who reads them gets NaN, who
// writes them stops the program. So does who changes an operand, in registers or in shared memory, between
// the product and the wait.
#pragma once

#include <cstdint>

#include "emulator/machine.h"

namespace emulator {

constexpr int kWarpgroupSize = 128;
constexpr int kMaxProductColumns = 256;

enum class HalfType { kBFloat16, kFloat16 };

// d [64 x columns] (+)= a [64 x 16] * b [16 x columns]. Descriptors: the operands in shared memory; a is in
// registers where its descriptor is 0, and b is then MN-major.
struct Product {
  HalfType type;
  int columns;
  bool accumulate;
  std::uint64_t a, b;

  bool operator==(const Product&) const = default;
};

// d: the thread's columns / 2 accumulators; a: its 4 registers of a, or null.
void begin_product(const Product& product, float* d, const std::uint32_t* a, const Wait& at);
void fence_products(const Wait& at);
void commit_products(const Wait& at);
void wait_for_products(int pending_groups, const Wait& at);
void change_registers(int registers, const Wait& at);

// What the thread has written, or has seen written, may be read by products and bulk copies.
void fence_async_proxy();

}  // namespace emulator
