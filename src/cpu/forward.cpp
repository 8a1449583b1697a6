// The forward pass on the CPU. A task is one query tile of one key/value head: the rows of a few positions
// and all heads of the group, which share their keys. Per block of kTileN keys that the tile sees:
//
//   gather   keys and values of the block, packed in the arithmetic type
//   scores   S^T = K Q^T, scaled, biased and masked on the way out of the registers
//   softmax  the online softmax in units of log 2: running maximum and sum of each row
//   output   O = O * rescale + P V
//
// A row that does not see a key gives it a weight of exactly 0, and the sums of a row run over its keys in
// ascending order, so neither the tile nor the block that a row shares with others changes its bits. Only
// under a mask or a dense bias does it matter to the blocks, and so to last bits, what neighbours see.

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/forward.cpp"
#include "cpu/targets.h"

#include <hwy/foreach_target.h>  // must come before highway.h

#include <hwy/highway.h>

#include <cmath>
#include <limits>
#include <numbers>

#include "core/parallel.h"
#include "cpu/backend.h"
#include "cpu/bugs.h"
#include "cpu/dense-inl.h"
#include "cpu/forward.h"
#include "cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace flash_dmattn::cpu::HWY_NAMESPACE {

template <class T>
void start_tile(const ForwardProblem& problem, const QueryTile& tile, const ForwardScratch<T>& scratch) {
  load_transposed(problem.layout, problem.args.query, tile, scratch.row, scratch.q_panels);
  load_positions(tile, scratch.position);
  std::fill_n(scratch.row_max, tile.num_panels() * kPanel, -std::numeric_limits<T>::infinity());
  std::fill_n(scratch.row_sum, tile.num_panels() * kPanel, T(0));
  std::fill_n(scratch.out, tile.num_rows() * problem.tile_shape.head_dim_padded, T(0));
}

template <class T>
void gather(const ForwardProblem& problem, const QueryTile& tile, const ForwardScratch<T>& scratch,
            int num_keys) {
  const std::int64_t head_dim = problem.layout.head_dim;
  const std::int64_t kv_head =
      injected(Bug::kWrongHead) ? (tile.kv_head + 1) % problem.layout.heads_kv : tile.kv_head;
  const Rows key = key_rows(problem.layout, problem.args.key, tile.sequence, kv_head);
  const Rows value = key_rows(problem.layout, problem.args.value, tile.sequence, kv_head);
  for_each_gathered(key, value, head_dim, scratch.entries, num_keys, [&](int n, std::int32_t j) {
    load_row(key, j, head_dim, scratch.keys + n * head_dim);
    const T* value_row = read_row(value, j, head_dim, scratch.row);
    scatter_to_panels(value_row, head_dim, head_dim, n, kTileN * kPanel, scratch.value_panels);
  });
  const auto bias = key_only<const T>(problem.layout, problem.args.bias, tile.sequence, kv_head);
  gather_bias(bias, scratch.entries, num_keys, scratch.bias);
}

// Logits of 16 rows and all keys of the block, and the rows' largest.
template <class T, Visibility kVisibility>
void score_panel(const TileShape& shape, const ForwardScratch<T>& scratch, std::int64_t panel, T scale_log2,
                 int num_keys, T* HWY_RESTRICT block_max) {
  constexpr Tag<T> d;
  const T* q_panel = scratch.q_panels + panel * shape.head_dim * kPanel;
  const PanelVisibility<T> visibility(scratch.position + panel * kPanel);
  const Vec<T> scale = hn::Set(d, scale_log2);
  Vec<T> largest[kVecs<T>];
  for (int v = 0; v < kVecs<T>; ++v) largest[v] = hn::Set(d, -std::numeric_limits<T>::infinity());
  for (int n0 = 0; n0 < num_keys; n0 += kTileM<T>) {
    Vec<T> acc[kTileM<T>][kVecs<T>];
    multiply<Lhs::kRowMajor>(scratch.keys + n0 * shape.head_dim, shape.head_dim, q_panel, shape.head_dim,
                             acc);
    // The last register tile may reach past num_keys, where the gathered keys are those of an earlier block.
    const int valid = HWY_MIN(kTileM<T>, num_keys - n0);
    T* HWY_RESTRICT row = scratch.scores + n0 * shape.score_stride + panel * kPanel;
#pragma GCC unroll 16
    for (int m = 0; m < kTileM<T>; ++m, row += shape.score_stride) {
      if (m >= valid) break;
      const Vec<T> bias = hn::Set(d, scratch.bias[n0 + m]);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs<T>; ++v) {
        Vec<T> logit = hn::MulAdd(acc[m][v], scale, bias);
        if constexpr (kVisibility == Visibility::kIntervals) {
          logit = visibility.mask(logit, v, scratch.entries[n0 + m]);
        }
        if constexpr (kVisibility == Visibility::kDense) {
          const T* addend = scratch.dense.addend + (row - scratch.scores) + v * kLanes<T>;
          logit = dense_logit<T>(acc[m][v], scale, hn::Load(d, addend));
        }
        hn::Store(logit, d, row + v * kLanes<T>);
        largest[v] = hn::Max(largest[v], logit);
      }
    }
  }
  for (int v = 0; v < kVecs<T>; ++v) hn::Store(largest[v], d, block_max + v * kLanes<T>);
}

// Turns the logits of 16 rows into weights relative to the rows' running maximum.
template <class T>
void softmax_panel(const ForwardScratch<T>& scratch, std::int64_t panel, std::int64_t score_stride,
                   int num_keys, const T* HWY_RESTRICT block_max) {
  constexpr Tag<T> d;
  const Vec<T> minus_infinity = hn::Set(d, -std::numeric_limits<T>::infinity());
  for (int v = 0; v < kVecs<T>; ++v) {
    const std::int64_t r = panel * kPanel + v * kLanes<T>;
    const Vec<T> old_max = hn::Load(d, scratch.row_max + r);
    const Vec<T> new_max = hn::Max(old_max, hn::Load(d, block_max + v * kLanes<T>));
    // -inf: every key so far was invisible; subtract 0, since (-inf) - (-inf) is NaN.
    const Vec<T> shift = hn::IfThenZeroElse(hn::Eq(new_max, minus_infinity), new_max);
    const Vec<T> rescale = exp2_nonpositive<T>(hn::Sub(old_max, shift));
    Vec<T> sum = hn::Zero(d);
    T* HWY_RESTRICT column = scratch.scores + r;
    for (int n = 0; n < num_keys; ++n) {
      Vec<T> weight = exp2_nonpositive<T>(hn::Sub(hn::Load(d, column + n * score_stride), shift));
      if (injected(Bug::kLowPrecisionWeights)) weight = round_to_bfloat16<T>(weight);
      hn::Store(weight, d, column + n * score_stride);
      sum = hn::Add(sum, weight);
    }
    hn::Store(hn::MulAdd(hn::Load(d, scratch.row_sum + r), rescale, sum), d, scratch.row_sum + r);
    hn::Store(new_max, d, scratch.row_max + r);
    hn::Store(injected(Bug::kNoRescale) ? hn::Set(d, T(1)) : rescale, d, scratch.rescale + r);
  }
}

// O = O * rescale + P V
template <class T>
void accumulate_output(const ForwardProblem& problem, const ForwardScratch<T>& scratch, std::int64_t num_rows,
                       int num_keys) {
  constexpr Tag<T> d;
  const std::int64_t stride = problem.tile_shape.head_dim_padded;
  for (std::int64_t column = 0; column < stride; column += kPanel) {
    const T* panel = scratch.value_panels + column * kTileN;
    for (std::int64_t r0 = 0; r0 < num_rows; r0 += kTileM<T>) {
      Vec<T> acc[kTileM<T>][kVecs<T>];
      multiply<Lhs::kColMajor>(scratch.scores + r0, problem.tile_shape.score_stride, panel, num_keys, acc);
      T* HWY_RESTRICT out = scratch.out + r0 * stride + column;
#pragma GCC unroll 16
      for (int m = 0; m < kTileM<T>; ++m) {
        const Vec<T> rescale = hn::Set(d, scratch.rescale[r0 + m]);
#pragma GCC unroll 8
        for (int v = 0; v < kVecs<T>; ++v) {
          T* lanes = out + m * stride + v * kLanes<T>;
          hn::Store(hn::MulAdd(hn::Load(d, lanes), rescale, acc[m][v]), d, lanes);
        }
      }
    }
  }
}

template <class T>
void store_results(const ForwardProblem& problem, const QueryTile& tile, const ForwardScratch<T>& scratch) {
  for (std::int64_t in_group = 0; in_group < tile.group; ++in_group) {
    const std::int64_t head = tile.query_head(in_group);
    const Rows out = query_rows(problem.layout, problem.args.out, tile.sequence, head);
    const auto lse = problem.layout.per_query<T>(problem.args.lse, tile.sequence, head);
    for (std::int64_t i = tile.row_begin; i < tile.row_end; ++i) {
      const std::int64_t r = tile.tile_row(i, in_group);
      const T sum = scratch.row_sum[r];
      T* values = scratch.out + r * problem.tile_shape.head_dim_padded;
      // A row without keys: its values may be 0 times a value that is not finite.
      if (sum == 0) std::fill_n(values, problem.layout.head_dim, T(injected(Bug::kEmptyRowNotZero) ? 1 : 0));
      store_row(values, sum == 0 ? T(1) : T(1) / sum, problem.layout.head_dim, out, i);
      if (lse.present()) {
        const double log2_sum = static_cast<double>(scratch.row_max[r]) + std::log2(static_cast<double>(sum));
        lse[i] = static_cast<T>(log2_sum * std::numbers::ln2) + T(injected(Bug::kLseOff) ? 1e-3 : 0);
      }
    }
  }
}

template <class T, Visibility kVisibility>
void process_block(const ForwardProblem& problem, const QueryTile& tile, const ForwardScratch<T>& scratch,
                   T scale_log2, int num_keys) {
  gather(problem, tile, scratch, num_keys);
  for (std::int64_t panel = 0; panel < tile.num_panels(); ++panel) {
    alignas(64) T block_max[kPanel];
    score_panel<T, kVisibility>(problem.tile_shape, scratch, panel, scale_log2, num_keys, block_max);
    if (injected(Bug::kDropOneKey) && panel % 4 == 1) {
      scratch.scores[panel * kPanel] = -std::numeric_limits<T>::infinity();
    }
    softmax_panel(scratch, panel, problem.tile_shape.score_stride, num_keys, block_max);
  }
  accumulate_output(problem, scratch, tile.num_rows(), num_keys);
}

template <class T>
void forward_tile(const ForwardProblem& problem, std::int64_t index, int worker) {
  const Plans::Tile place = problem.plans.locate_tile(index);
  const PlanShape plan_shape = problem.plans.shape(place.sequence);
  const Plan& plan = problem.plans[place.head_index];
  const QueryTile tile{.sequence = place.sequence,
                       .kv_head = place.head,
                       .group = problem.layout.group(),
                       .row_begin = plan_shape.tile_row_begin(place.tile),
                       .row_end = plan_shape.tile_row_begin(place.tile + 1),
                       .offset = plan_shape.offset()};
  Arena arena(Workspace{problem.scratch + worker * problem.scratch_bytes, problem.scratch_bytes});
  const ForwardScratch<T> scratch(problem.tile_shape, has_dense(problem.args), arena);
  start_tile(problem, tile, scratch);

  const double scale = problem.args.scale * (injected(Bug::kScaleOff) ? 1.01 : 1.0);
  const T scale_log2 = static_cast<T>(scale * std::numbers::log2e);
  TileKeys keys(plan, plan.segment_of_row(tile.row_begin), plan_shape, tile.row_begin, tile.row_end);
  if (has_dense(problem.args)) {
    DenseKeys<T> dense(problem.args, problem.layout, problem.tile_shape, tile, keys, scratch);
    while (const int num_keys = dense.next()) {
      process_block<T, Visibility::kDense>(problem, tile, scratch, scale_log2, num_keys);
    }
  } else {
    const auto bias = problem.layout.per_key<const T>(problem.args.bias, tile.sequence, tile.kv_head);
    bool masked = false;
    while (const int num_keys = keys.next(bias, kTileN, scratch.entries, scratch.places, &masked)) {
      const auto process =
          masked ? process_block<T, Visibility::kIntervals> : process_block<T, Visibility::kAll>;
      process(problem, tile, scratch, scale_log2, num_keys);
    }
  }
  store_results(problem, tile, scratch);
}

const char* target_name() { return hwy::TargetName(HWY_TARGET); }

void forward_tile_float(const ForwardProblem& problem, std::int64_t index, int worker) {
  forward_tile<float>(problem, index, worker);
}
void forward_tile_double(const ForwardProblem& problem, std::int64_t index, int worker) {
  forward_tile<double>(problem, index, worker);
}

}  // namespace flash_dmattn::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace flash_dmattn::cpu {
namespace {

HWY_EXPORT(forward_tile_float);
HWY_EXPORT(forward_tile_double);
HWY_EXPORT(target_name);

// The one cut of the workspace: measures it when the arena has no memory.
ForwardProblem make_problem(const ForwardArgs& args, int num_workers, Arena& arena) {
  const Layout layout = make_layout(args);
  const TileShape tile_shape(layout, kForwardRows);
  Arena worker;
  if (args.query.dtype == DType::kFloat64) {
    ForwardScratch<double>(tile_shape, has_dense(args), worker);
  } else {
    ForwardScratch<float>(tile_shape, has_dense(args), worker);
  }
  Plans plans(layout, args.causal, args.expiry.present(), tile_shape.positions, arena);
  std::byte* scratch = arena.take<std::byte>(worker.bytes(), num_workers);
  return {args, layout, tile_shape, plans, worker.bytes(), scratch};
}

}  // namespace

std::string forward_why_not(const ForwardArgs& args, const Target& /*target*/) {
  return args.plan.present() ? "takes no plan" : "";
}

std::size_t forward_workspace_bytes(const ForwardArgs& args, const Target& target) {
  Arena arena;
  make_problem(args, target.parallel_for.num_workers, arena);
  return arena.bytes();
}

void forward(const ForwardArgs& args, const Target& target, const Workspace& workspace) {
  Arena arena(workspace);
  ForwardProblem problem = make_problem(args, target.parallel_for.num_workers, arena);
  problem.plans.build(args.expiry, target.parallel_for);
  const auto tile = args.query.dtype == DType::kFloat64 ? HWY_DYNAMIC_DISPATCH(forward_tile_double)
                                                        : HWY_DYNAMIC_DISPATCH(forward_tile_float);
  // Late tiles see more keys than early ones: the longest come first.
  const std::int64_t num_tiles = problem.plans.num_tiles();
  for_each_task(target.parallel_for, num_tiles,
                [&](std::int64_t task, int worker) { tile(problem, num_tiles - 1 - task, worker); });
}

std::string instruction_set() { return HWY_DYNAMIC_DISPATCH(target_name)(); }

}  // namespace flash_dmattn::cpu
#endif  // HWY_ONCE
