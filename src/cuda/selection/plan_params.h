// What the kernels that build a plan share, and the ways to build one.
//
// A chunk is kMinSegment positions of a sequence, aligned. Every sequence has as many ids for chunks as for
// segments, the same ones (PlanLayout::first_segment).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/selection/plan_builder.h"

namespace flash_dmattn::cuda {

constexpr int kPlanThreads = 512;
constexpr int kLongRun = 8 * kPlanThreads;  // old keys that one CTA sorts at a time, at most
constexpr int kMergedRuns = 16;
// A CTA looks through so many keys in less time than another kernel would save it.
constexpr std::int64_t kMaxScan = 32768;

// Higher first: the order-preserving bits of the score, or the expiry, above the index of the key. Unique.
using PlanRank = unsigned long long;

// Keys of a chunk that outlive its segment.
struct LeavingKeys {
  int count;
  int last_expiry;
};

enum class PlanPath {
  kScan,    // build_by_segment: a segment's CTA looks through all keys before it
  kGather,  // build_by_segment: through those that left their own segment alive, listed first
  kPasses,  // build_in_passes: for long lists, and long sequences whose lists decide on the segments
};

// What the host knows of the lists.
struct PlanBounds {
  int segment_length;    // 0: chosen on the device
  std::int64_t max_old;  // old keys of a list, at most
  int run_length;        // keys sorted at a time
  PlanPath path;
};
PlanBounds plan_bounds(const PlanInputs& inputs);

// [heads_kv][num_segments] of each, one per chunk, unless said otherwise. What a path does not use is null.
struct PlanScratch {
  LeavingKeys* leaving = nullptr;  // kGather
  PlanEntry* left = nullptr;       // the keys themselves, kMinSegment places per chunk
  int* alive = nullptr;    // kPasses: keys alive at the chunk's start; before arrange_lists, how many more
                           // than a chunk earlier
  int* births = nullptr;   // keys born in the chunk; after arrange_lists, in the chunks before it
  int* cursors = nullptr;  // per segment: old keys listed so far
  PlanRank* ranks[2] =
      {};  // [heads_kv][total_k]: lists on the way to their order; kScan needs the first alone
};

struct PlanParams {
  PlanInputs inputs;
  PlanView plan;
  PlanScratch scratch;
};

cudaError_t build_by_segment(const PlanParams& params, const PlanBounds& bounds, cudaStream_t stream);
cudaError_t build_in_passes(const PlanParams& params, const PlanBounds& bounds, cudaStream_t stream);

}  // namespace flash_dmattn::cuda
