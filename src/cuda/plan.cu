// The pass `plan` of the public functions.
#include <limits>
#include <string>

#include "core/dtype.h"
#include "core/layout.h"
#include "cuda/backend.h"
#include "cuda/common/arguments.h"
#include "cuda/common/launch.h"
#include "cuda/selection/plan_builder.h"
#include "cuda/sm80/dense.h"

namespace flash_dmattn::cuda {
namespace {

// Of a plan of lists.
PlanInputs inputs_of(const PlanArgs& args) {
  const bool packed = args.cu_seqlens_k.present();
  const auto& shape = (args.expiry.present() ? args.expiry : args.bias).shape;
  PlanInputs inputs;
  Geometry& geometry = inputs.geometry;
  geometry.cu_seqlens_q = cu_seqlens_data(args.cu_seqlens_q);
  geometry.cu_seqlens_k = cu_seqlens_data(args.cu_seqlens_k);
  geometry.num_sequences = static_cast<int>(packed ? args.cu_seqlens_k.shape[0] - 1 : shape[0]);
  // Packed, the queries are not at hand, and cu_seqlens_q needs no upper bound.
  geometry.seqlen_q = packed ? std::numeric_limits<int>::max() : static_cast<int>(args.num_queries);
  geometry.seqlen_k = static_cast<int>(packed ? shape[0] : shape[2]);
  geometry.heads_kv = static_cast<int>(shape[1]);
  inputs.causal = args.causal;
  inputs.expiry = key_tensor<const int>(args.expiry);
  inputs.score = key_tensor<const void>(args.score);
  inputs.score_dtype = args.score.dtype;
  inputs.bias = key_tensor<const float>(args.bias);
  inputs.keep_window = args.keep_window;
  return inputs;
}

}  // namespace

std::string plan_why_not(const PlanArgs& args, const Target& target) {
  if (args.bias.present() && args.bias.dtype == DType::kFloat64) {
    return "bias: takes float32, bfloat16 and float16, got float64";
  }
  if (args.score.present() && args.score.dtype == DType::kFloat64) {
    return "takes scores of float32, bfloat16 or float16, got float64";
  }
  return device_why_not(target);
}

std::size_t plan_workspace_bytes(const PlanArgs& args, const Target& /*target*/) {
  if (has_dense(args)) return 0;
  Arena arena;
  arena.take<unsigned char>(plan_scratch_bytes(inputs_of(args)));
  return arena.bytes();
}

std::size_t plan_elements(const PlanArgs& args) {
  Arena arena;
  if (has_dense(args)) {
    sm80::cut_dense_bits(arena, sm80::dense_inputs(args));
  } else {
    cut_plan(arena, inputs_of(args));
  }
  return (arena.bytes() + sizeof(int) - 1) / sizeof(int);
}

Status plan(const PlanArgs& args, const Target& target, const Workspace& workspace) {
  const DeviceGuard guard(target.device_index);
  if (guard.status() != cudaSuccess) return device_status("plan", guard.status());
  const auto stream = static_cast<cudaStream_t>(target.stream);
  Arena arena(Workspace{args.plan.data, sizeof(int) * static_cast<std::size_t>(args.plan.shape[0])});
  if (has_dense(args)) {
    const sm80::DenseInputs inputs = sm80::dense_inputs(args);
    return device_status("plan", sm80::build_dense_bits(inputs, sm80::cut_dense_bits(arena, inputs), stream));
  }
  const PlanInputs inputs = inputs_of(args);
  Arena scratch(workspace);
  const cudaError_t error = build_plan(inputs, cut_plan(arena, inputs),
                                       scratch.take<unsigned char>(plan_scratch_bytes(inputs)), stream);
  return device_status("plan", error);
}

}  // namespace flash_dmattn::cuda
