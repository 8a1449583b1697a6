// The public functions: every backend's kernels in the order of preference, behind the checks of core/.

// The whole library is compiled with hidden symbols; what the public header declares is seen from outside.
#pragma GCC visibility push(default)
#include "flash_dmattn/attention.h"
#pragma GCC visibility pop

#include <array>

#include "core/dispatch.h"
#include "cpu/backend.h"
#if FLASH_DMATTN_CUDA
#include "cuda/backend.h"
#endif

namespace flash_dmattn {
namespace {

// No kernel of the CPU can fail.
template <auto run, typename Args>
Status succeed(const Args& args, const Target& target, const Workspace& workspace) {
  run(args, target, workspace);
  return {};
}

constexpr std::array kSelectKernels = {
#if FLASH_DMATTN_CUDA
    Kernel<SelectArgs>{"sm80", DeviceType::kCuda, cuda::select_why_not, cuda::select_workspace_bytes,
                       cuda::select},
#endif
    Kernel<SelectArgs>{"cpu", DeviceType::kCpu, cpu::select_why_not, cpu::select_workspace_bytes,
                       succeed<cpu::select>},
};
constexpr std::array kForwardKernels = {
#if FLASH_DMATTN_CUDA
    Kernel<ForwardArgs>{"sm80 decode", DeviceType::kCuda, cuda::decode_why_not, cuda::decode_workspace_bytes,
                        cuda::decode},
    Kernel<ForwardArgs>{"sm90", DeviceType::kCuda, cuda::forward_sm90_why_not,
                        cuda::forward_sm90_workspace_bytes, cuda::forward_sm90},
    Kernel<ForwardArgs>{"sm80", DeviceType::kCuda, cuda::forward_why_not, cuda::forward_workspace_bytes,
                        cuda::forward},
#endif
    Kernel<ForwardArgs>{"cpu decode", DeviceType::kCpu, cpu::decode_why_not, cpu::decode_workspace_bytes,
                        succeed<cpu::decode>},
    Kernel<ForwardArgs>{"cpu", DeviceType::kCpu, cpu::forward_why_not, cpu::forward_workspace_bytes,
                        succeed<cpu::forward>},
};
constexpr std::array kBackwardKernels = {
#if FLASH_DMATTN_CUDA
    Kernel<BackwardArgs>{"sm80", DeviceType::kCuda, cuda::backward_why_not, cuda::backward_workspace_bytes,
                         cuda::backward},
#endif
    Kernel<BackwardArgs>{"cpu", DeviceType::kCpu, cpu::backward_why_not, cpu::backward_workspace_bytes,
                         succeed<cpu::backward>},
};

#if FLASH_DMATTN_CUDA
constexpr std::array kPlanKernels = {
    Kernel<PlanArgs>{"sm80", DeviceType::kCuda, cuda::plan_why_not, cuda::plan_workspace_bytes, cuda::plan},
};
constexpr Pass<PlanArgs> kPlan{"plan", kPlanKernels};
#else
constexpr Pass<PlanArgs> kPlan{"plan", {}};
#endif

constexpr Pass<SelectArgs> kSelect{"select", kSelectKernels};
constexpr Pass<ForwardArgs> kForward{"forward", kForwardKernels};
constexpr Pass<BackwardArgs> kBackward{"backward", kBackwardKernels};

}  // namespace

Status select(const SelectArgs& args, const Target& target, const Workspace& workspace) {
  return kSelect.run(args, target, workspace);
}
Status plan(const PlanArgs& args, const Target& target, const Workspace& workspace) {
  const std::size_t elements = plan_elements(args, target);
  if (elements > 0 && args.plan.shape[0] != static_cast<std::int64_t>(elements)) {
    Validator check("plan", target);
    check.fail("plan", args.plan.present() ? std::to_string(args.plan.shape[0]) + " elements" : "no tensor",
               std::to_string(elements) + " elements, as plan_elements says");
    return Status::invalid(check.message());
  }
  return kPlan.run(args, target, workspace);
}
Status forward(const ForwardArgs& args, const Target& target, const Workspace& workspace) {
  return kForward.run(args, target, workspace);
}
Status backward(const BackwardArgs& args, const Target& target, const Workspace& workspace) {
  return kBackward.run(args, target, workspace);
}

std::size_t workspace_bytes(const SelectArgs& args, const Target& target) {
  return kSelect.workspace_bytes(args, target);
}
std::size_t workspace_bytes(const PlanArgs& args, const Target& target) {
  return kPlan.workspace_bytes(args, target);
}
std::size_t workspace_bytes(const ForwardArgs& args, const Target& target) {
  return kForward.workspace_bytes(args, target);
}
std::size_t workspace_bytes(const BackwardArgs& args, const Target& target) {
  return kBackward.workspace_bytes(args, target);
}

std::size_t plan_elements([[maybe_unused]] const PlanArgs& args, [[maybe_unused]] const Target& target) {
#if FLASH_DMATTN_CUDA
  if (kPlan.why_unsupported(args, target).empty()) return cuda::plan_elements(args);
#endif
  return 0;
}

std::string why_unsupported(const SelectArgs& args, const Target& target) {
  return kSelect.why_unsupported(args, target);
}
std::string why_unsupported(const PlanArgs& args, const Target& target) {
  return kPlan.why_unsupported(args, target);
}
std::string why_unsupported(const ForwardArgs& args, const Target& target) {
  return kForward.why_unsupported(args, target);
}
std::string why_unsupported(const BackwardArgs& args, const Target& target) {
  return kBackward.why_unsupported(args, target);
}

std::string explain(const ForwardArgs& args, const Target& target) { return kForward.explain(args, target); }
std::string explain(const BackwardArgs& args, const Target& target) {
  return kBackward.explain(args, target);
}

const char* version() { return FLASH_DMATTN_VERSION; }
std::string describe_build() {
  std::string text = "cpu (" + cpu::instruction_set() + ")";
#if FLASH_DMATTN_CUDA
  text += "; cuda (" + cuda::architectures() + ")";
#endif
  return text;
}

}  // namespace flash_dmattn
