// Forward and backward under a dense mask or bias, or both. Their lists (dense_params.h) are built by every
// call for itself, and so are the bits unless the call has a plan: the bits are the plan.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <string>

#include "core/workspace.h"
#include "cuda/sm80/dense_params.h"
#include "cuda/sm80/params.h"
#include "flash_dmattn/attention.h"

namespace flash_dmattn::cuda::sm80 {

// A mask, a dense bias, or a key-only bias as one that is the same for all rows.
PairTensor pair_tensor(const TensorView& view, const Geometry& geometry);
// Of an element, where it can be copied in pieces of 16 bytes; else 0.
inline int copied_bytes(const PairTensor& tensor) { return tensor.vectors ? tensor.element_bytes() : 0; }

// What decides about the lists.
struct DenseInputs {
  Geometry geometry;
  PairTensor mask, bias;
  VectorTensor<const int> expiry;
  bool causal = true;
  Workspace plan{};  // what it holds is taken from there
};

// Args: PlanArgs (whose plan is an output), ForwardArgs or BackwardArgs.
template <typename Args>
DenseInputs dense_inputs(const Args& args);

// The bits alone: what a plan holds.
DenseLists cut_dense_bits(Arena& arena, const DenseInputs& inputs);
cudaError_t build_dense_bits(const DenseInputs& inputs, const DenseLists& bits, cudaStream_t stream);

// tile_m: of the kernel that reads the lists of tiles. all_keys: with the lists of the backward.
DenseLists cut_dense_lists(Arena& arena, const DenseInputs& inputs, int tile_m, bool all_keys);
cudaError_t build_dense_lists(const DenseInputs& inputs, int tile_m, const DenseLists& lists,
                              cudaStream_t stream);
// Zeros in the bias's gradient where no pair is computed.
cudaError_t zero_bias_grad(const DenseInputs& inputs, const DenseLists& lists, const PairTensor& dbias,
                           cudaStream_t stream);

// The gradient of a bias that several rows, heads or sequences share, dense.dbias.
std::string shared_bias_grad_why_not(const BackwardArgs& args, int device);
cudaError_t shared_bias_grad(const BackwardArgs& args, const DenseParams& dense, RowStats* stats, int device,
                             cudaStream_t stream);

std::string dense_forward_why_not(const ForwardArgs& args, int device);
std::string dense_backward_why_not(const BackwardArgs& args, int device);

std::size_t dense_forward_bytes(const ForwardArgs& args, int device);
std::size_t dense_backward_bytes(const BackwardArgs& args, int device);

cudaError_t dense_forward(const ForwardArgs& args, const Workspace& workspace, int device,
                          cudaStream_t stream);
cudaError_t dense_backward(const BackwardArgs& args, const Workspace& workspace, int device,
                           cudaStream_t stream);

}  // namespace flash_dmattn::cuda::sm80
