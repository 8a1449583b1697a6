// The plan in one kernel: a CTA per segment scans the keys before it for those still alive, sorts them, and
// appends the keys born inside.
#include "cuda/common/launch.h"
#include "cuda/selection/plan_lists.cuh"

namespace flash_dmattn::cuda {
namespace {

constexpr int kScanned = 6;  // keys per thread at a time: enough loads in flight
constexpr int kBorn = 4;

// kItems: a list has at most kPlanThreads * kItems old keys, or none.
template <int kItems>
__global__ void __launch_bounds__(kPlanThreads, 2) build_segments(const __grid_constant__ PlanParams params) {
  const PlanTask task = locate_task(params, blockIdx.x, 1);
  const int length = params.plan.layout.segment_length;
  if (task.index < 0) return;
  const HeadKeys keys(params.inputs, task.sequence, task.head);
  const PlanSegment segment = plan_segment(keys, task.index, length);
  int* size = params.plan.segment_sizes + task.first_id + task.index;
  if (!segment.listed) {
    if (threadIdx.x == 0) *size = 0;
    return;
  }
  const PlanList list(params.plan, task, segment.index, length);
  const int from = segment.from(keys);
  int num_old = for_each_outliving<kScanned>(keys, 0, segment.begin, from, [&](int n, int key, int expiry) {
    if (n < length) list.entries[n] = {key, expiry};
  });
  num_old = min(num_old, length);
  if (num_old > 0) {
    PlanRank ranks[kItems];
    sort_by_rank(keys, list.entries, num_old, ranks);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int place = static_cast<int>(threadIdx.x) * kItems + i;
      if (place < num_old) list.entries[place] = keys.entry(ranks[i]);
    }
  }
  const int num_born =
      for_each_outliving<kBorn>(keys, segment.begin, segment.end, from, [&](int n, int key, int expiry) {
        list.entries[static_cast<std::int64_t>(num_old) + n] = {key, expiry};
      });
  __syncthreads();
  finish_blocks(list, keys, segment, 0, num_old + num_born);
  if (threadIdx.x == 0) *size = num_old + num_born;
}

}  // namespace

cudaError_t build_in_one_kernel(const PlanParams& params, const PlanBounds& bounds, cudaStream_t stream) {
  const std::int64_t ctas = params.inputs.geometry.heads_kv * params.plan.layout.num_segments;
  const LaunchConfig config{static_cast<unsigned>(ctas), kPlanThreads, 0, stream};
  if (bounds.max_old <= 4 * kPlanThreads) return launch(build_segments<4>, config, params);
  return launch(build_segments<8>, config, params);
}

}  // namespace flash_dmattn::cuda
