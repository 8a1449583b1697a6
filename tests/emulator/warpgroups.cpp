#include "emulator/warpgroups.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <iterator>
#include <memory>
#include <utility>
#include <vector>

#include "emulator/qualifiers.h"
#include "machine_state.h"

namespace emulator {
namespace {

constexpr int kWarps = kWarpgroupSize / kWarpSize;
constexpr unsigned kMaxWarpgroups = kMaxThreads / kWarpgroupSize;
// A signalling NaN.
constexpr std::uint32_t kWithTheMachine = 0xffbfffffu;

// The accumulators of products under way, [64][columns].
struct Accumulators {
  int columns;
  int products;                      // not yet computed
  float* registers[kWarpgroupSize];  // null: the thread's have not come
  float values[64 * kMaxProductColumns];
};

struct BegunProduct {
  Product product;
  Wait at;
  Accumulators* accumulators;
  bool first;                                      // of those under way on its accumulators
  const std::uint32_t* registers[kWarpgroupSize];  // of a
  Operands operands;                               // as they were when the warps came
};

enum class Kind { kProduct, kFence, kCommit, kWait, kRegisters };

// What all threads of the warpgroup execute; `number`: pending groups, or registers.
struct Instruction {
  Kind kind;
  Wait at;
  int number = 0;
  Product product{};

  bool operator==(const Instruction& other) const {
    return kind == other.kind && same(at, other.at) && number == other.number && product == other.product;
  }
};

// An instruction that some threads have executed, but not all.
struct Entry {
  Instruction instruction;
  int arrived = 0;
  int arrived_in_warp[kWarps] = {};
  BegunProduct* begun = nullptr;
};

template <typename T>
class Pool {
 public:
  T* take() {
    if (free_.empty()) return new T;
    T* item = free_.back();
    free_.pop_back();
    return item;
  }
  void give_back(T* item) { free_.push_back(item); }

 private:
  std::vector<T*> free_;
};

using Group = std::vector<BegunProduct*>;

struct Warpgroup {
  std::deque<Entry> log;
  std::size_t log_begin = 0;              // instructions before it, which all threads have executed
  std::size_t next[kWarpgroupSize] = {};  // instruction of each thread
  bool fenced = false;                    // since the last wait
  std::uint32_t fence_time = 0;           // of a thread's latest fence_async_proxy
  std::vector<Accumulators*> accumulators;
  Group uncommitted;
  std::deque<Group> groups;
  unsigned waiting = 0;  // threads
};

Warpgroup* const warpgroups = new Warpgroup[kMaxWarpgroups];
Warpgroup& warpgroup_of(unsigned thread) { return warpgroups[thread / kWarpgroupSize]; }
Pool<BegunProduct>& products = *new Pool<BegunProduct>;
Pool<Accumulators>& accumulators = *new Pool<Accumulators>;

// ---- The order of instructions ----

// The current thread executes the instruction.
Entry& enter(Warpgroup& group, const Instruction& instruction) {
  maybe_yield();
  const unsigned first = threadIdx.x / kWarpgroupSize * kWarpgroupSize;
  const Wait& at = instruction.at;
  if (first + kWarpgroupSize > machine.launch.threads) {
    fail_at(at, "the thread is in no warpgroup of 128 threads");
  }
  const std::size_t index = group.next[threadIdx.x - first]++ - group.log_begin;
  if (index == group.log.size()) group.log.push_back({instruction});
  Entry& entry = group.log[index];
  if (!(entry.instruction == instruction)) {
    const Wait& other = entry.instruction.at;
    fail_at(at, "other threads of the warpgroup execute %s at %s:%u, or this with other operands", other.what,
            other.site.file_name(), other.site.line());
  }
  ++entry.arrived;
  ++entry.arrived_in_warp[(threadIdx.x - first) / kWarpSize];
  return entry;
}

// True if all threads have executed the instruction, which is then the oldest of the log.
bool complete(Warpgroup& group, const Entry& entry) {
  if (entry.arrived < kWarpgroupSize) return false;
  group.log.pop_front();
  ++group.log_begin;
  return true;
}

// ---- Registers of a thread ----

// Calls visit(row, column, index) for the pairs of neighbouring accumulators of a thread of the warpgroup.
template <typename Visit>
void for_pairs(unsigned thread, int columns, Visit&& visit) {
  const int row = static_cast<int>(thread / kWarpSize * 16 + thread % kWarpSize / 4);
  const int column = static_cast<int>(thread % 4 * 2);
  for (int n = 0; n < columns / 8; ++n) {
    visit(row, 8 * n + column, 4 * n);
    visit(row + 8, 8 * n + column, 4 * n + 2);
  }
}

// Takes the accumulators from the thread's registers.
void take(Accumulators& to, unsigned thread, float* registers, bool with_values) {
  to.registers[thread] = registers;
  if (with_values) {
    for_pairs(thread, to.columns, [&](int row, int column, int i) {
      std::memcpy(&to.values[row * to.columns + column], &registers[i], 2 * sizeof(float));
    });
  }
  for (int i = 0; i < to.columns / 2; ++i) std::memcpy(&registers[i], &kWithTheMachine, sizeof(float));
}

// Gives them back.
void return_registers(const Accumulators& from, const Wait& at) {
  for (unsigned thread = 0; thread < kWarpgroupSize; ++thread) {
    float* registers = from.registers[thread];
    for (int i = 0; i < from.columns / 2; ++i) {
      if (std::memcmp(&registers[i], &kWithTheMachine, sizeof(float)) == 0) continue;
      fail_at(at, "accumulator %d of thread %u of the warpgroup was written before the wait for it", i,
              thread);
    }
    for_pairs(thread, from.columns, [&](int row, int column, int i) {
      std::memcpy(&registers[i], &from.values[row * from.columns + column], 2 * sizeof(float));
    });
  }
}

// Calls visit(place in Operands::a, index) for a thread's registers of a, each a pair of elements.
template <typename Visit>
void for_registers_of_a(unsigned thread, Visit&& visit) {
  const unsigned row = thread / kWarpSize * 16 + thread % kWarpSize / 4;
  const unsigned column = thread % 4 * 2;
  for (unsigned i = 0; i < 4; ++i) visit((row + i % 2 * 8) * 16 + column + i / 2 * 8, i);
}

// ---- Products ----

// The accumulators under way that the thread's registers belong to, or null.
Accumulators* find_accumulators(const Warpgroup& group, unsigned thread, const float* d, int columns,
                                const Wait& at) {
  for (Accumulators* candidate : group.accumulators) {
    const float* other = candidate->registers[thread];
    if (other == nullptr) continue;
    if (other == d && candidate->columns == columns) return candidate;
    if (other < d + columns / 2 && d < other + candidate->columns / 2) {
      fail_at(at, "some of its accumulators are those of another product under way, some are not");
    }
  }
  return nullptr;
}

BegunProduct* start_product(Warpgroup& group, const Product& product, unsigned thread, const float* d,
                            const Wait& at) {
  BegunProduct* begun = products.take();
  begun->product = product;
  begun->at = at;
  begun->accumulators = find_accumulators(group, thread, d, product.columns, at);
  begun->first = begun->accumulators == nullptr;
  if (begun->first) {
    begun->accumulators = accumulators.take();
    begun->accumulators->columns = product.columns;
    begun->accumulators->products = 0;
    std::fill(std::begin(begun->accumulators->registers), std::end(begun->accumulators->registers), nullptr);
    group.accumulators.push_back(begun->accumulators);
  }
  ++begun->accumulators->products;
  return begun;
}

void enter_registers(const Warpgroup& group, BegunProduct& begun, unsigned thread, float* d,
                     const std::uint32_t* a) {
  Accumulators* under_way = find_accumulators(group, thread, d, begun.product.columns, begun.at);
  if (under_way != (begun.first ? nullptr : begun.accumulators)) {
    fail_at(begun.at, "threads of a warpgroup name different accumulators");
  }
  if (begun.first) take(*begun.accumulators, thread, d, begun.product.accumulate);
  begun.registers[thread] = a;
  if (a == nullptr) return;
  for_registers_of_a(thread, [&](unsigned place, unsigned i) {
    std::memcpy(&begun.operands.a[place], &a[i], sizeof(a[i]));
  });
}

void check_operands(const BegunProduct& begun) {
  static Operands now;
  constexpr std::uint32_t kFenced = ~0u;  // that has been checked
  const Product& product = begun.product;
  const auto stop = [&](const char* what) { fail_at(begun.at, "%s changed before the wait for it", what); };
  if (product.a != 0) {
    read_rows(product, 0, 64, now, kFenced);
  } else {
    for (unsigned thread = 0; thread < kWarpgroupSize; ++thread) {
      for_registers_of_a(thread, [&](unsigned place, unsigned i) {
        std::memcpy(&now.a[place], &begun.registers[thread][i], sizeof(std::uint32_t));
      });
    }
  }
  if (std::memcmp(now.a, begun.operands.a, sizeof(now.a)) != 0) stop("a");
  read_columns(product, now, kFenced);
  if (std::memcmp(now.b, begun.operands.b, 16 * sizeof(now.b[0]) * product.columns) != 0) stop("b");
}

void finish_product(Warpgroup& group, BegunProduct* begun) {
  check_operands(*begun);
  Accumulators* sum = begun->accumulators;
  multiply(begun->product, begun->operands, sum->values);
  if (--sum->products == 0) {
    return_registers(*sum, begun->at);
    std::erase(group.accumulators, sum);
    accumulators.give_back(sum);
  }
  products.give_back(begun);
}

}  // namespace

void begin_product(const Product& product, float* d, const std::uint32_t* a, const Wait& at) {
  require_capability(90, at);
  Warpgroup& group = warpgroup_of(threadIdx.x);
  Entry& entry = enter(group, {Kind::kProduct, at, 0, product});
  const unsigned thread = threadIdx.x % kWarpgroupSize;
  if (entry.begun == nullptr) entry.begun = start_product(group, product, thread, d, at);
  BegunProduct* begun = entry.begun;
  enter_registers(group, *begun, thread, d, a);
  const unsigned warp = thread / kWarpSize;
  if (entry.arrived_in_warp[warp] < kWarpSize) return;
  // From here on the tensor cores may read the operands, this warp's rows of a and all of b.
  if (product.a != 0) read_rows(product, static_cast<int>(warp) * 16, 16, begun->operands, group.fence_time);
  const auto complete_warps =
      std::count(std::begin(entry.arrived_in_warp), std::end(entry.arrived_in_warp), int{kWarpSize});
  if (complete_warps == 1) read_columns(product, begun->operands, group.fence_time);
  if (!complete(group, entry)) return;
  if (!group.fenced) {
    fail_at(at, "no wgmma_fence since the last wgmma_wait");
  }
  group.uncommitted.push_back(begun);
}

void fence_products(const Wait& at) {
  Warpgroup& group = warpgroup_of(threadIdx.x);
  if (complete(group, enter(group, {Kind::kFence, at}))) group.fenced = true;
}

void commit_products(const Wait& at) {
  Warpgroup& group = warpgroup_of(threadIdx.x);
  if (complete(group, enter(group, {Kind::kCommit, at}))) {
    group.groups.push_back(std::exchange(group.uncommitted, {}));
  }
}

void wait_for_products(int pending_groups, const Wait& at) {
  Warpgroup& group = warpgroup_of(threadIdx.x);
  if (!complete(group, enter(group, {Kind::kWait, at, pending_groups}))) {
    wait_here(at);
    return;
  }
  group.fenced = false;
  for (; group.groups.size() > static_cast<std::size_t>(pending_groups); group.groups.pop_front()) {
    for (BegunProduct* begun : group.groups.front()) finish_product(group, begun);
  }
  const unsigned first = threadIdx.x / kWarpgroupSize * kWarpgroupSize;
  for (unsigned thread = first; thread < first + kWarpgroupSize; ++thread) {
    if (thread != threadIdx.x) wake(thread);
  }
  maybe_yield();
}

void change_registers(int registers, const Wait& at) {
  require_capability(90, at);
  Warpgroup& group = warpgroup_of(threadIdx.x);
  complete(group, enter(group, {Kind::kRegisters, at, registers}));
}

void fence_async_proxy() {
  const std::uint32_t now = ++machine.clock;
  machine.threads[threadIdx.x].fence_time = now;
  warpgroup_of(threadIdx.x).fence_time = now;
}

void reset_warpgroups() {
  for (unsigned thread = 0; thread < kMaxThreads; thread += kWarpgroupSize) {
    Warpgroup& group = warpgroup_of(thread);
    if (group.log_begin == 0 && group.log.empty() && group.fence_time == 0) continue;
    for (const Entry& entry : group.log) {
      if (entry.begun != nullptr) products.give_back(entry.begun);
    }
    for (BegunProduct* begun : group.uncommitted) products.give_back(begun);
    for (const Group& products_of : group.groups) {
      for (BegunProduct* begun : products_of) products.give_back(begun);
    }
    for (Accumulators* sum : group.accumulators) accumulators.give_back(sum);
    group = {};
  }
}

void check_warpgroups() {
  for (unsigned thread = 0; thread < machine.launch.threads; thread += kWarpgroupSize) {
    const Warpgroup& group = warpgroup_of(thread);
    if (group.log.empty()) continue;
    const Entry& entry = group.log.front();
    const Wait& at = entry.instruction.at;
    fail_at(at, "%d threads of the warpgroup of thread %u have executed it, the others have ended",
            entry.arrived, thread);
  }
}

}  // namespace emulator
