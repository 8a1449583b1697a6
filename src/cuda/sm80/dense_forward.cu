#include "cuda/common/arguments.h"
#include "cuda/common/launch.h"
#include "cuda/common/log2.h"
#include "cuda/sm80/dense.h"
#include "cuda/sm80/dense_forward_kernel.cuh"
#include "cuda/sm80/dense_instances.h"

namespace flash_dmattn::cuda::sm80 {
namespace {

using Run = cudaError_t (*)(const ForwardArgs&, const DenseParams&, cudaStream_t);

template <typename Config>
cudaError_t run(const ForwardArgs& args, const DenseParams& dense, cudaStream_t stream) {
  using Element = typename Config::Element;
  const Geometry geometry = make_geometry(args);
  const ForwardParams<Element> params = {
      .geometry = geometry,
      .plan = {},
      .tiles = RowTiles::make(geometry, args.causal, Config::kTileM),
      .query = rows_tensor<const Element>(args.query),
      .key = rows_tensor<const Element>(args.key),
      .value = rows_tensor<const Element>(args.value),
      .out = rows_tensor<Element>(args.out),
      .lse = query_tensor<float>(args.lse),
      .head_dim = static_cast<int>(args.query.shape[args.query.rank - 1]),
      .scale_log2 = static_cast<float>(args.scale * kLog2E),
      .causal = args.causal,
  };
  return launch(dense_forward_kernel<Config>,
                {static_cast<unsigned>(params.tiles.grid(geometry)), Config::kThreads,
                 Config::shared_bytes(dense.staged ? dense.bias.element_bytes() : 0), stream},
                params, dense);
}

template <typename Config>
constexpr DenseInstance<Run> instance(DType dtype) {
  return {dtype,
          Config::kHeadDim,
          Config::kTileM,
          Config::kCtasPerSm,
          [](int bytes) { return Config::shared_bytes(bytes); },
          run<Config>};
}

template <typename Element>
struct Configs {
  using Wide64 = DenseForwardConfig<Element, 64, 4, 2, 2>;
  using Narrow64 = DenseForwardConfig<Element, 64, 4, 1, 2>;
  using Wide128 = DenseForwardConfig<Element, 128, 4, 2, 2>;
  using Narrow128 = DenseForwardConfig<Element, 128, 4, 1, 2>;
  using Wide256 = DenseForwardConfig<Element, 256, 4, 1, 2>;
  using Narrow256 = DenseForwardConfig<Element, 256, 2, 1, 2>;
};
using B = Configs<BFloat16>;
using H = Configs<Float16>;

constexpr DenseInstance<Run> kInstances[] = {
    instance<B::Wide64>(DType::kBFloat16),  instance<B::Narrow64>(DType::kBFloat16),
    instance<H::Wide64>(DType::kFloat16),   instance<H::Narrow64>(DType::kFloat16),
    instance<B::Wide128>(DType::kBFloat16), instance<B::Narrow128>(DType::kBFloat16),
    instance<H::Wide128>(DType::kFloat16),  instance<H::Narrow128>(DType::kFloat16),
    instance<B::Wide256>(DType::kBFloat16), instance<B::Narrow256>(DType::kBFloat16),
    instance<H::Wide256>(DType::kFloat16),  instance<H::Narrow256>(DType::kFloat16),
};
constexpr std::span<const DenseInstance<Run>> kTable = kInstances;

struct Call {
  DenseInputs inputs;
  DenseChoice<Run> choice;
  DenseParams dense;
};

Call cut(Arena& arena, const ForwardArgs& args, int device) {
  Call call;
  call.inputs = dense_inputs(args);
  call.choice = choose(kTable, args.query, call.inputs.bias, device);
  call.dense = {.lists = cut_dense_lists(arena, call.inputs, call.choice.instance->tile_m, false),
                .bias = call.inputs.bias,
                .dbias = {},
                .staged = call.choice.staged};
  return call;
}

}  // namespace

std::string dense_forward_why_not(const ForwardArgs& args, int device) {
  return why_not(kTable, args.query, device);
}

std::size_t dense_forward_bytes(const ForwardArgs& args, int device) {
  Arena arena;
  cut(arena, args, device);
  return arena.bytes();
}

cudaError_t dense_forward(const ForwardArgs& args, const Workspace& workspace, int device,
                          cudaStream_t stream) {
  Arena arena(workspace);
  const Call call = cut(arena, args, device);
  const DenseInstance<Run>& instance = *call.choice.instance;
  const cudaError_t status = build_dense_lists(call.inputs, instance.tile_m, call.dense.lists, stream);
  return status == cudaSuccess ? instance.run(args, call.dense, stream) : status;
}

}  // namespace flash_dmattn::cuda::sm80
