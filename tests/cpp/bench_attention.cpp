// Forward and backward of one key/value head with a group of four, one thread, selected keys and dense; one
// query against a cache.
#include <benchmark/benchmark.h>

#include <cmath>
#include <random>
#include <vector>

#include "flash_dmattn/attention.h"

namespace flash_dmattn {
namespace {

constexpr std::int64_t kGroup = 4;

// Arguments: sequence length, head dim, keep window (0: every key). num_queries: -1, one for every key.
struct Setup {
  explicit Setup(const benchmark::State& state, std::int64_t num_queries = -1) {
    const std::int64_t seqlen = state.range(0), head_dim = state.range(1), keep_window = state.range(2);
    const std::int64_t rows = num_queries < 0 ? seqlen : num_queries;
    std::mt19937 engine(1);
    std::normal_distribution<float> normal;
    const auto random = [&](std::int64_t size) {
      std::vector<float> data(static_cast<std::size_t>(size));
      for (float& x : data) x = normal(engine);
      return data;
    };
    const std::int64_t q_size = rows * kGroup * head_dim, k_size = seqlen * head_dim;
    query = random(q_size), dout = random(q_size), key = random(k_size), value = random(k_size),
    bias = random(seqlen);
    out.resize(q_size), dq.resize(q_size), dk.resize(k_size), dv.resize(k_size), dbias.resize(seqlen);
    lse.resize(rows * kGroup), expiry.resize(seqlen);

    forward.query = contiguous_view(query.data(), DType::kFloat32, {1, rows, kGroup, head_dim});
    forward.key = contiguous_view(key.data(), DType::kFloat32, {1, seqlen, 1, head_dim});
    forward.value = contiguous_view(value.data(), DType::kFloat32, {1, seqlen, 1, head_dim});
    forward.bias = contiguous_view(bias.data(), DType::kFloat32, {1, 1, seqlen});
    forward.out = contiguous_view(out.data(), DType::kFloat32, {1, rows, kGroup, head_dim});
    forward.lse = contiguous_view(lse.data(), DType::kFloat32, {1, kGroup, rows});
    forward.scale = 1 / std::sqrt(static_cast<double>(head_dim));
    if (keep_window > 0) {
      forward.expiry = contiguous_view(expiry.data(), DType::kInt32, {1, 1, seqlen});
      selection.score = forward.bias;
      selection.expiry = forward.expiry;
      selection.keep_window = keep_window;
      selection.num_queries = num_queries;
      status = call(select, selection);
    }
    backward.query = forward.query, backward.key = forward.key, backward.value = forward.value;
    backward.bias = forward.bias, backward.expiry = forward.expiry;
    backward.out = forward.out, backward.lse = forward.lse, backward.scale = forward.scale;
    backward.dout = contiguous_view(dout.data(), DType::kFloat32, {1, rows, kGroup, head_dim});
    backward.dq = contiguous_view(dq.data(), DType::kFloat32, {1, rows, kGroup, head_dim});
    backward.dk = contiguous_view(dk.data(), DType::kFloat32, {1, seqlen, 1, head_dim});
    backward.dv = contiguous_view(dv.data(), DType::kFloat32, {1, seqlen, 1, head_dim});
    backward.dbias = contiguous_view(dbias.data(), DType::kFloat32, {1, 1, seqlen});
  }

  template <typename Args>
  Status call(Status (*function)(const Args&, const Target&, const Workspace&), const Args& args) {
    memory.resize(workspace_bytes(args, {}));
    return function(args, {}, {.data = memory.data(), .bytes = memory.size()});
  }

  std::vector<float> query, key, value, bias, out, lse, dout, dq, dk, dv, dbias;
  std::vector<std::int32_t> expiry;
  std::vector<unsigned char> memory;
  SelectArgs selection;
  ForwardArgs forward;
  BackwardArgs backward;
  Status status;
};

void report(benchmark::State& state, const Status& status) {
  if (!status.ok()) state.SkipWithError(status.message.c_str());
}

void attention_forward(benchmark::State& state) {
  Setup setup(state);
  report(state, setup.status);
  for (auto _ : state) report(state, setup.call(forward, setup.forward));
}

void attention_backward(benchmark::State& state) {
  Setup setup(state);
  report(state, setup.status);
  report(state, setup.call(forward, setup.forward));
  for (auto _ : state) report(state, setup.call(backward, setup.backward));
}

void decode_select(benchmark::State& state) {
  Setup setup(state, 1);
  report(state, setup.status);
  for (auto _ : state) report(state, setup.call(select, setup.selection));
}

void decode_attention(benchmark::State& state) {
  Setup setup(state, 1);
  report(state, setup.status);
  for (auto _ : state) report(state, setup.call(forward, setup.forward));
}

void shapes(benchmark::internal::Benchmark* benchmark) {
  benchmark->Unit(benchmark::kMillisecond)->ArgNames({"N", "D", "w"});
  benchmark->Args({4096, 64, 1024})->Args({4096, 128, 1024})->Args({4096, 64, 0});
}
BENCHMARK(attention_forward)->Apply(shapes);
BENCHMARK(attention_backward)->Apply(shapes);

void decode_shape(benchmark::internal::Benchmark* benchmark) {
  benchmark->Unit(benchmark::kMillisecond)->ArgNames({"N", "D", "w"})->Args({524288, 64, 1024});
}
BENCHMARK(decode_select)->Apply(decode_shape);
BENCHMARK(decode_attention)->Apply(decode_shape)->Args({524288, 64, 0});

}  // namespace
}  // namespace flash_dmattn
