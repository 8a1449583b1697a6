// The outcome of a call. The library never throws, prints or aborts.
#pragma once

#include <string>
#include <utility>

namespace flash_dmattn {

enum class StatusCode { kOk, kInvalidArgument, kUnsupported, kDeviceError };

struct [[nodiscard]] Status {
  StatusCode code = StatusCode::kOk;
  std::string message;  // names the function, the argument, what it got and what is accepted; empty when ok

  bool ok() const { return code == StatusCode::kOk; }
  static Status invalid(std::string message) { return {StatusCode::kInvalidArgument, std::move(message)}; }
  static Status unsupported(std::string message) { return {StatusCode::kUnsupported, std::move(message)}; }
  static Status device_error(std::string message) { return {StatusCode::kDeviceError, std::move(message)}; }
};

}  // namespace flash_dmattn
