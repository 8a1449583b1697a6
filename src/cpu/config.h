// The tile sizes of the CPU backend. Every figure depends on the group and nothing else, so that results do
// not depend on batch, heads, length or threads.
#pragma once

#include <cstdint>

namespace flash_dmattn::cpu {

inline constexpr int kPanel = 16;            // columns of a packed right-hand side
inline constexpr int kMaxTileM = 12;         // rows of a register tile, at most (kTileM of simd-inl.h)
inline constexpr int kTileN = 96;            // keys gathered at a time; a multiple of every kTileM
inline constexpr int kPrefetchDistance = 6;  // keys ahead of the one that is gathered
inline constexpr int kForwardRows = 192;     // query rows of a tile, aimed at
inline constexpr int kBackwardRows = 96;
inline constexpr int kMaxTilePositions = 64;      // more positions would gather keys that few of the rows see
inline constexpr std::int64_t kMinSegment = 512;  // positions that share one list of keys, at least

constexpr std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace flash_dmattn::cpu
