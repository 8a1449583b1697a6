#include "emulator/runtime_api.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>

namespace {

constexpr int kSharedBytesPerMultiprocessor = 233472;
constexpr std::size_t kReservedSharedBytes = 1024;  // per CTA
constexpr std::size_t kSharedBytesWithoutOptIn = 48 * 1024;
constexpr int kThreadsPerMultiprocessor = 2048;
constexpr int kCtasPerMultiprocessor = 32;

std::atomic<cudaError_t> last_error = cudaSuccess;

cudaError_t report(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

std::mutex limits_mutex;
std::map<const void*, std::size_t> limits;  // of dynamic shared memory, of kernels that have asked for more

std::size_t limit_of(const void* kernel) {
  const std::lock_guard lock(limits_mutex);
  const auto found = limits.find(kernel);
  return found == limits.end() ? kSharedBytesWithoutOptIn : found->second;
}

}  // namespace

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetLastError() { return last_error.exchange(cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return report(device == 0 ? cudaSuccess : cudaErrorInvalidDevice); }
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = 90;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return report(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = static_cast<int>(kSharedBytesWithoutOptIn);
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = emulator::multiprocessors();
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = emulator::compute_capability() / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = emulator::compute_capability() % 10;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = std::min(kSharedBytesPerMultiprocessor,
                        static_cast<int>(emulator::shared_bytes_limit() + kReservedSharedBytes));
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(emulator::shared_bytes_limit());
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = 50 << 20;
      return cudaSuccess;
  }
  return report(cudaErrorInvalidValue);
}

cudaError_t cudaMemsetAsync(void* to, int byte, std::size_t count, cudaStream_t) {
  std::memset(to, byte, count);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t count, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, count);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

namespace emulator {

cudaError_t set_dynamic_shared_limit(const void* kernel, int bytes) {
  if (bytes < 0 || static_cast<std::size_t>(bytes) > shared_bytes_limit())
    return report(cudaErrorInvalidValue);
  const std::lock_guard lock(limits_mutex);
  limits[kernel] = std::max(static_cast<std::size_t>(bytes), kSharedBytesWithoutOptIn);
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(void*), void* context) {
  const dim3& grid = config.gridDim;
  const dim3& block = config.blockDim;
  const bool one_dimensional = grid.y == 1 && grid.z == 1 && block.y == 1 && block.z == 1;
  if (!one_dimensional || grid.x == 0 || grid.x > 0x7fffffffu || block.x == 0 || block.x > kMaxThreads) {
    return report(cudaErrorInvalidConfiguration);
  }
  if (config.dynamicSmemBytes > std::min(limit_of(kernel), shared_bytes_limit())) {
    return report(cudaErrorInvalidValue);
  }
  const bool early = config.numAttrs > 0 && config.attrs->val.programmaticStreamSerializationAllowed != 0;
  run({kernel, grid.x, block.x, config.dynamicSmemBytes, early, body, context});
  return cudaSuccess;
}

int resident_ctas(int threads, std::size_t shared_bytes) {
  const std::size_t by_memory = kSharedBytesPerMultiprocessor / (shared_bytes + kReservedSharedBytes);
  return std::min({kCtasPerMultiprocessor, kThreadsPerMultiprocessor / threads, static_cast<int>(by_memory)});
}

}  // namespace emulator
