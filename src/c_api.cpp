// The C interface: its structs to those of the C++ interface, status and message back, nothing else.

// The whole library is compiled with hidden symbols; what the public header declares is seen from outside.
#pragma GCC visibility push(default)
#include "flash_dmattn/c_api.h"
#pragma GCC visibility pop

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <limits>
#include <new>
#include <string>
#include <string_view>

#include "core/validation.h"
#include "flash_dmattn/attention.h"

namespace flash_dmattn {
namespace {

// The interface as callers compiled it: a struct changes by appending alone, and never has padding.
static_assert(sizeof(flash_dmattn_tensor) == 80);
static_assert(sizeof(flash_dmattn_target) == 48);
static_assert(sizeof(flash_dmattn_select_args) == 8 + 3 * 80 + 5 * 8);
static_assert(sizeof(flash_dmattn_plan_args) == 8 + 7 * 80 + 3 * 8);
static_assert(sizeof(flash_dmattn_forward_args) == 8 + 12 * 80 + 3 * 8);
static_assert(sizeof(flash_dmattn_backward_args) == 8 + 18 * 80 + 3 * 8);
static_assert(FLASH_DMATTN_MAX_RANK == kMaxRank);
static_assert(FLASH_DMATTN_INVALID_ARGUMENT == static_cast<int>(StatusCode::kInvalidArgument));
static_assert(FLASH_DMATTN_UNSUPPORTED == static_cast<int>(StatusCode::kUnsupported));
static_assert(FLASH_DMATTN_DEVICE_ERROR == static_cast<int>(StatusCode::kDeviceError));
static_assert(FLASH_DMATTN_DEVICE_CUDA == static_cast<int>(DeviceType::kCuda));
static_assert(FLASH_DMATTN_FLOAT64 == static_cast<int>(DType::kFloat64) + 1);
static_assert(FLASH_DMATTN_FLOAT32 == static_cast<int>(DType::kFloat32) + 1);
static_assert(FLASH_DMATTN_FLOAT16 == static_cast<int>(DType::kFloat16) + 1);
static_assert(FLASH_DMATTN_BFLOAT16 == static_cast<int>(DType::kBFloat16) + 1);
static_assert(FLASH_DMATTN_INT32 == static_cast<int>(DType::kInt32) + 1);
static_assert(FLASH_DMATTN_BOOL == static_cast<int>(DType::kBool) + 1);

// A struct_size that was never set is likely beyond this, and nothing is read at its word.
constexpr std::uint64_t kMaxStructBytes = 1 << 16;

thread_local char last_error[2048];

// As snprintf does.
void copy_text(std::string_view from, char* to, std::size_t capacity) {
  if (capacity == 0) return;
  const std::size_t length = std::min(from.size(), capacity - 1);
  std::copy_n(from.data(), length, to);
  to[length] = '\0';
}

// Every function that returns a status runs in here. call: () -> Status.
template <typename Call>
flash_dmattn_status guarded(const char* function, Call&& call) noexcept {
  const auto caught = [function](flash_dmattn_status code, const char* what) {
    std::snprintf(last_error, sizeof(last_error), "flash_dmattn::%s: %s", function, what);
    return code;
  };
  try {
    const Status status = call();
    copy_text(status.message, last_error, sizeof(last_error));
    return static_cast<flash_dmattn_status>(status.code);
  } catch (const std::bad_alloc&) {
    return caught(FLASH_DMATTN_OUT_OF_MEMORY, "got no memory for a message or text");
  } catch (...) {
    return caught(FLASH_DMATTN_EXCEPTION, "parallel_for ended with an exception");
  }
}

// Zeros in place of what a shorter struct lacks. A null pointer is all zeros, too.
template <typename Struct>
Struct read_struct(Validator& check, const char* name, const Struct* from) {
  Struct known{};
  if (from == nullptr) return known;
  const auto* bytes = reinterpret_cast<const unsigned char*>(from);
  std::uint64_t size = 0;
  std::memcpy(&size, bytes, sizeof(size));
  if (size < sizeof(size) || size > kMaxStructBytes || size % sizeof(size) != 0) {
    check.fail(name, "struct_size " + std::to_string(size),
               "the size of the struct, " + std::to_string(sizeof(Struct)));
    return known;
  }
  if (std::any_of(bytes + std::min<std::uint64_t>(sizeof(Struct), size), bytes + size,
                  [](unsigned char byte) { return byte != 0; })) {
    check.fail(name, "fields beyond the first " + std::to_string(sizeof(Struct)) + " bytes",
               std::string("zeros there, which version ") + version() + " does not know");
  }
  std::memcpy(&known, bytes, std::min<std::uint64_t>(size, sizeof(Struct)));
  return known;
}

TensorView convert(Validator& check, const char* name, const flash_dmattn_tensor& tensor) {
  TensorView view;
  if (tensor.rank == 0) return view;
  if (tensor.dtype < FLASH_DMATTN_FLOAT64 || tensor.dtype > FLASH_DMATTN_BOOL) {
    check.fail(name, "dtype " + std::to_string(tensor.dtype), "a flash_dmattn_dtype");
    return view;
  }
  view.data = tensor.data;
  view.dtype = static_cast<DType>(tensor.dtype - 1);
  view.rank = tensor.rank;
  std::copy_n(tensor.shape, kMaxRank, view.shape.begin());
  std::copy_n(tensor.strides, kMaxRank, view.stride.begin());
  return view;
}

bool convert_causal(Validator& check, std::int64_t causal) {
  if (causal != 0 && causal != 1) check.fail("causal", std::to_string(causal), "0 or 1");
  return causal != 0;
}

SelectArgs convert(Validator& check, const flash_dmattn_select_args& from) {
  return {.score = convert(check, "score", from.score),
          .cu_seqlens = convert(check, "cu_seqlens", from.cu_seqlens),
          .expiry = convert(check, "expiry", from.expiry),
          .keep_window = from.keep_window,
          .causal = convert_causal(check, from.causal),
          .num_sinks = from.num_sinks,
          .local_window = from.local_window,
          .num_queries = from.num_queries == 0 ? -1 : from.num_queries};
}

PlanArgs convert(Validator& check, const flash_dmattn_plan_args& from) {
  return {.expiry = convert(check, "expiry", from.expiry),
          .score = convert(check, "score", from.score),
          .bias = convert(check, "bias", from.bias),
          .cu_seqlens_q = convert(check, "cu_seqlens_q", from.cu_seqlens_q),
          .cu_seqlens_k = convert(check, "cu_seqlens_k", from.cu_seqlens_k),
          .mask = convert(check, "mask", from.mask),
          .plan = convert(check, "plan", from.plan),
          .num_queries = from.num_queries,
          .keep_window = from.keep_window,
          .causal = convert_causal(check, from.causal)};
}

// What forward and backward share.
template <typename Args, typename From>
Args convert_attention(Validator& check, const From& from) {
  Args args;
  args.query = convert(check, "query", from.query);
  args.key = convert(check, "key", from.key);
  args.value = convert(check, "value", from.value);
  args.bias = convert(check, "bias", from.bias);
  args.mask = convert(check, "mask", from.mask);
  args.expiry = convert(check, "expiry", from.expiry);
  args.score = convert(check, "score", from.score);
  args.keep_window = from.keep_window;
  args.plan = convert(check, "plan", from.plan);
  args.cu_seqlens_q = convert(check, "cu_seqlens_q", from.cu_seqlens_q);
  args.cu_seqlens_k = convert(check, "cu_seqlens_k", from.cu_seqlens_k);
  args.out = convert(check, "out", from.out);
  args.lse = convert(check, "lse", from.lse);
  args.scale = from.scale;
  args.causal = convert_causal(check, from.causal);
  return args;
}

ForwardArgs convert(Validator& check, const flash_dmattn_forward_args& from) {
  return convert_attention<ForwardArgs>(check, from);
}

BackwardArgs convert(Validator& check, const flash_dmattn_backward_args& from) {
  auto args = convert_attention<BackwardArgs>(check, from);
  args.dout = convert(check, "dout", from.dout);
  args.dlse = convert(check, "dlse", from.dlse);
  args.dq = convert(check, "dq", from.dq);
  args.dk = convert(check, "dk", from.dk);
  args.dv = convert(check, "dv", from.dv);
  args.dbias = convert(check, "dbias", from.dbias);
  return args;
}

Target convert(Validator& check, const flash_dmattn_target& from) {
  Target target;
  if (from.device_type != FLASH_DMATTN_DEVICE_CPU && from.device_type != FLASH_DMATTN_DEVICE_CUDA) {
    check.fail("target.device_type", std::to_string(from.device_type), "a flash_dmattn_device_type");
  }
  target.device_type = from.device_type == FLASH_DMATTN_DEVICE_CUDA ? DeviceType::kCuda : DeviceType::kCpu;
  target.device_index = from.device_index;
  target.stream = from.stream;
  if (from.parallel_for == nullptr) {
    if (from.num_workers != 0 && from.num_workers != 1) {
      check.fail("target.num_workers", std::to_string(from.num_workers) + " without parallel_for", "0 or 1");
    }
    return target;
  }
  if (from.num_workers < 1 || from.num_workers > std::numeric_limits<int>::max()) {
    check.fail("target.num_workers", std::to_string(from.num_workers), "at least 1");
  }
  target.parallel_for = {static_cast<int>(from.num_workers), from.context, from.parallel_for};
  return target;
}

// Converts and calls use(args, target) -> Status.
template <typename From, typename Use>
flash_dmattn_status with_arguments(const char* function, const From* args, const flash_dmattn_target* target,
                                   Use&& use) noexcept {
  return guarded(function, [&]() -> Status {
    Validator check(function, Target{});
    check.require(args != nullptr, "args", "a null pointer", "a struct");
    const auto cpp_args = convert(check, read_struct(check, "args", args));
    const Target cpp_target = convert(check, read_struct(check, "target", target));
    if (!check.ok()) return Status::invalid(check.message());
    return use(cpp_args, cpp_target);
  });
}

// What measure says of the arguments; where that is 0, whether they would be refused.
template <typename From, typename Measure>
flash_dmattn_status size_of(const char* function, const From* args, const flash_dmattn_target* target,
                            std::size_t* size, Measure&& measure) noexcept {
  if (size != nullptr) *size = 0;
  return with_arguments(function, args, target, [&](const auto& cpp_args, const Target& cpp_target) {
    if (size == nullptr) {
      Validator check(function, cpp_target);
      check.fail("the size to return", "a null pointer", "memory for it");
      return Status::invalid(check.message());
    }
    *size = measure(cpp_args, cpp_target);
    if (*size > 0) return Status{};
    std::string why = validate(cpp_args, cpp_target);
    if (!why.empty()) return Status::invalid(std::move(why));
    why = why_unsupported(cpp_args, cpp_target);
    return why.empty() ? Status{} : Status::unsupported(std::move(why));
  });
}

template <typename From>
flash_dmattn_status workspace_size(const char* function, const From* args, const flash_dmattn_target* target,
                                   std::size_t* bytes) noexcept {
  return size_of(function, args, target, bytes, [](const auto& cpp_args, const Target& cpp_target) {
    return workspace_bytes(cpp_args, cpp_target);
  });
}

Status store_text(const char* function, const std::string& from, char* text, std::size_t capacity,
                  std::size_t* length) {
  if (text == nullptr && capacity > 0) {
    Validator check(function, Target{});
    check.fail("text", "a null pointer", std::to_string(capacity) + " bytes of memory");
    return Status::invalid(check.message());
  }
  copy_text(from, text, capacity);
  if (length != nullptr) *length = from.size();
  return {};
}

template <typename From>
flash_dmattn_status explain_call(const char* function, const From* args, const flash_dmattn_target* target,
                                 char* text, std::size_t capacity, std::size_t* length) noexcept {
  if (text != nullptr) copy_text("", text, capacity);
  if (length != nullptr) *length = 0;
  return with_arguments(function, args, target, [&](const auto& cpp_args, const Target& cpp_target) {
    return store_text(function, explain(cpp_args, cpp_target), text, capacity, length);
  });
}

}  // namespace
}  // namespace flash_dmattn

namespace fd = flash_dmattn;

flash_dmattn_status flash_dmattn_select_workspace_bytes(const flash_dmattn_select_args* args,
                                                        const flash_dmattn_target* target, size_t* bytes) {
  return fd::workspace_size("select", args, target, bytes);
}
flash_dmattn_status flash_dmattn_plan_workspace_bytes(const flash_dmattn_plan_args* args,
                                                      const flash_dmattn_target* target, size_t* bytes) {
  return fd::workspace_size("plan", args, target, bytes);
}
flash_dmattn_status flash_dmattn_forward_workspace_bytes(const flash_dmattn_forward_args* args,
                                                         const flash_dmattn_target* target, size_t* bytes) {
  return fd::workspace_size("forward", args, target, bytes);
}
flash_dmattn_status flash_dmattn_backward_workspace_bytes(const flash_dmattn_backward_args* args,
                                                          const flash_dmattn_target* target, size_t* bytes) {
  return fd::workspace_size("backward", args, target, bytes);
}
flash_dmattn_status flash_dmattn_plan_elements(const flash_dmattn_plan_args* args,
                                               const flash_dmattn_target* target, size_t* elements) {
  return fd::size_of("plan", args, target, elements, fd::plan_elements);
}

flash_dmattn_status flash_dmattn_select(const flash_dmattn_select_args* args,
                                        const flash_dmattn_target* target, void* workspace,
                                        size_t workspace_bytes) {
  return fd::with_arguments("select", args, target, [&](const auto& cpp_args, const fd::Target& cpp_target) {
    return fd::select(cpp_args, cpp_target, {.data = workspace, .bytes = workspace_bytes});
  });
}
flash_dmattn_status flash_dmattn_plan(const flash_dmattn_plan_args* args, const flash_dmattn_target* target,
                                      void* workspace, size_t workspace_bytes) {
  return fd::with_arguments("plan", args, target, [&](const auto& cpp_args, const fd::Target& cpp_target) {
    return fd::plan(cpp_args, cpp_target, {.data = workspace, .bytes = workspace_bytes});
  });
}
flash_dmattn_status flash_dmattn_forward(const flash_dmattn_forward_args* args,
                                         const flash_dmattn_target* target, void* workspace,
                                         size_t workspace_bytes) {
  return fd::with_arguments("forward", args, target, [&](const auto& cpp_args, const fd::Target& cpp_target) {
    return fd::forward(cpp_args, cpp_target, {.data = workspace, .bytes = workspace_bytes});
  });
}
flash_dmattn_status flash_dmattn_backward(const flash_dmattn_backward_args* args,
                                          const flash_dmattn_target* target, void* workspace,
                                          size_t workspace_bytes) {
  return fd::with_arguments(
      "backward", args, target, [&](const auto& cpp_args, const fd::Target& cpp_target) {
        return fd::backward(cpp_args, cpp_target, {.data = workspace, .bytes = workspace_bytes});
      });
}

flash_dmattn_status flash_dmattn_explain_forward(const flash_dmattn_forward_args* args,
                                                 const flash_dmattn_target* target, char* text,
                                                 size_t capacity, size_t* length) {
  return fd::explain_call("forward", args, target, text, capacity, length);
}
flash_dmattn_status flash_dmattn_explain_backward(const flash_dmattn_backward_args* args,
                                                  const flash_dmattn_target* target, char* text,
                                                  size_t capacity, size_t* length) {
  return fd::explain_call("backward", args, target, text, capacity, length);
}
flash_dmattn_status flash_dmattn_describe_build(char* text, size_t capacity, size_t* length) {
  if (length != nullptr) *length = 0;
  constexpr const char* kFunction = "describe_build";
  return fd::guarded(kFunction,
                     [&] { return fd::store_text(kFunction, fd::describe_build(), text, capacity, length); });
}

const char* flash_dmattn_version(void) { return fd::version(); }

const char* flash_dmattn_last_error(void) { return fd::last_error; }
