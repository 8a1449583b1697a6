// The public functions: every backend's kernels in the order of preference, behind the checks of core/.

// The whole library is compiled with hidden symbols; what the public header declares is seen from outside.
#pragma GCC visibility push(default)
#include "flash_dmattn/attention.h"
#pragma GCC visibility pop

#include <array>

#include "core/dispatch.h"
#include "cpu/backend.h"

namespace flash_dmattn {
namespace {

constexpr std::array kSelectKernels = {
    Kernel<SelectArgs>{"cpu", cpu::select_why_not, cpu::select_workspace_bytes, cpu::select},
};
constexpr std::array kForwardKernels = {
    Kernel<ForwardArgs>{"cpu", cpu::forward_why_not, cpu::forward_workspace_bytes, cpu::forward},
};
constexpr std::array kBackwardKernels = {
    Kernel<BackwardArgs>{"cpu", cpu::backward_why_not, cpu::backward_workspace_bytes, cpu::backward},
};

constexpr Pass<SelectArgs> kSelect{"select", kSelectKernels};
constexpr Pass<ForwardArgs> kForward{"forward", kForwardKernels};
constexpr Pass<BackwardArgs> kBackward{"backward", kBackwardKernels};

}  // namespace

Status select(const SelectArgs& args, const Target& target, const Workspace& workspace) {
  return kSelect.run(args, target, workspace);
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
std::size_t workspace_bytes(const ForwardArgs& args, const Target& target) {
  return kForward.workspace_bytes(args, target);
}
std::size_t workspace_bytes(const BackwardArgs& args, const Target& target) {
  return kBackward.workspace_bytes(args, target);
}

std::string why_unsupported(const SelectArgs& args, const Target& target) {
  return kSelect.why_unsupported(args, target);
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
std::string describe_build() { return "cpu (" + cpu::instruction_set() + ")"; }

}  // namespace flash_dmattn
