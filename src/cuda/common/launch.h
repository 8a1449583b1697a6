// Kernel launches, and what the host must know about the device.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
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

// Asks the runtime whether a kernel may start early: its code waits, which code for compute capabilities
// before 9.0 does not, not even where a newer device has translated it, and the driver can record such
// launches in a graph.
inline cudaError_t ask_whether_kernel_waits(const void* kernel, bool& waits) {
  constexpr int kFirstDriver = 12030;
  int driver = 0;
  cudaError_t status = cudaDriverGetVersion(&driver);
  cudaFuncAttributes attributes{};
  if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, kernel);
  waits = driver >= kFirstDriver && attributes.ptxVersion >= 90;
  return status;
}

// The same for the current device, remembered. Several threads may ask at the same time.
inline cudaError_t kernel_waits(const void* kernel, bool& waits) {
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  constexpr std::size_t kRemembered = 256;
  static std::array<std::atomic<std::uint64_t>, kRemembered>
      answers{};  // the question, and the answer in bit 0
  const auto address = static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(kernel));
  const std::uint64_t question = address << 16 | static_cast<std::uint64_t>(device & 0x7fff) << 1;
  auto& remembered = answers[(address / 16 + static_cast<unsigned>(device)) % kRemembered];
  const std::uint64_t answer = remembered.load(std::memory_order_relaxed);
  if ((answer & ~std::uint64_t{1}) == question) {
    waits = (answer & 1) != 0;
    return cudaSuccess;
  }
  status = ask_whether_kernel_waits(kernel, waits);
  if (status == cudaSuccess) remembered.store(question | (waits ? 1 : 0), std::memory_order_relaxed);
  return status;
}

struct LaunchConfig {
  unsigned grid;  // CTAs; a launch of none does nothing
  unsigned threads;
  std::size_t shared_bytes;  // dynamic shared memory
  cudaStream_t stream;
  // The work before in the stream is a kernel of the same call, and this one may start before that one ends
  // (programmatic dependent launch). Its threads all begin with wait_for_previous_kernel().
  bool early = false;
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
  cudaLaunchAttribute early{};
  if (config.early) {
    bool waits = false;
    const cudaError_t status = kernel_waits(reinterpret_cast<const void*>(kernel), waits);
    if (status != cudaSuccess) return status;
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    native.attrs = &early;
    native.numAttrs = waits ? 1 : 0;
  }
  return cudaLaunchKernelEx(&native, kernel, Params(std::forward<Args>(args))...);
}

}  // namespace flash_dmattn::cuda
