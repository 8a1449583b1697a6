// Dynamic-mask attention from C++: scores -> expiry -> attention. Build against an installed flash_dmattn:
//
//   cmake -S . -B build -DCMAKE_PREFIX_PATH=<prefix of flash_dmattn> && cmake --build build && build/minimal
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "flash_dmattn/attention.h"

namespace fd = flash_dmattn;

// The library allocates nothing: a call runs in memory that the caller lends.
template <typename Args>
bool run(fd::Status (*function)(const Args&, const fd::Target&, const fd::Workspace&), const Args& args) {
  std::vector<unsigned char> memory(fd::workspace_bytes(args, fd::Target{}));
  const fd::Status status = function(args, fd::Target{}, {.data = memory.data(), .bytes = memory.size()});
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.message.c_str());
  return status.ok();
}

int main() {
  constexpr std::int64_t kTokens = 1024, kHeads = 4, kHeadsKv = 2, kHeadDim = 64, kKeepWindow = 64;
  std::mt19937 engine(0);
  std::normal_distribution<float> normal;
  const auto random = [&](std::int64_t size) {
    std::vector<float> data(size);
    for (float& x : data) x = normal(engine);
    return data;
  };
  const std::vector<float> query = random(kTokens * kHeads * kHeadDim),
                           key = random(kTokens * kHeadsKv * kHeadDim);
  const std::vector<float> value = random(kTokens * kHeadsKv * kHeadDim), score = random(kHeadsKv * kTokens);
  std::vector<float> out(query.size());
  std::vector<std::int32_t> expiry(score.size());

  fd::SelectArgs select;
  select.score = fd::contiguous_view(score.data(), fd::DType::kFloat32, {1, kHeadsKv, kTokens});
  select.expiry = fd::contiguous_view(expiry.data(), fd::DType::kInt32, {1, kHeadsKv, kTokens});
  select.keep_window = kKeepWindow;

  fd::ForwardArgs forward;
  forward.query = fd::contiguous_view(query.data(), fd::DType::kFloat32, {1, kTokens, kHeads, kHeadDim});
  forward.key = fd::contiguous_view(key.data(), fd::DType::kFloat32, {1, kTokens, kHeadsKv, kHeadDim});
  forward.value = fd::contiguous_view(value.data(), fd::DType::kFloat32, {1, kTokens, kHeadsKv, kHeadDim});
  forward.bias = select.score;  // in models of this family the score is also added to the logits
  forward.expiry = select.expiry;
  forward.out = fd::contiguous_view(out.data(), fd::DType::kFloat32, {1, kTokens, kHeads, kHeadDim});
  forward.scale = 1 / std::sqrt(double{kHeadDim});
  if (!run(fd::select, select) || !run(fd::forward, forward)) return 1;

  std::printf("flash_dmattn %s, %s\n", fd::version(), fd::describe_build().c_str());
  std::printf("the last query sees %lld of %lld keys; out[0] = %f\n",
              static_cast<long long>(std::count(expiry.begin(), expiry.begin() + kTokens, kTokens)),
              static_cast<long long>(kTokens), out[0]);
}
