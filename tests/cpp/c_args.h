// Arguments of the C++ interface as those of the C interface, so that one problem runs through both.
#pragma once

#include <algorithm>

#include "flash_dmattn/attention.h"
#include "flash_dmattn/c_api.h"

namespace flash_dmattn::testing {

inline flash_dmattn_tensor to_c(const TensorView& view) {
  flash_dmattn_tensor tensor{};
  tensor.data = view.data;
  tensor.dtype = static_cast<std::int32_t>(view.dtype) + 1;
  tensor.rank = view.rank;
  std::copy_n(view.shape.begin(), kMaxRank, tensor.shape);
  std::copy_n(view.stride.begin(), kMaxRank, tensor.strides);
  return tensor;
}

inline flash_dmattn_target to_c(const Target& target) {
  flash_dmattn_target result{};
  result.struct_size = sizeof(result);
  result.device_type = static_cast<std::int32_t>(target.device_type);
  result.device_index = target.device_index;
  result.stream = target.stream;
  result.parallel_for = target.parallel_for.run;
  result.context = target.parallel_for.context;
  result.num_workers = target.parallel_for.num_workers;
  return result;
}

inline flash_dmattn_select_args to_c(const SelectArgs& args) {
  flash_dmattn_select_args result{};
  result.struct_size = sizeof(result);
  result.score = to_c(args.score);
  result.cu_seqlens = to_c(args.cu_seqlens);
  result.expiry = to_c(args.expiry);
  result.keep_window = args.keep_window;
  result.causal = args.causal;
  result.num_sinks = args.num_sinks;
  result.local_window = args.local_window;
  result.num_queries = args.num_queries;
  return result;
}

inline flash_dmattn_plan_args to_c(const PlanArgs& args) {
  flash_dmattn_plan_args result{};
  result.struct_size = sizeof(result);
  result.expiry = to_c(args.expiry);
  result.score = to_c(args.score);
  result.bias = to_c(args.bias);
  result.cu_seqlens_q = to_c(args.cu_seqlens_q);
  result.cu_seqlens_k = to_c(args.cu_seqlens_k);
  result.plan = to_c(args.plan);
  result.mask = to_c(args.mask);
  result.num_queries = args.num_queries;
  result.keep_window = args.keep_window;
  result.causal = args.causal;
  return result;
}

// What forward and backward share.
template <typename Result, typename Args>
Result attention_to_c(const Args& args) {
  Result result{};
  result.struct_size = sizeof(result);
  result.query = to_c(args.query);
  result.key = to_c(args.key);
  result.value = to_c(args.value);
  result.bias = to_c(args.bias);
  result.mask = to_c(args.mask);
  result.expiry = to_c(args.expiry);
  result.score = to_c(args.score);
  result.keep_window = args.keep_window;
  result.plan = to_c(args.plan);
  result.cu_seqlens_q = to_c(args.cu_seqlens_q);
  result.cu_seqlens_k = to_c(args.cu_seqlens_k);
  result.out = to_c(args.out);
  result.lse = to_c(args.lse);
  result.scale = args.scale;
  result.causal = args.causal;
  return result;
}

inline flash_dmattn_forward_args to_c(const ForwardArgs& args) {
  return attention_to_c<flash_dmattn_forward_args>(args);
}

inline flash_dmattn_backward_args to_c(const BackwardArgs& args) {
  auto result = attention_to_c<flash_dmattn_backward_args>(args);
  result.dout = to_c(args.dout);
  result.dlse = to_c(args.dlse);
  result.dq = to_c(args.dq);
  result.dk = to_c(args.dk);
  result.dv = to_c(args.dv);
  result.dbias = to_c(args.dbias);
  return result;
}

// The functions of a pass, by the type of its arguments.
inline flash_dmattn_status c_run(const flash_dmattn_select_args* args, const flash_dmattn_target* target,
                                 void* workspace, std::size_t bytes) {
  return flash_dmattn_select(args, target, workspace, bytes);
}
inline flash_dmattn_status c_run(const flash_dmattn_plan_args* args, const flash_dmattn_target* target,
                                 void* workspace, std::size_t bytes) {
  return flash_dmattn_plan(args, target, workspace, bytes);
}
inline flash_dmattn_status c_run(const flash_dmattn_forward_args* args, const flash_dmattn_target* target,
                                 void* workspace, std::size_t bytes) {
  return flash_dmattn_forward(args, target, workspace, bytes);
}
inline flash_dmattn_status c_run(const flash_dmattn_backward_args* args, const flash_dmattn_target* target,
                                 void* workspace, std::size_t bytes) {
  return flash_dmattn_backward(args, target, workspace, bytes);
}
inline flash_dmattn_status c_workspace_bytes(const flash_dmattn_select_args* args,
                                             const flash_dmattn_target* target, std::size_t* bytes) {
  return flash_dmattn_select_workspace_bytes(args, target, bytes);
}
inline flash_dmattn_status c_workspace_bytes(const flash_dmattn_plan_args* args,
                                             const flash_dmattn_target* target, std::size_t* bytes) {
  return flash_dmattn_plan_workspace_bytes(args, target, bytes);
}
inline flash_dmattn_status c_workspace_bytes(const flash_dmattn_forward_args* args,
                                             const flash_dmattn_target* target, std::size_t* bytes) {
  return flash_dmattn_forward_workspace_bytes(args, target, bytes);
}
inline flash_dmattn_status c_workspace_bytes(const flash_dmattn_backward_args* args,
                                             const flash_dmattn_target* target, std::size_t* bytes) {
  return flash_dmattn_backward_workspace_bytes(args, target, bytes);
}

}  // namespace flash_dmattn::testing
