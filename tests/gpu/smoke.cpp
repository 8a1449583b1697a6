// Every instance of every CUDA kernel on tiny shapes, without PyTorch: what compute-sanitizer looks at
// (scripts/sanitize_gpu.sh). Values lie in [1, 2], so that a right output does, too; what is right beyond
// that is for the Python suites. Outputs, plans and workspaces are left uninitialised.
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "flash_dmattn/attention.h"

namespace fd = flash_dmattn;

namespace {

void require(bool condition, const std::string& what) {
  if (condition) return;
  std::fprintf(stderr, "smoke: %s\n", what.c_str());
  std::exit(1);
}

void require(cudaError_t error, const char* what) {
  require(error == cudaSuccess, std::string(what) + ": " + cudaGetErrorString(error));
}

void require(const fd::Status& status, const char* what) {
  require(status.ok(), std::string(what) + ": " + status.message);
}

class DeviceMemory {
 public:
  explicit DeviceMemory(std::size_t bytes) { require(cudaMalloc(&data_, bytes + 1), "cudaMalloc"); }
  ~DeviceMemory() { cudaFree(data_); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

std::size_t bytes_of(fd::DType dtype) {
  if (dtype == fd::DType::kBool) return 1;
  return dtype == fd::DType::kBFloat16 || dtype == fd::DType::kFloat16 ? 2 : 4;
}

// 16 bits of a float that both half types hold exactly: multiples of 1/64 below 4.
std::uint16_t half_bits(float value, fd::DType dtype) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (dtype == fd::DType::kBFloat16) return static_cast<std::uint16_t>(bits >> 16);
  if (value == 0) return 0;
  const std::uint32_t sign = bits >> 31, exponent = ((bits >> 23) & 0xff) - 127 + 15,
                      fraction = (bits >> 13) & 0x3ff;
  return static_cast<std::uint16_t>(sign << 15 | exponent << 10 | fraction);
}

float half_value(std::uint16_t half, fd::DType dtype) {
  if (dtype == fd::DType::kBFloat16) {
    const std::uint32_t bits = std::uint32_t{half} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  const int exponent = half >> 10 & 0x1f, fraction = half & 0x3ff;
  if (exponent == 31) return fraction ? NAN : INFINITY;
  const float size =
      exponent ? std::ldexp(1.0f + fraction / 1024.0f, exponent - 15) : std::ldexp(fraction, -24);
  return half >> 15 ? -size : size;
}

struct Tensor {
  Tensor(fd::DType dtype, const std::array<std::int64_t, 4>& shape)
      : Tensor(dtype, {shape[0], shape[1], shape[2], shape[3]}) {}
  Tensor(fd::DType dtype, std::initializer_list<std::int64_t> shape)
      : view(fd::contiguous_view(static_cast<void*>(nullptr), dtype, shape)),
        memory(view.num_elements() * bytes_of(dtype)) {
    view.data = memory.data();
  }

  fd::TensorView view;
  DeviceMemory memory;

  void copy_from(const void* host) {
    const std::size_t bytes = view.num_elements() * bytes_of(view.dtype);
    require(cudaMemcpyAsync(view.data, host, bytes, cudaMemcpyHostToDevice, nullptr), "copy to the device");
    require(cudaDeviceSynchronize(), "copy to the device");
  }

  std::vector<float> values() const {
    const std::int64_t count = view.num_elements();
    std::vector<std::uint16_t> halves(bytes_of(view.dtype) == 2 ? count : 0);
    std::vector<float> found(count);
    void* host = halves.empty() ? static_cast<void*>(found.data()) : halves.data();
    require(cudaMemcpyAsync(host, view.data, count * bytes_of(view.dtype), cudaMemcpyDeviceToHost, nullptr),
            "copy");
    require(cudaDeviceSynchronize(), "copy from the device");
    for (std::size_t i = 0; i < halves.size(); ++i) found[i] = half_value(halves[i], view.dtype);
    return found;
  }
};

// Multiples of 1/64 in [low, low + 1].
void fill(Tensor& tensor, float low, std::mt19937& engine) {
  const std::int64_t count = tensor.view.num_elements();
  std::vector<float> floats(count);
  std::vector<std::uint16_t> halves(count);
  for (std::int64_t i = 0; i < count; ++i) {
    floats[i] = low + static_cast<float>(engine() % 65) / 64;
    halves[i] = half_bits(floats[i], tensor.view.dtype);
  }
  tensor.copy_from(bytes_of(tensor.view.dtype) == 2 ? static_cast<void*>(halves.data()) : floats.data());
}

template <typename Args>
void run(fd::Status (*function)(const Args&, const fd::Target&, const fd::Workspace&), const Args& args,
         const char* name) {
  const fd::Target target{.device_type = fd::DeviceType::kCuda};
  const std::string reason = fd::why_unsupported(args, target);
  require(reason.empty(), std::string(name) + " is not supported: " + reason);
  const std::size_t bytes = fd::workspace_bytes(args, target);
  const DeviceMemory workspace(bytes);
  require(function(args, target, {.data = workspace.data(), .bytes = bytes}), name);
  require(cudaDeviceSynchronize(), name);
}

struct Shape {
  const char* name;
  fd::DType dtype;
  std::int64_t head_dim, heads_q, heads_kv, seqlen_q, seqlen_k, keep_window;  // no window: plain attention
  bool causal = true, packed = false, with_bias = true, with_plan = false;
  // A mask of every pair and a bias [1, dense_heads, dense_rows, seqlen_k], in the place of the one per key.
  std::int64_t dense_heads = 0, dense_rows = 0;
};

// The tensors of one shape. Packed: two sequences, the first of 5 rows and keys.
struct Problem {
  Problem(const Shape& shape, std::mt19937& engine)
      : query(rows(shape.dtype, shape, shape.seqlen_q, shape.heads_q)),
        key(rows(shape.dtype, shape, shape.seqlen_k, shape.heads_kv)),
        value(rows(shape.dtype, shape, shape.seqlen_k, shape.heads_kv)),
        dout(rows(shape.dtype, shape, shape.seqlen_q, shape.heads_q)),
        score(per_head(fd::DType::kFloat32, shape, shape.heads_kv, shape.seqlen_k, false)),
        expiry(per_head(fd::DType::kInt32, shape, shape.heads_kv, shape.seqlen_k, false)),
        dlse(per_head(fd::DType::kFloat32, shape, shape.heads_q, shape.seqlen_q, true)),
        cu_seqlens_q(fd::DType::kInt32, {3}),
        cu_seqlens_k(fd::DType::kInt32, {3}),
        mask(fd::DType::kBool, {1, shape.heads_q, shape.seqlen_q, shape.seqlen_k}),
        dense_bias(shape.dtype, dense_bias_shape(shape)) {
    for (Tensor* tensor : {&query, &key, &dout, &score, &dlse}) fill(*tensor, -0.5f, engine);
    fill(value, 1.0f, engine);
    const std::int32_t ends_q[] = {0, 5, static_cast<std::int32_t>(shape.seqlen_q)};
    const std::int32_t ends_k[] = {0, 5, static_cast<std::int32_t>(shape.seqlen_k)};
    cu_seqlens_q.copy_from(ends_q);
    cu_seqlens_k.copy_from(ends_k);
    fill(dense_bias, -0.5f, engine);
    std::vector<unsigned char> sees(mask.view.num_elements());
    for (std::size_t i = 0; i < sees.size(); ++i) {
      const auto key_index = static_cast<std::int64_t>(i) % shape.seqlen_k;
      sees[i] = key_index == 0 || (key_index / 64 % 3 != 1 && engine() % 4 == 0);  // some blocks nobody sees
    }
    mask.copy_from(sees.data());
  }

  static std::array<std::int64_t, 4> dense_bias_shape(const Shape& shape) {
    return {1, std::max<std::int64_t>(shape.dense_heads, 1), std::max<std::int64_t>(shape.dense_rows, 1),
            shape.seqlen_k};
  }

  static Tensor rows(fd::DType dtype, const Shape& shape, std::int64_t length, std::int64_t heads) {
    if (shape.packed) return Tensor(dtype, {length, heads, shape.head_dim});
    return Tensor(dtype, {1, length, heads, shape.head_dim});
  }

  // One number per key and head, packed [total, heads]; or per row and head, packed [heads, total].
  static Tensor per_head(fd::DType dtype, const Shape& shape, std::int64_t heads, std::int64_t length,
                         bool of_rows) {
    if (!shape.packed) return Tensor(dtype, {1, heads, length});
    return of_rows ? Tensor(dtype, {heads, length}) : Tensor(dtype, {length, heads});
  }

  Tensor query, key, value, dout, score, expiry, dlse, cu_seqlens_q, cu_seqlens_k, mask, dense_bias;
};

void check_range(const Tensor& tensor, float low, float high, const char* name) {
  for (const float value : tensor.values()) {
    require(value >= low && value <= high, std::string(name) + " holds " + std::to_string(value));
  }
}

void attend(const Shape& shape, std::mt19937& engine) {
  std::printf("%s: %s D%lld H%lld/%lld %lldx%lld w%lld\n", shape.name,
              shape.dtype == fd::DType::kFloat16 ? "f16" : "bf16", static_cast<long long>(shape.head_dim),
              static_cast<long long>(shape.heads_q), static_cast<long long>(shape.heads_kv),
              static_cast<long long>(shape.seqlen_q), static_cast<long long>(shape.seqlen_k),
              static_cast<long long>(shape.keep_window));
  const fd::Target target{.device_type = fd::DeviceType::kCuda};
  Problem problem(shape, engine);
  const fd::TensorView absent{};
  const fd::TensorView cu_q = shape.packed ? problem.cu_seqlens_q.view : absent;
  const fd::TensorView cu_k = shape.packed ? problem.cu_seqlens_k.view : absent;
  const bool windowed = shape.keep_window > 0;
  if (windowed) {
    fd::SelectArgs select{.score = problem.score.view,
                          .cu_seqlens = cu_k,
                          .expiry = problem.expiry.view,
                          .keep_window = shape.keep_window,
                          .causal = shape.causal};
    if (shape.causal && !shape.packed) select.num_queries = shape.seqlen_q;
    run(fd::select, select, "select");
  }
  const bool dense = shape.dense_heads > 0;
  const fd::TensorView bias = dense ? problem.dense_bias.view : shape.with_bias ? problem.score.view : absent;
  const fd::TensorView mask = dense ? problem.mask.view : absent;
  const fd::TensorView expiry = windowed ? problem.expiry.view : absent;
  const fd::TensorView score = windowed ? problem.score.view : absent;
  fd::PlanArgs plan_args{.expiry = expiry,
                         .score = score,
                         .bias = bias,
                         .cu_seqlens_q = cu_q,
                         .cu_seqlens_k = cu_k,
                         .num_queries = shape.seqlen_q,
                         .keep_window = shape.keep_window,
                         .causal = shape.causal};
  const std::int64_t plan_size =
      shape.with_plan ? static_cast<std::int64_t>(fd::plan_elements(plan_args, target)) : 1;
  Tensor plan(fd::DType::kInt32, {plan_size});
  if (shape.with_plan) {
    plan_args.plan = plan.view;
    run(fd::plan, plan_args, "plan");
  }
  const fd::TensorView given = shape.with_plan ? plan.view : absent;
  const double scale = 1 / std::sqrt(static_cast<double>(shape.head_dim));

  Tensor out = Problem::rows(shape.dtype, shape, shape.seqlen_q, shape.heads_q);
  Tensor lse = Problem::per_head(fd::DType::kFloat32, shape, shape.heads_q, shape.seqlen_q, true);
  // The Hopper kernels leave negative scales to the portable ones.
  for (const double forward_scale : {-scale, scale}) {
    run(fd::forward,
        fd::ForwardArgs{.query = problem.query.view,
                        .key = problem.key.view,
                        .value = problem.value.view,
                        .bias = bias,
                        .mask = mask,
                        .expiry = expiry,
                        .score = score,
                        .keep_window = shape.keep_window,
                        .plan = given,
                        .cu_seqlens_q = cu_q,
                        .cu_seqlens_k = cu_k,
                        .out = out.view,
                        .lse = lse.view,
                        .scale = forward_scale,
                        .causal = shape.causal},
        "forward");
    check_range(out, 0.99f, 2.01f, "out");
    check_range(lse, -100, 100, "lse");
  }

  Tensor dq = Problem::rows(shape.dtype, shape, shape.seqlen_q, shape.heads_q);
  Tensor dk = Problem::rows(shape.dtype, shape, shape.seqlen_k, shape.heads_kv);
  Tensor dv = Problem::rows(shape.dtype, shape, shape.seqlen_k, shape.heads_kv);
  Tensor dbias = dense ? Tensor(shape.dtype, Problem::dense_bias_shape(shape))
                       : Problem::per_head(fd::DType::kFloat32, shape, shape.heads_kv, shape.seqlen_k, false);
  fd::BackwardArgs backward{.query = problem.query.view,
                            .key = problem.key.view,
                            .value = problem.value.view,
                            .bias = bias,
                            .mask = mask,
                            .expiry = expiry,
                            .score = score,
                            .keep_window = shape.keep_window,
                            .plan = given,
                            .cu_seqlens_q = cu_q,
                            .cu_seqlens_k = cu_k,
                            .out = out.view,
                            .lse = lse.view,
                            .dout = problem.dout.view,
                            .dlse = problem.dlse.view,
                            .dq = dq.view,
                            .dk = dk.view,
                            .dv = dv.view,
                            .dbias = shape.with_bias ? dbias.view : absent,
                            .scale = scale,
                            .causal = shape.causal};
  run(fd::backward, backward, "backward");
  for (const Tensor* gradient : {&dq, &dk, &dv}) check_range(*gradient, -1e4f, 1e4f, "a gradient");
  if (shape.with_bias) check_range(dbias, -1e4f, 1e4f, "dbias");
}

void select_alone(fd::DType dtype, std::int64_t heads, std::int64_t length, std::int64_t keep_window,
                  bool causal, std::int64_t num_queries, std::mt19937& engine) {
  std::printf("select: %lld heads of %lld, w%lld\n", static_cast<long long>(heads),
              static_cast<long long>(length), static_cast<long long>(keep_window));
  Tensor score(dtype, {1, heads, length}), expiry(fd::DType::kInt32, {1, heads, length});
  fill(score, -0.5f, engine);
  run(fd::select,
      fd::SelectArgs{.score = score.view,
                     .expiry = expiry.view,
                     .keep_window = keep_window,
                     .causal = causal,
                     .num_sinks = 2,
                     .local_window = causal ? 3 : 0,
                     .num_queries = num_queries},
      "select");
}

}  // namespace

int main() {
  std::mt19937 engine(0);
  for (const fd::DType dtype : {fd::DType::kBFloat16, fd::DType::kFloat16}) {
    for (const std::int64_t head_dim : {64, 128, 256}) {
      attend({"window", dtype, head_dim, 4, 2, 150, 200, 32, true, false, true, true}, engine);
      attend({"padded head dim, odd group", dtype, head_dim - 8, 3, 1, 70, 70, 16}, engine);
      attend({"not causal", dtype, head_dim, 2, 1, 40, 130, 50, false}, engine);
      attend({"no window", dtype, head_dim, 2, 2, 130, 140, 0, true, false, true, false}, engine);
      attend({"neither window nor bias", dtype, head_dim, 2, 2, 70, 70, 0, true, false, false}, engine);
      attend({"packed", dtype, head_dim, 4, 1, 135, 135, 20, true, true}, engine);
      attend({"one query", dtype, head_dim, 4, 1, 1, 300, 64}, engine);
      attend({"decode", dtype, head_dim, 6, 2, 3, 700, 300}, engine);
      attend({"decode, all keys", dtype, head_dim, 2, 1, 1, 1500, 0, true, false, false}, engine);
      for (const auto& [heads, rows] : {std::pair{4, 140}, std::pair{2, 140}, std::pair{1, 1}}) {
        attend({.name = "dense mask and bias",
                .dtype = dtype,
                .head_dim = head_dim,
                .heads_q = 4,
                .heads_kv = 2,
                .seqlen_q = 140,
                .seqlen_k = 200,
                .keep_window = 0,
                .causal = rows > 1,
                .dense_heads = heads,
                .dense_rows = rows},
               engine);
      }
    }
  }
  attend({"three segments", fd::DType::kBFloat16, 64, 1, 1, 2150, 4300, 40, true, false, true, true}, engine);
  for (const fd::DType dtype : {fd::DType::kFloat32, fd::DType::kBFloat16, fd::DType::kFloat16}) {
    select_alone(dtype, 2, 3000, 100, true, -1, engine);
    select_alone(dtype, 2, 3000, 100, false, -1, engine);
  }
  select_alone(fd::DType::kFloat32, 1, 1, 1, true, -1, engine);
  select_alone(fd::DType::kFloat32, 1, 70000, 1000, true, -1, engine);
  for (const std::int64_t num_queries : {1, 5, 100}) {
    select_alone(fd::DType::kFloat32, 1, 70000, 1000, true, num_queries, engine);
  }
  std::printf("smoke: all ran\n");
  return 0;
}
