// What the CPU backend offers to the dispatcher. Every function is called with validated arguments; the
// workspace has the bytes that *_workspace_bytes asked for (no alignment: Arena aligns), and num_workers is
// at least 1.
#pragma once

#include <cstddef>
#include <string>

#include "flash_dmattn/attention.h"

namespace flash_dmattn::cpu {

// Why this backend cannot run a call on tensors in host memory, or "" if it can.
std::string select_why_not(const SelectArgs& args, const Target& target);
std::string decode_why_not(const ForwardArgs& args, const Target& target);
std::string forward_why_not(const ForwardArgs& args, const Target& target);
std::string backward_why_not(const BackwardArgs& args, const Target& target);

std::size_t select_workspace_bytes(const SelectArgs& args, const Target& target);
std::size_t decode_workspace_bytes(const ForwardArgs& args, const Target& target);
std::size_t forward_workspace_bytes(const ForwardArgs& args, const Target& target);
std::size_t backward_workspace_bytes(const BackwardArgs& args, const Target& target);

void select(const SelectArgs& args, const Target& target, const Workspace& workspace);
void decode(const ForwardArgs& args, const Target& target, const Workspace& workspace);
void forward(const ForwardArgs& args, const Target& target, const Workspace& workspace);
void backward(const BackwardArgs& args, const Target& target, const Workspace& workspace);

// The instruction set that the kernels use on this machine, such as "AVX2".
std::string instruction_set();

}  // namespace flash_dmattn::cpu
