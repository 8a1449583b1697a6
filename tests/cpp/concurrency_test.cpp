// Calls from several threads at the same time, each with workers of its own: the results are those of one
// call alone, the messages those of the thread's own call. Made for ThreadSanitizer (make test-tsan), which
// sees a race even where no result shows it.
#include <atomic>
#include <cstdio>
#include <cstdlib>

#include "attention_case.h"
#include "c_args.h"
#include "support.h"

namespace flash_dmattn::testing {
namespace {

constexpr int kThreads = 4;

// How often each thread calls.
int rounds() {
  const char* text = std::getenv("FLASH_DMATTN_TEST_ROUNDS");
  return text == nullptr ? 2 : std::atoi(text);
}

// work(thread, round) in every thread, all of which begin together.
template <typename Work>
void run_together(const Work& work) {
  std::atomic<int> waiting{kThreads};
  std::vector<std::thread> pool;
  for (int thread = 0; thread < kThreads; ++thread) {
    pool.emplace_back([&, thread] {
      --waiting;
      while (waiting > 0) std::this_thread::yield();
      for (int round = 0; round < rounds(); ++round) work(thread, round);
    });
  }
  for (std::thread& thread : pool) thread.join();
}

// Several tiles, segments and waves of tasks: workers meet.
std::vector<Case> cases() {
  return {
      {.dtype = DType::kFloat32,
       .sequences = {{600, 700}},
       .heads_kv = 2,
       .visibility = Visibility::kWindow,
       .keep_window = 20},
      {.dtype = DType::kBFloat16,
       .sequences = {{40, 70}, {0, 3}, {90, 90}},
       .packed = true,
       .heads_kv = 2,
       .group = 3,
       .visibility = Visibility::kRandomExpiry},
      {.dtype = DType::kFloat64, .sequences = {{150, 150}}, .heads_kv = 3, .strides = Strides::kReversed},
      {.dtype = DType::kFloat16,
       .sequences = {{130, 60}, {130, 60}},
       .group = 2,
       .causal = false,
       .visibility = Visibility::kWindow,
       .keep_window = 9,
       .strides = Strides::kPermuted},
  };
}

std::vector<std::vector<unsigned char>> bytes_of(const Outputs& outputs) {
  const Gradients& g = outputs.gradients;
  return {outputs.out.bytes(), outputs.lse.bytes(), g.dq.bytes(),
          g.dk.bytes(),        g.dv.bytes(),        g.dbias.bytes()};
}

template <typename Args>
void run_c(const Args& args, const Target& target, Poison poison) {
  const auto c_args = to_c(args);
  const flash_dmattn_target c_target = to_c(target);
  std::size_t bytes = 0;
  EXPECT_EQ(c_workspace_bytes(&c_args, &c_target, &bytes), FLASH_DMATTN_OK) << flash_dmattn_last_error();
  std::vector<unsigned char> workspace(bytes, static_cast<unsigned char>(poison));
  EXPECT_EQ(c_run(&c_args, &c_target, workspace.data(), bytes), FLASH_DMATTN_OK) << flash_dmattn_last_error();
}

// Forward and backward. Every thread begins with another case, so that each case also meets itself.
TEST(Concurrency, Attention) {
  const Passes c_passes = {run_c<ForwardArgs>, run_c<BackwardArgs>};
  std::vector<std::unique_ptr<Problem>> problems;
  std::vector<Expectation> expectations;
  std::vector<std::vector<std::vector<unsigned char>>> want;
  for (const Case& c : cases()) {
    problems.push_back(std::make_unique<Problem>(c, problems.size()));
    expectations.push_back(expect(*problems.back()));
    const Outputs alone = run_case(*problems.back(), expectations.back());
    ASSERT_EQ(compare(*problems.back(), expectations.back(), alone), "");
    want.push_back(bytes_of(alone));
  }
  std::atomic<int> count{0};
  run_together([&](int thread, int round) {
    for (std::size_t n = 0; n < problems.size(); ++n) {
      const std::size_t at = (n + static_cast<std::size_t>(thread)) % problems.size();
      const bool through_c = (thread + round) % 2 == 1;
      const Outputs got = run_case(*problems[at], expectations[at], threads(1 + thread), Poison::kNaN, 15,
                                   through_c ? c_passes : kCppPasses);
      EXPECT_EQ(bytes_of(got), want[at]) << describe(problems[at]->c);
      ++count;
    }
  });
  for (const auto& problem : problems) EXPECT_TRUE(problem->inputs_unchanged());
  std::printf("compared %d concurrent forward and backward calls\n", count.load());
}

// The threads share the scores and nothing else.
TEST(Concurrency, Selection) {
  Random random(3);
  Tensor score(DType::kFloat32, {2, 3, 500});
  score.fill([&] { return random.normal(); });
  const auto select_with = [&](int thread, int workers, Tensor& expiry) {
    SelectArgs args;
    args.score = score.view();
    args.expiry = expiry.view();
    args.keep_window = 10 + thread;
    run(select, args, threads(workers));
  };
  std::vector<Tensor> want(kThreads);
  for (int thread = 0; thread < kThreads; ++thread) {
    want[thread] = Tensor(DType::kInt32, {2, 3, 500});
    select_with(thread, 1, want[thread]);
  }
  run_together([&](int thread, int) {
    Tensor expiry(DType::kInt32, {2, 3, 500});
    select_with(thread, 3, expiry);
    EXPECT_EQ(expiry.bytes(), want[thread].bytes());
  });
}

// Refusals, texts and the messages of the C interface beside each other.
TEST(Concurrency, RefusalsAndTexts) {
  run_together([](int thread, int round) {
    for (int n = 0; n < 50; ++n) {
      const std::int64_t wrong = -1 - thread - 10 * (round + n);
      const std::string got = "keep_window: got " + std::to_string(wrong) + ", expected at least ";
      const SelectArgs select_args{.keep_window = wrong};
      EXPECT_EQ(select(select_args, {}, {}).message, "flash_dmattn::select: " + got + "1");
      const flash_dmattn_select_args c_select = to_c(select_args);
      EXPECT_EQ(c_run(&c_select, nullptr, nullptr, 0), FLASH_DMATTN_INVALID_ARGUMENT);
      EXPECT_EQ(flash_dmattn_last_error(), "flash_dmattn::select: " + got + "1");

      std::int32_t memory[8] = {};
      PlanArgs plan_args;
      plan_args.expiry = contiguous_view(memory, DType::kInt32, {1, 1, 8});
      plan_args.keep_window = wrong;
      EXPECT_EQ(plan(plan_args, {}, {}).message, "flash_dmattn::plan: " + got + "0");
      const flash_dmattn_plan_args c_plan = to_c(plan_args);
      std::size_t elements = 1;
      EXPECT_EQ(flash_dmattn_plan_elements(&c_plan, nullptr, &elements), FLASH_DMATTN_INVALID_ARGUMENT);
      EXPECT_EQ(flash_dmattn_last_error(), "flash_dmattn::plan: " + got + "0");

      char text[256];
      EXPECT_EQ(flash_dmattn_describe_build(text, sizeof(text), nullptr), FLASH_DMATTN_OK);
      EXPECT_EQ(text, describe_build());
      EXPECT_STREQ(flash_dmattn_last_error(), "");
    }
  });
}

}  // namespace
}  // namespace flash_dmattn::testing
