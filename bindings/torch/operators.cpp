// The operators torch.ops.flash_dmattn.*: a tensor becomes a view, outputs and workspace come from PyTorch.
// No logic. Fake kernels and derivatives are registered in python/flash_dmattn/_ops.py.

#include <string>
#include <tuple>

#include "conversions.h"

#if FLASH_DMATTN_BUG_HOOKS
#include "cpu/bugs.h"
#endif

namespace flash_dmattn::bindings {
namespace {

Tensor select_op(Tensor score, std::int64_t keep_window, bool is_causal, std::int64_t num_sinks,
                 std::int64_t local_window, OptionalTensor cu_seqlens, std::int64_t num_queries) {
  Call call("select", score);
  Tensor expiry = call.empty(score.sizes(), ScalarType::Int);
  call.run<SelectArgs>(select, {.score = call.view(score, "score"),
                                .cu_seqlens = call.offsets(cu_seqlens, "cu_seqlens"),
                                .expiry = call.view(expiry, "expiry"),
                                .keep_window = keep_window,
                                .causal = is_causal,
                                .num_sinks = num_sinks,
                                .local_window = local_window,
                                .num_queries = num_queries});
  return expiry;
}

Tensor plan_op(OptionalTensor expiry, OptionalTensor score, OptionalTensor bias, OptionalTensor cu_seqlens_q,
               OptionalTensor cu_seqlens_k, std::int64_t num_queries, std::int64_t keep_window,
               bool is_causal, OptionalTensor mask) {
  if (!expiry.has_value() && !bias.has_value() && !mask.has_value()) {
    fail("plan", "expiry", "got none of expiry, bias and mask, expected at least one of them");
  }
  Call call("plan", expiry.has_value() ? *expiry : bias.has_value() ? *bias : *mask);
  PlanArgs args{.expiry = call.view(expiry, "expiry"),
                .score = call.view(score, "score"),
                .bias = call.view(bias, "bias"),
                .cu_seqlens_q = call.offsets(cu_seqlens_q, "cu_seqlens_q"),
                .cu_seqlens_k = call.offsets(cu_seqlens_k, "cu_seqlens_k"),
                .mask = call.view(mask, "mask"),
                .num_queries = num_queries,
                .keep_window = keep_window,
                .causal = is_causal};
  Tensor plan_memory =
      call.empty({static_cast<std::int64_t>(plan_elements(args, call.target()))}, ScalarType::Int);
  args.plan = call.view(plan_memory, "plan");
  call.run(plan, args);
  return plan_memory;
}

// lse is float32, or float64 where the query is.
ScalarType lse_dtype(const Tensor& query) {
  return query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// [B, H, Sq], packed [H, total_q].
Tensor empty_lse(const Call& call, const Tensor& query) {
  if (query.dim() == 4) return call.empty({query.size(0), query.size(2), query.size(1)}, lse_dtype(query));
  if (query.dim() != 3) {
    fail("forward", "query",
         "got " + std::to_string(query.dim()) +
             " dimensions, expected [B, Sq, H, D], or packed [total_q, H, D] with cu_seqlens_q and "
             "cu_seqlens_k");
  }
  return call.empty({query.size(1), query.size(0)}, lse_dtype(query));
}

struct Forward {
  Call call;
  Tensor out, lse;
  ForwardArgs args;
};

Forward make_forward(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& bias,
                     const OptionalTensor& mask, const OptionalTensor& expiry, const OptionalTensor& score,
                     const OptionalTensor& plan, const OptionalTensor& cu_seqlens_q,
                     const OptionalTensor& cu_seqlens_k, std::int64_t keep_window, double scale,
                     bool is_causal) {
  Call call("forward", query);
  Tensor lse = empty_lse(call, query);
  Tensor out = call.empty_rows(query.sizes(), query.scalar_type());
  const ForwardArgs args{.query = call.rows(query, "query"),
                         .key = call.rows(key, "key"),
                         .value = call.rows(value, "value"),
                         .bias = call.view(bias, "bias"),
                         .mask = call.view(mask, "mask"),
                         .expiry = call.view(expiry, "expiry"),
                         .score = call.view(score, "score"),
                         .keep_window = keep_window,
                         .plan = call.view(plan, "plan"),
                         .cu_seqlens_q = call.offsets(cu_seqlens_q, "cu_seqlens_q"),
                         .cu_seqlens_k = call.offsets(cu_seqlens_k, "cu_seqlens_k"),
                         .out = call.rows(out, "out"),
                         .lse = call.view(lse, "lse"),
                         .scale = scale,
                         .causal = is_causal};
  return {std::move(call), std::move(out), std::move(lse), args};
}

std::tuple<Tensor, Tensor> forward_op(Tensor query, Tensor key, Tensor value, OptionalTensor bias,
                                      OptionalTensor mask, OptionalTensor expiry, OptionalTensor score,
                                      OptionalTensor plan, OptionalTensor cu_seqlens_q,
                                      OptionalTensor cu_seqlens_k, std::int64_t keep_window, double scale,
                                      bool is_causal) {
  Forward pass = make_forward(query, key, value, bias, mask, expiry, score, plan, cu_seqlens_q, cu_seqlens_k,
                              keep_window, scale, is_causal);
  pass.call.run(forward, pass.args);
  return {pass.call.finished(pass.out), pass.lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_op(
    Tensor grad_out, OptionalTensor grad_lse, Tensor query, Tensor key, Tensor value, OptionalTensor bias,
    OptionalTensor mask, OptionalTensor expiry, OptionalTensor score, OptionalTensor plan, Tensor out,
    Tensor lse, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, std::int64_t keep_window,
    double scale, bool is_causal, bool need_dq, bool need_dk, bool need_dv, bool need_dbias) {
  if (need_dbias && !bias.has_value()) {
    fail("backward", "need_dbias", "got True without a bias, expected False");
  }
  Call call("backward", query);
  // A gradient that is not needed is an empty tensor, and absent for the library.
  const ScalarType dtype = query.scalar_type();
  const auto empty_rows = [&](const Tensor& tensor, bool needed) {
    return needed ? call.empty_rows(tensor.sizes(), dtype) : call.empty({0}, dtype);
  };
  const auto rows_if = [&](bool needed, const Tensor& tensor, const char* argument) {
    return needed ? call.rows(tensor, argument) : TensorView{};
  };
  Tensor dq = empty_rows(query, need_dq);
  Tensor dk = empty_rows(key, need_dk);
  Tensor dv = empty_rows(value, need_dv);
  const ScalarType dbias_dtype =
      bias.has_value() && bias->dim() == 4 ? bias->scalar_type() : lse_dtype(query);
  Tensor dbias = need_dbias ? call.empty(bias->sizes(), dbias_dtype) : call.empty({0}, dbias_dtype);
  call.run<BackwardArgs>(backward, {.query = call.rows(query, "query"),
                                    .key = call.rows(key, "key"),
                                    .value = call.rows(value, "value"),
                                    .bias = call.view(bias, "bias"),
                                    .mask = call.view(mask, "mask"),
                                    .expiry = call.view(expiry, "expiry"),
                                    .score = call.view(score, "score"),
                                    .keep_window = keep_window,
                                    .plan = call.view(plan, "plan"),
                                    .cu_seqlens_q = call.offsets(cu_seqlens_q, "cu_seqlens_q"),
                                    .cu_seqlens_k = call.offsets(cu_seqlens_k, "cu_seqlens_k"),
                                    .out = call.rows(out, "out"),
                                    .lse = call.view(lse, "lse"),
                                    .dout = call.rows(grad_out, "grad_out"),
                                    .dlse = call.view(grad_lse, "grad_lse"),
                                    .dq = rows_if(need_dq, dq, "dq"),
                                    .dk = rows_if(need_dk, dk, "dk"),
                                    .dv = rows_if(need_dv, dv, "dv"),
                                    .dbias = need_dbias ? call.view(dbias, "dbias") : TensorView{},
                                    .scale = scale,
                                    .causal = is_causal});
  return {call.finished(dq), call.finished(dk), call.finished(dv), dbias};
}

std::string explain_op(Tensor query, Tensor key, Tensor value, OptionalTensor bias, OptionalTensor mask,
                       OptionalTensor expiry, OptionalTensor score, OptionalTensor plan,
                       OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, std::int64_t keep_window,
                       double scale, bool is_causal) {
  const Forward pass = make_forward(query, key, value, bias, mask, expiry, score, plan, cu_seqlens_q,
                                    cu_seqlens_k, keep_window, scale, is_causal);
  return explain(pass.args, pass.call.target());
}

std::string describe_build_op() { return std::string(version()) + "; " + describe_build(); }

#if FLASH_DMATTN_BUG_HOOKS
constexpr int kNumBugs = sizeof(cpu::kBugNames) / sizeof(cpu::kBugNames[0]);

// Injects bug number 1, 2, ... of bug_names(), or none with 0, into every later call of the process.
void inject_op(std::int64_t bug) {
  if (bug < 0 || bug > kNumBugs) fail("inject", "bug", "got " + std::to_string(bug));
  cpu::injected_bug = static_cast<int>(bug);
}

std::string bug_names_op() {
  std::string names;
  for (const char* name : cpu::kBugNames) names += std::string(name) + "\n";
  return names;
}
#endif

}  // namespace

// The namespace is a macro, which the registration macros would take for a name.
#define FLASH_DMATTN_LIBRARY(ns, m) STABLE_TORCH_LIBRARY(ns, m)
#define FLASH_DMATTN_LIBRARY_IMPL(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)

FLASH_DMATTN_LIBRARY(FLASH_DMATTN_TORCH_NAMESPACE, library) {
  library.def(
      "select(Tensor score, int keep_window, bool is_causal, int num_sinks, int local_window, "
      "Tensor? cu_seqlens, SymInt num_queries=-1) -> Tensor");
  library.def(
      "plan(Tensor? expiry, Tensor? score, Tensor? bias, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
      "SymInt num_queries, int keep_window, bool is_causal, Tensor? mask=None) -> Tensor");
  library.def(
      "forward(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? mask, Tensor? expiry, "
      "Tensor? score, Tensor? plan, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, int keep_window, "
      "float scale, bool is_causal) -> (Tensor out, Tensor lse)");
  library.def(
      "backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor? bias, "
      "Tensor? mask, Tensor? expiry, Tensor? score, Tensor? plan, Tensor out, Tensor lse, "
      "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, int keep_window, float scale, bool is_causal, "
      "bool need_dq, bool need_dk, bool need_dv, bool need_dbias) -> (Tensor dq, Tensor dk, Tensor dv, "
      "Tensor dbias)");
  library.def(
      "explain(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? mask, Tensor? expiry, "
      "Tensor? score, Tensor? plan, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, int keep_window, "
      "float scale, bool is_causal) -> str");
  library.def("describe_build() -> str");
#if FLASH_DMATTN_BUG_HOOKS
  library.def("inject(int bug) -> ()");
  library.def("bug_names() -> str");
#endif
}

template <class Library>
void implement(Library& library) {
  library.impl("select", TORCH_BOX(&select_op));
  library.impl("plan", TORCH_BOX(&plan_op));
  library.impl("forward", TORCH_BOX(&forward_op));
  library.impl("backward", TORCH_BOX(&backward_op));
  library.impl("explain", TORCH_BOX(&explain_op));
}

FLASH_DMATTN_LIBRARY_IMPL(FLASH_DMATTN_TORCH_NAMESPACE, CPU, library) { implement(library); }
#if FLASH_DMATTN_CUDA && !FLASH_DMATTN_EMULATED
FLASH_DMATTN_LIBRARY_IMPL(FLASH_DMATTN_TORCH_NAMESPACE, CUDA, library) { implement(library); }
#endif

FLASH_DMATTN_LIBRARY_IMPL(FLASH_DMATTN_TORCH_NAMESPACE, CompositeExplicitAutograd, library) {
  library.impl("describe_build", TORCH_BOX(&describe_build_op));
#if FLASH_DMATTN_BUG_HOOKS
  library.impl("inject", TORCH_BOX(&inject_op));
  library.impl("bug_names", TORCH_BOX(&bug_names_op));
#endif
}

}  // namespace flash_dmattn::bindings
