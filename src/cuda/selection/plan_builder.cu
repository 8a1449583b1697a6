#include "cuda/selection/plan_builder.h"

#include <algorithm>
#include <bit>
#include <climits>
#include <cstddef>

#include "cuda/selection/plan_params.h"

namespace flash_dmattn::cuda {
namespace {

// Twice as long would not be an int. No sequence has more than two segments of it.
constexpr std::int64_t kMaxSegment = std::int64_t{1} << 30;

// 0: the device chooses.
std::int64_t host_segment_length(const PlanInputs& inputs) {
  const std::int64_t longest = inputs.geometry.seqlen_k;
  std::int64_t keys = longest;  // one segment
  if (inputs.causal && inputs.expiry.present() && longest > kMinSegment) {
    if (inputs.keep_window == 0) return 0;
    keys = std::min(longest, inputs.keep_window);
  }
  const auto length = static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(keys)));
  return std::clamp<std::int64_t>(length, kMinSegment, kMaxSegment);
}

PlanPath choose_path(std::int64_t length, std::int64_t max_old, std::int64_t longest) {
  constexpr std::int64_t kMaxScanOfOneSegment = 131072;
  if (length == 0) return longest <= kMaxScan ? PlanPath::kScan : PlanPath::kPasses;
  if (max_old == 0) return longest <= kMaxScanOfOneSegment ? PlanPath::kScan : PlanPath::kPasses;
  if (max_old > kLongRun) return PlanPath::kPasses;
  return longest <= kMaxScan ? PlanPath::kScan : PlanPath::kGather;
}

PlanScratch cut_scratch(Arena& arena, const PlanInputs& inputs, const PlanBounds& bounds) {
  const Geometry& geometry = inputs.geometry;
  const auto layout = PlanLayout::make(geometry.total_k(), geometry.num_sequences, kMinSegment);
  const auto chunks = static_cast<std::size_t>(geometry.heads_kv * layout.num_segments);
  PlanScratch scratch;
  if (bounds.path == PlanPath::kGather) {
    scratch.leaving = arena.take<LeavingKeys>(chunks);
    scratch.left = arena.take<PlanEntry>(chunks * kMinSegment);
  }
  if (bounds.path == PlanPath::kPasses) {
    scratch.alive = arena.take<int>(chunks);
    scratch.births = arena.take<int>(chunks);
    scratch.cursors = arena.take<int>(chunks);
  }
  if (bounds.max_old > bounds.run_length) {
    const auto keys = static_cast<std::size_t>(geometry.heads_kv * geometry.total_k());
    scratch.ranks[0] = arena.take<PlanRank>(keys);
    if (bounds.path == PlanPath::kPasses) scratch.ranks[1] = arena.take<PlanRank>(keys);
  }
  return scratch;
}

}  // namespace

PlanBounds plan_bounds(const PlanInputs& inputs) {
  const std::int64_t longest = inputs.geometry.seqlen_k;
  const std::int64_t length = host_segment_length(inputs);
  PlanBounds bounds{};
  bounds.segment_length = static_cast<int>(length);
  if (length == 0) {
    bounds.max_old = static_cast<std::int64_t>(std::bit_floor(static_cast<std::uint64_t>(longest - 1)));
  } else {
    bounds.max_old = inputs.causal && length < longest ? length : 0;
  }
  bounds.path = choose_path(length, bounds.max_old, longest);
  const std::int64_t longest_run = bounds.path == PlanPath::kPasses ? length : bounds.max_old;
  bounds.run_length = longest_run >= kLongRun ? kLongRun : kMinSegment;
  return bounds;
}

PlanView cut_plan(Arena& arena, const PlanInputs& inputs) {
  const Geometry& geometry = inputs.geometry;
  const int length = plan_bounds(inputs).segment_length;
  PlanView plan;
  plan.layout =
      PlanLayout::make(geometry.total_k(), geometry.num_sequences, length == 0 ? kMinSegment : length);
  const auto heads = static_cast<std::size_t>(geometry.heads_kv);
  const auto num_entries = heads * static_cast<std::size_t>(plan.layout.num_entries);
  plan.entries = arena.take<PlanEntry>(num_entries);
  if (inputs.bias.present()) plan.bias = arena.take<float>(num_entries);
  plan.hulls = arena.take<BlockHull>(heads * static_cast<std::size_t>(plan.layout.num_blocks));
  plan.segment_sizes = arena.take<int>(heads * static_cast<std::size_t>(plan.layout.num_segments));
  if (length == 0)
    plan.segment_lengths = arena.take<int>(heads * static_cast<std::size_t>(geometry.num_sequences));
  return plan;
}

std::size_t plan_scratch_bytes(const PlanInputs& inputs) {
  Arena arena;
  cut_scratch(arena, inputs, plan_bounds(inputs));
  return arena.bytes();
}

cudaError_t build_plan(const PlanInputs& inputs, const PlanView& plan, void* scratch, cudaStream_t stream) {
  const Geometry& geometry = inputs.geometry;
  if (geometry.num_sequences == 0 || geometry.heads_kv == 0) return cudaSuccess;
  if (2 * plan.layout.num_segments > INT_MAX / geometry.heads_kv)
    return cudaErrorInvalidConfiguration;  // CTAs
  const PlanBounds bounds = plan_bounds(inputs);
  Arena arena(Workspace{scratch, plan_scratch_bytes(inputs)});
  const PlanParams params{inputs, plan, cut_scratch(arena, inputs, bounds)};
  return bounds.path == PlanPath::kPasses ? build_in_passes(params, bounds, stream)
                                          : build_by_segment(params, bounds, stream);
}

}  // namespace flash_dmattn::cuda
