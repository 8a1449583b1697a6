// Forward and backward against the definition in float64.
#include <cmath>
#include <cstdio>

#include "attention_case.h"

namespace flash_dmattn::testing {
namespace {

class Attention : public ::testing::Test {
 protected:
  static void TearDownTestSuite() {
    std::printf("compared %lld elements with the oracle\n", static_cast<long long>(elements_compared));
  }
};

constexpr DType kFloats[] = {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16};

TEST_F(Attention, EveryTypeAndVisibility) {
  for (const DType dtype : kFloats) {
    for (const bool causal : {true, false}) {
      for (const Visibility visibility : {Visibility::kAll, Visibility::kWindow, Visibility::kRandomExpiry}) {
        check_case({.dtype = dtype,
                    .sequences = {{70, 70}, {70, 70}},
                    .heads_kv = 2,
                    .group = 3,
                    .head_dim = 40,
                    .causal = causal,
                    .visibility = visibility,
                    .keep_window = 13},
                   1);
        check_case({.dtype = dtype,
                    .sequences = {{0, 0}, {5, 33}, {0, 7}, {64, 64}, {1, 1}},
                    .packed = true,
                    .heads_kv = 2,
                    .group = 2,
                    .head_dim = 17,
                    .causal = causal,
                    .visibility = visibility,
                    .keep_window = 13,
                    .strides = Strides::kGaps},
                   2);
      }
    }
  }
}

// Long enough for several segments of the plan, with windows shorter and longer than a segment.
TEST_F(Attention, LongSequences) {
  for (const std::int64_t keep_window : {1, 40, 600}) {
    for (const std::int64_t seqlen_q : {1, 700, 1400}) {
      check_case({.sequences = {{seqlen_q, 1400}},
                  .group = 2,
                  .head_dim = 8,
                  .visibility = Visibility::kWindow,
                  .keep_window = keep_window},
                 3);
    }
  }
  check_case({.dtype = DType::kFloat64,
              .sequences = {{1100, 1300}},
              .head_dim = 4,
              .visibility = Visibility::kRandomExpiry},
             4);
  check_case({.sequences = {{1100, 1300}}, .head_dim = 4, .visibility = Visibility::kAll}, 5);
  check_case({.sequences = {{1300, 1100}},
              .head_dim = 4,
              .causal = false,
              .visibility = Visibility::kWindow,
              .keep_window = 500},
             6);
  check_case({.sequences = {{600, 1100}, {3, 3}, {700, 700}},
              .packed = true,
              .heads_kv = 2,
              .head_dim = 4,
              .visibility = Visibility::kWindow,
              .keep_window = 30,
              .tied_scores = true},
             7);
}

// Every form of mask and dense bias, of every type.
TEST_F(Attention, MasksAndDenseBiases) {
  std::uint64_t seed = 20;
  for (const bool batch : {true, false}) {
    for (const auto heads : {DenseForm::kOne, DenseForm::kOfKeys, DenseForm::kOfQueries}) {
      for (const bool rows : {true, false}) {
        for (const DType dtype : kFloats) {
          Case c{.dtype = dtype,
                 .sequences = {{70, 90}, {70, 90}},
                 .heads_kv = 2,
                 .group = 3,
                 .head_dim = 24,
                 .causal = seed % 3 != 0,
                 .mask = DenseForm{!batch, DenseForm::kOfQueries, true},
                 .dense_bias = DenseForm{batch, heads, rows},
                 .dense_dtype = kFloats[seed % 4],
                 .masked = 0.7};
          check_case(c, ++seed, threads(2));
          std::swap(c.mask, c.dense_bias);
          c.visibility = Visibility::kWindow;
          c.keep_window = 21;
          c.strides = Strides::kPermuted;
          check_case(c, ++seed);
        }
      }
    }
  }
  check_case({.sequences = {{1100, 1300}},
              .group = 2,
              .head_dim = 8,
              .mask = DenseForm{},
              .dense_bias = DenseForm{.heads = DenseForm::kOne},
              .masked = 0.97},
             ++seed);
}

TEST_F(Attention, RandomCases) {
  Random random(11);
  constexpr int kCases = 400;
  int cases = 0;
  for (; cases < kCases && !HasFailure(); ++cases) {
    check_case(random_case(random), static_cast<std::uint64_t>(cases), threads(random.pick({1, 1, 2, 5})));
  }
  std::printf("%d random cases\n", cases);
}

TEST_F(Attention, LargeLogits) {
  for (const DType dtype : kFloats) {
    for (const double scale : {30.0, -30.0, 1000.0, -1000.0}) {
      if (dtype == DType::kFloat64 && std::abs(scale) > 100) continue;  // 1e-12 is no bound for logits of 1e4
      check_case({.dtype = dtype,
                  .sequences = {{50, 60}},
                  .group = 2,
                  .head_dim = 16,
                  .visibility = Visibility::kWindow,
                  .keep_window = 20,
                  .scale = scale},
                 8);
    }
  }
}

// Heads of zero number, and keys that no query head reads.
TEST_F(Attention, NoHeads) {
  for (const bool packed : {false, true}) {
    check_case({.sequences = {{3, 5}, {3, 5}}, .packed = packed, .heads_kv = 0, .group = 1}, 9);
    check_case({.sequences = {{3, 5}, {3, 5}}, .packed = packed, .heads_kv = 2, .group = 0}, 9);
  }
  for (const auto heads : {DenseForm::kOne, DenseForm::kOfKeys, DenseForm::kOfQueries}) {
    for (const bool rows : {true, false}) {
      const DenseForm form{.batch = rows, .heads = heads, .rows = rows};
      for (const std::int64_t heads_kv : {0, 2}) {
        check_case({.sequences = {{3, 5}, {3, 5}},
                    .heads_kv = heads_kv,
                    .group = heads_kv == 0 ? 1 : 0,
                    .mask = form,
                    .dense_bias = form},
                   9);
      }
    }
  }
}

// Query, key and value may repeat elements along an axis, as dout does after out.sum().backward().
TEST_F(Attention, ExpandedInputs) {
  const Problem problem({.sequences = {{20, 20}, {20, 20}}, .heads_kv = 2, .head_dim = 8}, 10);
  Tensor ones = problem.like_query(), expanded = problem.like_query();
  ones.fill([] { return 1.0; });
  expanded.fill([] { return 1.0; });
  TensorView repeated = expanded.view();
  repeated.stride = {0, 0, 0, 0};
  Tensor out = problem.like_query(), lse = problem.like_lse();
  ForwardArgs forward_args = problem.forward_args();
  forward_args.out = out.view();
  forward_args.lse = lse.view();
  run(forward, forward_args);
  BackwardArgs args = problem.backward_args();
  args.out = out.view();
  args.lse = lse.view();
  std::vector<std::vector<unsigned char>> results;
  for (const TensorView& dout : {ones.view(), repeated}) {
    Tensor dq = problem.like_query(), dk = problem.like_key(), dv = problem.like_key();
    args.dout = dout;
    args.dq = dq.view();
    args.dk = dk.view();
    args.dv = dv.view();
    run(backward, args);
    for (const Tensor* tensor : {&dq, &dk, &dv}) results.push_back(tensor->elements());
  }
  for (std::size_t i = 0; i < 3; ++i) EXPECT_EQ(results[i], results[i + 3]);
}

// Outputs that are not asked for change nothing in the others.
TEST_F(Attention, EverySubsetOfOutputs) {
  const Problem problem({.sequences = {{90, 100}},
                         .heads_kv = 2,
                         .group = 2,
                         .head_dim = 24,
                         .visibility = Visibility::kWindow,
                         .keep_window = 17},
                        12);
  const Outputs all = run_case(problem, expect(problem));

  Tensor out = problem.like_query();
  ForwardArgs forward_args = problem.forward_args();
  forward_args.out = out.view();
  run(forward, forward_args);
  EXPECT_EQ(out.elements(), all.out.elements()) << "without lse";

  const Expectation expectation = expect(problem);
  const Gradients& g = all.gradients;
  for (int subset = 0; subset < 16; ++subset) {
    Tensor dq = problem.like_query(), dk = problem.like_key(), dv = problem.like_key(),
           dbias = problem.like_bias();
    const Outputs some = run_case(problem, expectation, {}, Poison::kNaN, subset);
    const auto check = [&](const char* name, int bit, const Tensor& got, const Tensor& want,
                           const Tensor& fresh) {
      SCOPED_TRACE(std::string(name) + ", subset " + std::to_string(subset));
      EXPECT_EQ(got.elements(), (subset & bit) != 0 ? want.elements() : fresh.elements());
    };
    check("dq", 1, some.gradients.dq, g.dq, dq);
    check("dk", 2, some.gradients.dk, g.dk, dk);
    check("dv", 4, some.gradients.dv, g.dv, dv);
    check("dbias", 8, some.gradients.dbias, g.dbias, dbias);
  }
}

}  // namespace
}  // namespace flash_dmattn::testing
