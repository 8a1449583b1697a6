// What the kernels of the selection for few rows (select_few.cuh) share.
#pragma once

#include <cuda_runtime.h>

#include "cuda/selection/few_sample.h"
#include "cuda/selection/select_problem.cuh"

namespace flash_dmattn::cuda {

constexpr int kMaxFewRows = 32;
constexpr Rank kLeastRank = Rank{0x00800000u} << 32;  // that an enabled key can have
constexpr Rank kNoRank = ~Rank{0};

// Keys below `lower` cannot survive, keys from `upper` on surely do; those between are the candidates.
struct FewBounds {
  Rank lower, upper;
};

// Of one head of a sequence. Written by sample_scores, which leaves the counts 0.
struct FewLine {
  FewBounds bounds;
  unsigned num_sure;  // keys from bounds.upper on
  unsigned num_candidates;
  unsigned num_finished;  // CTAs of split_keys
};

struct FewProblem {
  SelectProblem select;  // tiles: the pieces of the CTAs of split_keys, multiples of kFewTile keys
  FewSample sample;
  FewLine* lines = nullptr;    // [sequences * heads]
  Rank* candidates = nullptr;  // [sequences * heads][seqlen]

  __device__ std::int64_t line(const Sequence& sequence, int head) const {
    return static_cast<std::int64_t>(sequence.index) * select.geometry.heads_kv + head;
  }
};

// visit(element) with an element of the scores' type.
template <typename Visit>
__device__ __forceinline__ void with_element_of(DType dtype, Visit&& visit) {
  if (dtype == DType::kFloat32) {
    visit(0.0f);
  } else if (dtype == DType::kBFloat16) {
    visit(BFloat16{});
  } else {
    visit(Float16{});
  }
}

}  // namespace flash_dmattn::cuda
