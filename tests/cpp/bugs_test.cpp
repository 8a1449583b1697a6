// Proof that green means something: with a known bug injected into the library, the comparisons of these
// suites fail.
#include "cpu/bugs.h"

#include <cstdio>

#include "attention_case.h"

namespace flash_dmattn::testing {
namespace {

// Comparisons that see every bug between them.
std::vector<Case> cases() {
  return {
      {.sequences = {{200, 230}, {200, 230}},
       .heads_kv = 2,
       .group = 3,
       .head_dim = 32,
       .visibility = Visibility::kWindow,
       .keep_window = 40,
       .disabled_keys = 0.3},
      {.dtype = DType::kFloat64, .sequences = {{65, 65}}, .group = 2, .head_dim = 8, .disabled_keys = 1},
      {.sequences = {{1200, 1200}},
       .group = 2,
       .head_dim = 8,
       .visibility = Visibility::kWindow,
       .keep_window = 300},
      {.sequences = {{90, 110}},
       .heads_kv = 2,
       .group = 2,
       .head_dim = 8,
       .mask = DenseForm{.heads = DenseForm::kOne},
       .dense_bias = DenseForm{.rows = false}},
      // Few rows: the kernel "cpu decode", three splits of the keys.
      {.sequences = {{3, 9000}},
       .heads_kv = 2,
       .group = 2,
       .head_dim = 8,
       .visibility = Visibility::kWindow,
       .keep_window = 100},
  };
}

bool selection_is_right() {
  constexpr std::int64_t kLength = 20, kKeepWindow = 3;
  Tensor score(DType::kFloat32, {1, 1, kLength}), expiry(DType::kInt32, {1, 1, kLength});
  score.fill([] { return 1.0; });
  SelectArgs args;
  args.score = score.view();
  args.expiry = expiry.view();
  args.keep_window = kKeepWindow;
  run(select, args);
  bool right = true;
  expiry.for_each([&](const Index& i) {
    right = right && expiry.get(i) == static_cast<double>(std::min(i[2] + kKeepWindow, kLength));
  });
  return right;
}

TEST(Bugs, AreCaught) {
  std::vector<Problem> problems;
  problems.reserve(cases().size());
  std::vector<Expectation> expectations;
  for (const Case& c : cases()) {
    problems.emplace_back(c, /*seed=*/problems.size());
    expectations.push_back(expect(problems.back()));
  }
  // What is wrong, or "".
  const auto verdict = [&]() -> std::string {
    if (!selection_is_right()) return "select: of equal scores the wrong key is kept";
    for (std::size_t i = 0; i < problems.size(); ++i) {
      const std::string message =
          compare(problems[i], expectations[i], run_case(problems[i], expectations[i]));
      if (!message.empty()) return message;
    }
    return "";
  };

  ASSERT_EQ(verdict(), "") << "without a bug";
  const int num_bugs = static_cast<int>(std::size(cpu::kBugNames));
  int caught = 0;
  for (int bug = 1; bug <= num_bugs; ++bug) {
    cpu::injected_bug.store(bug);
    const std::string message = verdict();
    const std::string first = message.substr(0, message.find(';'));
    std::printf("%2d %-58s %s\n", bug, cpu::kBugNames[bug - 1],
                message.empty() ? "NOT CAUGHT" : first.c_str());
    caught += !message.empty();
  }
  cpu::injected_bug.store(0);
  std::printf("%d of %d injected bugs caught\n", caught, num_bugs);
  EXPECT_EQ(caught, num_bugs);
}

}  // namespace
}  // namespace flash_dmattn::testing
