#include "core/validation.h"

#include <algorithm>
#include <limits>

#include "core/dtype.h"

namespace flash_dmattn {
namespace {

// Expiry and positions are int32, so no axis is longer.
constexpr std::int64_t kMaxAxis = std::numeric_limits<std::int32_t>::max();
// More than any machine addresses. Below it, sums of byte counts do not overflow.
constexpr std::int64_t kMaxBytes = std::int64_t{1} << 56;
constexpr int kMaxWorkers = 1 << 16;

template <typename Numbers>
std::string list(const Numbers& numbers, int count) {
  std::string text = "[";
  for (int i = 0; i < count; ++i) text += (i == 0 ? "" : ", ") + std::to_string(numbers[i]);
  return text + "]";
}

std::string describe(Validator::DTypes dtypes) {
  std::string text;
  std::size_t index = 0;
  for (DType dtype : dtypes) {
    if (index > 0) text += index + 1 == dtypes.size() ? " or " : ", ";
    text += dtype_name(dtype);
    ++index;
  }
  return text;
}

// "[B, Sk, Hkv, D] with B = 2, D = 64"; sizes that broadcast: "[B, H, Sq, Sk] with B = 2 or 1, H = 8, 2 or 1"
std::string describe(Validator::Axes axes) {
  std::string symbols, sizes;
  for (const Axis& axis : axes) {
    symbols += (symbols.empty() ? "" : ", ") + std::string(axis.symbol);
    if (axis.size != kAnySize) {
      sizes +=
          (sizes.empty() ? " with " : ", ") + std::string(axis.symbol) + " = " + std::to_string(axis.size);
      if (axis.shared != axis.size) sizes += ", " + std::to_string(axis.shared);
      if (axis.broadcasts) sizes += " or 1";
    }
  }
  return "[" + symbols + "]" + sizes;
}

std::int64_t magnitude(std::int64_t stride) {
  if (stride == std::numeric_limits<std::int64_t>::min()) return std::numeric_limits<std::int64_t>::max();
  return stride < 0 ? -stride : stride;
}

// a * b + c with a, b, c >= 0, or more than kMaxBytes if it is more.
std::int64_t bounded_multiply_add(std::int64_t a, std::int64_t b, std::int64_t c) {
  std::int64_t product, sum;
  if (__builtin_mul_overflow(a, b, &product) || __builtin_add_overflow(product, c, &sum))
    return kMaxBytes + 1;
  return std::min(sum, kMaxBytes + 1);
}

}  // namespace

void Validator::fail(std::string_view argument, std::string_view got, std::string_view expected) {
  if (!ok()) return;
  message_.append("flash_dmattn::").append(function_).append(": ").append(argument);
  message_.append(": got ").append(got).append(", expected ").append(expected);
}

bool Validator::input(const char* name, const TensorView& tensor, DTypes dtypes, Axes axes) {
  check_type_and_shape(name, tensor, dtypes, axes);
  if (ok()) check_memory(name, tensor);
  if (ok()) remember(name, tensor);
  return ok();
}

bool Validator::output(const char* name, const TensorView& tensor, DTypes dtypes, Axes axes) {
  check_type_and_shape(name, tensor, dtypes, axes);
  if (ok()) check_memory(name, tensor);
  if (ok()) check_writable(name, tensor);
  if (ok()) remember(name, tensor);
  return ok();
}

void Validator::check_type_and_shape(const char* name, const TensorView& tensor, DTypes dtypes, Axes axes) {
  if (!ok()) return;
  if (!tensor.present()) return fail(name, "no tensor", describe(axes));
  if (tensor.rank != static_cast<int>(axes.size())) {
    const bool printable = tensor.rank > 0 && tensor.rank <= kMaxRank;
    return fail(
        name, printable ? "shape " + list(tensor.shape, tensor.rank) : "rank " + std::to_string(tensor.rank),
        describe(axes));
  }
  if (std::find(dtypes.begin(), dtypes.end(), tensor.dtype) == dtypes.end()) {
    return fail(name, std::string("dtype ") + dtype_name(tensor.dtype), describe(dtypes));
  }
  const auto got = [&] { return "shape " + list(tensor.shape, tensor.rank); };
  std::int64_t bytes = static_cast<std::int64_t>(dtype_size(tensor.dtype));
  int index = 0;
  for (const Axis& axis : axes) {
    const std::int64_t size = tensor.shape[index++];
    if (!axis.takes(size)) return fail(name, got(), describe(axes));
    if (size < 0 || size > kMaxAxis) return fail(name, got(), "sizes from 0 to " + std::to_string(kMaxAxis));
    bytes = bounded_multiply_add(bytes, std::max<std::int64_t>(size, 1), 0);
  }
  if (bytes > kMaxBytes) fail(name, got(), "at most 2^56 bytes");
}

void Validator::check_memory(const char* name, const TensorView& tensor) {
  if (tensor.num_elements() == 0) return;
  const auto item = static_cast<std::int64_t>(dtype_size(tensor.dtype));
  if (tensor.data == nullptr) {
    return fail(name, "a null pointer", "memory for shape " + list(tensor.shape, tensor.rank));
  }
  if (reinterpret_cast<std::uintptr_t>(tensor.data) % item != 0) {
    return fail(name, "misaligned memory", "an address divisible by " + std::to_string(item));
  }
  std::int64_t extent = 1;
  for (int axis = 0; axis < tensor.rank; ++axis) {
    extent = bounded_multiply_add(tensor.shape[axis] - 1, magnitude(tensor.stride[axis]), extent);
  }
  if (bounded_multiply_add(extent, item, 0) > kMaxBytes) {
    fail(name, "strides " + list(tensor.stride, tensor.rank), "elements within 2^56 bytes");
  }
}

void Validator::check_writable(const char* name, const TensorView& tensor) {
  if (tensor.num_elements() == 0) return;
  // No two elements meet if the stride of each axis reaches beyond all that the axes of smaller strides span.
  for (int axis = 0; axis < tensor.rank; ++axis) {
    if (tensor.shape[axis] == 1) continue;
    const std::int64_t stride = magnitude(tensor.stride[axis]);
    std::int64_t span = 0;
    for (int other = 0; other < tensor.rank; ++other) {
      if (other == axis || tensor.shape[other] == 1) continue;
      const std::int64_t smaller = magnitude(tensor.stride[other]);
      if (smaller <= stride) span += smaller * (tensor.shape[other] - 1);
    }
    if (stride <= span) {
      const std::string strides = " with strides " + list(tensor.stride, tensor.rank);
      return fail(name, "shape " + list(tensor.shape, tensor.rank) + strides,
                  "strides under which no two elements of an output share memory");
    }
  }
  for (int i = 0; i < num_seen_; ++i) {
    if (seen_[i].data == tensor.data) {
      return fail(name, std::string("the memory of ") + seen_[i].name, "memory of its own");
    }
  }
}

void Validator::remember(const char* name, const TensorView& tensor) {
  if (tensor.num_elements() > 0) seen_[num_seen_++] = {name, tensor.data};
}

bool Validator::contiguous(const char* name, const TensorView& tensor, DTypes dtypes, Axes axes) {
  if (!input(name, tensor, dtypes, axes)) return false;
  std::int64_t stride = 1;
  for (int axis = tensor.rank - 1; axis >= 0; --axis) {
    if (tensor.shape[axis] > 1 && tensor.stride[axis] != stride) {
      fail(name, "strides " + list(tensor.stride, tensor.rank), "contiguous memory");
    }
    stride *= tensor.shape[axis];
  }
  return ok();
}

bool Validator::cu_seqlens(const char* name, const TensorView& tensor, const char* total_symbol,
                           std::int64_t total) {
  const Axes axes = {{"sequences + 1"}};
  const DTypes dtypes = {DType::kInt32};
  if (!(on_cpu_ ? input(name, tensor, dtypes, axes) : contiguous(name, tensor, dtypes, axes))) return false;
  require(tensor.shape[0] > 0, name, "shape [0]", "[sequences + 1], the first element 0");
  if (!ok() || !on_cpu_) return ok();
  const auto* offsets = static_cast<const std::int32_t*>(tensor.data);
  std::int64_t previous = offsets[0];
  if (previous != 0) fail(name, std::to_string(previous) + " at index 0", "0");
  for (std::int64_t i = 1; i < tensor.shape[0]; ++i) {
    const std::int64_t offset = offsets[i * tensor.stride[0]];
    if (offset < previous) {
      fail(name, std::to_string(offset) + " at index " + std::to_string(i),
           "at least " + std::to_string(previous) + ", the offset before it");
      return false;
    }
    previous = offset;
  }
  if (previous != total) {
    fail(name, std::to_string(previous) + " at the end",
         std::string(total_symbol) + " = " + std::to_string(total));
  }
  return ok();
}

void Validator::target(const Target& target) {
  if (target.device_type == DeviceType::kCuda) {
    if (target.device_index < 0) fail("device_index", std::to_string(target.device_index), "at least 0");
    return;
  }
  const int num_workers = target.parallel_for.num_workers;
  if (num_workers < 1 || num_workers > kMaxWorkers) {
    fail("parallel_for.num_workers", std::to_string(num_workers), "1 to " + std::to_string(kMaxWorkers));
  }
  require(target.parallel_for.run != nullptr, "parallel_for.run", "a null pointer", "a function");
}

}  // namespace flash_dmattn
