// Selection against its definition (docs/math.md): the keys of highest rank at each position, found by
// counting.
#include <algorithm>
#include <cstdio>
#include <limits>
#include <memory>

#include "oracle.h"
#include "support.h"

namespace flash_dmattn::testing {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

struct Rule {
  std::int64_t keep_window;
  bool causal = true;
  std::int64_t num_sinks = 0;
  std::int64_t local_window = 0;
  std::int64_t num_queries = -1;
};

// The expiry of every key of one head. Also checks the theorem behind it: what drops out does not return.
std::vector<std::int64_t> expected_expiry(const std::vector<double>& score, const Rule& rule) {
  const auto seqlen = static_cast<std::int64_t>(score.size());
  std::vector<std::int64_t> expiry(score.size());
  for (std::int64_t key = 0; key < seqlen; ++key) {
    expiry[key] = key;
    if (!rule.causal) {
      if (selected(score, key, seqlen, rule.keep_window)) expiry[key] = seqlen;
    } else {
      for (std::int64_t position = key; position < seqlen; ++position) {
        if (!selected(score, key, position + 1, rule.keep_window)) continue;
        EXPECT_EQ(expiry[key], position) << "key " << key << " returns";
        expiry[key] = position + 1;
      }
    }
    if (!(score[key] > -kInf)) continue;  // disabled
    if (key < rule.num_sinks) expiry[key] = seqlen;
    if (rule.local_window > 0) {
      expiry[key] = std::max(expiry[key], key + std::min(rule.local_window, seqlen - key));
    }
    if (rule.num_queries >= 0 && expiry[key] <= seqlen - rule.num_queries) expiry[key] = key;
  }
  return expiry;
}

SelectArgs make_args(const Tensor& score, const Tensor& expiry, const Rule& rule) {
  SelectArgs args;
  args.score = score.view();
  args.expiry = expiry.view();
  args.keep_window = rule.keep_window;
  args.causal = rule.causal;
  args.num_sinks = rule.num_sinks;
  args.local_window = rule.local_window;
  args.num_queries = rule.num_queries;
  return args;
}

TEST(Selection, EveryShortScoreVector) {
  constexpr double kValues[] = {-kInf, -1, -0.0, 0.0, 1};
  std::int64_t count = 0;
  for (std::int64_t length = 0; length <= 7; ++length) {
    std::int64_t vectors = 1;
    for (std::int64_t i = 0; i < length; ++i) vectors *= 5;
    Tensor score(DType::kFloat32, {vectors, 1, length});
    std::vector<std::vector<double>> scores(vectors, std::vector<double>(length));
    for (std::int64_t vector = 0; vector < vectors; ++vector) {
      for (std::int64_t i = 0, code = vector; i < length; ++i, code /= 5) {
        scores[vector][i] = kValues[code % 5];
        score.set({vector, 0, i}, kValues[code % 5]);
      }
    }
    for (std::int64_t keep_window = 1; keep_window <= 8; ++keep_window) {
      for (const bool causal : {true, false}) {
        const Rule rule{.keep_window = keep_window, .causal = causal};
        Tensor expiry(DType::kInt32, {vectors, 1, length});
        run(select, make_args(score, expiry, rule));
        const auto* got = static_cast<const std::int32_t*>(expiry.view().data);
        for (std::int64_t vector = 0; vector < vectors; ++vector, ++count) {
          const std::vector<std::int64_t> want = expected_expiry(scores[vector], rule);
          ASSERT_TRUE(std::equal(want.begin(), want.end(), got + vector * length))
              << "scores number " << vector << " of length " << length << ", w = " << keep_window
              << (causal ? ", causal" : ", not causal");
        }
      }
    }
  }
  std::printf("compared %lld selections, every score vector of length <= 7\n", static_cast<long long>(count));
}

enum class Family { kNormal, kEqual, kTwoValues, kUp, kDown, kZeros, kDisabled, kHoles, kDenormal };

std::function<double()> score_source(Family family, Random& random) {
  auto step = std::make_shared<double>(0);
  switch (family) {
    case Family::kNormal:
      return [&random] { return random.normal(); };
    case Family::kEqual:
      return [] { return 0.5; };
    case Family::kTwoValues:
      return [&random] { return random.chance(0.5) ? 1.0 : 2.0; };
    case Family::kUp:
      return [step] { return (*step += 1); };
    case Family::kDown:
      return [step] { return (*step -= 1); };
    case Family::kZeros:
      return [&random] { return random.chance(0.5) ? 0.0 : -0.0; };
    case Family::kDisabled:
      return [&random] { return random.chance(0.5) ? -kInf : kNaN; };
    case Family::kHoles:
      return [&random] { return random.pick({random.normal(), -kInf, kNaN, -kNaN, kInf, -1e4, 6e4}); };
    case Family::kDenormal:
      return [&random] { return std::ldexp(random.normal(), -1070); };
  }
  return {};
}

// Sequences of one call, batched where all have one length.
struct Shape {
  std::vector<std::int64_t> lengths;
  bool packed;
  std::int64_t heads;
};

void check_call(DType dtype, const Shape& shape, const Rule& rule, Strides strides, Family family,
                int workers, Random& random) {
  std::vector<std::int64_t> begins = {0};
  for (std::int64_t length : shape.lengths) begins.push_back(begins.back() + length);
  const auto sequences = static_cast<std::int64_t>(shape.lengths.size());
  const std::int64_t seqlen = sequences == 0 ? 5 : shape.lengths[0];
  const Index tensor_shape =
      shape.packed ? Index{begins.back(), shape.heads} : Index{sequences, shape.heads, seqlen};
  const auto place = [&](std::int64_t sequence, std::int64_t head, std::int64_t key) {
    return shape.packed ? Index{begins[sequence] + key, head} : Index{sequence, head, key};
  };

  Tensor score(dtype, tensor_shape, strides);
  score.fill(score_source(family, random));
  Tensor expiry(DType::kInt32, tensor_shape, strides);
  SelectArgs args = make_args(score, expiry, rule);
  Tensor cu_seqlens(DType::kInt32, {sequences + 1}, strides);
  if (shape.packed) {
    for (std::int64_t i = 0; i <= sequences; ++i) cu_seqlens.set({i}, static_cast<double>(begins[i]));
    args.cu_seqlens = cu_seqlens.view();
  }
  const std::vector<unsigned char> before = score.bytes();
  run(select, args, threads(workers), random.pick({Poison::kNaN, Poison::kLarge}));
  EXPECT_EQ(score.bytes(), before) << "scores written";
  EXPECT_TRUE(expiry.surroundings_untouched());

  for (std::int64_t sequence = 0; sequence < sequences; ++sequence) {
    for (std::int64_t head = 0; head < shape.heads; ++head) {
      std::vector<double> scores(shape.lengths[sequence]);
      std::vector<std::int64_t> got(scores.size());
      for (std::size_t key = 0; key < scores.size(); ++key) {
        const Index index = place(sequence, head, static_cast<std::int64_t>(key));
        scores[key] = score.get(index);
        got[key] = static_cast<std::int64_t>(expiry.get(index));
      }
      ASSERT_EQ(got, expected_expiry(scores, rule)) << dtype_name(dtype) << ", sequence " << sequence
                                                    << ", head " << head << ", w = " << rule.keep_window;
    }
  }
}

TEST(Selection, RandomCalls) {
  Random random(1);
  constexpr int kCalls = 1500;
  for (int call = 0; call < kCalls && !HasFailure(); ++call) {
    Shape shape;
    shape.packed = random.chance(0.5);
    shape.heads = random.pick<std::int64_t>({0, 1, 2, 3, 8});
    const std::int64_t sequences = random.between(0, 4);
    for (std::int64_t i = 0; i < sequences; ++i) {
      const bool empty = random.chance(0.25);
      shape.lengths.push_back(i > 0 && !shape.packed ? shape.lengths[0] : empty ? 0 : random.between(1, 70));
    }
    Rule rule;
    const std::int64_t longest =
        sequences == 0 ? 0 : *std::max_element(shape.lengths.begin(), shape.lengths.end());
    rule.keep_window = random.pick<std::int64_t>(
        {1, 2, 3, 4, 7, 31, 32, 33, std::max<std::int64_t>(longest - 1, 1),
         std::max<std::int64_t>(longest, 1), longest + 1, std::numeric_limits<std::int64_t>::max()});
    rule.causal = random.chance(0.7);
    rule.num_sinks =
        random.pick<std::int64_t>({0, 0, 1, 4, longest, std::numeric_limits<std::int64_t>::max()});
    if (rule.causal) {
      rule.local_window =
          random.pick<std::int64_t>({0, 0, 1, 5, longest, std::numeric_limits<std::int64_t>::max()});
      if (!shape.packed && sequences > 0 && random.chance(0.3)) rule.num_queries = random.between(0, longest);
    }
    check_call(random.pick({DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16}), shape,
               rule,
               random.pick({Strides::kContiguous, Strides::kPermuted, Strides::kGaps, Strides::kReversed}),
               static_cast<Family>(random.between(0, 8)), random.pick({1, 2, 3, 7}), random);
  }
  std::printf("compared %d random calls\n", kCalls);
}

// Scores that float32 cannot tell apart are ranked in float64.
TEST(Selection, Float64IsRankedInFloat64) {
  Tensor score(DType::kFloat64, {1, 1, 3}), expiry(DType::kInt32, {1, 1, 3});
  score.set({0, 0, 0}, 1 + 0x1p-52);
  score.set({0, 0, 1}, 1);
  score.set({0, 0, 2}, 1 - 0x1p-53);
  run(select, make_args(score, expiry, {.keep_window = 1}));
  EXPECT_EQ(expiry.get({0, 0, 0}), 3);
  EXPECT_EQ(expiry.get({0, 0, 1}), 1);
  EXPECT_EQ(expiry.get({0, 0, 2}), 2);
}

// An input may repeat one element along an axis.
TEST(Selection, ExpandedScores) {
  const double one = 1;
  SelectArgs args;
  args.score = contiguous_view(&one, DType::kFloat64, {2, 3, 5});
  args.score.stride = {0, 0, 0};
  Tensor expiry(DType::kInt32, {2, 3, 5});
  args.expiry = expiry.view();
  args.keep_window = 2;
  run(select, args);
  expiry.for_each([&](const Index& index) {
    EXPECT_EQ(expiry.get(index), static_cast<double>(std::min<std::int64_t>(index[2] + 2, 5)));
  });
}

// Above 2^24, a float cannot hold every index; int32 can.
TEST(Selection, LongSequence) {
  constexpr std::int64_t kLength = (std::int64_t{1} << 24) + 100;
  const float zero = 0;
  SelectArgs args;
  args.score = contiguous_view(&zero, DType::kFloat32, {1, 1, kLength});
  args.score.stride = {0, 0, 0};
  std::vector<std::int32_t> expiry(kLength);
  args.expiry = contiguous_view(expiry.data(), DType::kInt32, {1, 1, kLength});
  args.keep_window = 3;
  run(select, args);
  std::int64_t wrong = 0;
  for (std::int64_t key = 0; key < kLength; ++key) wrong += expiry[key] != std::min(key + 3, kLength);
  EXPECT_EQ(wrong, 0);
}

}  // namespace
}  // namespace flash_dmattn::testing
