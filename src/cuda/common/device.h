// What the host must know about a device, asked once per process: each question costs about as much as a
// launch.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <utility>

namespace flash_dmattn::cuda {

struct DeviceProperties {
  cudaError_t status = cudaSuccess;  // of the questions; the rest is 0 if they failed
  int compute_capability = 0;        // 10 * major + minor
  int max_shared_bytes = 0;          // that a CTA may ask for
  int multiprocessors = 0;
};

inline DeviceProperties ask_device(int device) {
  DeviceProperties properties;
  int major = 0;
  int minor = 0;
  const std::array questions = {
      std::pair{&major, cudaDevAttrComputeCapabilityMajor},
      std::pair{&minor, cudaDevAttrComputeCapabilityMinor},
      std::pair{&properties.max_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin},
      std::pair{&properties.multiprocessors, cudaDevAttrMultiProcessorCount},
  };
  for (const auto& [answer, attribute] : questions) {
    if (properties.status == cudaSuccess)
      properties.status = cudaDeviceGetAttribute(answer, attribute, device);
  }
  properties.compute_capability = 10 * major + minor;
  if (properties.status != cudaSuccess) {
    cudaGetLastError();  // a failed question must not haunt the next launch
    return {properties.status};
  }
  return properties;
}

// Failures are not remembered. Several threads may ask at the same time; they get the same answer.
inline DeviceProperties device_properties(int device) {
  constexpr int kRemembered = 64;
  static std::array<std::atomic<int>, kRemembered> capabilities{};
  static std::array<std::atomic<int>, kRemembered> shared_bytes{};
  static std::array<std::atomic<int>, kRemembered> multiprocessors{};
  if (device < 0 || device >= kRemembered) return ask_device(device);
  if (const int capability = capabilities[device].load(std::memory_order_acquire); capability != 0) {
    return {cudaSuccess, capability, shared_bytes[device].load(std::memory_order_relaxed),
            multiprocessors[device].load(std::memory_order_relaxed)};
  }
  const DeviceProperties properties = ask_device(device);
  shared_bytes[device].store(properties.max_shared_bytes, std::memory_order_relaxed);
  multiprocessors[device].store(properties.multiprocessors, std::memory_order_relaxed);
  capabilities[device].store(properties.compute_capability, std::memory_order_release);
  return properties;
}

}  // namespace flash_dmattn::cuda
