// Few rows against a long cache: the kernel "cpu decode", and selection for the last rows alone.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <optional>

#include "attention_case.h"
#include "cpu/decode.h"

namespace flash_dmattn::testing {
namespace {

using cpu::kMaxDecodeQueries;
using cpu::kSplitKeys;
using cpu::SoftmaxState;

constexpr double kInf = std::numeric_limits<double>::infinity();

// The kernel that a call of these lengths runs on.
std::string kernel_of(const Case& c) {
  const Problem problem(c, 1);
  const Tensor out = problem.like_query();
  ForwardArgs args = problem.forward_args();
  args.out = out.view();
  const std::string text = explain(args, {});
  const std::size_t end = text.find(": runs"), line = text.rfind('\n', end) + 1;  // npos + 1 is 0
  return text.substr(line, end - line);
}

template <class T>
SoftmaxState<T> state_of(std::initializer_list<T> logits) {
  SoftmaxState<T> state;
  for (const T logit : logits) state = merge(state, SoftmaxState<T>{logit, 1}).state;
  return state;
}

TEST(SoftmaxState, IsAMonoid) {
  const SoftmaxState<double> none, some = state_of<double>({-3, 0.5, 2}), more = state_of<double>({7, -1}),
                                   hidden = state_of<double>({-kInf, -kInf});
  EXPECT_EQ(some.max, 2);
  EXPECT_NEAR(some.sum, std::exp2(-5) + std::exp2(-1.5) + 1, 1e-15);
  for (const auto& state : {none, some, more, hidden}) {
    for (const auto& neutral : {none, hidden}) {
      const auto left = merge(neutral, state), right = merge(state, neutral);
      EXPECT_EQ(left.state.max, state.max);
      EXPECT_EQ(right.state.max, state.max);
      if (state.sum == 0) continue;
      EXPECT_EQ(left.state.sum, state.sum);
      EXPECT_EQ(right.state.sum, state.sum);
      EXPECT_EQ(left.right_factor, 1);
      EXPECT_EQ(left.left_factor, 0);
    }
  }
  EXPECT_EQ(merge(none, hidden).state.sum, 0);
  const auto one_way = merge(merge(some, more).state, some).state;
  const auto other_way = merge(some, merge(more, some).state).state;
  EXPECT_EQ(one_way.max, other_way.max);
  EXPECT_NEAR(one_way.sum, other_way.sum, 1e-15);
}

TEST(SoftmaxState, NanStays) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const auto some = state_of<double>({1, 2});
  for (const auto& bad : {SoftmaxState<double>{nan, 1}, SoftmaxState<double>{1, nan}}) {
    EXPECT_TRUE(std::isnan(merge(some, bad).state.sum));
    EXPECT_TRUE(std::isnan(merge(bad, some).state.sum));
  }
}

TEST(Decode, WhichCallsItTakes) {
  for (const bool causal : {true, false}) {
    EXPECT_EQ(kernel_of({.sequences = {{1, 2}}, .causal = causal}), "cpu decode");
    EXPECT_EQ(kernel_of({.sequences = {{kMaxDecodeQueries, 17}}, .causal = causal}), "cpu decode");
    EXPECT_EQ(kernel_of({.sequences = {{kMaxDecodeQueries, 16}}, .causal = causal}), "cpu");
    EXPECT_EQ(kernel_of({.sequences = {{kMaxDecodeQueries + 1, 9000}}, .causal = causal}), "cpu");
    EXPECT_EQ(kernel_of({.sequences = {{1, 9000}}, .packed = true, .causal = causal}), "cpu");
    EXPECT_EQ(kernel_of({.sequences = {{1, 90}}, .causal = causal, .mask = DenseForm{}}), "cpu");
    EXPECT_EQ(kernel_of({.sequences = {{1, 90}}, .causal = causal, .dense_bias = DenseForm{}}), "cpu");
  }
}

TEST(Decode, MeetsTheOracleAroundSplitBorders) {
  std::uint64_t seed = 0;
  for (const std::int64_t seqlen_k : {kSplitKeys - 1, kSplitKeys, kSplitKeys + 1, 2 * kSplitKeys + 7}) {
    for (const Visibility visibility : {Visibility::kAll, Visibility::kWindow, Visibility::kRandomExpiry}) {
      for (const bool causal : {true, false}) {
        const std::int64_t seqlen_q = 1 + static_cast<std::int64_t>(seed % kMaxDecodeQueries);
        check_case({.dtype = seed % 3 == 0 ? DType::kBFloat16 : DType::kFloat32,
                    .sequences = {{seqlen_q, seqlen_k}},
                    .heads_kv = 2,
                    .group = seed % 4 == 0 ? 5 : 1,
                    .head_dim = 12,
                    .causal = causal,
                    .visibility = visibility,
                    .keep_window = 100},
                   seed, threads(1 + static_cast<int>(seed % 3)));
        ++seed;
      }
    }
  }
}

TEST(Decode, RandomCases) {
  Random random(51);
  constexpr int kCases = 250;
  int cases = 0;
  for (; cases < kCases && !HasFailure(); ++cases) {
    Case c = random_case(random);
    c.packed = false;
    c.mask = c.dense_bias = std::nullopt;
    const std::int64_t seqlen_q = random.between(1, kMaxDecodeQueries);
    const std::int64_t seqlen_k = random.chance(0.1) ? random.between(kSplitKeys - 20, kSplitKeys + 20)
                                                     : random.between(seqlen_q + 1, 300);
    if (seqlen_k > 1000) c.group = std::min<std::int64_t>(c.group, 2), c.head_dim = 7;
    c.sequences.assign(random.pick<std::size_t>({0, 1, 1, 2}), {seqlen_q, seqlen_k});
    ASSERT_EQ(kernel_of(c), "cpu decode");
    check_case(c, static_cast<std::uint64_t>(cases), threads(random.pick({1, 1, 2, 5})));
  }
  std::printf("%d random cases\n", cases);
}

// One head of one batch entry, of a view [B, S, H, D], [B, H, S] or [B, Hkv, S].
TensorView head_of(TensorView view, std::int64_t entry, std::int64_t head) {
  const int head_axis = view.rank == 4 ? 2 : 1;
  view.data = static_cast<float*>(view.data) + entry * view.stride[0] + head * view.stride[head_axis];
  view.shape[0] = view.shape[head_axis] = 1;
  return view;
}

// Whatever the batch, the group, the row tile that a row falls into, and the number of workers.
TEST(Decode, AHeadAloneHasTheSameBits) {
  for (const Visibility visibility : {Visibility::kAll, Visibility::kWindow, Visibility::kRandomExpiry}) {
    const Problem problem({.sequences = {{7, 9000}, {7, 9000}},
                           .heads_kv = 2,
                           .group = 11,
                           .head_dim = 20,
                           .visibility = visibility,
                           .keep_window = 300},
                          61);
    ASSERT_GT(7 * 11, cpu::kRowTile);
    ForwardArgs args = problem.forward_args();
    std::vector<std::vector<unsigned char>> together;
    for (const int workers : {1, 2, 3, 7}) {
      Tensor out = problem.like_query(), lse = problem.like_lse();
      args.out = out.view(), args.lse = lse.view();
      run(forward, args, threads(workers), workers == 2 ? Poison::kLarge : Poison::kNaN);
      if (together.empty()) together = {out.elements(), lse.elements()};
      ASSERT_EQ(out.elements(), together[0]) << workers << " workers";
      ASSERT_EQ(lse.elements(), together[1]) << workers << " workers";
    }
    Tensor out = problem.like_query(), lse = problem.like_lse();
    for (std::int64_t entry = 0; entry < 2; ++entry) {
      for (std::int64_t head = 0; head < 22; ++head) {
        ForwardArgs alone = args;
        alone.query = head_of(args.query, entry, head), alone.out = head_of(out.view(), entry, head);
        alone.lse = head_of(lse.view(), entry, head);
        alone.key = head_of(args.key, entry, head / 11), alone.value = head_of(args.value, entry, head / 11);
        alone.bias = head_of(args.bias, entry, head / 11);
        if (args.expiry.present()) alone.expiry = head_of(args.expiry, entry, head / 11);
        run(forward, alone);
      }
    }
    EXPECT_EQ(out.elements(), together[0]);
    EXPECT_EQ(lse.elements(), together[1]);
  }
}

// A later token reaches no earlier row, to the last bit: keys and values after a row's position, and their
// scores, selected anew.
TEST(Decode, Causality) {
  constexpr std::int64_t kQueries = 9, kKeys = 5000, kHeadDim = 8;
  Random random(71);
  std::vector<float> query(kQueries * kHeadDim), key(kKeys * kHeadDim), value(key), bias(kKeys);
  for (auto* data : {&query, &key, &value, &bias}) {
    for (float& x : *data) x = static_cast<float>(random.normal());
  }
  std::vector<float> before;
  for (std::int64_t unchanged = kQueries; unchanged > 0; --unchanged) {
    const std::int64_t first = kKeys - kQueries + unchanged;  // key
    for (std::int64_t j = first; j < kKeys; ++j) {
      bias[j] = static_cast<float>(3 * random.normal());
      for (std::int64_t column = 0; column < kHeadDim; ++column) {
        key[j * kHeadDim + column] = value[j * kHeadDim + column] = static_cast<float>(random.normal());
      }
    }
    std::vector<std::int32_t> expiry(kKeys);
    std::vector<float> out(query.size());
    SelectArgs select_args;
    select_args.score = contiguous_view(bias.data(), DType::kFloat32, {1, 1, kKeys});
    select_args.expiry = contiguous_view(expiry.data(), DType::kInt32, {1, 1, kKeys});
    select_args.keep_window = 40;
    select_args.num_queries = kQueries;
    run(select, select_args);
    ForwardArgs args;
    args.query = contiguous_view(query.data(), DType::kFloat32, {1, kQueries, 1, kHeadDim});
    args.key = contiguous_view(key.data(), DType::kFloat32, {1, kKeys, 1, kHeadDim});
    args.value = contiguous_view(value.data(), DType::kFloat32, {1, kKeys, 1, kHeadDim});
    args.bias = select_args.score;
    args.expiry = select_args.expiry;
    args.out = contiguous_view(out.data(), DType::kFloat32, {1, kQueries, 1, kHeadDim});
    args.scale = 0.35;
    run(forward, args);
    if (before.empty()) before = out;
    EXPECT_TRUE(std::equal(out.begin(), out.begin() + unchanged * kHeadDim, before.begin()))
        << unchanged << " rows unchanged";
  }
}

// What nobody sees may hold anything, and a query that is not a number reaches its own row alone.
TEST(Decode, UnseenKeysAndBadQueries) {
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  constexpr std::int64_t kQueries = 3, kKeys = kSplitKeys + 30, kHeadDim = 5;
  std::vector<float> query(kQueries * kHeadDim, 0.5F), key(kKeys * kHeadDim, kNaN), value(key), bias(kKeys);
  std::vector<std::int32_t> expiry(kKeys, 0);
  const auto show = [&](std::int64_t j, std::int32_t until) {
    expiry[j] = until;
    std::fill_n(key.begin() + j * kHeadDim, kHeadDim, 1.0F);
    std::fill_n(value.begin() + j * kHeadDim, kHeadDim, static_cast<float>(j));
  };
  show(5, kKeys);
  show(kSplitKeys + 1, kKeys - 1);  // the last row does not see it
  std::vector<float> out(query.size()), lse(kQueries);
  ForwardArgs args;
  args.query = contiguous_view(query.data(), DType::kFloat32, {1, kQueries, 1, kHeadDim});
  args.key = contiguous_view(key.data(), DType::kFloat32, {1, kKeys, 1, kHeadDim});
  args.value = contiguous_view(value.data(), DType::kFloat32, {1, kKeys, 1, kHeadDim});
  args.bias = contiguous_view(bias.data(), DType::kFloat32, {1, 1, kKeys});
  args.expiry = contiguous_view(expiry.data(), DType::kInt32, {1, 1, kKeys});
  args.out = contiguous_view(out.data(), DType::kFloat32, {1, kQueries, 1, kHeadDim});
  args.lse = contiguous_view(lse.data(), DType::kFloat32, {1, 1, kQueries});
  args.scale = 1;
  run(forward, args);
  const float between = (5.0F + kSplitKeys + 1) / 2;
  EXPECT_FLOAT_EQ(out[0], between);
  EXPECT_FLOAT_EQ(out[kHeadDim], between);
  EXPECT_EQ(out[2 * kHeadDim], 5);
  EXPECT_FLOAT_EQ(lse[2], 2.5F);

  query[0] = kNaN;  // row 0
  run(forward, args);
  EXPECT_TRUE(std::isnan(out[0]));
  EXPECT_FLOAT_EQ(out[kHeadDim], between);
  EXPECT_EQ(out[2 * kHeadDim], 5);

  expiry[5] = 0;
  std::fill(bias.begin(), bias.end(), kNaN);
  bias[kSplitKeys + 1] = -std::numeric_limits<float>::infinity();
  run(forward, args);
  for (const float x : out) EXPECT_EQ(x, 0);
  for (const float x : lse) EXPECT_EQ(x, -std::numeric_limits<float>::infinity());
}

// Memory is a formula: partial results, and a task for each worker.
TEST(Decode, Workspace) {
  const Problem problem({.sequences = {{4, 9000}, {4, 9000}}, .heads_kv = 3, .group = 2, .head_dim = 40}, 81);
  const Tensor out = problem.like_query();
  ForwardArgs args = problem.forward_args();
  args.out = out.view();
  const std::size_t rows = 4 * 2, splits = 3, padded = 48, partials = 2 * 3 * splits * rows;
  const std::size_t worker = 4 * (rows * (padded + cpu::kBlockKeys) + 5 * padded + cpu::kBlockKeys) +
                             sizeof(cpu::PlanEntry) * cpu::kBlockKeys;
  for (const int workers : {1, 4}) {
    const double want = static_cast<double>(4 * partials * (padded + 2) + workers * worker);
    const auto got = static_cast<double>(workspace_bytes(args, threads(workers)));
    EXPECT_GE(got, want);
    EXPECT_LE(got, want + 64 * (4 + 6.0 * workers));
  }
}

// The last rows' selection against the selection for every row, which another algorithm makes.
TEST(SelectionForTheLastRows, IsWhatTheySeeOfTheWhole) {
  Random random(91);
  constexpr int kCalls = 120;
  int few = 0;
  for (int call = 0; call < kCalls && !HasFailure(); ++call) {
    const std::int64_t seqlen = random.pick<std::int64_t>({10367, 10368, 12000, 30001});
    const DType dtype = random.pick({DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16});
    Tensor score(dtype, {2, 2, seqlen},
                 random.pick({Strides::kContiguous, Strides::kPermuted, Strides::kReversed}));
    const auto kind = random.between(0, 6);
    double step = 0;
    score.fill([&]() -> double {
      switch (kind) {
        case 0:
          return 1;
        case 1:
          return step += 0.5;
        case 2:
          return step -= 0.5;
        case 3:
          return random.chance(0.01) ? random.normal() : -kInf;
        case 4:
          return std::fmod(step += 1, 128) == 0 ? 5 + 1e-3 * step
                                                : random.normal();  // a period of the sample's
        default:
          return random.normal();
      }
    });
    SelectArgs args;
    Tensor whole(DType::kInt32, score.shape()), last(DType::kInt32, score.shape(), Strides::kPermuted);
    args.score = score.view();
    args.expiry = whole.view();
    args.keep_window = random.pick<std::int64_t>({1, 7, 64, 128, 129, 500, 1000, seqlen - 1});
    args.num_sinks = random.pick<std::int64_t>({0, 0, 4, seqlen});
    const bool causal = random.chance(0.7);
    if (causal) args.local_window = random.pick<std::int64_t>({0, 0, 9, seqlen});
    run(select, args);
    args.expiry = last.view();
    args.causal = causal;
    args.num_queries = causal ? random.pick<std::int64_t>({0, 1, 2, 16, 300}) : -1;
    run(select, args, threads(random.pick({1, 2, 5})), random.pick({Poison::kNaN, Poison::kLarge}));
    const std::int64_t first = seqlen - (causal ? args.num_queries : 1);
    std::int64_t wrong = 0;
    whole.for_each([&](const Index& i) {
      const double expiry = whole.get(i);
      const bool seen = causal ? expiry > static_cast<double>(first) : expiry == static_cast<double>(seqlen);
      wrong += last.get(i) != (seen ? expiry : static_cast<double>(i[2]));
    });
    EXPECT_EQ(wrong, 0) << dtype_name(dtype) << ", " << seqlen << " keys, w = " << args.keep_window
                        << ", scores of kind " << kind << (causal ? ", causal" : "");
    few += args.keep_window <= 129;
  }
  EXPECT_GT(few, kCalls / 4);
}

}  // namespace
}  // namespace flash_dmattn::testing
