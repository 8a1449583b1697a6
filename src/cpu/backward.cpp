// The backward pass on the CPU. A task is one segment of one key/value head; it walks the segment's query
// tiles and, per block of kTileN keys that a tile sees, does five products:
//
//   P^T  = exp(K Q^T * scale + bias - lse)        forward: P = softmax(Q K^T * scale + bias)
//   dS^T = P^T * (V dO^T - delta)                 forward: O = P V
//   dV  += P^T dO      dK += dS^T Q      dbias += rowsum(dS^T)      dQ += dS K
//
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
#include <limits>
#include <numbers>

#include "core/parallel.h"
#include "cpu/backend.h"
#include "cpu/backward.h"
#include "cpu/bugs.h"
#include "cpu/reduce_partials.h"
#include "cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace flash_dmattn::cpu::HWY_NAMESPACE {

// Rows past the tile's end have lse = +inf and dout = 0: their weights and gradients are 0.
template <class T>
void start_tile(const BackwardProblem& problem, const QueryTile& tile, const BackwardScratch<T>& scratch) {
  const BackwardArgs& args = problem.args;
  const Layout& layout = problem.layout;
  load_transposed(layout, args.query, tile, scratch.row, scratch.q_transposed);
  load_transposed(layout, args.dout, tile, scratch.row, scratch.dout_transposed);
  load_positions(tile, scratch.position);
  std::fill_n(scratch.lse, tile.num_panels() * kPanel, std::numeric_limits<T>::infinity());
  std::fill_n(scratch.delta, tile.num_panels() * kPanel, T(0));
  std::fill_n(scratch.dq, tile.num_rows() * problem.tile_shape.head_dim_padded, T(0));
  const std::int64_t panel_stride = problem.tile_shape.rows * kPanel;
  for (std::int64_t in_group = 0; in_group < tile.group; ++in_group) {
    const std::int64_t head = tile.query_head(in_group);
    const Rows query = query_rows(layout, args.query, tile.sequence, head);
    const Rows out = query_rows(layout, args.out, tile.sequence, head);
    const Rows dout = query_rows(layout, args.dout, tile.sequence, head);
    const auto lse = layout.per_query<const T>(args.lse, tile.sequence, head);
    const auto dlse = layout.per_query<const T>(args.dlse, tile.sequence, head);
    const std::int64_t visible_dim =
        injected(Bug::kGroupLosesHead) && tile.group > 1 && in_group == tile.group - 1 ? 0 : layout.head_dim;
    for (std::int64_t i = tile.row_begin; i < tile.row_end; ++i) {
      const std::int64_t r = tile.tile_row(i, in_group);
      const T* query_row = read_row(query, i, layout.head_dim, scratch.row);
      scatter_to_panels(query_row, visible_dim, layout.head_dim, r, panel_stride, scratch.q_panels);
      const T* dout_row = read_row(dout, i, layout.head_dim, scratch.row);
      scatter_to_panels(dout_row, visible_dim, layout.head_dim, r, panel_stride, scratch.dout_panels);
      if (lse[i] == -std::numeric_limits<T>::infinity()) continue;
      const T* out_row = read_row(out, i, layout.head_dim, scratch.out_row);
      const T row_delta = dot(dout_row, out_row, layout.head_dim);
      const bool with_dlse = dlse.present() && !injected(Bug::kDlseIgnored);
      scratch.delta[r] = row_delta * T(injected(Bug::kDeltaOff) ? 1.01 : 1) - (with_dlse ? dlse[i] : T(0));
      scratch.lse[r] = (lse[i] + T(injected(Bug::kBackwardLseOff) ? 1e-3 : 0)) * std::numbers::log2e_v<T>;
    }
  }
}

template <class T>
void gather(const BackwardProblem& problem, const QueryTile& tile, const BackwardScratch<T>& scratch,
            int num_keys) {
  const std::int64_t head_dim = problem.layout.head_dim;
  const Rows key = key_rows(problem.layout, problem.args.key, tile.sequence, tile.kv_head);
  const Rows value = key_rows(problem.layout, problem.args.value, tile.sequence, tile.kv_head);
  for_each_gathered(key, value, head_dim, scratch.entries, num_keys, [&](int n, std::int32_t j) {
    T* key_row = scratch.keys + n * head_dim;
    load_row(key, j, head_dim, key_row);
    scatter_to_panels(key_row, head_dim, head_dim, n, kTileN * kPanel, scratch.key_panels);
    load_row(value, j, head_dim, scratch.values + n * head_dim);
  });
  const auto bias = problem.layout.per_key<const T>(problem.args.bias, tile.sequence, tile.kv_head);
  gather_bias(bias, scratch.entries, num_keys, scratch.bias);
}

// P^T of 16 rows and all keys of the block.
template <class T, bool kMasked>
void weight_panel(const TileShape& shape, const BackwardScratch<T>& scratch, std::int64_t panel, T scale_log2,
                  int num_keys) {
  constexpr Tag<T> d;
  const T* q_panel = scratch.q_transposed + panel * shape.head_dim * kPanel;
  const PanelVisibility<T> visibility(scratch.position + panel * kPanel);
  const Vec<T> scale = hn::Set(d, scale_log2);
  Vec<T> lse[kVecs<T>];
  for (int v = 0; v < kVecs<T>; ++v) lse[v] = hn::Load(d, scratch.lse + panel * kPanel + v * kLanes<T>);
  for (int n0 = 0; n0 < num_keys; n0 += kTileM<T>) {
    Vec<T> acc[kTileM<T>][kVecs<T>];
    multiply<Lhs::kRowMajor>(scratch.keys + n0 * shape.head_dim, shape.head_dim, q_panel, shape.head_dim,
                             acc);
    const int valid = HWY_MIN(kTileM<T>, num_keys - n0);
    T* HWY_RESTRICT row = scratch.weights + n0 * shape.score_stride + panel * kPanel;
#pragma GCC unroll 16
    for (int m = 0; m < kTileM<T>; ++m, row += shape.score_stride) {
      if (m >= valid) break;
      const Vec<T> bias = hn::Set(d, scratch.bias[n0 + m]);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs<T>; ++v) {
        Vec<T> logit = hn::MulAdd(acc[m][v], scale, bias);
        if constexpr (kMasked) logit = visibility.mask(logit, v, scratch.entries[n0 + m]);
        hn::Store(exp2_nonpositive<T>(hn::Sub(logit, lse[v])), d, row + v * kLanes<T>);
      }
    }
  }
}

// dS^T of 16 rows and all keys of the block, and its sums over the rows.
template <class T>
void dscore_panel(const TileShape& shape, const BackwardScratch<T>& scratch, std::int64_t panel,
                  int num_keys) {
  constexpr Tag<T> d;
  const T* dout_panel = scratch.dout_transposed + panel * shape.head_dim * kPanel;
  Vec<T> delta[kVecs<T>];
  for (int v = 0; v < kVecs<T>; ++v) delta[v] = hn::Load(d, scratch.delta + panel * kPanel + v * kLanes<T>);
  for (int n0 = 0; n0 < num_keys; n0 += kTileM<T>) {
    Vec<T> acc[kTileM<T>][kVecs<T>];
    multiply<Lhs::kRowMajor>(scratch.values + n0 * shape.head_dim, shape.head_dim, dout_panel, shape.head_dim,
                             acc);
    const int valid = HWY_MIN(kTileM<T>, num_keys - n0);
    const std::int64_t place = n0 * shape.score_stride + panel * kPanel;
#pragma GCC unroll 16
    for (int m = 0; m < kTileM<T>; ++m) {
      if (m >= valid) break;
#pragma GCC unroll 8
      for (int v = 0; v < kVecs<T>; ++v) {
        const std::int64_t lanes = place + m * shape.score_stride + v * kLanes<T>;
        const Vec<T> dscore = hn::Mul(hn::Load(d, scratch.weights + lanes), hn::Sub(acc[m][v], delta[v]));
        hn::Store(dscore, d, scratch.dscores + lanes);
        T* sum = scratch.dbias + (n0 + m) * kPanel + v * kLanes<T>;
        hn::Store(panel == 0 ? dscore : hn::Add(hn::Load(d, sum), dscore), d, sum);
      }
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

// The five products of one block of keys. `partial` holds the sums of the segment.
template <class T>
void process_block(const BackwardProblem& problem, const QueryTile& tile, const BackwardScratch<T>& scratch,
                   bool masked, int num_keys, T* partial, T* partial_dbias) {
  const BackwardArgs& args = problem.args;
  const PartialShape& shape = problem.partial_shape;
  gather(problem, tile, scratch, num_keys);
  for (int n = 0; n < num_keys + kMaxTileM; ++n) {
    T* sums = n < num_keys ? partial + scratch.places[n] * shape.width() : scratch.unused_row;
    scratch.dk_rows[n] = injected(Bug::kLoseOneDk) && n == 5 ? scratch.unused_row : sums;
    scratch.dv_rows[n] = n < num_keys ? sums + shape.dk_width : scratch.unused_row;
    if (injected(Bug::kLoseOneDv) && n == 3) scratch.dv_rows[n] = scratch.unused_row;
  }
  const T scale_log2 = static_cast<T>(args.scale * std::numbers::log2e);
  const auto weigh = masked ? weight_panel<T, true> : weight_panel<T, false>;
  for (std::int64_t panel = 0; panel < tile.num_panels(); ++panel) {
    weigh(problem.tile_shape, scratch, panel, scale_log2, num_keys);
  }
  if (args.dv.present()) {
    accumulate_keys(problem, scratch.weights, scratch.dout_panels, tile.num_rows(), num_keys,
                    scratch.dv_rows);
  }
  if (!args.dq.present() && !args.dk.present() && !args.dbias.present()) return;
  for (std::int64_t panel = 0; panel < tile.num_panels(); ++panel) {
    dscore_panel(problem.tile_shape, scratch, panel, num_keys);
  }
  if (args.dk.present()) {
    accumulate_keys(problem, scratch.dscores, scratch.q_panels, tile.num_rows(), num_keys, scratch.dk_rows);
  }
  if (args.dq.present()) accumulate_dq(problem, scratch, tile.num_rows(), num_keys);
  if (args.dbias.present()) {
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
  const BackwardScratch<T> scratch(problem.tile_shape, arena);
  for (std::int64_t row = segment.row_begin; row < segment.row_end;) {
    const std::int64_t row_end = plan_shape.tile_row_begin(plan_shape.tile_of_row(row) + 1);
    const QueryTile tile{.sequence = sequence,
                         .kv_head = item.head_index % problem.layout.heads_kv,
                         .group = problem.layout.group(),
                         .row_begin = row,
                         .row_end = row_end,
                         .offset = plan_shape.offset()};
    start_tile(problem, tile, scratch);
    TileKeys keys(plan, segment, plan_shape, row, row_end);
    const auto bias = problem.layout.per_key<const T>(problem.args.bias, sequence, tile.kv_head);
    bool masked = false;
    while (const int num_keys = keys.next(bias, kTileN, scratch.entries, scratch.places, &masked)) {
      process_block(problem, tile, scratch, masked, num_keys, partial, partial_dbias);
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
                                   .dbias_width = args.dbias.present() ? 1 : 0};
  Arena worker;
  BackwardScratch<T>(tile_shape, worker);
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
  std::byte* scratch = arena.take<std::byte>(worker.bytes() * num_workers);
  T* partial = arena.take<T>(std::max(longest, wave));
  SegmentItem* items = arena.take<SegmentItem>(plans.max_segments());
  void* dk_sum = take_sum(args.dk);
  void* dv_sum = take_sum(args.dv);
  return {args,    layout, tile_shape, partial_shape, plans,  worker.bytes(),
          scratch, wave,   partial,    items,         dk_sum, dv_sum};
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
  const std::int64_t heads_read = problem.layout.heads_q == 0 ? 0 : problem.plans.num_heads();
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
}

}  // namespace

std::string backward_why_not(const BackwardArgs& args, const Target& /*target*/) {
  if (is_dense(args.bias) || args.mask.present()) return "takes no mask or bias with a query axis";
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
