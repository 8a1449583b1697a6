// The CUDA selection against a sorted set of ranks, with pieces so small that short sequences meet every
// boundary.
#include <algorithm>
#include <cstdlib>
#include <functional>
#include <limits>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cuda/backend.h"
#include "cuda/selection/few_sample.h"
#include "cuda/selection/select.h"
#include "support.h"

namespace flash_dmattn::testing {
namespace {

using cuda::SelectSizes;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr std::int64_t kMax = std::numeric_limits<std::int64_t>::max();

struct Rule {
  std::int64_t keep_window = 1;
  bool causal = true;
  std::int64_t num_sinks = 0;
  std::int64_t local_window = 0;
  std::int64_t num_queries = -1;
};

std::vector<std::int64_t> expected_expiry(const std::vector<double>& score, const Rule& rule) {
  const auto seqlen = static_cast<std::int64_t>(score.size());
  std::vector<std::int64_t> expiry(score.size());
  std::set<std::pair<double, std::int64_t>> kept;
  for (std::int64_t key = 0; key < seqlen; ++key) {
    expiry[key] = key;
    if (!(score[key] > -kInf)) continue;
    expiry[key] = seqlen;
    kept.insert({score[key], key});
    if (static_cast<std::int64_t>(kept.size()) <= rule.keep_window) continue;
    const std::int64_t evicted = kept.begin()->second;
    expiry[evicted] = rule.causal ? key : evicted;
    kept.erase(kept.begin());
  }
  const std::int64_t first_position = rule.num_queries < 0 ? 0 : seqlen - rule.num_queries;
  for (std::int64_t key = 0; key < seqlen; ++key) {
    if (!(score[key] > -kInf)) continue;
    if (key < rule.num_sinks) expiry[key] = seqlen;
    expiry[key] = std::max(expiry[key], key + std::min(rule.local_window, seqlen - key));
    if (expiry[key] <= first_position) expiry[key] = key;
  }
  return expiry;
}

enum class Family {
  kNormal,
  kFewValues,
  kEqual,
  kUp,
  kDown,
  kNoisyUp,
  kWalk,
  kHeavy,
  kExtreme,
  kHoles,
  kDisabled
};
constexpr int kFamilies = 11;

std::function<double()> score_source(Family family, Random& random) {
  auto state = std::make_shared<double>(0);
  switch (family) {
    case Family::kNormal:
      return [&random] { return random.normal(); };
    case Family::kFewValues:
      return [&random] { return static_cast<double>(random.between(-2, 2)); };
    case Family::kEqual:
      return [] { return -1.0; };
    case Family::kUp:
      return [state] { return *state += 1; };
    case Family::kDown:
      return [state] { return *state -= 1; };
    case Family::kNoisyUp:
      return [state, &random] { return (*state += 0.01) + random.normal(); };
    case Family::kWalk:
      return [state, &random] { return *state += random.normal(); };
    case Family::kHeavy:
      return [&random] { return 1e4 * random.normal() / std::abs(random.normal()); };
    case Family::kExtreme:
      return [&random] { return random.pick({1e-42, -1e-42, 0.0, -0.0, 3.4e38, -3.4e38, kInf, 6e4, -6e-8}); };
    case Family::kHoles:
      return [&random] { return random.pick({random.normal(), -kInf, kNaN, -kNaN, kInf, -0.0, 0.0}); };
    case Family::kDisabled:
      return [&random] { return random.chance(0.95) ? random.pick({-kInf, kNaN}) : random.normal(); };
  }
  return {};
}

struct Shape {
  std::vector<std::int64_t> lengths;  // one for all if not packed
  bool packed = false;
  std::int64_t heads = 1;

  std::int64_t longest() const {
    return lengths.empty() ? 0 : *std::max_element(lengths.begin(), lengths.end());
  }
};

struct Call {
  Tensor score, expiry, cu_seqlens;
  SelectArgs args;
};

Call make_call(DType dtype, const Shape& shape, const Rule& rule, Strides strides) {
  Call call;
  std::vector<std::int64_t> begins = {0};
  for (std::int64_t length : shape.lengths) begins.push_back(begins.back() + length);
  const auto sequences = static_cast<std::int64_t>(shape.lengths.size());
  const Index sizes =
      shape.packed ? Index{begins.back(), shape.heads} : Index{sequences, shape.heads, shape.longest()};
  call.score = Tensor(dtype, sizes, strides);
  call.expiry = Tensor(DType::kInt32, sizes, strides);
  call.cu_seqlens = Tensor(DType::kInt32, {sequences + 1});
  for (std::int64_t i = 0; i <= sequences; ++i) call.cu_seqlens.set({i}, static_cast<double>(begins[i]));
  call.args = {.score = call.score.view(),
               .cu_seqlens = shape.packed ? call.cu_seqlens.view() : TensorView{},
               .expiry = call.expiry.view(),
               .keep_window = rule.keep_window,
               .causal = rule.causal,
               .num_sinks = rule.num_sinks,
               .local_window = rule.local_window,
               .num_queries = rule.num_queries};
  return call;
}

// In a workspace of exactly the size asked for, aligned to nothing, between guards.
void run_select(const SelectArgs& args, const SelectSizes& sizes, Poison poison) {
  constexpr std::size_t kGuard = 256;
  const std::size_t bytes = cuda::select_workspace_bytes(args, sizes);
  std::vector<std::uint32_t> memory((bytes + 2 * kGuard) / 4 + 1, static_cast<std::uint32_t>(poison));
  const std::vector<std::uint32_t> before = memory;
  auto* begin = reinterpret_cast<unsigned char*>(memory.data()) + kGuard - 3;
  ASSERT_EQ(cuda::select(args, sizes, {.data = begin, .bytes = bytes}, nullptr), cudaSuccess);
  const auto* now = reinterpret_cast<const unsigned char*>(memory.data());
  const auto* then = reinterpret_cast<const unsigned char*>(before.data());
  EXPECT_EQ(std::memcmp(now, then, kGuard - 3), 0) << "written before the workspace";
  const std::size_t end = kGuard - 3 + bytes;
  EXPECT_EQ(std::memcmp(now + end, then + end, memory.size() * 4 - end), 0) << "written behind the workspace";
}

void check_scores(Call& call, const Shape& shape, const Rule& rule, const std::string& what,
                  SelectSizes sizes, Random& random) {
  if (sizes.chunk == 0) sizes = cuda::choose_select_sizes(call.args);
  const std::vector<unsigned char> before = call.score.bytes();
  run_select(call.args, sizes, random.pick({Poison::kNaN, Poison::kLarge}));
  EXPECT_EQ(call.score.bytes(), before) << "scores written";
  EXPECT_TRUE(call.expiry.surroundings_untouched());

  std::int64_t begin = 0;
  for (std::size_t sequence = 0; sequence < shape.lengths.size(); ++sequence) {
    const auto index = static_cast<std::int64_t>(sequence);
    for (std::int64_t head = 0; head < shape.heads; ++head) {
      const auto place = [&](std::int64_t key) {
        return shape.packed ? Index{begin + key, head} : Index{index, head, key};
      };
      std::vector<double> scores(shape.lengths[sequence]);
      for (std::size_t key = 0; key < scores.size(); ++key) {
        scores[key] = call.score.get(place(static_cast<std::int64_t>(key)));
      }
      const std::vector<std::int64_t> want = expected_expiry(scores, rule);
      for (std::size_t key = 0; key < scores.size(); ++key) {
        ASSERT_EQ(static_cast<std::int64_t>(call.expiry.get(place(static_cast<std::int64_t>(key)))),
                  want[key])
            << dtype_name(call.score.view().dtype) << ", " << what << ", sequence " << sequence
            << " of length " << scores.size() << ", head " << head << ", key " << key
            << ", w = " << rule.keep_window << ", causal " << rule.causal << ", sinks " << rule.num_sinks
            << ", local " << rule.local_window << ", queries " << rule.num_queries << ", chunk "
            << sizes.chunk << ", super-chunk " << sizes.super_chunk;
      }
    }
    begin += shape.lengths[sequence];
  }
}

void check_call(DType dtype, const Shape& shape, const Rule& rule, Strides strides, Family family,
                SelectSizes sizes, Random& random) {
  Call call = make_call(dtype, shape, rule, strides);
  call.score.fill(score_source(family, random));
  check_scores(call, shape, rule, "family " + std::to_string(static_cast<int>(family)), sizes, random);
}

// A random shape with sequences of up to `longest` keys, and a random rule.
void check_random_call(std::int64_t longest, SelectSizes sizes, Random& random) {
  Shape shape;
  shape.packed = random.chance(0.4);
  shape.heads = random.pick<std::int64_t>({1, 1, 2, 3});
  const std::int64_t sequences = random.between(1, 3);
  for (std::int64_t i = 0; i < sequences; ++i) {
    const bool empty = random.chance(0.15);
    shape.lengths.push_back(i > 0 && !shape.packed ? shape.lengths[0]
                            : empty                ? 0
                                                   : random.between(1, longest));
  }
  const std::int64_t seqlen = shape.longest();
  Rule rule;
  rule.keep_window = random.chance(0.3) ? random.between(1, seqlen + 5)
                                        : std::max<std::int64_t>(random.between(1, seqlen / 8 + 2), 1);
  if (random.chance(0.05)) rule.keep_window = std::numeric_limits<std::int64_t>::max();
  rule.causal = random.chance(0.8);
  if (random.chance(0.2)) rule.num_sinks = random.pick<std::int64_t>({1, 4, seqlen, kMax});
  if (rule.causal && random.chance(0.2)) rule.local_window = random.pick<std::int64_t>({1, 5, seqlen, kMax});
  if (rule.causal && !shape.packed && random.chance(0.5)) {
    rule.num_queries =
        random.pick<std::int64_t>({0, 1, 2, 5, 32, seqlen / 4, seqlen / 2, seqlen - 1, seqlen});
    rule.num_queries = std::clamp<std::int64_t>(rule.num_queries, 0, seqlen);
  }
  check_call(random.pick({DType::kFloat32, DType::kFloat32, DType::kBFloat16, DType::kFloat16}), shape, rule,
             random.pick({Strides::kContiguous, Strides::kPermuted, Strides::kGaps, Strides::kReversed}),
             static_cast<Family>(random.between(0, kFamilies - 1)), sizes, random);
}

// The order in which the emulator runs threads and CTAs; 0: theirs.
void set_order(int seed) { setenv("FLASH_DMATTN_EMULATOR_SEED", std::to_string(seed).c_str(), 1); }

TEST(SelectKernels, SmallPieces) {
  Random random(1);
  for (int call = 0; call < 250 && !HasFailure(); ++call) {
    set_order(call % 3);
    const int super_chunk = 32 * random.pick({1, 2, 5});
    check_random_call(260, {.chunk = 32, .super_chunk = super_chunk}, random);
  }
  set_order(0);
}

TEST(SelectKernels, ChunksOfEverySize) {
  Random random(2);
  for (int call = 0; call < 30 && !HasFailure(); ++call) {
    const int chunk = random.pick({256, 1024});
    check_random_call(5 * chunk, {.chunk = chunk, .super_chunk = chunk * random.pick({1, 2, 4})}, random);
  }
}

TEST(SelectKernels, TheirOwnSizes) {
  Random random(3);
  for (const std::int64_t longest : {31, 32, 33, 255, 256, 257, 1023, 1024, 1025, 3000}) {
    for (int call = 0; call < 4 && !HasFailure(); ++call) check_random_call(longest, {}, random);
  }
}

// Every kernel on full pieces: all keys of a chunk enter and as many old ones die.
TEST(SelectKernels, FullPieces) {
  Random random(4);
  for (const Family family : {Family::kUp, Family::kEqual, Family::kDown, Family::kNormal}) {
    const Shape shape{.lengths = {70000}, .packed = false, .heads = 1};
    check_call(DType::kFloat32, shape, {.keep_window = 2000}, Strides::kContiguous, family, {}, random);
  }
  const Shape shape{.lengths = {70000}, .packed = false, .heads = 1};
  for (const std::int64_t num_queries : {1, 2, 7, 32, 1500, 30000}) {
    check_call(DType::kBFloat16, shape, {.keep_window = 700, .num_queries = num_queries},
               Strides::kContiguous, Family::kNormal, {}, random);
  }
  const Shape packed{.lengths = {300, 0, 40000, 1, 35000, 2000}, .packed = true, .heads = 2};
  for (const bool causal : {true, false}) {
    check_call(DType::kFloat32, packed, {.keep_window = 1500, .causal = causal}, Strides::kContiguous,
               Family::kNoisyUp, {}, random);
  }
}

// Few rows of a long sequence: what the sample says of all keys is right, too high, or too low.
TEST(SelectKernels, SamplesThatMislead) {
  Random random(6);
  constexpr std::int64_t kKeys = 40000;
  const Shape shape{.lengths = {kKeys, kKeys}, .packed = false, .heads = 1};
  for (const std::int64_t rows : {1, 9, 32}) {
    const std::int64_t prefix = rows == 1 ? kKeys : kKeys - rows;
    std::vector<bool> sampled(kKeys);
    const auto sample = cuda::FewSample::make(static_cast<int>(prefix), 1000, 1000);
    for (int i = 0; i < sample.size; ++i) sampled[sample.key(i)] = true;
    ASSERT_EQ(std::count(sampled.begin(), sampled.end(), true), cuda::FewSample::kMost);
    for (const double step : {3.0, -3.0, 0.0}) {
      for (const double noise : {1.0, 0.0}) {
        const Rule rule{.keep_window = random.pick({20, 1000, 5000, 39000}), .num_queries = rows};
        Call call =
            make_call(DType::kFloat32, shape, rule, random.pick({Strides::kContiguous, Strides::kGaps}));
        for (std::int64_t key = 0; key < kKeys; ++key) {
          call.score.set({0, 0, key}, noise * random.normal() + (sampled[key] ? step : 0));
          call.score.set({1, 0, key}, random.chance(0.9) ? -kInf : noise * random.normal());
        }
        check_scores(call, shape, rule, "step " + std::to_string(step), {}, random);
      }
    }
  }
}

// Offsets that decrease, or leave the tensor, give wrong results and nothing worse.
TEST(SelectKernels, NonsenseOffsets) {
  Random random(5);
  for (int call = 0; call < 60 && !HasFailure(); ++call) {
    const Shape shape{.lengths = {100, 90, 0, 70}, .packed = true, .heads = 2};
    const Rule rule{.keep_window = random.between(1, 100), .causal = random.chance(0.7)};
    Call made = make_call(DType::kFloat32, shape, rule, Strides::kContiguous);
    made.score.fill(score_source(static_cast<Family>(random.between(0, kFamilies - 1)), random));
    for (std::int64_t i = 0; i <= 4; ++i) {
      made.cu_seqlens.set({i}, random.pick<double>({0, 5, 100, 190, 260, 261, -1, 2e9, -2e9}));
    }
    run_select(made.args, {.chunk = 32, .super_chunk = 64}, random.pick({Poison::kNaN, Poison::kLarge}));
    EXPECT_TRUE(made.expiry.surroundings_untouched());
  }
}

}  // namespace
}  // namespace flash_dmattn::testing
