// Each pass has an ordered list of kernels. The first whose why_not is empty runs; the same list answers how
// much workspace a call needs and why it is refused, so that the three cannot disagree.
#pragma once

#include <cstddef>
#include <span>
#include <string>

#include "core/validation.h"
#include "core/workspace.h"

namespace flash_dmattn {

template <typename Args>
struct Kernel {
  const char* name;
  std::string (*why_not)(const Args& args, const Target& target);  // "" if it can run
  std::size_t (*workspace_bytes)(const Args& args, const Target& target);
  void (*run)(const Args& args, const Target& target, const Workspace& workspace);
};

template <typename Args>
struct Pass {
  const char* function;
  std::span<const Kernel<Args>> kernels;

  // The kernel that runs, or null with the reason in status.
  const Kernel<Args>* choose(const Args& args, const Target& target, Status& status) const {
    std::string message = validate(args, target);
    if (!message.empty()) {
      status = Status::invalid(std::move(message));
      return nullptr;
    }
    for (const Kernel<Args>& kernel : kernels) {
      const std::string reason = kernel.why_not(args, target);
      if (reason.empty()) return &kernel;
      message.append(message.empty() ? "" : "; ").append(kernel.name).append(": ").append(reason);
    }
    status =
        Status::unsupported(std::string("flash_dmattn::") + function + ": no kernel can run: " + message);
    return nullptr;
  }

  Status run(const Args& args, const Target& target, const Workspace& workspace) const {
    Status status;
    const Kernel<Args>* kernel = choose(args, target, status);
    if (kernel == nullptr) return status;
    const std::size_t needed = kernel->workspace_bytes(args, target);
    Validator check(function);
    check.require(workspace.bytes >= needed, "workspace", std::to_string(workspace.bytes) + " bytes",
                  "at least " + std::to_string(needed) + ", as workspace_bytes says");
    check.require(workspace.data != nullptr || needed == 0, "workspace", "a null pointer",
                  std::to_string(needed) + " bytes of memory");
    if (!check.ok()) return Status::invalid(check.message());
    kernel->run(args, target, workspace);
    return status;
  }

  std::size_t workspace_bytes(const Args& args, const Target& target) const {
    Status status;
    const Kernel<Args>* kernel = choose(args, target, status);
    return kernel == nullptr ? 0 : kernel->workspace_bytes(args, target);
  }

  std::string why_unsupported(const Args& args, const Target& target) const {
    Status status;
    choose(args, target, status);
    return status.message;
  }

  std::string explain(const Args& args, const Target& target) const {
    const std::string message = validate(args, target);
    if (!message.empty()) return message;
    std::string text;
    for (const Kernel<Args>& kernel : kernels) {
      const std::string reason = kernel.why_not(args, target);
      text.append(text.empty() ? "" : "\n").append(kernel.name).append(": ");
      text.append(reason.empty() ? "runs" : reason);
    }
    return text;
  }
};

}  // namespace flash_dmattn
