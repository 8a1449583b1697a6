#include "cuda/backend.h"

namespace flash_dmattn::cuda {

// The build system knows.
std::string architectures() { return FLASH_DMATTN_CUDA_ARCHITECTURES; }

}  // namespace flash_dmattn::cuda
