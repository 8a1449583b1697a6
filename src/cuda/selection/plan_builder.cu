#include "cuda/selection/plan_builder.h"

#include <algorithm>
#include <bit>
#include <cstddef>

#include "cuda/selection/plan_params.h"

namespace flash_dmattn::cuda {
namespace {

// Twice as long would not be an int. No sequence has more than two segments of it.
constexpr std::int64_t kMaxSegment = std::int64_t{1} << 30;

// 0: the device chooses.
std::int64_t host_segment_length(const PlanInputs& inputs, std::int64_t longest) {
  std::int64_t keys = longest;  // one segment
  if (inputs.causal && inputs.expiry.present() && longest > kMinSegment) {
    if (inputs.keep_window == 0) return 0;
    keys = std::min(longest, inputs.keep_window);
  }
  const auto length = static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(keys)));
  return std::clamp<std::int64_t>(length, kMinSegment, kMaxSegment);
}

PlanScratch cut_scratch(Arena& arena, const PlanInputs& inputs, const PlanBounds& bounds) {
  if (bounds.in_one_kernel) return {};
  const Geometry& geometry = inputs.geometry;
  const auto layout = PlanLayout::make(geometry.total_k(), geometry.num_sequences, kMinSegment);
  const auto chunks = static_cast<std::size_t>(geometry.heads_kv * layout.num_segments);
  PlanScratch scratch{.alive = arena.take<int>(chunks),
                      .births = arena.take<int>(chunks),
                      .cursors = arena.take<int>(chunks)};
  if (bounds.needs_merging()) {
    const auto ranks = static_cast<std::size_t>(geometry.heads_kv * geometry.total_k());
    for (PlanRank*& buffer : scratch.ranks) buffer = arena.take<PlanRank>(ranks);
  }
  return scratch;
}

}  // namespace

PlanBounds plan_bounds(const PlanInputs& inputs) {
  // Where a CTA would scan more than this, passes over all keys are faster.
  constexpr std::int64_t kMaxScan = 131072;
  constexpr std::int64_t kMaxScannedSegments = 32;
  const std::int64_t longest = inputs.geometry.seqlen_k;
  const std::int64_t length = host_segment_length(inputs, longest);
  PlanBounds bounds{};
  bounds.segment_length = static_cast<int>(length);
  bounds.longest = longest;
  const bool one_segment = !inputs.causal || length >= longest;
  if (length == 0) {
    bounds.max_old = static_cast<std::int64_t>(std::bit_floor(static_cast<std::uint64_t>(longest - 1)));
  } else {
    bounds.max_old = one_segment ? 0 : length;
  }
  constexpr int kLongRun = 8 * kPlanThreads;
  bounds.run_length = length >= kLongRun ? kLongRun : kMinSegment;
  bounds.in_one_kernel = length > 0 && bounds.max_old <= kLongRun && longest <= kMaxScan &&
                         longest <= kMaxScannedSegments * length;
  return bounds;
}

PlanView cut_plan(Arena& arena, const PlanInputs& inputs) {
  const Geometry& geometry = inputs.geometry;
  const PlanBounds bounds = plan_bounds(inputs);
  const bool chosen = bounds.segment_length == 0;
  PlanView plan;
  plan.layout = PlanLayout::make(geometry.total_k(), geometry.num_sequences,
                                 chosen ? kMinSegment : bounds.segment_length);
  const auto heads = static_cast<std::size_t>(geometry.heads_kv);
  const auto num_entries = heads * static_cast<std::size_t>(plan.layout.num_entries);
  plan.entries = arena.take<PlanEntry>(num_entries);
  if (inputs.bias.present()) plan.bias = arena.take<float>(num_entries);
  plan.hulls = arena.take<BlockHull>(heads * static_cast<std::size_t>(plan.layout.num_blocks));
  plan.segment_sizes = arena.take<int>(heads * static_cast<std::size_t>(plan.layout.num_segments));
  if (chosen)
    plan.segment_lengths = arena.take<int>(heads * static_cast<std::size_t>(geometry.num_sequences));
  return plan;
}

std::size_t plan_scratch_bytes(const PlanInputs& inputs) {
  Arena arena;
  cut_scratch(arena, inputs, plan_bounds(inputs));
  return arena.bytes();
}

cudaError_t build_plan(const PlanInputs& inputs, const PlanView& plan, void* scratch, cudaStream_t stream) {
  if (inputs.geometry.num_sequences == 0 || inputs.geometry.heads_kv == 0) return cudaSuccess;
  const PlanBounds bounds = plan_bounds(inputs);
  Arena arena(Workspace{scratch, plan_scratch_bytes(inputs)});
  const PlanParams params{inputs, plan, cut_scratch(arena, inputs, bounds)};
  return bounds.in_one_kernel ? build_in_one_kernel(params, bounds, stream)
                              : build_in_passes(params, bounds, stream);
}

}  // namespace flash_dmattn::cuda
