// Selection of one head: random scores, where few keys enter the window, and rising ones, where all do.
#include <benchmark/benchmark.h>

#include <random>
#include <vector>

#include "flash_dmattn/attention.h"

namespace flash_dmattn {
namespace {

void bench_select(benchmark::State& state, bool rising) {
  const std::int64_t seqlen = state.range(0);
  std::mt19937 engine(1);
  std::normal_distribution<float> normal;
  std::vector<float> score(static_cast<std::size_t>(seqlen));
  for (std::size_t i = 0; i < score.size(); ++i) score[i] = rising ? static_cast<float>(i) : normal(engine);
  std::vector<std::int32_t> expiry(score.size());
  SelectArgs args;
  args.score = contiguous_view(score.data(), DType::kFloat32, {1, 1, seqlen});
  args.expiry = contiguous_view(expiry.data(), DType::kInt32, {1, 1, seqlen});
  args.keep_window = state.range(1);
  std::vector<unsigned char> memory(workspace_bytes(args, {}));
  for (auto _ : state) {
    const Status status = select(args, {}, {.data = memory.data(), .bytes = memory.size()});
    if (!status.ok()) state.SkipWithError(status.message.c_str());
  }
  state.SetItemsProcessed(state.iterations() * seqlen);
}

void random_scores(benchmark::State& state) { bench_select(state, false); }
void rising_scores(benchmark::State& state) { bench_select(state, true); }

BENCHMARK(random_scores)
    ->Unit(benchmark::kMicrosecond)
    ->ArgNames({"N", "w"})
    ->Args({8192, 1024})
    ->Args({131072, 1024});
BENCHMARK(rising_scores)
    ->Unit(benchmark::kMicrosecond)
    ->ArgNames({"N", "w"})
    ->Args({8192, 1024})
    ->Args({131072, 1024});

}  // namespace
}  // namespace flash_dmattn
