#include "core/validation.h"

namespace flash_dmattn {
namespace {

void check_window(Validator& check, const SelectArgs& args) {
  check.require(args.keep_window >= 1, "keep_window", std::to_string(args.keep_window), "at least 1");
  check.require(args.num_sinks >= 0, "num_sinks", std::to_string(args.num_sinks), "at least 0");
  check.require(args.local_window >= 0, "local_window", std::to_string(args.local_window), "at least 0");
  check.require(args.causal || args.local_window == 0, "local_window",
                std::to_string(args.local_window) + " without causal", "0: local keys need an order");
}

void check_num_queries(Validator& check, const SelectArgs& args) {
  if (args.num_queries == -1) return;
  const std::string got = std::to_string(args.num_queries);
  check.require(args.causal, "num_queries", got + " without causal", "-1, all");
  check.require(!args.cu_seqlens.present(), "num_queries", got + " with cu_seqlens", "-1, all");
  if (!check.ok()) return;
  const std::int64_t seqlen_k = args.score.shape[2];
  check.require(args.num_queries >= 0 && args.num_queries <= seqlen_k, "num_queries", got,
                "0 to Sk = " + std::to_string(seqlen_k) + ", or -1 for all");
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
