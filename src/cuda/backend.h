// What src/api.cpp calls of the CUDA backend: one answer to "does it run?", one to "how much workspace?", and
// the run, for each pass. Each is an entry of its Kernel table.
#pragma once

#include <cstddef>
#include <string>

#include "flash_dmattn/attention.h"

namespace flash_dmattn::cuda {

std::string select_why_not(const SelectArgs& args, const Target& target);
std::size_t select_workspace_bytes(const SelectArgs& args, const Target& target);
Status select(const SelectArgs& args, const Target& target, const Workspace& workspace);

std::string plan_why_not(const PlanArgs& args, const Target& target);
std::size_t plan_workspace_bytes(const PlanArgs& args, const Target& target);
Status plan(const PlanArgs& args, const Target& target, const Workspace& workspace);
std::size_t plan_elements(const PlanArgs& args);

std::string forward_why_not(const ForwardArgs& args, const Target& target);
std::size_t forward_workspace_bytes(const ForwardArgs& args, const Target& target);
Status forward(const ForwardArgs& args, const Target& target, const Workspace& workspace);

// The forward on Hopper.
std::string forward_sm90_why_not(const ForwardArgs& args, const Target& target);
std::size_t forward_sm90_workspace_bytes(const ForwardArgs& args, const Target& target);
Status forward_sm90(const ForwardArgs& args, const Target& target, const Workspace& workspace);

// The forward of few rows over many keys.
std::string decode_why_not(const ForwardArgs& args, const Target& target);
std::size_t decode_workspace_bytes(const ForwardArgs& args, const Target& target);
Status decode(const ForwardArgs& args, const Target& target, const Workspace& workspace);

std::string backward_why_not(const BackwardArgs& args, const Target& target);
std::size_t backward_workspace_bytes(const BackwardArgs& args, const Target& target);
Status backward(const BackwardArgs& args, const Target& target, const Workspace& workspace);

// The compute capabilities with code in this build: "sm_80, PTX".
std::string architectures();

}  // namespace flash_dmattn::cuda
