#include "cuda/common/launch.h"
#include "cuda/sm80/backward_params.h"
#include "cuda/sm80/dense.h"
#include "cuda/sm80/dense_bias_grad_kernel.cuh"
#include "cuda/sm80/dense_instances.h"

namespace flash_dmattn::cuda::sm80 {
namespace {

using Run = cudaError_t (*)(const BackwardArgs&, const DenseParams&, RowStats*, cudaStream_t);

template <typename Config>
cudaError_t run(const BackwardArgs& args, const DenseParams& dense, RowStats* stats, cudaStream_t stream) {
  using Element = typename Config::Element;
  const BackwardParams<Element> params = make_params<Element>(args, {}, stats);
  const Geometry& geometry = params.geometry;
  const BiasShape shape = {.batches = static_cast<int>(args.dbias.shape[0]),
                           .heads = static_cast<int>(args.dbias.shape[1]),
                           .rows = args.dbias.rank == 4 && args.dbias.shape[2] > 1};
  const std::int64_t ctas = static_cast<std::int64_t>(shape.batches) * shape.heads *
                            (shape.rows ? ceil_div(geometry.seqlen_q, Config::kTileQ) : 1) *
                            dense.lists.num_blocks;
  return launch(dense_bias_grad_kernel<Config>,
                {static_cast<unsigned>(ctas), Config::kThreads, Config::shared_bytes(0), stream}, params,
                dense, shape);
}

template <typename Config>
constexpr DenseInstance<Run> instance(DType dtype) {
  return {dtype,
          Config::kHeadDim,
          0,
          Config::kCtasPerSm,
          [](int bytes) { return Config::shared_bytes(bytes); },
          run<Config>};
}

constexpr DenseInstance<Run> kInstances[] = {
    instance<DenseBiasGradConfig<BFloat16, 64, 64, 2>>(DType::kBFloat16),
    instance<DenseBiasGradConfig<Float16, 64, 64, 2>>(DType::kFloat16),
    instance<DenseBiasGradConfig<BFloat16, 128, 64, 2>>(DType::kBFloat16),
    instance<DenseBiasGradConfig<Float16, 128, 64, 2>>(DType::kFloat16),
    instance<DenseBiasGradConfig<BFloat16, 256, 32, 2>>(DType::kBFloat16),
    instance<DenseBiasGradConfig<Float16, 256, 32, 2>>(DType::kFloat16),
};
constexpr std::span<const DenseInstance<Run>> kTable = kInstances;

}  // namespace

std::string shared_bias_grad_why_not(const BackwardArgs& args, int device) {
  return why_not(kTable, args.query, device);
}

cudaError_t shared_bias_grad(const BackwardArgs& args, const DenseParams& dense, RowStats* stats, int device,
                             cudaStream_t stream) {
  return choose(kTable, args.query, {}, device).instance->run(args, dense, stats, stream);
}

}  // namespace flash_dmattn::cuda::sm80
