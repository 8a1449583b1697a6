#include "cuda/common/arguments.h"
#include "cuda/common/launch.h"
#include "cuda/common/log2.h"
#include "cuda/sm80/forward_kernel.cuh"
#include "cuda/sm80/instances.h"
#include "cuda/sm80/kernels.h"

namespace flash_dmattn::cuda::sm80 {
namespace {

using Run = cudaError_t (*)(const ForwardArgs&, const PlanView&, cudaStream_t);

template <typename Config>
cudaError_t run(const ForwardArgs& args, const PlanView& plan, cudaStream_t stream) {
  using Element = typename Config::Element;
  const Geometry geometry = make_geometry(args);
  const ForwardParams<Element> params = {
      .geometry = geometry,
      .plan = plan,
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
  return launch(forward_kernel<Config>,
                {static_cast<unsigned>(params.tiles.grid(geometry)), Config::kThreads,
                 sizeof(typename Config::SharedMemory), stream},
                params);
}

template <typename Config>
constexpr Instance<Run> instance(DType dtype) {
  return {configuration<Config>(dtype, Config::kTileM), run<Config>};
}

// Registers allow two CTAs of 128 threads per multiprocessor.
template <typename Element>
using Config64 = ForwardConfig<Element, 64, 4, 2, 64, 2>;
template <typename Element>
using Config128 = ForwardConfig<Element, 128, 4, 2, 64, 2>;
template <typename Element>
using Config256 = ForwardConfig<Element, 256, 4, 1, 64, 2>;

constexpr Instance<Run> kInstances[] = {
    instance<Config64<BFloat16>>(DType::kBFloat16),  instance<Config64<Float16>>(DType::kFloat16),
    instance<Config128<BFloat16>>(DType::kBFloat16), instance<Config128<Float16>>(DType::kFloat16),
    instance<Config256<BFloat16>>(DType::kBFloat16), instance<Config256<Float16>>(DType::kFloat16),
};
constexpr std::span<const Instance<Run>> kTable = kInstances;

}  // namespace

std::string forward_why_not(const ForwardArgs& args, int device) {
  return why_not(kTable, args.query, device);
}

std::vector<NamedTable> forward_tables() { return {named("forward", kTable)}; }

cudaError_t forward(const ForwardArgs& args, const PlanView& plan, int device, cudaStream_t stream) {
  return choose(kTable, args.query, device).instance->run(args, plan, stream);
}

}  // namespace flash_dmattn::cuda::sm80
