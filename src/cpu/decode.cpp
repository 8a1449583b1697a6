// The forward pass of a few rows against a long cache. Nothing is packed or transposed, as nothing is used
// often enough to pay for it: rows of keys and values are read in place where their type allows, four at a
// time, and the head dim lies along the vector lanes. Per block of kBlockKeys keys that a split has for the
// rows of the call:
//
//   scores   products of four keys and two rows
//   softmax  the online softmax in units of log 2: running maximum and sum of each row
//   output   O = O * rescale + P V, four keys and two rows at a time
//
// A row's bits depend on the lengths of the call and on what its own key/value head holds: not on the batch,
// the group, the workers or the rows beside it.

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/decode.cpp"
#include "cpu/targets.h"

#include <hwy/foreach_target.h>  // must come before highway.h

#include <hwy/highway.h>

#include <cmath>
#include <limits>
#include <numbers>

#include "core/parallel.h"
#include "cpu/backend.h"
#include "cpu/bugs.h"
#include "cpu/decode-inl.h"
#include "cpu/decode.h"
#include "cpu/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace flash_dmattn::cpu::HWY_NAMESPACE {

template <class T>
inline constexpr T kMinusInfinity = -std::numeric_limits<T>::infinity();

// The keys of a split that some row of the call sees, in ascending order, one block after the other.
template <class T>
class SplitKeys {
 public:
  SplitKeys(const DecodeProblem& problem, VectorView<const std::int32_t> expiry, VectorView<const T> bias,
            std::int64_t split)
      : expiry_(expiry),
        bias_(bias),
        key_(split * kSplitKeys),
        end_(std::min(key_ + kSplitKeys, problem.layout.max_seqlen_k)),
        first_position_(static_cast<std::int32_t>(problem.first_position())),
        last_position_(static_cast<std::int32_t>(problem.last_position())) {}

  // Fills at most kBlockKeys entries and returns their number; 0: the split has no more. Sets *masked if some
  // row of the call does not see one of them.
  int next(PlanEntry* entries, bool* masked) {
    *masked = false;
    int count = 0;
    for (; count < kBlockKeys && skip_unseen(); ++key_) {
      const auto key = static_cast<std::int32_t>(key_);
      const std::int32_t expiry = expiry_.present() ? expiry_[key] : last_position_ + 1;
      if (expiry <= std::max(key, first_position_)) continue;
      if (bias_.present() && bias_[key] == kMinusInfinity<T>) continue;
      *masked |= key > first_position_ || expiry <= last_position_;
      entries[count++] = {key, expiry};
    }
    return count;
  }

 private:
  // Steps over keys that have expired before the first row, a vector of them at a time; false at the end.
  bool skip_unseen() {
    if (expiry_.present() && expiry_.stride == 1) {
      constexpr Tag<std::int32_t> d;
      constexpr std::int64_t kStep = kLanes<std::int32_t>;
      const auto first = hn::Set(d, first_position_);
      while (key_ + kStep <= end_ && hn::AllFalse(d, hn::Gt(hn::LoadU(d, expiry_.data + key_), first))) {
        key_ += kStep;
      }
    }
    return key_ < end_;
  }

  VectorView<const std::int32_t> expiry_;
  VectorView<const T> bias_;
  std::int64_t key_, end_;
  std::int32_t first_position_, last_position_;
};

// Where one task reads and writes.
template <class T>
struct DecodeTask {
  std::int64_t kv_head, split;
  std::int64_t row_begin;  // of the rows of its key/value head
  std::int64_t num_rows;
  Sequence sequence;
  Rows key, value;
  SoftmaxState<T>* states;  // [num_rows]
  T* sums;                  // [num_rows][head_dim_padded]

  // Row tiles run fastest: those that read the same keys stand together.
  DecodeTask(const DecodeProblem& problem, std::int64_t index) {
    const DecodeShape& shape = problem.shape;
    row_begin = index % shape.row_tiles * kRowTile;
    num_rows = std::min(shape.rows - row_begin, kRowTile);
    split = index / shape.row_tiles % shape.splits;
    const std::int64_t head_index = index / shape.row_tiles / shape.splits;
    kv_head = head_index % problem.layout.heads_kv;
    sequence = problem.layout.sequence(head_index / problem.layout.heads_kv);
    const std::int64_t read_head =
        injected(Bug::kWrongHead) ? (kv_head + 1) % problem.layout.heads_kv : kv_head;
    key = key_rows(problem.layout, problem.args.key, sequence, read_head);
    value = key_rows(problem.layout, problem.args.value, sequence, read_head);
    Arena arena(problem.partials);
    const DecodePartials<T> partials(shape, arena);
    const std::int64_t partial = shape.partial(head_index, split, row_begin);
    states = partials.states + partial;
    sums = partials.sums + partial * shape.head_dim_padded;
  }
};

template <class T>
void start_task(const DecodeProblem& problem, const DecodeTask<T>& task, const DecodeScratch<T>& scratch) {
  const DecodeShape& shape = problem.shape;
  const std::int64_t stride = shape.head_dim_padded;
  std::fill_n(scratch.query, task.num_rows * stride, T(0));
  std::fill_n(scratch.quad, kQuad * stride, T(0));
  std::fill_n(scratch.zeros, stride, T(0));
  std::fill_n(task.sums, task.num_rows * stride, T(0));
  std::fill_n(task.states, task.num_rows, SoftmaxState<T>{});
  for (std::int64_t r = 0; r < task.num_rows; ++r) {
    const std::int64_t row = task.row_begin + r;
    const std::int64_t head = task.kv_head * shape.group + row % shape.group;
    const Rows query = query_rows(problem.layout, problem.args.query, task.sequence, head);
    load_row(query, row / shape.group, shape.head_dim, scratch.query + r * stride);
  }
}

// Asks for the keys and values of the entries [begin, begin + count), as far as there are any.
template <class T>
HWY_INLINE void prefetch(const DecodeTask<T>& task, const DecodeScratch<T>& scratch, std::size_t head_dim,
                         int begin, int count, int num_keys) {
  for (int n = begin; n < HWY_MIN(begin + count, num_keys); ++n) {
    prefetch_row(task.key, scratch.entries[n].key, head_dim);
    prefetch_row(task.value, scratch.entries[n].key, head_dim);
  }
}

// Calls take(n, rows) for every quad of the block, with `rows` the quad's rows of `from`, keys or values;
// rows after the last key are 0.
template <class T, class Take>
HWY_INLINE void for_each_quad(const Rows& from, const DecodeShape& shape, const DecodeScratch<T>& scratch,
                              int num_keys, const Take& take) {
  const bool in_place = holds<T>(from) && shape.head_dim % kLanes<T> == 0;
  for (int n = 0; n < num_keys; n += kQuad) {
    const T* rows[kQuad];
    for (int m = 0; m < kQuad; ++m) {
      T* copy = scratch.quad + m * shape.head_dim_padded;
      if (n + m >= num_keys) {
        rows[m] = scratch.zeros;
      } else if (in_place) {
        rows[m] = reinterpret_cast<const T*>(from.row(scratch.entries[n + m].key));
      } else {
        load_row(from, scratch.entries[n + m].key, shape.head_dim, copy);
        rows[m] = copy;
      }
    }
    take(n, rows);
  }
}

// How far the scores of a row are worked on: whole quads.
inline int padded_keys(int num_keys) { return static_cast<int>(round_up(num_keys, kQuad)); }

// Products to logits in units of log 2, for one row; -inf for keys that it does not see and after the last.
template <class T>
void scale_and_mask(const DecodeScratch<T>& scratch, T scale_log2, std::int64_t position, bool masked,
                    int num_keys, T* HWY_RESTRICT scores) {
  constexpr Tag<T> d;
  const Vec<T> minus_infinity = hn::Set(d, kMinusInfinity<T>);
  for (int n = 0; n < padded_keys(num_keys); n += kLanes<T>) {
    const Vec<T> logit =
        hn::MulAdd(hn::Load(d, scores + n), hn::Set(d, scale_log2), hn::Load(d, scratch.bias + n));
    const auto valid = hn::FirstN(d, static_cast<std::size_t>(HWY_MAX(num_keys - n, 0)));
    hn::Store(hn::IfThenElse(valid, logit, minus_infinity), d, scores + n);
  }
  if (!masked) return;
  for (int n = 0; n < num_keys; ++n) {
    const PlanEntry entry = scratch.entries[n];
    const std::int64_t birth = entry.key + (injected(Bug::kCausalOffByOne) ? 1 : 0);
    const std::int64_t expiry = entry.expiry + std::int64_t{injected(Bug::kKeySeenOnceTooLong)};
    if (position < birth || position >= expiry) scores[n] = kMinusInfinity<T>;
  }
}

// Turns the logits of one row into weights relative to its running maximum, and brings its sums there.
template <class T>
void softmax_row(T* HWY_RESTRICT scores, int num_keys, std::size_t stride, SoftmaxState<T>& state,
                 T* HWY_RESTRICT sums) {
  constexpr Tag<T> d;
  Vec<T> largest = hn::Set(d, state.max);
  for (int n = 0; n < padded_keys(num_keys); n += kLanes<T>)
    largest = hn::Max(largest, hn::Load(d, scores + n));
  const T new_max = hn::GetLane(hn::MaxOfLanes(d, largest));
  if (new_max != state.max) {
    const T rescale = injected(Bug::kNoRescale) ? T(1) : rescale_factor(state.max, new_max);
    state.sum *= rescale_factor(state.max, new_max);
    state.max = new_max;
    for (std::size_t i = 0; i < stride; i += kLanes<T>) {
      hn::Store(hn::Mul(hn::Load(d, sums + i), hn::Set(d, rescale)), d, sums + i);
    }
  }
  const Vec<T> shift = hn::Set(d, new_max == kMinusInfinity<T> ? T(0) : new_max);
  Vec<T> sum = hn::Zero(d);
  for (int n = 0; n < padded_keys(num_keys); n += kLanes<T>) {
    Vec<T> weight = exp2_nonpositive<T>(hn::Sub(hn::Load(d, scores + n), shift));
    if (injected(Bug::kLowPrecisionWeights)) weight = round_to_bfloat16<T>(weight);
    hn::Store(weight, d, scores + n);
    sum = hn::Add(sum, weight);
  }
  state.sum += hn::GetLane(hn::SumOfLanes(d, sum));
}

template <class T>
void decode_split(const DecodeProblem& problem, std::int64_t index, int worker) {
  const DecodeTask<T> task(problem, index);
  const DecodeShape& shape = problem.shape;
  const std::int64_t stride = shape.head_dim_padded;
  Arena arena(Workspace{problem.scratch + worker * problem.scratch_bytes, problem.scratch_bytes});
  const DecodeScratch<T> scratch(shape, arena);
  start_task(problem, task, scratch);

  const double scale = problem.args.scale * (injected(Bug::kScaleOff) ? 1.01 : 1.0);
  const T scale_log2 = static_cast<T>(scale * std::numbers::log2e);
  const auto bias = problem.layout.per_key<const T>(problem.args.bias, task.sequence, task.kv_head);
  const auto expiry =
      problem.layout.per_key<const std::int32_t>(problem.args.expiry, task.sequence, task.kv_head);
  SplitKeys<T> keys(problem, expiry, bias, task.split);
  bool masked = false;
  while (const int num_keys = keys.next(scratch.entries, &masked)) {
    prefetch(task, scratch, shape.head_dim, 0, kPrefetchKeys, num_keys);
    gather_bias(bias, scratch.entries, num_keys, scratch.bias);
    for_each_quad(task.key, shape, scratch, num_keys, [&](int n, const T* const(&rows)[kQuad]) {
      prefetch(task, scratch, shape.head_dim, n + kPrefetchKeys, kQuad, num_keys);
      for_each_pair(task.num_rows, [&]<int kRows>(std::int64_t r) {
        multiply_quad<kRows>(rows, scratch.query + r * stride, stride, shape.head_dim,
                             scratch.scores + r * kBlockKeys + n);
      });
    });
    for (std::int64_t r = 0; r < task.num_rows; ++r) {
      T* scores = scratch.scores + r * kBlockKeys;
      scale_and_mask(scratch, scale_log2, problem.position(task.row_begin + r), masked, num_keys, scores);
      if (injected(Bug::kDropOneKey) && r == 0) scores[0] = kMinusInfinity<T>;
      softmax_row(scores, num_keys, stride, task.states[r], task.sums + r * stride);
    }
    for_each_quad(task.value, shape, scratch, num_keys, [&](int n, const T* const(&rows)[kQuad]) {
      for_each_pair(task.num_rows, [&]<int kRows>(std::int64_t r) {
        accumulate_quad<kRows>(rows, scratch.scores + r * kBlockKeys + n, stride, shape.head_dim,
                               task.sums + r * stride);
      });
    });
  }
}

// The result of one row: its partial results, merged into that of the first split.
template <class T>
void merge_row(const DecodeProblem& problem, std::int64_t index) {
  constexpr Tag<T> d;
  const DecodeShape& shape = problem.shape;
  const std::int64_t head_index = index / shape.rows, row = index % shape.rows;
  const std::int64_t stride = shape.head_dim_padded;
  Arena arena(problem.partials);
  const DecodePartials<T> partials(shape, arena);
  SoftmaxState<T> state = partials.states[shape.partial(head_index, 0, row)];
  T* sums = partials.sums + shape.partial(head_index, 0, row) * stride;
  const std::int64_t splits = shape.splits - (injected(Bug::kSplitLost) && shape.splits > 1 ? 1 : 0);
  for (std::int64_t split = 1; split < splits; ++split) {
    const std::int64_t partial = shape.partial(head_index, split, row);
    const MergedState<T> merged = merge(state, partials.states[partial]);
    state = merged.state;
    const T* right = partials.sums + partial * stride;
    const Vec<T> left_factor = hn::Set(d, merged.left_factor), right_factor = hn::Set(d, merged.right_factor);
    for (std::int64_t i = 0; i < stride; i += kLanes<T>) {
      const Vec<T> left = hn::Mul(hn::Load(d, sums + i), left_factor);
      hn::Store(hn::MulAdd(hn::Load(d, right + i), right_factor, left), d, sums + i);
    }
  }

  const std::int64_t kv_head = head_index % problem.layout.heads_kv;
  const Sequence sequence = problem.layout.sequence(head_index / problem.layout.heads_kv);
  const std::int64_t head = kv_head * shape.group + row % shape.group, i = row / shape.group;
  // A row without keys: its sums may be 0 times a value that is not finite.
  if (state.sum == 0) std::fill_n(sums, stride, T(injected(Bug::kEmptyRowNotZero) ? 1 : 0));
  store_row(sums, state.sum == 0 ? T(1) : T(1) / state.sum, shape.head_dim,
            query_rows(problem.layout, problem.args.out, sequence, head), i);
  const auto lse = problem.layout.per_query<T>(problem.args.lse, sequence, head);
  if (!lse.present()) return;
  const double log2_sum = static_cast<double>(state.max) + std::log2(static_cast<double>(state.sum));
  lse[i] = static_cast<T>(log2_sum * std::numbers::ln2) + T(injected(Bug::kLseOff) ? 1e-3 : 0);
}

void decode_split_float(const DecodeProblem& problem, std::int64_t index, int worker) {
  decode_split<float>(problem, index, worker);
}
void decode_split_double(const DecodeProblem& problem, std::int64_t index, int worker) {
  decode_split<double>(problem, index, worker);
}
void merge_row_float(const DecodeProblem& problem, std::int64_t index) { merge_row<float>(problem, index); }
void merge_row_double(const DecodeProblem& problem, std::int64_t index) { merge_row<double>(problem, index); }

}  // namespace flash_dmattn::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace flash_dmattn::cpu {
namespace {

HWY_EXPORT(decode_split_float);
HWY_EXPORT(decode_split_double);
HWY_EXPORT(merge_row_float);
HWY_EXPORT(merge_row_double);

template <class T>
DecodeProblem make_typed_problem(const ForwardArgs& args, int num_workers, Arena& arena) {
  const Layout layout = make_layout(args);
  const DecodeShape shape(layout);
  Arena partials, worker;
  DecodePartials<T>(shape, partials);
  DecodeScratch<T>(shape, worker);
  std::byte* partials_data = arena.take<std::byte>(partials.bytes());
  std::byte* scratch = arena.take<std::byte>(worker.bytes() * num_workers);
  return {args, layout, shape, {partials_data, partials.bytes()}, worker.bytes(), scratch};
}

// The one cut of the workspace: measures it when the arena has no memory.
DecodeProblem make_problem(const ForwardArgs& args, int num_workers, Arena& arena) {
  return args.query.dtype == DType::kFloat64 ? make_typed_problem<double>(args, num_workers, arena)
                                             : make_typed_problem<float>(args, num_workers, arena);
}

}  // namespace

std::string decode_why_not(const ForwardArgs& args, const Target& /*target*/) {
  if (args.plan.present()) return "takes no plan";
  if (args.cu_seqlens_k.present()) return "takes no packed sequences";
  if (args.mask.present() || args.bias.rank == 4) return "takes no mask or bias with a query axis";
  const std::int64_t seqlen_q = args.query.shape[1], seqlen_k = args.key.shape[1];
  if (seqlen_q > kMaxDecodeQueries || seqlen_q >= seqlen_k) {
    return "takes at most " + std::to_string(kMaxDecodeQueries) +
           " queries, and more keys than queries, got " + std::to_string(seqlen_q) + " and " +
           std::to_string(seqlen_k);
  }
  return "";
}

std::size_t decode_workspace_bytes(const ForwardArgs& args, const Target& target) {
  Arena arena;
  make_problem(args, target.parallel_for.num_workers, arena);
  return arena.bytes();
}

void decode(const ForwardArgs& args, const Target& target, const Workspace& workspace) {
  Arena arena(workspace);
  const DecodeProblem problem = make_problem(args, target.parallel_for.num_workers, arena);
  const DecodeShape& shape = problem.shape;
  const bool is_double = args.query.dtype == DType::kFloat64;
  const auto split =
      is_double ? HWY_DYNAMIC_DISPATCH(decode_split_double) : HWY_DYNAMIC_DISPATCH(decode_split_float);
  const auto merge =
      is_double ? HWY_DYNAMIC_DISPATCH(merge_row_double) : HWY_DYNAMIC_DISPATCH(merge_row_float);
  for_each_task(target.parallel_for, shape.heads * shape.splits * shape.row_tiles,
                [&](std::int64_t task, int worker) { split(problem, task, worker); });
  for_each_task(target.parallel_for, shape.heads * shape.rows,
                [&](std::int64_t row, int /*worker*/) { merge(problem, row); });
}

}  // namespace flash_dmattn::cpu
#endif  // HWY_ONCE
