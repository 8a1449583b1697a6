// Selection on raw bytes: the expiry of every key equals that of an ordered set from which each key beyond
// the window drops the last.
#include <algorithm>
#include <cmath>
#include <set>
#include <vector>

#include "c_args.h"
#include "core/dtype.h"
#include "core/numeric.h"
#include "fuzz_input.h"

namespace flash_dmattn::testing {
namespace {

double read_score(const std::vector<std::uint8_t>& bytes, DType dtype, std::size_t index) {
  const std::uint8_t* from = bytes.data() + index * dtype_size(dtype);
  const auto load = [from](auto value) {
    std::memcpy(&value, from, sizeof(value));
    return value;
  };
  switch (dtype) {
    case DType::kFloat64:
      return load(double{});
    case DType::kFloat32:
      return load(float{});
    case DType::kFloat16:
      return float16_to_float(load(std::uint16_t{}));
    default:
      return bfloat16_to_float(load(std::uint16_t{}));
  }
}

std::vector<std::int32_t> expected_expiry(const std::vector<double>& score, const SelectArgs& rule) {
  const auto seqlen = static_cast<std::int64_t>(score.size());
  std::vector<std::int64_t> expiry(score.size());
  std::set<std::pair<double, std::int64_t>> window;  // the lowest rank first
  for (std::int64_t key = 0; key < seqlen; ++key) {
    expiry[key] = key;
    if (!(score[key] > -INFINITY)) continue;  // disabled
    expiry[key] = seqlen;
    window.emplace(score[key], key);
    if (static_cast<std::int64_t>(window.size()) <= rule.keep_window) continue;
    const std::int64_t dropped = window.begin()->second;
    expiry[dropped] = rule.causal ? key : dropped;
    window.erase(window.begin());
  }
  for (std::int64_t key = 0; key < seqlen; ++key) {
    if (!(score[key] > -INFINITY)) continue;
    if (key < rule.num_sinks) expiry[key] = seqlen;
    if (rule.local_window > 0)
      expiry[key] = std::max(expiry[key], key + std::min(rule.local_window, seqlen - key));
    if (rule.num_queries >= 0 && expiry[key] <= seqlen - rule.num_queries) expiry[key] = key;
  }
  return {expiry.begin(), expiry.end()};
}

// Workers that run from the last to the first.
void run_backwards(void* /*context*/, int num_workers, flash_dmattn_body body, void* state) {
  for (int worker = num_workers; worker-- > 0;) body(state, worker);
}

void check_selection(Input& input) {
  SelectArgs args;
  const DType dtype = input.pick({DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64});
  const std::int64_t heads = 1 + input.below(3);
  args.keep_window = input.chance(16) ? INT64_MAX : 1 + input.below(40);
  args.causal = !input.chance(64);
  args.num_sinks = input.chance(64) ? input.pick<std::int64_t>({1, 3, 40, INT64_MAX}) : 0;
  if (args.causal && input.chance(64)) args.local_window = input.pick<std::int64_t>({1, 2, 9, INT64_MAX});
  const int rows = args.causal && input.chance(64) ? 1 + input.below(255) : -1;
  Target target;
  if (input.chance(64)) target.parallel_for = {2 + input.below(3), nullptr, run_backwards};
  const bool few_values = input.chance(64);  // many ties

  std::vector<std::uint8_t> bytes(input.left());
  for (std::uint8_t& byte : bytes) byte = input.take<std::uint8_t>() & (few_values ? 0xc1 : 0xff);
  const auto seqlen = static_cast<std::int64_t>(bytes.size() / dtype_size(dtype)) / heads;
  if (rows >= 0) args.num_queries = std::min<std::int64_t>(rows, seqlen);
  args.score = contiguous_view(bytes.data(), dtype, {1, heads, seqlen});
  std::vector<std::int32_t> expiry(static_cast<std::size_t>(heads * seqlen));
  args.expiry = contiguous_view(expiry.data(), DType::kInt32, {1, heads, seqlen});

  const flash_dmattn_select_args c_args = to_c(args);
  const flash_dmattn_target c_target = to_c(target);
  std::size_t size = 0;
  require(c_workspace_bytes(&c_args, &c_target, &size) == FLASH_DMATTN_OK, flash_dmattn_last_error());
  std::vector<std::uint8_t> workspace(size, 0xff);
  require(c_run(&c_args, &c_target, workspace.data(), size) == FLASH_DMATTN_OK, flash_dmattn_last_error());

  // 0 rows to read an expiry are all rows in C.
  if (args.num_queries == 0) args.num_queries = -1;
  for (std::int64_t head = 0; head < heads; ++head) {
    std::vector<double> score;
    for (std::int64_t key = 0; key < seqlen; ++key) {
      score.push_back(read_score(bytes, dtype, static_cast<std::size_t>(head * seqlen + key)));
    }
    const std::vector<std::int32_t> want = expected_expiry(score, args);
    require(std::equal(want.begin(), want.end(), expiry.begin() + head * seqlen), "another selection");
  }
}

}  // namespace
}  // namespace flash_dmattn::testing

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  flash_dmattn::testing::Input input(data, size);
  flash_dmattn::testing::check_selection(input);
  return 0;
}
