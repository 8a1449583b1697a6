// Decode on a CUDA device: the forward of few rows over many keys.
#include <cuda_runtime.h>

#include "cuda/backend.h"
#include "cuda/common/arguments.h"
#include "cuda/common/launch.h"
#include "cuda/sm80/decode.h"

namespace flash_dmattn::cuda {
namespace {

bool is_empty(const Geometry& geometry) {
  return geometry.heads_q == 0 || geometry.num_sequences == 0 || geometry.seqlen_q == 0;
}

}  // namespace

std::string decode_why_not(const ForwardArgs& args, const Target& target) {
  const std::string reason = forward_why_not(args, target);
  return reason.empty() ? sm80::decode_why_not(args, target.device_index) : reason;
}

std::size_t decode_workspace_bytes(const ForwardArgs& args, const Target& target) {
  if (is_empty(make_geometry(args))) return 0;
  Arena arena;
  sm80::cut_decode(arena, args, target.device_index);
  return arena.bytes();
}

Status decode(const ForwardArgs& args, const Target& target, const Workspace& workspace) {
  if (is_empty(make_geometry(args))) return {};
  const DeviceGuard guard(target.device_index);
  if (guard.status() != cudaSuccess) return device_status("forward", guard.status());
  Arena arena(workspace);
  const sm80::DecodeBuffers buffers = sm80::cut_decode(arena, args, target.device_index);
  return device_status(
      "forward", sm80::decode(args, buffers, target.device_index, static_cast<cudaStream_t>(target.stream)));
}

}  // namespace flash_dmattn::cuda
