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

}  // namespace

std::string validate(const SelectArgs& args, const Target& target) {
  Validator check("select");
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
  check.target(target);
  return check.message();
}

}  // namespace flash_dmattn
