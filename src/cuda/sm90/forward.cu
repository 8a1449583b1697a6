#include <algorithm>
#include <array>

#include "core/dtype.h"
#include "cuda/common/arguments.h"
#include "cuda/common/launch.h"
#include "cuda/common/log2.h"
#include "cuda/sm90/forward_kernel.cuh"
#include "cuda/sm90/kernels.h"

namespace flash_dmattn::cuda::sm90 {
namespace {

// Biases are divided by the scale.
constexpr double kLeastScale = 1.0 / (std::int64_t{1} << 40);

// So many bytes of packed keys at a time, but at least those of one kv head.
constexpr std::size_t kPackedBytes = std::size_t{512} << 20;

template <typename Element, int kHeadDim>
cudaError_t pack(const ForwardArgs& args, const ForwardParams<Element>& params, bool early,
                 cudaStream_t stream) {
  const PackParams<Element> pack = {
      .geometry = params.geometry,
      .plan = params.plan,
      .key = rows_tensor<const Element>(args.key),
      .value = rows_tensor<const Element>(args.value),
      .packed = params.packed,
      .first_head = params.first_head,
      .num_heads = params.num_heads,
      .head_dim = params.head_dim,
      .bias_scale = params.bias_scale,
      .causal = params.causal,
  };
  const std::int64_t units = std::int64_t{pack.packed.padding} + kPaddingUnits;
  return launch(pack_kernel<Element, kHeadDim>,
                {static_cast<unsigned>(ceil_div(units, kPackUnits)), kPackThreads, 0, stream, early}, pack);
}

template <typename Config>
cudaError_t run(const ForwardArgs& args, const PlanView& plan, const ForwardBuffers& buffers, bool early,
                int device, cudaStream_t stream) {
  using Element = typename Config::Element;
  const Geometry geometry = make_geometry(args);
  ForwardParams<Element> params = {
      .geometry = geometry,
      .plan = plan,
      .tiles = RowTiles::make(geometry, args.causal, Config::kTileM),
      .packed = buffers.packed,
      .query = rows_tensor<const Element>(args.query),
      .key = rows_tensor<const Element>(args.key),
      .value = rows_tensor<const Element>(args.value),
      .out = rows_tensor<Element>(args.out),
      .lse = query_tensor<float>(args.lse),
      .first_head = 0,
      .num_heads = 0,
      .head_dim = static_cast<int>(args.query.shape[args.query.rank - 1]),
      .scale_log2 = static_cast<float>(args.scale * kLog2E),
      .bias_scale = static_cast<float>(1 / (args.scale * kLog2E)),
      .causal = args.causal,
  };
  const std::int64_t multiprocessors = device_properties(device).multiprocessors;
  cudaError_t status = cudaSuccess;
  for (int head = 0; head < geometry.heads_kv && status == cudaSuccess; head += buffers.heads_per_wave) {
    params.first_head = head;
    params.num_heads = std::min(buffers.heads_per_wave, geometry.heads_kv - head);
    params.packed.padding = params.num_heads * params.packed.blocks_per_head * kUnitsPerBlock;
    if constexpr (!Config::kGather) {
      status = pack<Element, Config::kHeadDim>(args, params, early, stream);
      if (status != cudaSuccess) return status;
    }
    const std::int64_t tiles =
        std::int64_t{params.num_heads} * params.tiles.head_chunks * params.tiles.num_tiles;
    status = launch(forward_kernel<Config>,
                    {static_cast<unsigned>(std::min(tiles, multiprocessors)), Config::kThreads,
                     sizeof(typename Config::SharedMemory), stream, !Config::kGather || early},
                    params);
    early = true;
  }
  return status;
}

struct Instance {
  DType dtype;
  int head_dim;  // the largest it takes
  bool packs;    // the keys, before the kernel
  std::size_t shared_bytes;
  cudaError_t (*run)(const ForwardArgs&, const PlanView&, const ForwardBuffers&, bool early, int device,
                     cudaStream_t);
};

template <typename Config>
constexpr Instance instance(DType dtype) {
  return {dtype, Config::kHeadDim, !Config::kGather, sizeof(typename Config::SharedMemory), run<Config>};
}

template <typename Element>
using Config64 = ForwardConfig<Element, Feed::kGather, 64, 3, 8, 3, 32, 160>;
template <typename Element>
using Config128 = ForwardConfig<Element, Feed::kPacked, 128, 3, 5, 3, 56, 152>;

constexpr std::array kInstances = {
    instance<Config64<BFloat16>>(DType::kBFloat16),
    instance<Config64<Float16>>(DType::kFloat16),
    instance<Config128<BFloat16>>(DType::kBFloat16),
    instance<Config128<Float16>>(DType::kFloat16),
};

int head_dim_of(const ForwardArgs& args) { return static_cast<int>(args.query.shape[args.query.rank - 1]); }

const Instance* find(const ForwardArgs& args) {
  for (const Instance& instance : kInstances) {
    if (instance.dtype == args.query.dtype && head_dim_of(args) <= instance.head_dim) return &instance;
  }
  return nullptr;
}

}  // namespace

std::string forward_why_not(const ForwardArgs& args, int device) {
  const DeviceProperties properties = device_properties(device);
  if (properties.compute_capability != 90) {
    return "needs compute capability 9.0, this GPU has " +
           std::to_string(properties.compute_capability / 10) + "." +
           std::to_string(properties.compute_capability % 10);
  }
  if (args.query.dtype != DType::kBFloat16 && args.query.dtype != DType::kFloat16) {
    return std::string("takes bfloat16 and float16, got ") + dtype_name(args.query.dtype);
  }
  const int head_dim = head_dim_of(args);
  if (head_dim > kInstances.back().head_dim || head_dim % 8 != 0) {
    return "takes head dims that are multiples of 8, up to " + std::to_string(kInstances.back().head_dim) +
           ", got " + std::to_string(head_dim);
  }
  if (!(args.scale >= kLeastScale && args.scale <= 1 / kLeastScale)) {
    return "takes scales from 2^-40 to 2^40, got " + std::to_string(args.scale);
  }
  if (static_cast<std::size_t>(properties.max_shared_bytes) < find(args)->shared_bytes) {
    return "needs more shared memory than the " + std::to_string(properties.max_shared_bytes) +
           " bytes of this GPU";
  }
  return "";
}

ForwardBuffers cut_forward(Arena& arena, const ForwardArgs& args, const PlanView& plan) {
  const Geometry geometry = make_geometry(args);
  if (!find(args)->packs) return {.packed = {}, .heads_per_wave = geometry.heads_kv};
  const std::size_t row_bytes = 2 * static_cast<std::size_t>(find(args)->head_dim);
  const auto blocks = static_cast<std::size_t>(KeyBlocks::per_head(geometry, plan));
  const std::size_t head_bytes = blocks * kUnitsPerBlock * (2 * kUnit * row_bytes + sizeof(UnitKeys));
  ForwardBuffers buffers;
  buffers.heads_per_wave = static_cast<int>(std::clamp<std::size_t>(
      kPackedBytes / std::max<std::size_t>(head_bytes, 1), 1, static_cast<std::size_t>(geometry.heads_kv)));
  buffers.packed.blocks_per_head = static_cast<int>(blocks);
  const std::size_t units = buffers.heads_per_wave * blocks * kUnitsPerBlock + kPaddingUnits;
  buffers.packed.key = arena.take<unsigned char>(units * kUnit, row_bytes);
  buffers.packed.value = arena.take<unsigned char>(units * kUnit, row_bytes);
  buffers.packed.keys = arena.take<UnitKeys>(units);
  return buffers;
}

cudaError_t forward(const ForwardArgs& args, const PlanView& plan, const ForwardBuffers& buffers, bool early,
                    int device, cudaStream_t stream) {
  return find(args)->run(args, plan, buffers, early, device, stream);
}

}  // namespace flash_dmattn::cuda::sm90
