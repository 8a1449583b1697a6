// Logits are in units of log2(e) inside the CUDA kernels, because exp2 is what the hardware has.
#pragma once

namespace flash_dmattn::cuda {

constexpr double kLog2E = 1.44269504088896340736;
constexpr float kLn2 = 0.693147180559945309f;

}  // namespace flash_dmattn::cuda
