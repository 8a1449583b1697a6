// The plan in passes over all keys and all lists:
//
//   count_chunks   keys alive at the start of each chunk, keys born in it
//   arrange_lists  segment lengths where they are free, sizes of the lists
//   place_keys     every key into the list it is born in, in place, and into those it is old in, in any order
//   sort_runs      old keys by rank, run_length at a time: the whole list, mostly
//   merge_runs     kMergedRuns runs at a time to one
//   finish_lists   hulls, cores and biases
//
// place_keys takes the places of old keys by atomic additions. Their order ends there, since ranks are
// unique; and where more keys are alive than a segment has places, which no selection by keep_window leads
// to, sort_runs lists the first ones again.
#include <cub/block/block_scan.cuh>

#include "cuda/common/launch.h"
#include "cuda/selection/plan_lists.cuh"

namespace flash_dmattn::cuda {
namespace {

constexpr int kWarps = kPlanThreads / 32;

// Old keys alive at the start of a segment, of which at most `length` are listed.
__device__ int count_alive(const PlanScratch& scratch, std::int64_t first_id, const PlanSegment& segment) {
  return segment.listed && segment.index > 0 ? scratch.alive[first_id + segment.begin / kMinSegment] : 0;
}

__global__ void __launch_bounds__(kPlanThreads) count_chunks(const __grid_constant__ PlanParams params) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  constexpr int kPerLane = kMinSegment / kPlanThreads;
  const Chunk chunk(params, /*length_known=*/false);
  if (!chunk.exists()) return;
  const auto first =
      static_cast<unsigned>(chunk.begin) + threadIdx.x / 32 * (32 * kPerLane) + threadIdx.x % 32;
  int expiries[kPerLane];
  chunk.keys.load_expiries(first, chunk.end(), expiries);
  __shared__ int num_born;
  if (threadIdx.x == 0) num_born = 0;
  __syncthreads();
  const int born = count_boundaries(chunk.keys, first, expiries, params.scratch.alive + chunk.task.first_id);
  if (threadIdx.x % 32 == 0) atomicAdd(&num_born, born);
  __syncthreads();
  if (threadIdx.x == 0) params.scratch.births[chunk.task.first_id + chunk.task.index] = num_born;
}

// The running sums of alive, of births the sum of all.
__device__ int sum_chunks(const PlanScratch& scratch, std::int64_t first_id, int num_chunks) {
  using Scan = cub::BlockScan<int, kPlanThreads>;
  __shared__ typename Scan::TempStorage storage;
  int alive = 0;
  int born = 0;
  for (int first = 0; first < num_chunks; first += kPlanThreads) {
    const int chunk = first + static_cast<int>(threadIdx.x);
    const std::int64_t id = first_id + chunk;
    int entering = chunk < num_chunks ? scratch.alive[id] : 0;
    int births = chunk < num_chunks ? scratch.births[id] : 0;
    int sum = 0;
    Scan(storage).InclusiveSum(entering, entering, sum);
    __syncthreads();
    if (chunk < num_chunks) scratch.alive[id] = alive + entering;
    alive += sum;
    Scan(storage).ExclusiveSum(births, births, sum);
    __syncthreads();
    if (chunk < num_chunks) scratch.births[id] = born + births;
    born += sum;
  }
  return born;
}

// One CTA per head and sequence.
__global__ void __launch_bounds__(kPlanThreads) arrange_lists(const __grid_constant__ PlanParams params) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const Geometry& geometry = params.inputs.geometry;
  const PlanView& plan = params.plan;
  const PlanScratch& scratch = params.scratch;
  const int head = static_cast<int>(blockIdx.x) % geometry.heads_kv;
  const Sequence sequence = geometry.sequence(static_cast<int>(blockIdx.x) / geometry.heads_kv);
  const HeadKeys keys(params.inputs, sequence, head);
  const std::int64_t first_id =
      head * plan.layout.num_segments + PlanLayout::first_segment(sequence.begin_k, sequence.index);
  const int num_chunks = static_cast<int>(ceil_div(keys.seqlen, kMinSegment));
  const int num_born = sum_chunks(scratch, first_id, num_chunks);
  __syncthreads();
  int length = plan.layout.segment_length;
  if (plan.segment_lengths != nullptr) {
    length = choose_length(scratch.alive + first_id, num_chunks);
    if (threadIdx.x == 0) {
      plan.segment_lengths[static_cast<std::int64_t>(head) * geometry.num_sequences + sequence.index] =
          length;
    }
  }
  const auto born_before = [&](int position) {
    return position < keys.seqlen ? scratch.births[first_id + position / kMinSegment] : num_born;
  };
  const int num_ids = keys.seqlen / kMinSegment + 1;
  for (int index = static_cast<int>(threadIdx.x); index < num_ids; index += kPlanThreads) {
    const PlanSegment segment = plan_segment(keys, index, length);
    int size = 0;
    if (segment.listed) {
      size = min(count_alive(scratch, first_id, segment), length) + born_before(segment.end) -
             born_before(segment.begin);
    }
    plan.segment_sizes[first_id + index] = size;
    scratch.cursors[first_id + index] = 0;
  }
}

struct Leaving {
  PlanEntry entries[kMinSegment];  // the chunk's keys that outlive its segment
  int count;
  int last_expiry;
};

// Adds them to the lists of the later segments, a warp per segment.
__device__ void place_leaving(const PlanParams& params, const Chunk& chunk, const Leaving& leaving) {
  const int lane = threadIdx.x % 32;
  const int length = chunk.length;
  const int first = max(chunk.segment() + 1, chunk.keys.first_seen / length);
  const int last = (leaving.last_expiry - 1) / length;
  for (int index = first + static_cast<int>(threadIdx.x / 32); index <= last; index += kWarps) {
    const PlanList list(params.plan, chunk.task, index, length);
    const int from = plan_segment(chunk.keys, index, length).from(chunk.keys);
    const auto old_lanes = [&](int base) {
      const int n = base + lane;
      return __ballot_sync(kAllLanes, n < leaving.count && leaving.entries[n].expiry > from);
    };
    int count = 0;
    for (int base = 0; base < leaving.count; base += 32) count += __popc(old_lanes(base));
    if (count == 0) continue;
    int place = 0;
    if (lane == 0) place = atomicAdd(params.scratch.cursors + chunk.task.first_id + index, count);
    place = __shfl_sync(kAllLanes, place, 0);
    for (int base = 0; base < leaving.count; base += 32) {
      const unsigned lanes = old_lanes(base);
      const int mine = place + __popc(lanes & ((1u << lane) - 1));
      if ((lanes >> lane & 1) != 0 && mine < length) list.entries[mine] = leaving.entries[base + lane];
      place += __popc(lanes);
    }
  }
}

__global__ void __launch_bounds__(kPlanThreads) place_keys(const __grid_constant__ PlanParams params) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const Chunk chunk(params);
  if (!chunk.exists()) return;
  const HeadKeys& keys = chunk.keys;
  const PlanSegment segment = plan_segment(keys, chunk.segment(), chunk.length);
  const PlanList list(params.plan, chunk.task, segment.index, chunk.length);
  const std::int64_t first_id = chunk.task.first_id;
  const int* births = params.scratch.births + first_id;
  const std::int64_t place =
      static_cast<std::int64_t>(min(count_alive(params.scratch, first_id, segment), chunk.length)) +
      births[chunk.task.index] - births[segment.begin / kMinSegment];
  __shared__ Leaving leaving;
  if (threadIdx.x == 0) leaving.count = leaving.last_expiry = 0;
  __syncthreads();
  for_each_outliving<kMinSegment / kPlanThreads>(
      keys, static_cast<int>(chunk.begin), chunk.end(), keys.first_seen, [&](int n, int key, int expiry) {
        if (segment.listed) list.entries[place + n] = {key, expiry};
        if (expiry <= segment.end) return;
        leaving.entries[atomicAdd(&leaving.count, 1)] = {key, expiry};
        atomicMax(&leaving.last_expiry, expiry);
      });
  __syncthreads();
  if (leaving.count > 0) place_leaving(params, chunk, leaving);
}

// One CTA per run of kPlanThreads * kItems old keys.
template <int kItems>
__global__ void __launch_bounds__(kPlanThreads) sort_runs(const __grid_constant__ PlanParams params) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  constexpr int kRun = kPlanThreads * kItems;
  const Chunk chunk(params);
  if (!chunk.exists() || chunk.begin % kRun != 0) return;
  const PlanSegment segment =
      plan_segment(chunk.keys, static_cast<int>(chunk.begin / chunk.length) + 1, chunk.length);
  const int alive = count_alive(params.scratch, chunk.task.first_id, segment);
  const int num_old = min(alive, chunk.length);
  const int first = static_cast<int>(chunk.begin % chunk.length);
  if (first >= num_old) return;
  const int count = min(num_old - first, kRun);
  const PlanList list(params.plan, chunk.task, segment.index, chunk.length);
  if (alive > chunk.length) {
    for_each_outliving<4>(chunk.keys, 0, segment.begin, segment.from(chunk.keys),
                          [&](int n, int key, int expiry) {
                            if (n >= first && n < first + count) list.entries[n] = {key, expiry};
                          });
  }
  PlanRank ranks[kItems];
  sort_by_rank(chunk.keys, list.entries + first, count, ranks);
  PlanRank* const to = num_old <= kRun ? nullptr
                                       : params.scratch.ranks[0] + first +
                                             first_rank(params, chunk.task, segment.index, chunk.length);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int place = static_cast<int>(threadIdx.x) * kItems + i;
    if (place >= count) break;
    if (num_old <= kRun) {
      list.entries[place] = chunk.keys.entry(ranks[i]);
    } else {
      to[place] = ranks[i];
    }
  }
}

// Takes ranks[round % 2] in runs of run_length, in lists that have more. A key's place is its place in its
// own run and the number of higher ranks in the others. Lists that are in order now go to the plan.
__global__ void __launch_bounds__(kPlanThreads)
    merge_runs(const __grid_constant__ PlanParams params, int round, int run_length) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const Chunk chunk(params);
  if (!chunk.exists()) return;
  const PlanSegment segment =
      plan_segment(chunk.keys, static_cast<int>(chunk.begin / chunk.length) + 1, chunk.length);
  const int num_old = min(count_alive(params.scratch, chunk.task.first_id, segment), chunk.length);
  if (num_old <= run_length) return;
  const std::int64_t merged_length = static_cast<std::int64_t>(run_length) * kMergedRuns;
  const std::int64_t place_of_list = first_rank(params, chunk.task, segment.index, chunk.length);
  const PlanRank* const from = params.scratch.ranks[round % 2] + place_of_list;
  PlanRank* const to = params.scratch.ranks[1 - round % 2] + place_of_list;
  const PlanList list(params.plan, chunk.task, segment.index, chunk.length);
  for (int offset = 0; offset < kMinSegment; offset += kPlanThreads) {
    const int place = static_cast<int>(chunk.begin % chunk.length) + offset + static_cast<int>(threadIdx.x);
    if (place >= num_old) break;
    const PlanRank rank = from[place];
    const std::int64_t begin = place / merged_length * merged_length;
    const std::int64_t end = begin + merged_length < num_old ? begin + merged_length : num_old;
    const int merged = merged_place(from, place, static_cast<int>(begin), static_cast<int>(end), run_length);
    if (num_old <= merged_length) {
      list.entries[merged] = chunk.keys.entry(rank);
    } else {
      to[merged] = rank;
    }
  }
}

// One CTA per kMinSegment entries of the sequence's 2 * seqlen.
__global__ void __launch_bounds__(kPlanThreads) finish_lists(const __grid_constant__ PlanParams params) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const PlanTask task = locate_task(params, blockIdx.x, 2);
  const HeadKeys keys(params.inputs, task.sequence, task.head);
  const int length =
      params.plan.segment_length(task.head, task.sequence.index, params.inputs.geometry.num_sequences);
  const std::int64_t entry = static_cast<std::int64_t>(task.index) * kMinSegment;
  if (task.index < 0 || entry >= 2 * static_cast<std::int64_t>(keys.seqlen)) return;
  const int index =
      !keys.causal || entry < length ? 0 : static_cast<int>((entry - length) / (2ll * length)) + 1;
  const PlanSegment segment = plan_segment(keys, index, length);
  if (!segment.listed) return;
  const std::int64_t size = params.plan.segment_sizes[task.first_id + index];
  const std::int64_t first = entry - PlanLayout::entries_before(index, length);
  const std::int64_t last = first + kMinSegment < size ? first + kMinSegment : size;
  finish_blocks(PlanList(params.plan, task, index, length), keys, segment, static_cast<int>(first),
                static_cast<int>(last));
}

}  // namespace

cudaError_t build_in_passes(const PlanParams& params, const PlanBounds& bounds, cudaStream_t stream) {
  const Geometry& geometry = params.inputs.geometry;
  const std::int64_t num_chunks = geometry.heads_kv * params.plan.layout.num_segments;
  bool follows = false;  // a kernel of this call
  cudaError_t status = cudaMemsetAsync(params.scratch.alive, 0, num_chunks * sizeof(int), stream);
  const auto then = [&](auto kernel, std::int64_t ctas, auto... args) {
    const LaunchConfig config{static_cast<unsigned>(ctas), kPlanThreads, 0, stream, follows};
    if (status == cudaSuccess) status = launch(kernel, config, params, args...);
    follows = true;
  };
  then(count_chunks, num_chunks);
  then(arrange_lists, static_cast<std::int64_t>(geometry.num_sequences) * geometry.heads_kv);
  then(place_keys, num_chunks);
  if (bounds.max_old > 0) then(bounds.run_length == kLongRun ? sort_runs<8> : sort_runs<4>, num_chunks);
  std::int64_t run_length = bounds.run_length;
  for (int round = 0; run_length < bounds.max_old; ++round, run_length *= kMergedRuns) {
    then(merge_runs, num_chunks, round, static_cast<int>(run_length));
  }
  then(finish_lists, 2 * num_chunks);
  return status;
}

}  // namespace flash_dmattn::cuda
