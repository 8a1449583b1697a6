// Each pass has an ordered list of kernels. The first whose why_not is empty runs; the same list answers how
// much workspace a call needs and why it is refused, so that the three cannot disagree. Messages quote the
// arguments as they were given; kernels get canonical ones.
#pragma once

#include <cstddef>
#include <span>
#include <string>

#include "core/canonical.h"
#include "core/validation.h"
#include "core/workspace.h"

namespace flash_dmattn {

template <typename Args>
struct Kernel {
  const char* name;
  DeviceType device;                                               // where its tensors lie
  std::string (*why_not)(const Args& args, const Target& target);  // "" if it can run on this device
  std::size_t (*workspace_bytes)(const Args& args, const Target& target);
  Status (*run)(const Args& args, const Target& target, const Workspace& workspace);
};

template <typename Args>
struct Pass {
  const char* function;
  std::span<const Kernel<Args>> kernels;

  // The kernel that runs, or null with the reason in status.
  const Kernel<Args>* choose(const Args& given, const Target& target, Status& status) const {
    std::string message = validate(given, target);
    if (!message.empty()) {
      status = Status::invalid(std::move(message));
      return nullptr;
    }
    const Args args = canonical(given);
    for (const Kernel<Args>& kernel : kernels) {
      if (kernel.device == target.device_type && kernel.why_not(args, target).empty()) return &kernel;
    }
    bool has_cuda = false;
    for (const Kernel<Args>& kernel : kernels) {
      has_cuda |= kernel.device == DeviceType::kCuda;
      message.append(message.empty() ? "" : "; ").append(kernel.name).append(": ");
      message.append(reason_of(kernel, args, target));
    }
    if (!has_cuda) message.append(message.empty() ? "" : "; ").append("this build has no CUDA kernels");
    status =
        Status::unsupported(std::string("flash_dmattn::") + function + ": no kernel can run: " + message);
    return nullptr;
  }

  Status run(const Args& given, const Target& target, const Workspace& workspace) const {
    Status status;
    const Kernel<Args>* kernel = choose(given, target, status);
    if (kernel == nullptr) return status;
    const Args args = canonical(given);
    const std::size_t needed = kernel->workspace_bytes(args, target);
    Validator check(function, target);
    if (workspace.bytes < needed) {
      check.fail("workspace", std::to_string(workspace.bytes) + " bytes",
                 "at least " + std::to_string(needed) + ", as workspace_bytes says");
    }
    if (workspace.data == nullptr && needed > 0) {
      check.fail("workspace", "a null pointer", std::to_string(needed) + " bytes of memory");
    }
    if (!check.ok()) return Status::invalid(check.message());
    return kernel->run(args, target, workspace);
  }

  std::size_t workspace_bytes(const Args& args, const Target& target) const {
    Status status;
    const Kernel<Args>* kernel = choose(args, target, status);
    return kernel == nullptr ? 0 : kernel->workspace_bytes(canonical(args), target);
  }

  std::string why_unsupported(const Args& args, const Target& target) const {
    Status status;
    choose(args, target, status);
    return status.message;
  }

  // The kernels of other devices have nothing to say.
  std::string explain(const Args& given, const Target& target) const {
    std::string text = validate(given, target);
    if (!text.empty()) return text;
    const Args args = canonical(given);
    for (const Kernel<Args>& kernel : kernels) {
      if (kernel.device != target.device_type) continue;
      const std::string reason = kernel.why_not(args, target);
      text.append(text.empty() ? "" : "\n").append(kernel.name).append(": ");
      text.append(reason.empty() ? "runs" : reason);
    }
    return text.empty() ? why_unsupported(given, target) : text;
  }

 private:
  static std::string reason_of(const Kernel<Args>& kernel, const Args& args, const Target& target) {
    if (kernel.device == target.device_type) return kernel.why_not(args, target);
    return kernel.device == DeviceType::kCpu ? "takes tensors in host memory"
                                             : "takes tensors in the memory of a CUDA device";
  }
};

}  // namespace flash_dmattn
