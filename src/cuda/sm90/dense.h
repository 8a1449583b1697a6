// The parts of a dense mask's or bias's backward that have a kernel for Hopper; the rest is sm80/dense.h.
#pragma once

#include <cuda_runtime.h>

#include "cuda/sm80/dense_params.h"
#include "cuda/sm80/params.h"
#include "flash_dmattn/attention.h"

namespace flash_dmattn::cuda::sm90 {

#if FLASH_DMATTN_SM90
// Whether this device runs dense_key_grad for the call.
bool takes_dense_key_grad(const BackwardArgs& args, int device);
cudaError_t dense_key_grad(const BackwardArgs& args, const sm80::DenseParams& dense, sm80::RowStats* stats,
                           int device, cudaStream_t stream);
#else
inline bool takes_dense_key_grad(const BackwardArgs&, int) { return false; }
inline cudaError_t dense_key_grad(const BackwardArgs&, const sm80::DenseParams&, sm80::RowStats*, int,
                                  cudaStream_t) {
  return cudaErrorInvalidDevice;
}
#endif

}  // namespace flash_dmattn::cuda::sm90
