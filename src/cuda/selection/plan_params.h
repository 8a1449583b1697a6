// What the kernels that build a plan share, and the two ways to build one.
//
// A chunk is kMinSegment positions of a sequence, aligned. Every sequence has as many ids for chunks as for
// segments, the same ones (PlanLayout::first_segment).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/selection/plan_builder.h"

namespace flash_dmattn::cuda {

constexpr int kPlanThreads = 512;
constexpr int kMergedRuns = 16;

// Higher first: the order-preserving bits of the score, or the expiry, above the index of the key. Unique.
using PlanRank = unsigned long long;

// Memory of build_in_passes: [heads_kv][layout.num_segments] integers, one of each array per chunk.
struct PlanScratch {
  int* alive = nullptr;    // keys alive at the chunk's start; before arrange_lists, by how many more than a
                           // chunk earlier
  int* births = nullptr;   // keys born in the chunk; after arrange_lists, in the chunks before it
  int* cursors = nullptr;  // per segment: old keys listed so far
  PlanRank* ranks[2] =
      {};  // [heads_kv][total_k] each: lists on the way to their order, where one run may not do
};

struct PlanParams {
  PlanInputs inputs;
  PlanView plan;
  PlanScratch scratch;
};

// What the host knows of the lists.
struct PlanBounds {
  int segment_length;    // 0: chosen on the device
  std::int64_t longest;  // keys of a sequence, at most
  std::int64_t max_old;  // old keys of a list, at most
  int run_length;        // keys sorted at a time
  bool in_one_kernel;    // build_in_one_kernel, not build_in_passes
  bool needs_merging() const { return max_old > run_length; }
};
PlanBounds plan_bounds(const PlanInputs& inputs);

// One CTA per segment, which looks for its old keys itself: best where sequences are short, or have few
// segments.
cudaError_t build_in_one_kernel(const PlanParams& params, const PlanBounds& bounds, cudaStream_t stream);

// Every key is sent to the segments that it lives in; work and memory are linear in the keys and list
// entries.
cudaError_t build_in_passes(const PlanParams& params, const PlanBounds& bounds, cudaStream_t stream);

}  // namespace flash_dmattn::cuda
