// What must not change a single bit: the number of workers, what a workspace held before, what stands beside
// a sequence in its batch, what comes after a row. And every instruction set must meet the oracle.
#include "cpu/targets.h"  // before Highway, which then knows what the library was compiled for

#include <hwy/highway.h>

#include <algorithm>
#include <cstdio>

#include "attention_case.h"

namespace flash_dmattn::testing {
namespace {

std::vector<std::vector<unsigned char>> bits(const Outputs& outputs) {
  const Gradients& g = outputs.gradients;
  return {outputs.out.elements(), outputs.lse.elements(), g.dq.elements(),
          g.dk.elements(),        g.dv.elements(),        g.dbias.elements()};
}

std::vector<Case> cases() {
  std::vector<Case> list = {
      {.sequences = {{200, 230}, {200, 230}},
       .heads_kv = 2,
       .group = 3,
       .head_dim = 40,
       .visibility = Visibility::kWindow,
       .keep_window = 33},
      {.sequences = {{1200, 1200}},
       .group = 2,
       .head_dim = 8,
       .visibility = Visibility::kWindow,
       .keep_window = 90},
      {.dtype = DType::kBFloat16,
       .sequences = {{0, 0}, {150, 150}, {3, 90}, {97, 97}},
       .packed = true,
       .heads_kv = 2,
       .group = 4,
       .head_dim = 33,
       .visibility = Visibility::kRandomExpiry,
       .strides = Strides::kPermuted},
      {.dtype = DType::kFloat64, .sequences = {{130, 130}}, .heads_kv = 3, .head_dim = 20},
      {.dtype = DType::kFloat16,
       .sequences = {{90, 60}},
       .heads_kv = 2,
       .group = 2,
       .head_dim = 64,
       .causal = false,
       .visibility = Visibility::kWindow,
       .keep_window = 20},
  };
  Random random(21);
  for (int i = 0; i < 40; ++i) list.push_back(random_case(random));
  return list;
}

TEST(Invariance, WorkersAndPoison) {
  int comparisons = 0;
  std::uint64_t seed = 0;
  for (const Case& c : cases()) {
    SCOPED_TRACE(describe(c));
    const Problem problem(c, ++seed);
    const Expectation expectation = expect(problem);
    const auto once = bits(run_case(problem, expectation));
    for (const int workers : {1, 2, 3, 7}) {
      for (const Poison poison : {Poison::kNaN, Poison::kLarge}) {
        ASSERT_EQ(bits(run_case(problem, expectation, threads(workers), poison)), once)
            << workers << " workers";
        ++comparisons;
      }
    }
  }
  std::printf("%d runs equal bit for bit\n", comparisons);
}

// The elements of sequence s, heads in order.
std::vector<double> rows_of(const Problem& p, const Tensor& tensor, std::int64_t s, std::int64_t seqlen) {
  std::vector<double> values;
  for (std::int64_t i = 0; i < seqlen; ++i) {
    for (std::int64_t head = 0; head < tensor.shape()[tensor.shape().size() - 2]; ++head) {
      for (std::int64_t column = 0; column < p.c.head_dim; ++column) {
        values.push_back(tensor.get(p.q_row(s, i, head, column)));
      }
    }
  }
  return values;
}

void copy_sequence(const Problem& from, std::int64_t s, Problem& to, std::int64_t t) {
  const auto [seqlen_q, seqlen_k] = from.c.sequences[static_cast<std::size_t>(s)];
  for (std::int64_t head = 0; head < from.c.heads_kv * from.c.group; ++head) {
    for (std::int64_t i = 0; i < seqlen_q; ++i) {
      for (std::int64_t column = 0; column < from.c.head_dim; ++column) {
        to.query.set(to.q_row(t, i, head, column), from.query.get(from.q_row(s, i, head, column)));
      }
    }
  }
  for (std::int64_t head = 0; head < from.c.heads_kv; ++head) {
    for (std::int64_t i = 0; i < seqlen_k; ++i) {
      to.bias.set(to.per_key(t, i, head), from.bias.get(from.per_key(s, i, head)));
      to.expiry.set(to.per_key(t, i, head), from.expiry.get(from.per_key(s, i, head)));
      for (std::int64_t column = 0; column < from.c.head_dim; ++column) {
        to.key.set(to.k_row(t, i, head, column), from.key.get(from.k_row(s, i, head, column)));
        to.value.set(to.k_row(t, i, head, column), from.value.get(from.k_row(s, i, head, column)));
      }
    }
  }
}

Tensor run_forward(const Problem& problem) {
  Tensor out = problem.like_query();
  ForwardArgs args = problem.forward_args();
  args.out = out.view();
  run(forward, args);
  return out;
}

// A sequence gives the same bits alone, in a batch, and packed between others.
TEST(Invariance, Neighbours) {
  Case alone{.sequences = {{150, 170}},
             .heads_kv = 2,
             .group = 2,
             .head_dim = 24,
             .visibility = Visibility::kWindow,
             .keep_window = 31};
  const Problem first(alone, 31);
  const std::vector<double> want = rows_of(first, run_forward(first), 0, 150);

  Case batched = alone;
  batched.sequences = {{150, 170}, {150, 170}, {150, 170}};
  Problem in_batch(batched, 32);
  copy_sequence(first, 0, in_batch, 2);
  EXPECT_EQ(rows_of(in_batch, run_forward(in_batch), 2, 150), want);

  Case packed = alone;
  packed.packed = true;
  packed.sequences = {{7, 7}, {0, 0}, {150, 170}, {40, 90}};
  Problem in_pack(packed, 33);
  copy_sequence(first, 0, in_pack, 2);
  EXPECT_EQ(rows_of(in_pack, run_forward(in_pack), 2, 150), want);
}

// Tokens appended to a sequence, selected anew, change no bit of the rows before them.
TEST(Invariance, Causality) {
  constexpr std::int64_t kLong = 1400, kHeadDim = 8, kKeepWindow = 50;
  Random random(41);
  std::vector<float> query(kLong * kHeadDim), key(query), value(query), bias(kLong);
  for (auto* data : {&query, &key, &value, &bias}) {
    for (float& x : *data) x = static_cast<float>(random.normal());
  }
  std::vector<float> full;
  for (const std::int64_t length :
       {kLong, std::int64_t{1399}, std::int64_t{1025}, std::int64_t{700}, std::int64_t{33}}) {
    std::vector<std::int32_t> expiry(static_cast<std::size_t>(length));
    std::vector<float> out(static_cast<std::size_t>(length * kHeadDim));
    SelectArgs select_args;
    select_args.score = contiguous_view(bias.data(), DType::kFloat32, {1, 1, length});
    select_args.expiry = contiguous_view(expiry.data(), DType::kInt32, {1, 1, length});
    select_args.keep_window = kKeepWindow;
    run(select, select_args);
    ForwardArgs args;
    args.query = contiguous_view(query.data(), DType::kFloat32, {1, length, 1, kHeadDim});
    args.key = contiguous_view(key.data(), DType::kFloat32, {1, length, 1, kHeadDim});
    args.value = contiguous_view(value.data(), DType::kFloat32, {1, length, 1, kHeadDim});
    args.bias = select_args.score;
    args.expiry = select_args.expiry;
    args.out = contiguous_view(out.data(), DType::kFloat32, {1, length, 1, kHeadDim});
    args.scale = 0.35;
    run(forward, args);
    if (full.empty()) full = out;
    EXPECT_TRUE(std::equal(out.begin(), out.end(), full.begin())) << length << " tokens";
  }
}

TEST(Invariance, EveryInstructionSetMeetsTheOracle) {
  const std::vector<std::int64_t> targets = hwy::SupportedAndGeneratedTargets();
  std::string names;
  for (const std::int64_t target : targets) {
    hwy::SetSupportedTargetsForTest(target);
    names += std::string(names.empty() ? "" : ", ") + hwy::TargetName(target);
    SCOPED_TRACE(hwy::TargetName(target));
    std::uint64_t seed = 0;
    for (const Case& c : cases()) check_case(c, ++seed);
  }
  hwy::SetSupportedTargetsForTest(0);
  std::printf("instruction sets: %s; this machine's choice: %s\n", names.c_str(), describe_build().c_str());
  EXPECT_GE(targets.size(), 1u);
}

}  // namespace
}  // namespace flash_dmattn::testing
