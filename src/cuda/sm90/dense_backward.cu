#include "cuda/common/launch.h"
#include "cuda/sm80/backward_params.h"
#include "cuda/sm80/instances.h"
#include "cuda/sm90/dense.h"
#include "cuda/sm90/dense_dkv_kernel.cuh"

namespace flash_dmattn::cuda::sm90 {
namespace {

using Run = cudaError_t (*)(const BackwardArgs&, const DenseParams&, RowStats*, cudaStream_t);

template <typename Config>
cudaError_t run(const BackwardArgs& args, const DenseParams& dense, RowStats* stats, cudaStream_t stream) {
  const auto params = sm80::make_params<typename Config::Element>(args, {}, stats);
  const Geometry& geometry = params.geometry;
  const std::int64_t ctas =
      static_cast<std::int64_t>(geometry.num_sequences) * geometry.heads_kv * dense.lists.num_blocks;
  return launch(
      dense_key_grad_kernel<Config>,
      {static_cast<unsigned>(ctas), Config::kThreads, sizeof(typename Config::SharedMemory), stream}, params,
      dense);
}

template <typename Config>
constexpr sm80::Instance<Run> instance(DType dtype) {
  return {sm80::configuration<Config>(dtype, 0), run<Config>};
}

constexpr sm80::Instance<Run> kInstances[] = {
    instance<DenseKeyGradConfig<BFloat16, 64, 2>>(DType::kBFloat16),
    instance<DenseKeyGradConfig<Float16, 64, 2>>(DType::kFloat16),
    instance<DenseKeyGradConfig<BFloat16, 128, 2>>(DType::kBFloat16),
    instance<DenseKeyGradConfig<Float16, 128, 2>>(DType::kFloat16),
};
constexpr std::span<const sm80::Instance<Run>> kTable = kInstances;

}  // namespace

bool takes_dense_key_grad(const BackwardArgs& args, int device) {
  return device_properties(device).compute_capability == 90 && why_not(kTable, args.query, device).empty();
}

cudaError_t dense_key_grad(const BackwardArgs& args, const sm80::DenseParams& dense, sm80::RowStats* stats,
                           int device, cudaStream_t stream) {
  return choose(kTable, args.query, device).instance->run(args, dense, stats, stream);
}

}  // namespace flash_dmattn::cuda::sm90
