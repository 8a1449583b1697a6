// Kernel launches, and what the host must know about the device.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

namespace flash_dmattn::cuda {

// Makes the device current while it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    status_ = cudaGetDevice(&previous_);
    if (status_ == cudaSuccess && previous_ != device) {
      status_ = cudaSetDevice(device);
      changed_ = status_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t status() const { return status_; }

 private:
  cudaError_t status_ = cudaSuccess;
  int previous_ = 0;
  bool changed_ = false;
};

struct LaunchConfig {
  unsigned grid;  // CTAs; a launch of none does nothing
  unsigned threads;
  std::size_t shared_bytes;  // dynamic shared memory
  cudaStream_t stream;
};

template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), const LaunchConfig& config, Args&&... args) {
  if (config.grid == 0) return cudaSuccess;
  constexpr std::size_t kWithoutOptIn = 48 * 1024;
  if (config.shared_bytes > kWithoutOptIn) {
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                    static_cast<int>(config.shared_bytes));
    if (status != cudaSuccess) return status;
  }
  cudaLaunchConfig_t native{};
  native.gridDim = dim3(config.grid);
  native.blockDim = dim3(config.threads);
  native.dynamicSmemBytes = config.shared_bytes;
  native.stream = config.stream;
  return cudaLaunchKernelEx(&native, kernel, Params(std::forward<Args>(args))...);
}

}  // namespace flash_dmattn::cuda
