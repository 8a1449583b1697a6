#include "core/validation.h"

namespace flash_dmattn {
namespace {

void check_window(Validator& check, const SelectArgs& args) {
  if (args.keep_window < 1) check.fail("keep_window", std::to_string(args.keep_window), "at least 1");
  if (args.num_sinks < 0) check.fail("num_sinks", std::to_string(args.num_sinks), "at least 0");
  if (args.local_window < 0) check.fail("local_window", std::to_string(args.local_window), "at least 0");
  if (!args.causal && args.local_window != 0) {
    check.fail("local_window", std::to_string(args.local_window) + " without causal",
               "0: local keys need an order");
  }
}

void check_num_queries(Validator& check, const SelectArgs& args) {
  if (args.num_queries == -1) return;
  const auto got = [&] { return std::to_string(args.num_queries); };
  if (!args.causal) check.fail("num_queries", got() + " without causal", "-1, all");
  if (args.cu_seqlens.present()) check.fail("num_queries", got() + " with cu_seqlens", "-1, all");
  if (!check.ok()) return;
  const std::int64_t seqlen_k = args.score.shape[2];
  if (args.num_queries < 0 || args.num_queries > seqlen_k) {
    check.fail("num_queries", got(), "0 to Sk = " + std::to_string(seqlen_k) + ", or -1 for all");
  }
}

}  // namespace

std::string validate(const SelectArgs& args, const Target& target) {
  Validator check("select", target);
  check_window(check, args);
  const auto& shape = args.score.shape;
  if (args.cu_seqlens.present()) {
    check.input("score", args.score, kFloatingTypes, {{"total_k"}, {"Hkv"}}) &&
        check.cu_seqlens("cu_seqlens", args.cu_seqlens, "total_k", shape[0]) &&
        check.output("expiry", args.expiry, {DType::kInt32}, {{"total_k", shape[0]}, {"Hkv", shape[1]}});
  } else {
    check.input("score", args.score, kFloatingTypes, {{"B"}, {"Hkv"}, {"Sk"}}) &&
        check.output("expiry", args.expiry, {DType::kInt32},
                     {{"B", shape[0]}, {"Hkv", shape[1]}, {"Sk", shape[2]}});
  }
  if (check.ok()) check_num_queries(check, args);
  check.target(target);
  return check.message();
}

}  // namespace flash_dmattn
