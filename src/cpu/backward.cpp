// The backward pass on the CPU. A task is one segment of one key/value head; it walks the segment's query
// tiles and, per block of kTileN keys that a tile sees, does five products:
//
//   P^T  = exp(K Q^T * scale + bias - lse)        forward: P = softmax(Q K^T * scale + bias)
//   dS^T = P^T * (V dO^T - delta)                 forward: O = P V
//   dV  += P^T dO      dK += dS^T Q      dbias += rowsum(dS^T)      dQ += dS K
//
// (dbias of a key-only bias; that of a dense one is dS, stored here or summed by shared_dbias.cpp.)
// dQ of a row belongs to one tile. The sums of a key belong to every segment that sees it, so each segment
// keeps partial sums of its own; after each wave of segments they are added, one segment after the other in
// their order. So neither threads nor chance nor the size of a wave change the order of a sum.

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/backward.cpp"
#include "cpu/targets.h"

#include <hwy/foreach_target.h>  // must come before highway.h

#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numbers>

#include "core/parallel.h"
#include "cpu/backend.h"
#include "cpu/backward-inl.h"
#include "cpu/backward.h"
#include "cpu/bugs.h"
#include "cpu/reduce_partials.h"
#include "cpu/shared_dbias.h"

HWY_BEFORE_NAMESPACE();
namespace flash_dmattn::cpu::HWY_NAMESPACE {

// What the sums over rows need of a tile beyond load_tile.
template <class T>
void load_panels(const BackwardProblem& problem, const QueryTile& tile, const BackwardScratch<T>& scratch) {
  const Layout& layout = problem.layout;
  const std::int64_t panel_stride = problem.tile_shape.rows * kPanel;
  for (std::int64_t in_group = 0; in_group < tile.group; ++in_group) {
    const std::int64_t head = tile.query_head(in_group);
    const Rows query = query_rows(layout, problem.args.query, tile.sequence, head);
    const Rows dout = query_rows(layout, problem.args.dout, tile.sequence, head);
    const std::int64_t visible_dim =
        injected(Bug::kGroupLosesHead) && tile.group > 1 && in_group == tile.group - 1 ? 0 : layout.head_dim;
    for (std::int64_t i = tile.row_begin; i < tile.row_end; ++i) {
      const std::int64_t r = tile.tile_row(i, in_group);
      const T* query_row = read_row(query, i, layout.head_dim, scratch.row);
      scatter_to_panels(query_row, visible_dim, layout.head_dim, r, panel_stride, scratch.q_panels);
      const T* dout_row = read_row(dout, i, layout.head_dim, scratch.row);
      scatter_to_panels(dout_row, visible_dim, layout.head_dim, r, panel_stride, scratch.dout_panels);
    }
  }
}

// sums[n] += lhs(n, :) * panels for the gathered keys n: dK += dS^T Q and dV += P^T dO.
template <class T>
void accumulate_keys(const BackwardProblem& problem, const T* lhs, const T* panels, std::int64_t num_rows,
                     int num_keys, T* const* sums) {
  for (std::int64_t column = 0; column < problem.tile_shape.head_dim_padded; column += kPanel) {
    const T* panel = panels + column * problem.tile_shape.rows;
    for (int n0 = 0; n0 < num_keys; n0 += kTileM<T>) {
      multiply_add<Lhs::kRowMajor>(lhs + n0 * problem.tile_shape.score_stride,
                                   problem.tile_shape.score_stride, panel, num_rows, sums + n0, column);
    }
  }
}

// dQ += dS K
template <class T>
void accumulate_dq(const BackwardProblem& problem, const BackwardScratch<T>& scratch, std::int64_t num_rows,
                   int num_keys) {
  if (injected(Bug::kDqLosesBlock) && scratch.places[0] == 0) return;
  const std::int64_t stride = problem.tile_shape.head_dim_padded;
  for (std::int64_t column = 0; column < stride; column += kPanel) {
    const T* panel = scratch.key_panels + column * kTileN;
    for (std::int64_t r0 = 0; r0 < num_rows; r0 += kTileM<T>) {
      T* rows[kTileM<T>];
      for (int m = 0; m < kTileM<T>; ++m) rows[m] = scratch.dq + (r0 + m) * stride;
      multiply_add<Lhs::kColMajor>(scratch.dscores + r0, problem.tile_shape.score_stride, panel, num_keys,
                                   rows, column);
    }
  }
  if (injected(Bug::kLowPrecisionDq)) {
    for (std::int64_t k = 0; k < num_rows * stride; k += kLanes<T>) {
      hn::Store(round_to_bfloat16<T>(hn::Load(Tag<T>(), scratch.dq + k)), Tag<T>(), scratch.dq + k);
    }
  }
}

// The gradient of a dense bias where each element belongs to one tile: zeros, until store_dbias finds more.
template <class T>
void clear_dbias(const BackwardProblem& problem, const QueryTile& tile) {
  const TensorView& dbias = problem.args.dbias;
  const std::int64_t heads = problem.layout.tells_heads_apart(dbias) ? tile.group : 1;
  for (std::int64_t in_group = 0; in_group < heads; ++in_group) {
    const Rows rows = dense_rows(problem.layout, dbias, tile.sequence, tile.query_head(in_group));
    for (std::int64_t i = tile.row_begin; i < tile.row_end; ++i) {
      if (rows.unit_stride()) {
        std::memset(rows.row(i), 0, tile.sequence.seqlen_k * dtype_size(rows.dtype));
        continue;
      }
      for (std::int64_t key = 0; key < tile.sequence.seqlen_k; ++key) {
        store_element(T(0), rows.dtype, rows.at(i, key));
      }
    }
  }
}

template <class T>
void store_dbias(const BackwardProblem& problem, const QueryTile& tile, const BackwardScratch<T>& scratch,
                 int num_keys) {
  const TensorView& dbias = problem.args.dbias;
  const std::int64_t heads = problem.layout.tells_heads_apart(dbias) ? tile.group : 1;
  const std::int64_t stride = problem.tile_shape.score_stride;
  for (std::int64_t in_group = 0; in_group < heads; ++in_group) {
    const Rows rows = dense_rows(problem.layout, dbias, tile.sequence, tile.query_head(in_group));
    for (std::int64_t i = tile.row_begin; i < tile.row_end; ++i) {
      const T* dscores = scratch.dscores + tile.tile_row(i, in_group);
      for (int n = 0; n < num_keys; ++n, dscores += stride) {
        store_element(sum_of_heads(dscores, tile.group / heads), rows.dtype,
                      rows.at(i, scratch.entries[n].key));
      }
    }
  }
}

// The five products of one block of keys. `partial` holds the sums of the segment.
template <class T>
void process_block(const BackwardProblem& problem, const QueryTile& tile, const BackwardScratch<T>& scratch,
                   Visibility visibility, int num_keys, T* partial, T* partial_dbias) {
  const BackwardArgs& args = problem.args;
  const PartialShape& shape = problem.partial_shape;
  gather(problem, tile, scratch, num_keys);
  for (int n = 0; n < num_keys + kMaxTileM; ++n) {
    T* sums = n < num_keys ? partial + scratch.places[n] * shape.width() : scratch.unused_row;
    scratch.dk_rows[n] = injected(Bug::kLoseOneDk) && n == 5 ? scratch.unused_row : sums;
    scratch.dv_rows[n] = n < num_keys ? sums + shape.dk_width : scratch.unused_row;
    if (injected(Bug::kLoseOneDv) && n == 3) scratch.dv_rows[n] = scratch.unused_row;
  }
  weigh_block(problem, tile, scratch, visibility, num_keys);
  if (args.dv.present()) {
    accumulate_keys(problem, scratch.weights, scratch.dout_panels, tile.num_rows(), num_keys,
                    scratch.dv_rows);
  }
  const bool need_dbias = args.dbias.present() && problem.dense_dbias != DenseDbias::kShared;
  if (!args.dq.present() && !args.dk.present() && !need_dbias) return;
  differentiate_block(problem, tile, scratch, visibility, num_keys);
  if (args.dk.present()) {
    accumulate_keys(problem, scratch.dscores, scratch.q_panels, tile.num_rows(), num_keys, scratch.dk_rows);
  }
  if (args.dq.present()) accumulate_dq(problem, scratch, tile.num_rows(), num_keys);
  if (problem.dense_dbias == DenseDbias::kPerTile) {
    store_dbias(problem, tile, scratch, num_keys);
  } else if (need_dbias) {
    for (int n = 0; n < num_keys; ++n) {
      if (injected(Bug::kLoseOneDbias) && n == 2) continue;
      T sum = 0;
      for (int lane = 0; lane < kPanel; ++lane) sum += scratch.dbias[n * kPanel + lane];
      partial_dbias[scratch.places[n]] += sum;
    }
  }
}

template <class T>
void store_dq(const BackwardProblem& problem, const QueryTile& tile, const BackwardScratch<T>& scratch) {
  for (std::int64_t in_group = 0; in_group < tile.group; ++in_group) {
    const Rows dq = query_rows(problem.layout, problem.args.dq, tile.sequence, tile.query_head(in_group));
    for (std::int64_t i = tile.row_begin; i < tile.row_end; ++i) {
      const T* row = scratch.dq + tile.tile_row(i, in_group) * problem.tile_shape.head_dim_padded;
      // A row without keys: its sums may be 0 times a key that is not finite.
      const bool empty = scratch.lse[tile.tile_row(i, in_group)] == std::numeric_limits<T>::infinity();
      if (empty) std::fill_n(scratch.row, problem.layout.head_dim, T(0));
      store_row(empty ? scratch.row : row, static_cast<T>(problem.args.scale), problem.layout.head_dim, dq,
                i);
    }
  }
}

template <class T>
void backward_segment(const BackwardProblem& problem, const SegmentItem& item, int worker) {
  const std::int64_t sequence_index = item.head_index / problem.layout.heads_kv;
  const Sequence sequence = problem.layout.sequence(sequence_index);
  const PlanShape plan_shape = problem.plans.shape(sequence);
  const Plan& plan = problem.plans[item.head_index];
  const Segment& segment = *item.segment;
  const PartialShape& partial_shape = problem.partial_shape;
  const std::int64_t num_keys_listed = segment.list_end - segment.list_begin;
  T* partial = static_cast<T*>(problem.partial) + item.partial_begin;
  std::fill_n(partial, partial_shape.elements(num_keys_listed), T(0));
  T* partial_dbias = partial + num_keys_listed * partial_shape.width();

  Arena arena(Workspace{problem.scratch + worker * problem.scratch_bytes, problem.scratch_bytes});
  const BackwardScratch<T> scratch(problem.tile_shape, has_dense(problem.args), arena);
  for (std::int64_t row = segment.row_begin; row < segment.row_end;) {
    const std::int64_t row_end = plan_shape.tile_row_begin(plan_shape.tile_of_row(row) + 1);
    const QueryTile tile{.sequence = sequence,
                         .kv_head = item.head_index % problem.layout.heads_kv,
                         .group = problem.layout.group(),
                         .row_begin = row,
                         .row_end = row_end,
                         .offset = plan_shape.offset()};
    load_tile(problem, tile, scratch);
    load_panels(problem, tile, scratch);
    std::fill_n(scratch.dq, tile.num_rows() * problem.tile_shape.head_dim_padded, T(0));
    TileKeys keys(plan, segment, plan_shape, row, row_end);
    if (has_dense(problem.args)) {
      if (problem.dense_dbias == DenseDbias::kPerTile) clear_dbias<T>(problem, tile);
      DenseKeys<T> dense(problem.args, problem.layout, problem.tile_shape, tile, keys, scratch);
      while (const int num_keys = dense.next()) {
        process_block(problem, tile, scratch, Visibility::kDense, num_keys, partial, partial_dbias);
      }
    } else {
      const auto bias = problem.layout.per_key<const T>(problem.args.bias, sequence, tile.kv_head);
      bool masked = false;
      while (const int num_keys = keys.next(bias, kTileN, scratch.entries, scratch.places, &masked)) {
        const Visibility visibility = masked ? Visibility::kIntervals : Visibility::kAll;
        process_block(problem, tile, scratch, visibility, num_keys, partial, partial_dbias);
      }
    }
    if (problem.args.dq.present()) store_dq(problem, tile, scratch);
    row = row_end;
  }
}

void backward_segment_float(const BackwardProblem& problem, const SegmentItem& item, int worker) {
  backward_segment<float>(problem, item, worker);
}
void backward_segment_double(const BackwardProblem& problem, const SegmentItem& item, int worker) {
  backward_segment<double>(problem, item, worker);
}

}  // namespace flash_dmattn::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace flash_dmattn::cpu {
namespace {

HWY_EXPORT(backward_segment_float);
HWY_EXPORT(backward_segment_double);

// The segments of a wave take this much for each worker, or more if there is only one of them.
constexpr std::int64_t kWaveBytesPerWorker = std::int64_t{16} << 20;

// Whether the segments' sums can be added up in the gradient itself.
template <class T>
bool sums_in_place(const Layout& layout, const TensorView& gradient) {
  const int column_axis = layout.packed ? 2 : 3;
  return dtype_size(gradient.dtype) == sizeof(T) &&
         (gradient.stride[column_axis] == 1 || layout.head_dim == 1);
}

// The one cut of the workspace: measures it when the arena has no memory.
template <class T>
BackwardProblem make_problem(const BackwardArgs& args, int num_workers, Arena& arena) {
  const Layout layout = make_layout(args);
  const TileShape tile_shape(layout, kBackwardRows);
  const PartialShape partial_shape{.dk_width = args.dk.present() ? tile_shape.head_dim_padded : 0,
                                   .dv_width = args.dv.present() ? tile_shape.head_dim_padded : 0,
                                   .dbias_width = args.dbias.present() && !is_dense(args.bias) ? 1 : 0};
  Arena worker;
  BackwardScratch<T>(tile_shape, has_dense(args), worker);
  Plans plans(layout, args.causal, args.expiry.present(), tile_shape.positions, arena);
  // A list names a key once; the lists of one head together name it at most kMaxEntriesPerKey times.
  const std::int64_t longest = partial_shape.elements(layout.max_seqlen_k);
  const std::int64_t all = partial_shape.elements(kMaxEntriesPerKey * layout.total_k * layout.heads_kv) +
                           plans.max_segments() * kPanel;
  const std::int64_t wave = std::min<std::int64_t>(all, num_workers * kWaveBytesPerWorker / sizeof(T));
  const std::int64_t sum_elements = layout.total_k * layout.heads_kv * tile_shape.head_dim_padded;
  const auto take_sum = [&](const TensorView& gradient) -> void* {
    return gradient.present() && !sums_in_place<T>(layout, gradient) ? arena.take<T>(sum_elements) : nullptr;
  };
  std::byte* scratch = arena.take<std::byte>(worker.bytes(), num_workers);
  T* partial = arena.take<T>(std::max(longest, wave));
  SegmentItem* items = arena.take<SegmentItem>(plans.max_segments());
  void* dk_sum = take_sum(args.dk);
  void* dv_sum = take_sum(args.dv);
  const DenseDbias dense_dbias = find_dense_dbias(args, layout);
  T* shared_dbias = nullptr;
  if (dense_dbias == DenseDbias::kShared) {
    shared_dbias = arena.take<T>(num_workers *
                                 SharedDbias(args, layout, plans.shape(layout.sequence(0))).sums_of_worker());
  }
  return {args, layout,  tile_shape, partial_shape, plans,  worker.bytes(), scratch,
          wave, partial, items,      dk_sum,        dv_sum, dense_dbias,    shared_dbias};
}

template <class T>
void run(const BackwardArgs& args, const ParallelFor& parallel_for, const Workspace& workspace,
         void (*run_segment)(const BackwardProblem&, const SegmentItem&, int)) {
  Arena arena(workspace);
  BackwardProblem problem = make_problem<T>(args, parallel_for.num_workers, arena);
  problem.plans.build(args.expiry, parallel_for);
  clear_key_sums<T>(problem, parallel_for);

  std::int64_t num_items = 0;
  std::int64_t used = 0;
  const auto run_wave = [&] {
    for_each_task(parallel_for, num_items,
                  [&](std::int64_t task, int worker) { run_segment(problem, problem.items[task], worker); });
    add_partials<T>(problem, num_items, parallel_for);
    num_items = used = 0;
  };
  const bool all_shared = problem.dense_dbias == DenseDbias::kShared && !args.dq.present() &&
                          !args.dk.present() && !args.dv.present();
  const std::int64_t heads_read = problem.layout.heads_q == 0 || all_shared ? 0 : problem.plans.num_heads();
  for (std::int64_t head_index = 0; head_index < heads_read; ++head_index) {
    const Plan& plan = problem.plans[head_index];
    for (std::int64_t s = 0; s < plan.num_segments; ++s) {
      const Segment& segment = plan.segments[s];
      const std::int64_t elements = problem.partial_shape.elements(segment.list_end - segment.list_begin);
      if (num_items > 0 && used + elements > problem.wave_elements) run_wave();
      problem.items[num_items++] = {head_index, &segment, used};
      used += elements;
    }
  }
  run_wave();
  store_key_sums<T>(problem, parallel_for);
  if (problem.layout.heads_q == 0) {
    if (problem.dense_dbias != DenseDbias::kNone) fill_with_zeros(args.dbias);
  } else if (problem.dense_dbias == DenseDbias::kShared) {
    sum_shared_dbias<T>(problem, parallel_for);
  }
}

}  // namespace

std::string backward_why_not(const BackwardArgs& args, const Target& /*target*/) {
  return args.plan.present() ? "takes no plan" : "";
}

std::size_t backward_workspace_bytes(const BackwardArgs& args, const Target& target) {
  Arena arena;
  const int num_workers = target.parallel_for.num_workers;
  if (args.query.dtype == DType::kFloat64) {
    make_problem<double>(args, num_workers, arena);
  } else {
    make_problem<float>(args, num_workers, arena);
  }
  return arena.bytes();
}

void backward(const BackwardArgs& args, const Target& target, const Workspace& workspace) {
  if (args.query.dtype == DType::kFloat64) {
    run<double>(args, target.parallel_for, workspace, HWY_DYNAMIC_DISPATCH(backward_segment_double));
  } else {
    run<float>(args, target.parallel_for, workspace, HWY_DYNAMIC_DISPATCH(backward_segment_float));
  }
}

}  // namespace flash_dmattn::cpu
#endif  // HWY_ONCE
