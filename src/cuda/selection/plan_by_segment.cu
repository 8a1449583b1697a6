// The plan with a CTA per segment, which finds the old keys among those before it, sorts them, and appends
// the keys born inside. Where sequences are long, the keys that outlive their own segment are listed first,
// chunk by chunk: few, or with lives so short that few chunks concern a segment.
#include <cub/block/block_scan.cuh>

#include "cuda/common/launch.h"
#include "cuda/selection/plan_lists.cuh"

namespace flash_dmattn::cuda {
namespace {

// Items per thread at a time: enough loads in flight, and two CTAs on a multiprocessor.
constexpr int kScanned = 8;
constexpr int kBorn = 4;
static_assert(kBorn * kPlanThreads == kMinSegment);

__global__ void __launch_bounds__(kPlanThreads) list_leaving(const __grid_constant__ PlanParams params) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const Chunk chunk(params);
  if (!chunk.exists()) return;
  const PlanSegment segment = plan_segment(chunk.keys, chunk.segment(), chunk.length);
  const std::int64_t id = chunk.task.first_id + chunk.task.index;
  PlanEntry* const left = params.scratch.left + id * kMinSegment;
  __shared__ int last_expiry;
  if (threadIdx.x == 0) last_expiry = 0;
  __syncthreads();
  int last = 0;
  int count = 0;
  if (segment.end < chunk.keys.seqlen) {
    const int from = max(segment.end, chunk.keys.first_seen);
    count = for_each_outliving<kBorn>(chunk.keys, static_cast<int>(chunk.begin), chunk.end(), from,
                                      [&](int n, int key, int expiry) {
                                        left[n] = {key, expiry};
                                        last = max(last, expiry);
                                      });
  }
  last = __reduce_max_sync(kAllLanes, last);
  if (threadIdx.x % 32 == 0) atomicMax(&last_expiry, last);
  __syncthreads();
  if (threadIdx.x == 0) params.scratch.leaving[id] = {count, last_expiry};
}

// The lists of some chunks, one after the other.
struct LeftKeys {
  const int* offsets;  // [kPlanThreads], where each list begins
  const PlanEntry* left;

  __device__ const PlanEntry& entry(unsigned index) const {
    const int item = static_cast<int>(index);
    const int chunk = owner_of(item, kPlanThreads, [this](int at) { return offsets[at]; });
    return left[static_cast<std::int64_t>(chunk) * kMinSegment + item - offsets[chunk]];
  }
  template <int kCount>
  __device__ void load_expiries(unsigned first, int end, int (&expiries)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      expiries[i] = first + 32 * i < static_cast<unsigned>(end) ? entry(first + 32 * i).expiry : 0;
    }
  }
  __device__ bool outlives(unsigned /*index*/, int expiry, int from) const { return expiry > from; }
  __device__ int key(unsigned index) const { return entry(index).key; }
};

// As for_each_outliving over the keys before the segment, from the chunks' lists.
template <typename Found>
__device__ int for_each_left(const PlanScratch& scratch, std::int64_t first_id, int num_chunks, int from,
                             Found&& found) {
  using Scan = cub::BlockScan<int, kPlanThreads>;
  __shared__ typename Scan::TempStorage storage;
  __shared__ int offsets[kPlanThreads];
  int before = 0;
  for (int first = 0; first < num_chunks; first += kPlanThreads) {
    const int chunk = first + static_cast<int>(threadIdx.x);
    int offset = 0;
    if (chunk < num_chunks) {
      const LeavingKeys leaving = scratch.leaving[first_id + chunk];
      offset = leaving.last_expiry > from ? leaving.count : 0;
    }
    int size = 0;
    Scan(storage).ExclusiveSum(offset, offset, size);
    offsets[threadIdx.x] = offset;
    __syncthreads();
    const LeftKeys keys{offsets, scratch.left + (first_id + first) * kMinSegment};
    before += for_each_outliving<kBorn>(keys, 0, size, from,
                                        [&](int n, int key, int expiry) { found(before + n, key, expiry); });
  }
  return before;
}

// The length of the segments of a sequence of at most kMaxScan keys, which every CTA finds for itself.
__device__ int scan_for_length(const HeadKeys& keys) {
  constexpr int kMaxChunks = static_cast<int>(kMaxScan / kMinSegment);
  __shared__ int alive[kMaxChunks];
  if (threadIdx.x < kMaxChunks) alive[threadIdx.x] = 0;
  __syncthreads();
  const unsigned first = threadIdx.x / 32 * (32 * kScanned) + threadIdx.x % 32;
  for (unsigned tile = 0; tile < static_cast<unsigned>(keys.seqlen); tile += kPlanThreads * kScanned) {
    int expiries[kScanned];
    keys.load_expiries(first + tile, keys.seqlen, expiries);
    count_boundaries(keys, first + tile, expiries, alive);
  }
  __syncthreads();
  int sum = 0;
  for (int chunk = 0; chunk <= static_cast<int>(threadIdx.x) && chunk < kMaxChunks; ++chunk)
    sum += alive[chunk];
  __syncthreads();
  if (threadIdx.x < kMaxChunks) alive[threadIdx.x] = sum;
  __syncthreads();
  return choose_length(alive, static_cast<int>(ceil_div(keys.seqlen, kMinSegment)));
}

// Puts the num_old entries of a list in order. ranks: memory for as many, where there may be more than one
// run of them.
template <int kItems>
__device__ void sort_list(const HeadKeys& keys, const PlanList& list, int num_old, PlanRank* ranks) {
  constexpr int kRun = kPlanThreads * kItems;
  for (int first = 0; first < num_old; first += kRun) {
    PlanRank run[kItems];
    sort_by_rank(keys, list.entries + first, min(num_old - first, kRun), run);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int place = first + static_cast<int>(threadIdx.x) * kItems + i;
      if (place >= num_old) break;
      if (num_old <= kRun) {
        list.entries[place] = keys.entry(run[i]);
      } else {
        ranks[place] = run[i];
      }
    }
    __syncthreads();
  }
  if (num_old <= kRun) return;
  for (int place = threadIdx.x; place < num_old; place += kPlanThreads) {
    list.entries[merged_place(ranks, place, 0, num_old, kRun)] = keys.entry(ranks[place]);
  }
}

template <int kItems>
__global__ void __launch_bounds__(kPlanThreads, 2) build_segments(const __grid_constant__ PlanParams params) {
  wait_for_previous_kernel();
  const PlanTask task = locate_task(params, blockIdx.x, 1);
  if (task.index < 0) return;
  const HeadKeys keys(params.inputs, task.sequence, task.head);
  int length = params.plan.layout.segment_length;
  if (params.plan.segment_lengths != nullptr) {
    length = scan_for_length(keys);
    const std::int64_t lengths = task.head * static_cast<std::int64_t>(params.inputs.geometry.num_sequences);
    if (task.index == 0 && threadIdx.x == 0)
      params.plan.segment_lengths[lengths + task.sequence.index] = length;
  }
  const PlanSegment segment = plan_segment(keys, task.index, length);
  int* const size = params.plan.segment_sizes + task.first_id + task.index;
  if (!segment.listed) {
    if (threadIdx.x == 0) *size = 0;
    return;
  }
  const PlanList list(params.plan, task, segment.index, length);
  const int from = segment.from(keys);
  const auto list_old = [&](int n, int key, int expiry) {
    if (n < length) list.entries[n] = {key, expiry};
  };
  int num_old =
      params.scratch.leaving == nullptr
          ? for_each_outliving_in_any_order(keys, segment.begin, from, list_old)
          : for_each_left(params.scratch, task.first_id, segment.begin / kMinSegment, from, list_old);
  if (num_old > length && params.scratch.leaving == nullptr) {  // the first ones are listed
    for_each_outliving<kScanned>(keys, 0, segment.begin, from, list_old);
  }
  num_old = min(num_old, length);
  if (num_old > 0) {
    PlanRank* const ranks = params.scratch.ranks[0];
    sort_list<kItems>(keys, list, num_old,
                      ranks == nullptr ? nullptr : ranks + first_rank(params, task, segment.index, length));
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

cudaError_t build_by_segment(const PlanParams& params, const PlanBounds& bounds, cudaStream_t stream) {
  const std::int64_t ctas = params.inputs.geometry.heads_kv * params.plan.layout.num_segments;
  LaunchConfig config{static_cast<unsigned>(ctas), kPlanThreads, 0, stream};
  if (bounds.path == PlanPath::kGather) {
    const cudaError_t status = launch(list_leaving, config, params);
    if (status != cudaSuccess) return status;
    config.early = true;
  }
  return launch(bounds.run_length == kLongRun ? build_segments<8> : build_segments<4>, config, params);
}

}  // namespace flash_dmattn::cuda
