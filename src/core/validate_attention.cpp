#include <cmath>
#include <limits>

#include "core/dtype.h"
#include "core/layout.h"
#include "core/validation.h"

namespace flash_dmattn {
namespace {

// The sizes that the tensors of one call share.
struct Sizes {
  bool packed;
  std::int64_t batch = 0, seqlen_q = 0, seqlen_k = 0;  // packed: seqlen_q and seqlen_k are the totals
  std::int64_t heads_q = 0, heads_kv = 0, head_dim = 0;
  DType dtype, accumulation;
};

// Checks a tensor of one of the four kinds with Validator::input or Validator::output.
using Check = bool (Validator::*)(const char*, const TensorView&, Validator::DTypes, Validator::Axes);

bool check_q_rows(Validator& check, Check how, const char* name, const TensorView& tensor,
                  const Sizes& sizes) {
  if (sizes.packed) {
    return (check.*how)(name, tensor, {sizes.dtype},
                        {{"total_q", sizes.seqlen_q}, {"H", sizes.heads_q}, {"D", sizes.head_dim}});
  }
  return (check.*how)(
      name, tensor, {sizes.dtype},
      {{"B", sizes.batch}, {"Sq", sizes.seqlen_q}, {"H", sizes.heads_q}, {"D", sizes.head_dim}});
}

bool check_k_rows(Validator& check, Check how, const char* name, const TensorView& tensor,
                  const Sizes& sizes) {
  if (sizes.packed) {
    return (check.*how)(name, tensor, {sizes.dtype},
                        {{"total_k", sizes.seqlen_k}, {"Hkv", sizes.heads_kv}, {"D", sizes.head_dim}});
  }
  return (check.*how)(
      name, tensor, {sizes.dtype},
      {{"B", sizes.batch}, {"Sk", sizes.seqlen_k}, {"Hkv", sizes.heads_kv}, {"D", sizes.head_dim}});
}

bool check_per_key(Validator& check, Check how, const char* name, const TensorView& tensor,
                   Validator::DTypes dtypes, const Sizes& sizes) {
  if (sizes.packed) {
    return (check.*how)(name, tensor, dtypes, {{"total_k", sizes.seqlen_k}, {"Hkv", sizes.heads_kv}});
  }
  return (check.*how)(name, tensor, dtypes,
                      {{"B", sizes.batch}, {"Hkv", sizes.heads_kv}, {"Sk", sizes.seqlen_k}});
}

// Masks and biases with a query axis. Each axis has its full size or 1, the heads also Hkv.
bool check_dense(Validator& check, Check how, const char* name, const TensorView& tensor,
                 Validator::DTypes dtypes, const Sizes& sizes) {
  return (check.*how)(name, tensor, dtypes,
                      {{"B", sizes.batch, true},
                       {"H", sizes.heads_q, true, sizes.heads_kv},
                       {"Sq", sizes.seqlen_q, true},
                       {"Sk", sizes.seqlen_k}});
}

bool check_per_query(Validator& check, Check how, const char* name, const TensorView& tensor,
                     const Sizes& sizes) {
  if (sizes.packed) {
    return (check.*how)(name, tensor, {sizes.accumulation},
                        {{"H", sizes.heads_q}, {"total_q", sizes.seqlen_q}});
  }
  return (check.*how)(name, tensor, {sizes.accumulation},
                      {{"B", sizes.batch}, {"H", sizes.heads_q}, {"Sq", sizes.seqlen_q}});
}

// Query decides the type and D, query and key the lengths and heads.
template <typename Args>
void check_query_and_key(Validator& check, const Args& args, Sizes& sizes) {
  const auto& query = args.query.shape;
  const auto& key = args.key.shape;
  if (sizes.packed) {
    if (!check.input("query", args.query, kFloatingTypes, {{"total_q"}, {"H"}, {"D"}})) return;
    if (!check.input("key", args.key, {args.query.dtype}, {{"total_k"}, {"Hkv"}, {"D", query[2]}})) return;
  } else {
    if (!check.input("query", args.query, kFloatingTypes, {{"B"}, {"Sq"}, {"H"}, {"D"}})) return;
    if (!check.input("key", args.key, {args.query.dtype},
                     {{"B", query[0]}, {"Sk"}, {"Hkv"}, {"D", query[3]}})) {
      return;
    }
    sizes.batch = query[0];
  }
  const int row_axis = sizes.packed ? 0 : 1;
  sizes.seqlen_q = query[row_axis];
  sizes.seqlen_k = key[row_axis];
  sizes.heads_q = query[row_axis + 1];
  sizes.heads_kv = key[row_axis + 1];
  sizes.head_dim = query[row_axis + 2];
  sizes.dtype = args.query.dtype;
  sizes.accumulation = accumulation_dtype(sizes.dtype);
  check.require(sizes.head_dim >= 1, "query", "head dim D = 0", "at least 1");
  const bool divides = sizes.heads_kv == 0 ? sizes.heads_q == 0 : sizes.heads_q % sizes.heads_kv == 0;
  if (!divides) {
    check.fail("key", "Hkv = " + std::to_string(sizes.heads_kv),
               "a divisor of query's H = " + std::to_string(sizes.heads_q));
  }
}

template <typename Args>
void check_sequences(Validator& check, const Args& args, const Sizes& sizes) {
  if (!sizes.packed) {
    if (args.causal && sizes.seqlen_q > sizes.seqlen_k) {
      check.fail("query", "Sq = " + std::to_string(sizes.seqlen_q),
                 "at most Sk = " + std::to_string(sizes.seqlen_k) + " when causal");
    }
    return;
  }
  if (!check.cu_seqlens("cu_seqlens_q", args.cu_seqlens_q, "total_q", sizes.seqlen_q)) return;
  if (!check.cu_seqlens("cu_seqlens_k", args.cu_seqlens_k, "total_k", sizes.seqlen_k)) return;
  const std::int64_t length = args.cu_seqlens_q.shape[0];
  if (args.cu_seqlens_k.shape[0] != length) {
    check.fail("cu_seqlens_k", std::to_string(args.cu_seqlens_k.shape[0]) + " elements",
               std::to_string(length) + " as in cu_seqlens_q");
  }
  if (!check.ok() || !args.causal || !check.can_read_values()) return;
  const Layout layout = make_layout(args);
  for (std::int64_t index = 0; index < layout.num_sequences; ++index) {
    const Sequence sequence = layout.sequence(index);
    if (sequence.seqlen_q <= sequence.seqlen_k) continue;
    return check.fail("cu_seqlens_q",
                      std::to_string(sequence.seqlen_q) + " rows in sequence " + std::to_string(index),
                      "at most its " + std::to_string(sequence.seqlen_k) + " keys when causal");
  }
}

// What expiry was selected by. Args: PlanArgs, ForwardArgs or BackwardArgs.
template <typename Args>
void check_score(Validator& check, const Args& args, const Sizes& sizes) {
  if (args.keep_window < 0) check.fail("keep_window", std::to_string(args.keep_window), "at least 0");
  if (!args.expiry.present() && args.keep_window != 0) {
    check.fail("keep_window", std::to_string(args.keep_window) + " without expiry", "0");
  }
  check.require(args.expiry.present() || !args.score.present(), "score", "a tensor without expiry", "none");
  if (args.score.present())
    check_per_key(check, &Validator::input, "score", args.score, kFloatingTypes, sizes);
}

// Key-only, dense, or absent.
template <typename Args>
void check_bias_and_mask(Validator& check, const Args& args, const Sizes& sizes) {
  const bool dense_bias = is_dense(args.bias) && !sizes.packed;
  if (dense_bias) {
    check_dense(check, &Validator::input, "bias", args.bias, kFloatingTypes, sizes);
  } else if (args.bias.present()) {
    check_per_key(check, &Validator::input, "bias", args.bias, {sizes.accumulation}, sizes);
  }
  if (args.mask.present()) {
    check.require(!sizes.packed, "mask", "a tensor with cu_seqlens", "none: packed sequences take no mask");
    check_dense(check, &Validator::input, "mask", args.mask, {DType::kBool}, sizes);
  }
}

// What forward and backward share.
template <typename Args>
Sizes check_inputs(Validator& check, const Args& args) {
  Sizes sizes{.packed = args.cu_seqlens_q.present() || args.cu_seqlens_k.present(),
              .dtype = args.query.dtype,
              .accumulation = DType::kFloat32};
  check_query_and_key(check, args, sizes);
  if (!check.ok()) return sizes;
  check_k_rows(check, &Validator::input, "value", args.value, sizes);
  check_bias_and_mask(check, args, sizes);
  if (args.expiry.present()) {
    check_per_key(check, &Validator::input, "expiry", args.expiry, {DType::kInt32}, sizes);
  }
  check_score(check, args, sizes);
  if (args.plan.present()) check.contiguous("plan", args.plan, {DType::kInt32}, {{"n"}});
  if (check.ok()) check_sequences(check, args, sizes);
  if (!std::isfinite(args.scale)) check.fail("scale", std::to_string(args.scale), "a finite number");
  return sizes;
}

void check_dbias(Validator& check, const BackwardArgs& args, const Sizes& sizes) {
  if (!is_dense(args.bias)) {
    check_per_key(check, &Validator::output, "dbias", args.dbias, {sizes.accumulation}, sizes);
  } else if (check.ok()) {
    const auto& shape = args.bias.shape;
    check.output("dbias", args.dbias, {args.bias.dtype},
                 {{"B", shape[0]}, {"H", shape[1]}, {"Sq", shape[2]}, {"Sk", shape[3]}});
  }
}

// The sizes of a plan's key-only tensors, which are shaped like expiry or else bias.
Sizes plan_sizes(const PlanArgs& args) {
  Sizes sizes{.packed = args.cu_seqlens_q.present() || args.cu_seqlens_k.present(),
              .dtype = DType::kInt32,
              .accumulation = DType::kFloat32};
  const auto& shape = (args.expiry.present() ? args.expiry : args.bias).shape;
  sizes.batch = sizes.packed ? 0 : shape[0];
  sizes.heads_kv = shape[1];
  sizes.seqlen_k = sizes.packed ? shape[0] : shape[2];
  sizes.seqlen_q = args.num_queries;
  return sizes;
}

void check_plan_queries(Validator& check, const PlanArgs& args, const Sizes& sizes) {
  if (!sizes.packed) {
    const std::int64_t limit = args.causal ? sizes.seqlen_k : std::numeric_limits<std::int32_t>::max();
    if (args.num_queries < 0 || args.num_queries > limit) {
      check.fail("num_queries", std::to_string(args.num_queries), "0 to " + std::to_string(limit));
    }
    return;
  }
  check.contiguous("cu_seqlens_q", args.cu_seqlens_q, {DType::kInt32}, {{"sequences + 1"}});
  const std::int64_t length = args.cu_seqlens_q.shape[0];
  if (check.ok()) {
    check.contiguous("cu_seqlens_k", args.cu_seqlens_k, {DType::kInt32}, {{"sequences + 1", length}});
  }
  check.require(length > 0, "cu_seqlens_q", "shape [0]", "[sequences + 1], the first element 0");
}

// The arguments of a plan of bits.
void check_dense_plan(Validator& check, const PlanArgs& args) {
  const Layout layout = dense_layout(args);
  const Sizes sizes{.packed = args.cu_seqlens_q.present() || args.cu_seqlens_k.present(),
                    .batch = layout.num_sequences,
                    .seqlen_q = args.num_queries,
                    .seqlen_k = layout.max_seqlen_k,
                    .heads_q = layout.heads_q,
                    .heads_kv = layout.heads_kv,
                    .dtype = DType::kInt32,
                    .accumulation = DType::kFloat32};
  const bool divides = sizes.heads_kv == 0 ? sizes.heads_q == 0 : sizes.heads_q % sizes.heads_kv == 0;
  check_bias_and_mask(check, args, sizes);
  check.require(!sizes.packed, "bias", "a query axis with cu_seqlens", "[total_k, Hkv]");
  if (args.expiry.present())
    check_per_key(check, &Validator::input, "expiry", args.expiry, {DType::kInt32}, sizes);
  if (check.ok() && !divides) {
    check.fail("mask", std::to_string(sizes.heads_q) + " heads beside " + std::to_string(sizes.heads_kv),
               "a multiple of the number of key/value heads");
  }
  check_score(check, args, sizes);
  if (check.ok()) check_plan_queries(check, args, sizes);
}

// Those of a plan of lists.
void check_key_plan(Validator& check, const PlanArgs& args) {
  const Sizes sizes = plan_sizes(args);
  const Sizes any{.packed = sizes.packed,
                  .batch = kAnySize,
                  .seqlen_k = kAnySize,
                  .heads_kv = kAnySize,
                  .dtype = sizes.dtype,
                  .accumulation = sizes.accumulation};
  if (args.expiry.present())
    check_per_key(check, &Validator::input, "expiry", args.expiry, {DType::kInt32}, any);
  if (args.bias.present()) {
    check_per_key(check, &Validator::input, "bias", args.bias, {DType::kFloat32},
                  args.expiry.present() ? sizes : any);
  }
  check_score(check, args, sizes);
  if (check.ok()) check_plan_queries(check, args, sizes);
}

}  // namespace

std::string validate(const PlanArgs& args, const Target& target) {
  Validator check("plan", target);
  check.require(args.expiry.present() || args.bias.present() || args.mask.present(), "expiry",
                "none of expiry, bias and mask", "at least one of them");
  has_dense(args) ? check_dense_plan(check, args) : check_key_plan(check, args);
  if (args.plan.present()) check.output("plan", args.plan, {DType::kInt32}, {{"n"}});
  check.target(target);
  return check.message();
}

std::string validate(const ForwardArgs& args, const Target& target) {
  Validator check("forward", target);
  const Sizes sizes = check_inputs(check, args);
  if (check.ok()) check_q_rows(check, &Validator::output, "out", args.out, sizes);
  if (args.lse.present()) check_per_query(check, &Validator::output, "lse", args.lse, sizes);
  check.target(target);
  return check.message();
}

std::string validate(const BackwardArgs& args, const Target& target) {
  Validator check("backward", target);
  const Sizes sizes = check_inputs(check, args);
  if (check.ok()) check_q_rows(check, &Validator::input, "out", args.out, sizes);
  check_per_query(check, &Validator::input, "lse", args.lse, sizes);
  check_q_rows(check, &Validator::input, "dout", args.dout, sizes);
  if (args.dlse.present()) check_per_query(check, &Validator::input, "dlse", args.dlse, sizes);
  if (args.dq.present()) check_q_rows(check, &Validator::output, "dq", args.dq, sizes);
  if (args.dk.present()) check_k_rows(check, &Validator::output, "dk", args.dk, sizes);
  if (args.dv.present()) check_k_rows(check, &Validator::output, "dv", args.dv, sizes);
  check.require(!args.dbias.present() || args.bias.present(), "dbias", "a tensor without bias", "none");
  if (args.dbias.present()) check_dbias(check, args, sizes);
  check.target(target);
  return check.message();
}

}  // namespace flash_dmattn
