// Which units of packed keys a tile of rows visits: those in which some row sees some key, in the order of
// the plan. A later key changes neither that order nor what comes before it, and what comes after the last
// key that a row sees leaves its results as they are: so they do not depend on the future, bit for bit.
#pragma once

#include <cuda_runtime.h>

#include "cuda/common/key_visits.cuh"
#include "cuda/sm90/packed_keys.cuh"

namespace flash_dmattn::cuda::sm90 {

// The steps of a tile, of kUnits units each, formed by one warp: lane u holds unit u of the next step, and
// what has been found beyond it waits in the lanes after.
template <int kUnits>
class KeySteps {
  static_assert(kUnits + kUnitsPerBlock <= 32 && kUnits <= kPaddingUnits);

 public:
  int unit = 0;        // of this lane, in the packed keys
  unsigned tests = 0;  // bit u: some row does not see some key of unit u
  bool last = false;

  // For rows at positions [begin, end). first_block: that of the tile's list in the packed keys.
  __device__ KeySteps(const KeyVisits<kBlock>& visits, const PackedKeys& packed, std::int64_t first_block,
                      int begin, int end)
      : visits_(visits),
        keys_(packed.keys + first_block * kUnitsPerBlock),
        first_unit_(static_cast<int>(first_block) * kUnitsPerBlock),
        padding_(packed.padding),
        begin_(begin),
        end_(end) {
    fetch();
  }

  // The next step; false after the last. A tile that sees nothing has one step of padding.
  __device__ bool next() {
    if (last) return false;
    // What lay beyond the last step moves to the front.
    unit = __shfl_down_sync(0xffffffffu, unit, kUnits);
    waiting_tests_ >>= kUnits;
    count_ = max(count_ - kUnits, 0);
    while (count_ <= kUnits && more_) {
      add_block();
      fetch();
    }
    last = count_ <= kUnits;
    const int lane = static_cast<int>(threadIdx.x % 32);
    if (lane >= count_) unit = padding_ + lane;
    constexpr unsigned kAll = (1u << kUnits) - 1;
    tests = waiting_tests_ & kAll;
    if (last) tests |= kAll & ~((1u << count_) - 1);
    return true;
  }

 private:
  // Begins to read the next block: lane l judges its keys 2 l and 2 l + 1.
  __device__ void fetch() {
    KeyTile tile;
    more_ = visits_.next(tile);
    if (!more_) return;
    constexpr int kLanes = 32 / kUnitsPerBlock;
    const int lane = static_cast<int>(threadIdx.x % 32);
    unit_in_list_ = tile.first / kUnit;
    pair_ = *reinterpret_cast<const uint4*>(&keys_[unit_in_list_ + lane / kLanes].entries[lane % kLanes * 2]);
  }

  __device__ void add_block() {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int key[2] = {static_cast<int>(pair_.x), static_cast<int>(pair_.z)};
    const int expiry[2] = {static_cast<int>(pair_.y), static_cast<int>(pair_.w)};
    bool some = false;
    bool all = true;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      some = some || (key[i] < end_ && begin_ < expiry[i] && key[i] < expiry[i]);
      all = all && key[i] <= begin_ && end_ <= expiry[i];
    }
    const unsigned seen = __ballot_sync(0xffffffffu, some);
    const unsigned unseen = ~__ballot_sync(0xffffffffu, all);
    constexpr int kLanes = 32 / kUnitsPerBlock;
#pragma unroll
    for (int u = 0; u < kUnitsPerBlock; ++u) {
      constexpr unsigned kMask = (1u << kLanes) - 1;
      if ((seen >> (u * kLanes) & kMask) == 0) continue;
      if (lane == count_) unit = first_unit_ + unit_in_list_ + u;
      if ((unseen >> (u * kLanes) & kMask) != 0) waiting_tests_ |= 1u << count_;
      ++count_;
    }
  }

  KeyVisits<kBlock> visits_;
  const UnitKeys* keys_;  // of the tile's list
  int first_unit_;
  int padding_;
  int begin_;
  int end_;
  int count_ = 0;  // units found and not yet handed out
  unsigned waiting_tests_ = 0;
  bool more_ = false;  // a block is being read
  int unit_in_list_ = 0;
  uint4 pair_ = {};
};

}  // namespace flash_dmattn::cuda::sm90
