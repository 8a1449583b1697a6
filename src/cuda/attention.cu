// Forward and backward on a CUDA device: checks beyond those of core/, the plan, the kernels.
#include <cuda_runtime.h>

#include <climits>
#include <cstdlib>
#include <string>

#include "core/dtype.h"
#include "core/layout.h"
#include "core/workspace.h"
#include "cuda/backend.h"
#include "cuda/common/arguments.h"
#include "cuda/common/launch.h"
#include "cuda/common/row_tiles.cuh"
#include "cuda/common/zero.cuh"
#include "cuda/selection/plan_builder.h"
#include "cuda/sm80/dense.h"
#include "cuda/sm80/kernels.h"
#include "cuda/sm90/kernels.h"

namespace flash_dmattn::cuda {
namespace {

// Rows are copied in chunks of 16 bytes at 32-bit offsets from one row to the next.
std::string rows_why_not(const char* name, const TensorView& view) {
  if (!view.present() || view.num_elements() == 0) return "";
  const std::int64_t chunk = 16 / static_cast<std::int64_t>(dtype_size(view.dtype));
  const int last = view.rank - 1;
  bool fits = reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0 &&
              (view.shape[last] == 1 || view.stride[last] == 1);
  for (int axis = 0; axis < last; ++axis) {
    fits = fits && (view.shape[axis] <= 1 || view.stride[axis] % chunk == 0);
  }
  if (!fits) {
    return std::string(name) +
           ": takes a last axis of unit stride, and rows that start at multiples of 16 bytes";
  }
  const std::int64_t row_stride = view.stride[view.rank - 3];
  if (view.shape[view.rank - 3] > 1 && std::abs(row_stride) > INT_MAX / chunk) {
    return std::string(name) + ": takes rows less than 2 GiB apart, got a stride of " +
           std::to_string(row_stride);
  }
  return "";
}

// A plan is needed where some key may be hidden by more than its position.
template <typename Args>
bool needs_plan(const Args& args) {
  return !has_dense(args) && (args.expiry.present() || args.bias.present());
}

template <typename Args>
PlanInputs plan_inputs(const Args& args) {
  return {
      .geometry = make_geometry(args),
      .causal = args.causal,
      .expiry = key_tensor<const int>(args.expiry),
      .score = key_tensor<const void>(args.score),
      .score_dtype = args.score.dtype,
      .bias = key_tensor<const float>(args.bias),
      .keep_window = args.keep_window,
  };
}

// The plan of a call: the caller's own, or one that the call builds first.
struct CallPlan {
  PlanView view;
  void* scratch = nullptr;  // null: nothing to build
};

template <typename Args>
CallPlan cut_call_plan(Arena& arena, const Args& args) {
  if (!needs_plan(args)) return {};
  const PlanInputs inputs = plan_inputs(args);
  if (args.plan.present()) {
    Arena given({args.plan.data, static_cast<std::size_t>(args.plan.num_elements()) * sizeof(int)});
    return {cut_plan(given, inputs)};
  }
  CallPlan plan;
  plan.view = cut_plan(arena, inputs);
  plan.scratch = arena.take<unsigned char>(plan_scratch_bytes(inputs));
  return plan;
}

template <typename Args>
cudaError_t build_call_plan(const CallPlan& plan, const Args& args, cudaStream_t stream) {
  if (!needs_plan(args) || args.plan.present()) return cudaSuccess;
  return build_plan(plan_inputs(args), plan.view, plan.scratch, stream);
}

template <typename Args>
std::string common_why_not(const Args& args, const Target& target) {
  std::string reason = device_why_not(target);
  for (const auto& [name, view] : {std::pair{"query", &args.query}, std::pair{"key", &args.key},
                                   std::pair{"value", &args.value}, std::pair{"out", &args.out}}) {
    if (reason.empty()) reason = rows_why_not(name, *view);
  }
  if (!reason.empty()) return reason;
  if (args.bias.present() && args.bias.dtype == DType::kFloat64) {
    return "bias: takes float32, bfloat16 and float16, got float64";
  }
  if (args.score.present() && args.score.dtype == DType::kFloat64) {
    return "score: takes float32, bfloat16 and float16, got float64";
  }
  const Geometry geometry = make_geometry(args);
  if (geometry.total_k() > INT_MAX / 4 || geometry.total_q() > INT_MAX / 4) {
    return "takes at most " + std::to_string(INT_MAX / 4) + " rows in all sequences together";
  }
  if (geometry.total_q() * geometry.heads_q > INT_MAX || geometry.total_k() * geometry.heads_kv > INT_MAX) {
    return "takes at most " + std::to_string(INT_MAX) + " rows in all heads together";
  }
  if (!args.plan.present()) return "";
  Arena measure;
  if (has_dense(args)) {
    sm80::cut_dense_bits(measure, sm80::dense_inputs(args));
  } else if (needs_plan(args)) {
    cut_plan(measure, plan_inputs(args));
  }
  if (static_cast<std::size_t>(args.plan.num_elements()) * sizeof(int) >= measure.bytes()) return "";
  return "plan: takes the " + std::to_string(ceil_div(measure.bytes(), sizeof(int))) +
         " elements that plan makes of these arguments, got " + std::to_string(args.plan.num_elements());
}

// No rows, and so no results but gradients of 0.
bool is_empty(const Geometry& geometry) { return geometry.heads_q == 0 || geometry.num_sequences == 0; }

cudaError_t zero_gradients(const BackwardArgs& args, cudaStream_t stream) {
  cudaError_t status = cudaSuccess;
  for (const TensorView* gradient : {&args.dk, &args.dv, &args.dbias}) {
    if (status == cudaSuccess) status = fill_with_zeros(*gradient, stream);
  }
  return status;
}

}  // namespace

std::string forward_why_not(const ForwardArgs& args, const Target& target) {
  const std::string reason = common_why_not(args, target);
  if (!reason.empty()) return reason;
  return has_dense(args) ? sm80::dense_forward_why_not(args, target.device_index)
                         : sm80::forward_why_not(args, target.device_index);
}

std::size_t forward_workspace_bytes(const ForwardArgs& args, const Target& target) {
  if (is_empty(make_geometry(args))) return 0;
  if (has_dense(args)) return sm80::dense_forward_bytes(args, target.device_index);
  Arena arena;
  cut_call_plan(arena, args);
  return arena.bytes();
}

Status forward(const ForwardArgs& args, const Target& target, const Workspace& workspace) {
  const Geometry geometry = make_geometry(args);
  if (is_empty(geometry) || geometry.total_q() == 0) return {};
  const DeviceGuard guard(target.device_index);
  if (guard.status() != cudaSuccess) return device_status("forward", guard.status());
  const auto stream = static_cast<cudaStream_t>(target.stream);
  if (has_dense(args)) {
    return device_status("forward", sm80::dense_forward(args, workspace, target.device_index, stream));
  }
  Arena arena(workspace);
  const CallPlan plan = cut_call_plan(arena, args);
  cudaError_t status = build_call_plan(plan, args, stream);
  if (status == cudaSuccess) status = sm80::forward(args, plan.view, target.device_index, stream);
  return device_status("forward", status);
}

#if FLASH_DMATTN_SM90
std::string forward_sm90_why_not(const ForwardArgs& args, const Target& target) {
  const std::string reason = common_why_not(args, target);
  if (!reason.empty()) return reason;
  if (has_dense(args)) return "takes no mask and no dense bias";
  return sm90::forward_why_not(args, target.device_index);
}

std::size_t forward_sm90_workspace_bytes(const ForwardArgs& args, const Target&) {
  if (is_empty(make_geometry(args))) return 0;
  Arena arena;
  const CallPlan plan = cut_call_plan(arena, args);
  sm90::cut_forward(arena, args, plan.view);
  return arena.bytes();
}

Status forward_sm90(const ForwardArgs& args, const Target& target, const Workspace& workspace) {
  const Geometry geometry = make_geometry(args);
  if (is_empty(geometry) || geometry.total_q() == 0) return {};
  const DeviceGuard guard(target.device_index);
  if (guard.status() != cudaSuccess) return device_status("forward", guard.status());
  const auto stream = static_cast<cudaStream_t>(target.stream);
  Arena arena(workspace);
  const CallPlan plan = cut_call_plan(arena, args);
  const sm90::ForwardBuffers buffers = sm90::cut_forward(arena, args, plan.view);
  cudaError_t status = build_call_plan(plan, args, stream);
  const bool plan_built = needs_plan(args) && !args.plan.present();
  if (status == cudaSuccess) {
    status = sm90::forward(args, plan.view, buffers, plan_built, target.device_index, stream);
  }
  return device_status("forward", status);
}
#else
std::string forward_sm90_why_not(const ForwardArgs&, const Target&) {
  return "this build has no code for compute capability 9.0a";
}
std::size_t forward_sm90_workspace_bytes(const ForwardArgs&, const Target&) { return 0; }
Status forward_sm90(const ForwardArgs&, const Target&, const Workspace&) { return {}; }
#endif

std::string backward_why_not(const BackwardArgs& args, const Target& target) {
  std::string reason = common_why_not(args, target);
  for (const auto& [name, view] : {std::pair{"dout", &args.dout}, std::pair{"dq", &args.dq},
                                   std::pair{"dk", &args.dk}, std::pair{"dv", &args.dv}}) {
    if (reason.empty()) reason = rows_why_not(name, *view);
  }
  if (!reason.empty()) return reason;
  return has_dense(args) ? sm80::dense_backward_why_not(args, target.device_index)
                         : sm80::backward_why_not(args, target.device_index);
}

std::size_t backward_workspace_bytes(const BackwardArgs& args, const Target& target) {
  if (is_empty(make_geometry(args))) return 0;
  if (has_dense(args)) return sm80::dense_backward_bytes(args, target.device_index);
  const DeviceGuard guard(target.device_index);  // CUB asks the current device
  Arena arena;
  const CallPlan plan = cut_call_plan(arena, args);
  sm80::cut_backward(arena, args, plan.view, target.device_index);
  return arena.bytes();
}

Status backward(const BackwardArgs& args, const Target& target, const Workspace& workspace) {
  const DeviceGuard guard(target.device_index);
  if (guard.status() != cudaSuccess) return device_status("backward", guard.status());
  const auto stream = static_cast<cudaStream_t>(target.stream);
  if (is_empty(make_geometry(args))) return device_status("backward", zero_gradients(args, stream));
  if (has_dense(args)) {
    return device_status("backward", sm80::dense_backward(args, workspace, target.device_index, stream));
  }
  Arena arena(workspace);
  const CallPlan plan = cut_call_plan(arena, args);
  const sm80::BackwardBuffers buffers = sm80::cut_backward(arena, args, plan.view, target.device_index);
  cudaError_t status = build_call_plan(plan, args, stream);
  if (status == cudaSuccess) status = sm80::backward(args, plan.view, buffers, target.device_index, stream);
  return device_status("backward", status);
}

}  // namespace flash_dmattn::cuda
