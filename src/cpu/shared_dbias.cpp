#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/shared_dbias.cpp"
#include "cpu/targets.h"

#include <hwy/foreach_target.h>  // must come before highway.h

#include <hwy/highway.h>

#include <algorithm>

#include "core/parallel.h"
#include "cpu/backward-inl.h"
#include "cpu/bugs.h"
#include "cpu/shared_dbias.h"

HWY_BEFORE_NAMESPACE();
namespace flash_dmattn::cpu::HWY_NAMESPACE {

// sums[position][head] += what the rows of one tile add to one key.
template <class T>
void add_tile(const SharedDbias& cut, const QueryTile& tile, const T* dscores, T* sums) {
  const std::int64_t width = tile.group / cut.heads;
  for (std::int64_t head = 0; head < cut.heads; ++head) {
    if (cut.shares_tiles) {
      T sum = 0;
      for (std::int64_t i = tile.row_begin; i < tile.row_end; ++i) {
        sum += sum_of_heads(dscores + tile.tile_row(i, head * width), width);
      }
      sums[head] += sum;
    } else {
      for (std::int64_t i = tile.row_begin; i < tile.row_end; ++i) {
        sums[(i - tile.row_begin) * cut.heads + head] +=
            sum_of_heads(dscores + tile.tile_row(i, head * width), width);
      }
    }
  }
}

// Adds the dS of one tile to sums[key - keys.begin][position][head].
template <class T>
void add_dscores(const BackwardProblem& problem, const SharedDbias& cut, const QueryTile& tile, TileKeys keys,
                 Range range, const BackwardScratch<T>& scratch, T* sums) {
  keys.restrict_to(range.begin, range.end);
  DenseKeys<T> dense(problem.args, problem.layout, problem.tile_shape, tile, keys, scratch);
  bool loaded = false;
  while (const int num_keys = dense.next()) {
    if (!loaded) load_tile(problem, tile, scratch);
    loaded = true;
    gather(problem, tile, scratch, num_keys);
    weigh_block(problem, tile, scratch, Visibility::kDense, num_keys);
    differentiate_block(problem, tile, scratch, Visibility::kDense, num_keys);
    for (int n = 0; n < num_keys; ++n) {
      add_tile(cut, tile, scratch.dscores + n * problem.tile_shape.score_stride,
               sums + (scratch.entries[n].key - range.begin) * cut.positions * cut.heads);
    }
  }
}

template <class T>
void store_sums(const BackwardProblem& problem, const SharedDbias& cut, const SharedDbias::Task& task,
                const T* sums) {
  const Sequence sequence = problem.layout.sequence(task.sequences.begin);
  for (std::int64_t head = 0; head < cut.heads; ++head) {
    const std::int64_t query_head = task.kv_heads.begin * problem.layout.group() + head;
    const Rows dbias = dense_rows(problem.layout, problem.args.dbias, sequence, query_head);
    for (std::int64_t i = task.rows.begin; i < task.rows.end; ++i) {
      const T* sum = sums + (i - task.rows.begin) * cut.heads + head;
      for (std::int64_t key = task.keys.begin; key < task.keys.end; ++key, sum += cut.positions * cut.heads) {
        store_element(*sum, dbias.dtype, dbias.at(i, key));
      }
    }
  }
}

template <class T>
void sum_task(const BackwardProblem& problem, const SharedDbias& cut, std::int64_t index, int worker) {
  const SharedDbias::Task task = cut.task(index);
  Arena arena(Workspace{problem.scratch + worker * problem.scratch_bytes, problem.scratch_bytes});
  const BackwardScratch<T> scratch(problem.tile_shape, true, arena);
  T* sums = static_cast<T*>(problem.shared_dbias) + worker * cut.sums_of_worker();
  std::fill_n(sums, cut.sums_of_worker(), T(0));
  for (std::int64_t s = task.sequences.begin; s < task.sequences.end; ++s) {
    const Sequence sequence = problem.layout.sequence(s);
    for (std::int64_t kv_head = task.kv_heads.begin; kv_head < task.kv_heads.end; ++kv_head) {
      const Plan& plan = problem.plans[s * problem.layout.heads_kv + kv_head];
      for (std::int64_t t = task.tiles.begin; t < task.tiles.end; ++t) {
        const QueryTile tile{.sequence = sequence,
                             .kv_head = kv_head,
                             .group = problem.layout.group(),
                             .row_begin = cut.plan_shape.tile_row_begin(t),
                             .row_end = cut.plan_shape.tile_row_begin(t + 1),
                             .offset = cut.plan_shape.offset()};
        const Segment& segment = plan.segment_of_row(tile.row_begin);
        if (!(injected(Bug::kLoseOneSharer) && s + kv_head + t == 0)) {
          add_dscores(problem, cut, tile,
                      TileKeys(plan, segment, cut.plan_shape, tile.row_begin, tile.row_end), task.keys,
                      scratch, sums);
        }
      }
    }
  }
  store_sums(problem, cut, task, sums);
}

void sum_task_float(const BackwardProblem& problem, const SharedDbias& cut, std::int64_t index, int worker) {
  sum_task<float>(problem, cut, index, worker);
}
void sum_task_double(const BackwardProblem& problem, const SharedDbias& cut, std::int64_t index, int worker) {
  sum_task<double>(problem, cut, index, worker);
}

}  // namespace flash_dmattn::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace flash_dmattn::cpu {
namespace {

HWY_EXPORT(sum_task_float);
HWY_EXPORT(sum_task_double);

std::int64_t count(Range range) { return range.end - range.begin; }

// What a task walks of an axis: all of it, or its own place.
Range walked(bool shared, Range all, std::int64_t place) { return shared ? all : Range{place, place + 1}; }

}  // namespace

SharedDbias::SharedDbias(const BackwardArgs& args, const Layout& layout, const PlanShape& shape)
    : plan_shape(shape),
      sequences{0, layout.num_sequences},
      kv_heads{0, layout.heads_kv},
      shares_sequences(args.bias.shape[0] == 1),
      shares_kv_heads(args.bias.shape[1] == 1),
      shares_tiles(args.bias.shape[2] == 1),
      heads(layout.tells_heads_apart(args.bias) ? layout.group() : 1),
      positions(shares_tiles ? 1 : shape.tile_positions) {}

std::int64_t SharedDbias::num_tasks() const {
  const std::int64_t chunks = round_up(plan_shape.seqlen_k, kSharedDbiasKeys) / kSharedDbiasKeys;
  return (shares_sequences ? 1 : count(sequences)) * (shares_kv_heads ? 1 : count(kv_heads)) *
         (shares_tiles ? 1 : plan_shape.num_tiles()) * chunks;
}

SharedDbias::Task SharedDbias::task(std::int64_t index) const {
  // The place of the task on an axis of this many tasks.
  const auto place = [&index](std::int64_t size) {
    const std::int64_t result = index % size;
    index /= size;
    return result;
  };
  const std::int64_t key_begin =
      place(round_up(plan_shape.seqlen_k, kSharedDbiasKeys) / kSharedDbiasKeys) * kSharedDbiasKeys;
  const std::int64_t tile = shares_tiles ? 0 : place(plan_shape.num_tiles());
  const std::int64_t kv_head = shares_kv_heads ? 0 : place(count(kv_heads));
  return {.sequences = walked(shares_sequences, sequences, index),
          .kv_heads = walked(shares_kv_heads, kv_heads, kv_head),
          .tiles = walked(shares_tiles, {0, plan_shape.num_tiles()}, tile),
          .keys = {key_begin, std::min(key_begin + kSharedDbiasKeys, plan_shape.seqlen_k)},
          .rows = shares_tiles ? Range{0, 1}
                               : Range{plan_shape.tile_row_begin(tile), plan_shape.tile_row_begin(tile + 1)}};
}

template <class T>
void sum_shared_dbias(const BackwardProblem& problem, const ParallelFor& parallel_for) {
  const SharedDbias cut(problem.args, problem.layout, problem.plans.shape(problem.layout.sequence(0)));
  const auto sum = sizeof(T) == sizeof(float) ? HWY_DYNAMIC_DISPATCH(sum_task_float)
                                              : HWY_DYNAMIC_DISPATCH(sum_task_double);
  for_each_task(parallel_for, cut.num_tasks(),
                [&](std::int64_t index, int worker) { sum(problem, cut, index, worker); });
}

template void sum_shared_dbias<float>(const BackwardProblem&, const ParallelFor&);
template void sum_shared_dbias<double>(const BackwardProblem&, const ParallelFor&);

}  // namespace flash_dmattn::cpu
#endif  // HWY_ONCE
