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

using OptionalTensor = std::optional<Tensor>;

Tensor select_op(Tensor score, std::int64_t keep_window, bool is_causal, std::int64_t num_sinks,
                 std::int64_t local_window, OptionalTensor cu_seqlens) {
  const char* function = "select";
  Tensor expiry = empty_cpu(score.sizes(), ScalarType::Int);
  run_on_cpu<SelectArgs>(select, {.score = view_of(score, function, "score"),
                                  .cu_seqlens = view_of(cu_seqlens, function, "cu_seqlens"),
                                  .expiry = view_of(expiry, function, "expiry"),
                                  .keep_window = keep_window,
                                  .causal = is_causal,
                                  .num_sinks = num_sinks,
                                  .local_window = local_window});
  return expiry;
}

// lse is float32, or float64 where the query is.
ScalarType lse_dtype(const Tensor& query) {
  return query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// [B, H, Sq], packed [H, total_q].
Tensor empty_lse(const Tensor& query) {
  if (query.dim() == 4) return empty_cpu({query.size(0), query.size(2), query.size(1)}, lse_dtype(query));
  if (query.dim() != 3) {
    fail("forward", "query",
         "got " + std::to_string(query.dim()) +
             " dimensions, expected [B, Sq, H, D], or packed [total_q, H, D] with cu_seqlens_q and "
             "cu_seqlens_k");
  }
  return empty_cpu({query.size(1), query.size(0)}, lse_dtype(query));
}

ForwardArgs forward_args(const Tensor& query, const Tensor& key, const Tensor& value,
                         const OptionalTensor& bias, const OptionalTensor& expiry,
                         const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                         const Tensor& out, const Tensor& lse, double scale, bool is_causal) {
  const char* function = "forward";
  return {.query = view_of(query, function, "query"),
          .key = view_of(key, function, "key"),
          .value = view_of(value, function, "value"),
          .bias = view_of(bias, function, "bias"),
          .expiry = view_of(expiry, function, "expiry"),
          .cu_seqlens_q = view_of(cu_seqlens_q, function, "cu_seqlens_q"),
          .cu_seqlens_k = view_of(cu_seqlens_k, function, "cu_seqlens_k"),
          .out = view_of(out, function, "out"),
          .lse = view_of(lse, function, "lse"),
          .scale = scale,
          .causal = is_causal};
}

std::tuple<Tensor, Tensor> forward_op(Tensor query, Tensor key, Tensor value, OptionalTensor bias,
                                      OptionalTensor expiry, OptionalTensor cu_seqlens_q,
                                      OptionalTensor cu_seqlens_k, double scale, bool is_causal) {
  Tensor lse = empty_lse(query);
  Tensor out = empty_cpu(query.sizes(), query.scalar_type());
  run_on_cpu(forward, forward_args(query, key, value, bias, expiry, cu_seqlens_q, cu_seqlens_k, out, lse,
                                   scale, is_causal));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_op(
    Tensor grad_out, OptionalTensor grad_lse, Tensor query, Tensor key, Tensor value, OptionalTensor bias,
    OptionalTensor expiry, Tensor out, Tensor lse, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
    double scale, bool is_causal, bool need_dq, bool need_dk, bool need_dv, bool need_dbias) {
  const char* function = "backward";
  if (need_dbias && !bias.has_value())
    fail(function, "need_dbias", "got True without a bias, expected False");
  // A gradient that is not needed is an empty tensor, and absent for the library.
  const auto gradient = [](const Tensor* tensor, bool needed, ScalarType dtype) {
    return needed ? empty_cpu(tensor->sizes(), dtype) : empty_cpu({0}, dtype);
  };
  const auto view_if = [&](const Tensor& tensor, bool needed, const char* argument) {
    return needed ? view_of(tensor, function, argument) : TensorView{};
  };
  const ScalarType dtype = query.scalar_type();
  Tensor dq = gradient(&query, need_dq, dtype);
  Tensor dk = gradient(&key, need_dk, dtype);
  Tensor dv = gradient(&value, need_dv, dtype);
  Tensor dbias = gradient(bias.has_value() ? &*bias : nullptr, need_dbias, lse_dtype(query));
  run_on_cpu<BackwardArgs>(backward, {.query = view_of(query, function, "query"),
                                      .key = view_of(key, function, "key"),
                                      .value = view_of(value, function, "value"),
                                      .bias = view_of(bias, function, "bias"),
                                      .expiry = view_of(expiry, function, "expiry"),
                                      .cu_seqlens_q = view_of(cu_seqlens_q, function, "cu_seqlens_q"),
                                      .cu_seqlens_k = view_of(cu_seqlens_k, function, "cu_seqlens_k"),
                                      .out = view_of(out, function, "out"),
                                      .lse = view_of(lse, function, "lse"),
                                      .dout = view_of(grad_out, function, "grad_out"),
                                      .dlse = view_of(grad_lse, function, "grad_lse"),
                                      .dq = view_if(dq, need_dq, "dq"),
                                      .dk = view_if(dk, need_dk, "dk"),
                                      .dv = view_if(dv, need_dv, "dv"),
                                      .dbias = view_if(dbias, need_dbias, "dbias"),
                                      .scale = scale,
                                      .causal = is_causal});
  return {dq, dk, dv, dbias};
}

std::string explain_op(Tensor query, Tensor key, Tensor value, OptionalTensor bias, OptionalTensor expiry,
                       OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, double scale,
                       bool is_causal) {
  Tensor lse = empty_lse(query);
  Tensor out = empty_cpu(query.sizes(), query.scalar_type());
  const ForwardArgs args =
      forward_args(query, key, value, bias, expiry, cu_seqlens_q, cu_seqlens_k, out, lse, scale, is_causal);
  return explain(args, cpu_target());
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
      "select(Tensor score, int keep_window, bool is_causal, int num_sinks, int local_window, Tensor? "
      "cu_seqlens) "
      "-> Tensor");
  library.def(
      "forward(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? expiry, Tensor? cu_seqlens_q, "
      "Tensor? cu_seqlens_k, float scale, bool is_causal) -> (Tensor out, Tensor lse)");
  library.def(
      "backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor? bias, "
      "Tensor? expiry, Tensor out, Tensor lse, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, float scale, "
      "bool is_causal, bool need_dq, bool need_dk, bool need_dv, bool need_dbias) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)");
  library.def(
      "explain(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? expiry, Tensor? cu_seqlens_q, "
      "Tensor? cu_seqlens_k, float scale, bool is_causal) -> str");
  library.def("describe_build() -> str");
#if FLASH_DMATTN_BUG_HOOKS
  library.def("inject(int bug) -> ()");
  library.def("bug_names() -> str");
#endif
}

FLASH_DMATTN_LIBRARY_IMPL(FLASH_DMATTN_TORCH_NAMESPACE, CPU, library) {
  library.impl("select", TORCH_BOX(&select_op));
  library.impl("forward", TORCH_BOX(&forward_op));
  library.impl("backward", TORCH_BOX(&backward_op));
  library.impl("explain", TORCH_BOX(&explain_op));
}

FLASH_DMATTN_LIBRARY_IMPL(FLASH_DMATTN_TORCH_NAMESPACE, CompositeExplicitAutograd, library) {
  library.impl("describe_build", TORCH_BOX(&describe_build_op));
#if FLASH_DMATTN_BUG_HOOKS
  library.impl("inject", TORCH_BOX(&inject_op));
  library.impl("bug_names", TORCH_BOX(&bug_names_op));
#endif
}

}  // namespace flash_dmattn::bindings
