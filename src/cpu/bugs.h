// Known bugs that the test build can inject, to prove that the test-suite sees them. The release build
// compiles none of this: there `injected` is a constant false.
#pragma once

#include <atomic>
#include <cstdint>

#ifndef FLASH_DMATTN_BUG_HOOKS
#define FLASH_DMATTN_BUG_HOOKS 0
#endif

namespace flash_dmattn::cpu {

// In the order of kBugNames; 0 injects nothing.
enum class Bug : int {
  kNone,
  kDropOneKey,
  kKeySeenOnceTooLong,
  kCausalOffByOne,
  kWrongTie,
  kLoseOneDv,
  kLoseOneDk,
  kLoseOneDbias,
  kDeltaOff,
  kBackwardLseOff,
  kLowPrecisionWeights,
  kScaleOff,
  kWrongHead,
  kBiasMissing,
  kNoRescale,
  kDkScaleOff,
  kDqLosesBlock,
  kGroupLosesHead,
  kLseOff,
  kDlseIgnored,
  kSegmentCountedTwice,
  kEmptyRowNotZero,
  kLowPrecisionDq,
  kMaskRowBefore,
  kDenseBiasWrongHead,
  kLoseOneSharer,
  kSplitLost,
};

inline constexpr const char* kBugNames[] = {
    "one row in 64 loses its first key",
    "a key is seen by one position too many",
    "a key is not seen by its own position",
    "of equal scores the earlier key ranks higher",
    "dv loses one key of each gathered block",
    "dk loses one key of each gathered block",
    "dbias loses one key of each gathered block",
    "delta is off by 1 %",
    "lse is off by 1e-3 in the backward",
    "softmax weights are rounded to bfloat16",
    "scale is off by 1 % in the forward",
    "query heads read the wrong key/value head",
    "one key of each gathered block loses its bias",
    "sums are not rescaled when the maximum moves",
    "dk is scaled 1 % too large",
    "dq loses the first block of keys",
    "dk and dv lose the last head of the group",
    "lse is off by 1e-3",
    "the gradient of lse is ignored",
    "the first key of a segment is counted twice in dk and dv",
    "a row without keys returns ones",
    "dq is accumulated in bfloat16",
    "a row reads the mask of the row before",
    "the heads of a group read the dense bias of the first",
    "the gradient of a shared dense bias loses its first tile",
    "decode loses the last split of the keys",
};

inline constexpr bool kBugHooks = FLASH_DMATTN_BUG_HOOKS != 0;

#if FLASH_DMATTN_BUG_HOOKS
inline std::atomic<int> injected_bug{0};
inline bool injected(Bug bug) {
  return injected_bug.load(std::memory_order_relaxed) == static_cast<int>(bug);
}
#else
constexpr bool injected(Bug /*bug*/) { return false; }
#endif

}  // namespace flash_dmattn::cpu
