// What the target decides: which kernels may run, what is checked, and the words for it. No GPU is asked: the
// library under test has the kernels of the CPU alone.
#include <cstdint>
#include <string>

#include "support.h"

namespace flash_dmattn::testing {
namespace {

const Target kCudaTarget{.device_type = DeviceType::kCuda};
constexpr const char* kNone = ": no kernel can run: this build has no CUDA kernels";
constexpr const char* kNoneForCuda =
    ": no kernel can run: cpu: takes tensors in host memory; this build has no CUDA kernels";

// Memory that nobody may touch: reading it would end the test.
TensorView untouchable(DType dtype, std::initializer_list<std::int64_t> shape) {
  return contiguous_view(reinterpret_cast<void*>(std::uintptr_t{4096}), dtype, shape);
}

ForwardArgs packed_forward() {
  ForwardArgs args;
  args.query = untouchable(DType::kFloat16, {6, 4, 8});
  args.key = args.value = untouchable(DType::kFloat16, {10, 2, 8});
  args.out = untouchable(DType::kFloat16, {6, 4, 8});
  args.out.data = static_cast<char*>(args.out.data) + 4096;
  args.cu_seqlens_q = args.cu_seqlens_k = untouchable(DType::kInt32, {3});
  args.scale = 1;
  return args;
}

PlanArgs plan_of(std::int64_t num_queries) {
  PlanArgs args;
  args.expiry = untouchable(DType::kInt32, {2, 2, 5});
  args.num_queries = num_queries;
  return args;
}

TEST(Device, CudaTensorsAreRefusedWithoutBeingRead) {
  SelectArgs select_args;
  select_args.score = untouchable(DType::kFloat32, {10, 2});
  select_args.expiry = untouchable(DType::kInt32, {10, 2});
  select_args.expiry.data = static_cast<char*>(select_args.expiry.data) + 4096;
  select_args.cu_seqlens = untouchable(DType::kInt32, {3});
  select_args.keep_window = 2;
  EXPECT_EQ(why_unsupported(select_args, kCudaTarget), std::string("flash_dmattn::select") + kNoneForCuda);

  const ForwardArgs args = packed_forward();
  const Status status = forward(args, kCudaTarget, {});
  EXPECT_EQ(status.code, StatusCode::kUnsupported);
  EXPECT_EQ(status.message,
            "flash_dmattn::forward: no kernel can run: cpu decode: takes tensors in host memory; cpu: takes "
            "tensors "
            "in host memory; this build has no CUDA kernels");
  EXPECT_EQ(explain(args, kCudaTarget), status.message);
  EXPECT_EQ(workspace_bytes(args, kCudaTarget), 0u);
}

TEST(Device, OffsetsOnADeviceAreContiguous) {
  ForwardArgs args = packed_forward();
  args.cu_seqlens_k.stride[0] = 2;
  EXPECT_EQ(why_unsupported(args, kCudaTarget),
            "flash_dmattn::forward: cu_seqlens_k: got strides [2], expected contiguous memory");
}

TEST(Device, AnIndexIsNotNegative) {
  Target target = kCudaTarget;
  target.device_index = -1;
  EXPECT_EQ(why_unsupported(packed_forward(), target),
            "flash_dmattn::forward: device_index: got -1, expected at least 0");
}

TEST(Device, OnlyCudaKernelsTakeAPlan) {
  std::int32_t memory[8] = {};
  float numbers[64] = {};
  float out[64] = {};
  ForwardArgs args;
  args.query = args.key = args.value = contiguous_view(numbers, DType::kFloat32, {1, 4, 2, 8});
  args.out = contiguous_view(out, DType::kFloat32, {1, 4, 2, 8});
  args.scale = 1;
  EXPECT_EQ(why_unsupported(args, {}), "");
  args.plan = contiguous_view(memory, DType::kInt32, {8});
  EXPECT_EQ(
      why_unsupported(args, {}),
      "flash_dmattn::forward: no kernel can run: cpu decode: takes no plan; cpu: takes no plan; this build "
      "has no CUDA kernels");
  EXPECT_EQ(explain(args, {}), "cpu decode: takes no plan\ncpu: takes no plan");
}

TEST(Device, ThePlanIsMadeOnCudaAlone) {
  for (const Target& target : {Target{}, kCudaTarget}) {
    const PlanArgs args = plan_of(3);
    EXPECT_EQ(why_unsupported(args, target), std::string("flash_dmattn::plan") + kNone);
    EXPECT_EQ(plan(args, target, {}).code, StatusCode::kUnsupported);
    EXPECT_EQ(plan_elements(args, target), 0u);
    EXPECT_EQ(workspace_bytes(args, target), 0u);
  }
}

TEST(Device, WrongArgumentsOfAPlanOfBits) {
  const auto message = [](const PlanArgs& args) { return why_unsupported(args, kCudaTarget); };
  const std::string name = "flash_dmattn::plan: ";
  PlanArgs args;
  args.mask = untouchable(DType::kBool, {2, 4, 3, 5});
  args.num_queries = 3;
  EXPECT_EQ(message(args), std::string("flash_dmattn::plan") + kNone);
  args.num_queries = 2;
  EXPECT_EQ(message(args), name +
                               "mask: got shape [2, 4, 3, 5], expected [B, H, Sq, Sk] with B = 2 or 1, H = 4 "
                               "or 1, Sq = 2 or 1, Sk = 5");
  args.num_queries = 3;
  args.expiry = untouchable(DType::kInt32, {2, 2, 4});
  EXPECT_EQ(message(args),
            name + "expiry: got shape [2, 2, 4], expected [B, Hkv, Sk] with B = 2, Hkv = 2, Sk = 5");
  args.expiry = untouchable(DType::kInt32, {2, 3, 5});
  EXPECT_EQ(message(args),
            name + "mask: got 4 heads beside 3, expected a multiple of the number of key/value heads");
  args.expiry = untouchable(DType::kInt32, {2, 2, 5});
  args.bias = untouchable(DType::kFloat32, {1, 1, 3, 5});
  EXPECT_EQ(message(args), std::string("flash_dmattn::plan") + kNone);
  args.bias = {};
  args.expiry = {};
  args.cu_seqlens_q = args.cu_seqlens_k = untouchable(DType::kInt32, {3});
  EXPECT_EQ(message(args), name +
                               "mask: got a tensor with cu_seqlens, expected none: packed sequences take no "
                               "mask");
}

TEST(Device, WrongPlanArguments) {
  const auto message = [](const PlanArgs& args) { return why_unsupported(args, kCudaTarget); };
  const std::string name = "flash_dmattn::plan: ";
  EXPECT_EQ(message({}), name + "expiry: got none of expiry, bias and mask, expected at least one of them");
  EXPECT_EQ(message(plan_of(-1)), name + "num_queries: got -1, expected 0 to 5");
  EXPECT_EQ(message(plan_of(6)), name + "num_queries: got 6, expected 0 to 5");
  PlanArgs args = plan_of(6);
  args.causal = false;
  EXPECT_EQ(message(args), std::string("flash_dmattn::plan") + kNone);
  args = plan_of(3);
  args.bias = untouchable(DType::kFloat32, {2, 2, 4});
  EXPECT_EQ(message(args),
            name + "bias: got shape [2, 2, 4], expected [B, Hkv, Sk] with B = 2, Hkv = 2, Sk = 5");
  args = plan_of(3);
  args.keep_window = -1;
  EXPECT_EQ(message(args), name + "keep_window: got -1, expected at least 0");
  args = plan_of(3);
  args.score = untouchable(DType::kInt32, {2, 2, 5});
  EXPECT_EQ(message(args), name + "score: got dtype int32, expected float64, float32, bfloat16 or float16");
  args = plan_of(3);
  args.plan = args.expiry;
  EXPECT_EQ(message(args), name + "plan: got shape [2, 2, 5], expected [n]");
  args.plan = untouchable(DType::kInt32, {8});
  EXPECT_EQ(message(args), name + "plan: got the memory of expiry, expected memory of its own");
  args = plan_of(3);
  args.cu_seqlens_k = untouchable(DType::kInt32, {3});
  EXPECT_EQ(message(args), name + "expiry: got shape [2, 2, 5], expected [total_k, Hkv]");
  args.expiry = untouchable(DType::kInt32, {10, 2});
  EXPECT_EQ(message(args), name + "cu_seqlens_q: got no tensor, expected [sequences + 1]");
  args.cu_seqlens_q = untouchable(DType::kInt32, {4});
  EXPECT_EQ(message(args),
            name + "cu_seqlens_k: got shape [3], expected [sequences + 1] with sequences + 1 = 4");
}

}  // namespace
}  // namespace flash_dmattn::testing
