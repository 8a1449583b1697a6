// Tiny calls of both passes through the C interface, against the float64 oracle with its error budget. The
// input decides shape, strides, types, visibility and the seed of the numbers.
#include "attention_case.h"
#include "c_args.h"
#include "fuzz_input.h"

namespace flash_dmattn::testing {
namespace {

Case read_case(Input& input) {
  Case c;
  c.dtype = input.pick({DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64});
  c.packed = input.chance(100);
  c.causal = !input.chance(80);
  c.heads_kv = 1 + input.below(2);
  c.group = input.pick<std::int64_t>({1, 2, 3, 5, 0});
  c.head_dim = 1 + input.below(20);
  const int sequences = input.below(3) + (c.packed ? 0 : 1);
  for (int i = 0; i < sequences; ++i) {
    const std::int64_t q = input.below(16), more = input.below(16);
    if (i > 0 && !c.packed) {
      c.sequences.push_back(c.sequences[0]);
    } else {
      c.sequences.push_back({q, c.causal ? q + more : more});
    }
  }
  c.visibility = input.pick({Visibility::kWindow, Visibility::kAll, Visibility::kRandomExpiry});
  c.keep_window = 1 + input.below(20);
  c.bias = !input.chance(64);
  c.dlse = input.chance(128);
  c.scale = input.pick({0.25, 1.0, 0.0, -2.0}) / std::sqrt(static_cast<double>(c.head_dim));
  c.strides = input.pick({Strides::kContiguous, Strides::kPermuted, Strides::kGaps, Strides::kReversed});
  c.disabled_keys = input.pick({0.0, 0.3, 1.0});
  c.tied_scores = input.chance(64);
  if (c.packed) return c;
  const auto form = [&] {
    return DenseForm{.batch = !input.chance(64),
                     .heads = input.pick({DenseForm::kOfQueries, DenseForm::kOfKeys, DenseForm::kOne}),
                     .rows = !input.chance(64)};
  };
  if (input.chance(80)) c.mask = form();
  if (input.chance(80)) c.dense_bias = form();
  c.dense_dtype = input.pick({DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64});
  return c;
}

// Workers that run from the last to the first.
void run_backwards(void* /*context*/, int num_workers, ParallelFor::Body body, void* state) {
  for (int worker = num_workers; worker-- > 0;) body(state, worker);
}

template <typename Args>
void run_c(const Args& args, const Target& target, Poison poison) {
  const auto c_args = to_c(args);
  const flash_dmattn_target c_target = to_c(target);
  std::size_t bytes = 0;
  require(c_workspace_bytes(&c_args, &c_target, &bytes) == FLASH_DMATTN_OK, flash_dmattn_last_error());
  std::vector<unsigned char> workspace(bytes, static_cast<unsigned char>(poison));
  require(c_run(&c_args, &c_target, workspace.data(), bytes) == FLASH_DMATTN_OK, flash_dmattn_last_error());
}

void check_attention(Input& input) {
  const Case c = read_case(input);
  Target target;
  if (input.chance(64)) target.parallel_for = {2 + input.below(3), nullptr, run_backwards};
  const Problem problem(c, input.take<std::uint32_t>());
  const Expectation expectation = expect(problem);
  const Passes passes = {run_c<ForwardArgs>, run_c<BackwardArgs>};
  const Outputs outputs = run_case(problem, expectation, target, Poison::kNaN, 15, passes);
  const std::string difference = compare(problem, expectation, outputs);
  require(difference.empty(), describe(c) + ": " + difference);
  require(problem.inputs_unchanged(), "an input was written");
  const Gradients& results = outputs.gradients;
  for (const Tensor* tensor :
       {&outputs.out, &outputs.lse, &results.dq, &results.dk, &results.dv, &results.dbias}) {
    require(tensor->surroundings_untouched(), "written outside of an output");
  }
}

}  // namespace
}  // namespace flash_dmattn::testing

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  flash_dmattn::testing::Input input(data, size);
  flash_dmattn::testing::check_attention(input);
  return 0;
}
