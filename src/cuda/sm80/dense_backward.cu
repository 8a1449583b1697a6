#include "cuda/common/arguments.h"
#include "cuda/common/launch.h"
#include "cuda/common/log2.h"
#include "cuda/sm80/backward_params.h"
#include "cuda/sm80/dense.h"
#include "cuda/sm80/dense_dkv_kernel.cuh"
#include "cuda/sm80/dense_dq_kernel.cuh"
#include "cuda/sm80/dense_dq_product_kernel.cuh"
#include "cuda/sm80/instances.h"
#include "cuda/sm80/row_stats.cuh"
#include "cuda/sm90/dense.h"

namespace flash_dmattn::cuda::sm80 {
namespace {

using Run = cudaError_t (*)(const BackwardArgs&, const DenseParams&, RowStats*, cudaStream_t);

template <typename Config>
cudaError_t run_keys(const BackwardArgs& args, const DenseParams& dense, RowStats* stats,
                     cudaStream_t stream) {
  using Element = typename Config::Element;
  const BackwardParams<Element> params = make_params<Element>(args, {}, stats);
  const Geometry& geometry = params.geometry;
  const std::int64_t ctas =
      static_cast<std::int64_t>(geometry.num_sequences) * geometry.heads_kv * dense.lists.num_blocks;
  return launch(dense_key_grad_kernel<Config>,
                {static_cast<unsigned>(ctas), Config::kThreads,
                 Config::shared_bytes(dense.staged ? dense.bias.element_bytes() : 0), stream},
                params, dense);
}

template <typename Config>
cudaError_t run_queries(const BackwardArgs& args, const DenseParams& dense, RowStats* stats,
                        cudaStream_t stream) {
  using Element = typename Config::Element;
  BackwardParams<Element> params = make_params<Element>(args, {}, stats);
  params.tiles = RowTiles::make(params.geometry, args.causal, Config::kTileM);
  return launch(dense_query_grad_kernel<Config>,
                {static_cast<unsigned>(params.tiles.grid(params.geometry)), Config::kThreads,
                 Config::shared_bytes(dense.staged ? dense.bias.element_bytes() : 0), stream},
                params, dense);
}

// dQ from the bias's gradient.
template <typename Config>
cudaError_t run_product(const BackwardArgs& args, const DenseParams& dense, RowStats* stats,
                        cudaStream_t stream) {
  using Element = typename Config::Element;
  BackwardParams<Element> params = make_params<Element>(args, {}, stats);
  params.tiles = RowTiles::make(params.geometry, args.causal, Config::kTileM);
  DenseParams product = dense;
  product.bias = dense.dbias;
  product.staged = true;
  return launch(dense_query_product_kernel<Config>,
                {static_cast<unsigned>(params.tiles.grid(params.geometry)), Config::kThreads,
                 Config::shared_bytes(0), stream},
                params, product);
}

template <typename Config>
constexpr Instance<Run> keys(DType dtype) {
  return {configuration<Config>(dtype, 0), run_keys<Config>};
}
template <typename Config>
constexpr Instance<Run> queries(DType dtype) {
  return {configuration<Config>(dtype, Config::kTileM), run_queries<Config>};
}
template <typename Config>
constexpr Instance<Run> product(DType dtype) {
  return {configuration<Config>(dtype, Config::kTileM), run_product<Config>};
}

template <typename Element>
struct Configs {
  using Keys64 = DenseKeyGradConfig<Element, 64, 64, 2, 1, 3>;
  using Keys128 = DenseKeyGradConfig<Element, 128, 64, 2, 1, 2>;
  using FewerRows128 = DenseKeyGradConfig<Element, 128, 32, 2, 1, 2>;
  using Keys256 = DenseKeyGradConfig<Element, 256, 32, 1, 2, 1>;
  using Queries64 = DenseQueryGradConfig<Element, 64, 4, 2, 3>;
  using Queries128 = DenseQueryGradConfig<Element, 128, 4, 2, 2>;
  using OneStage128 = DenseQueryGradConfig<Element, 128, 4, 1, 2>;
  using Queries256 = DenseQueryGradConfig<Element, 256, 4, 1, 1>;
  using FewerRows256 = DenseQueryGradConfig<Element, 256, 2, 1, 1>;
  using Product64 = DenseQueryProductConfig<Element, 64, 4, 4>;
  using Product128 = DenseQueryProductConfig<Element, 128, 4, 4>;
  using Product256 = DenseQueryProductConfig<Element, 256, 4, 2>;
};
using B = Configs<BFloat16>;
using H = Configs<Float16>;

constexpr Instance<Run> kKeyInstances[] = {
    keys<B::Keys64>(DType::kBFloat16),  keys<H::Keys64>(DType::kFloat16),
    keys<B::Keys128>(DType::kBFloat16), keys<B::FewerRows128>(DType::kBFloat16),
    keys<H::Keys128>(DType::kFloat16),  keys<H::FewerRows128>(DType::kFloat16),
    keys<B::Keys256>(DType::kBFloat16), keys<H::Keys256>(DType::kFloat16),
};
constexpr Instance<Run> kQueryInstances[] = {
    queries<B::Queries64>(DType::kBFloat16),  queries<H::Queries64>(DType::kFloat16),
    queries<B::Queries128>(DType::kBFloat16), queries<B::OneStage128>(DType::kBFloat16),
    queries<H::Queries128>(DType::kFloat16),  queries<H::OneStage128>(DType::kFloat16),
    queries<B::Queries256>(DType::kBFloat16), queries<B::FewerRows256>(DType::kBFloat16),
    queries<H::Queries256>(DType::kFloat16),  queries<H::FewerRows256>(DType::kFloat16),
};
constexpr Instance<Run> kProductInstances[] = {
    product<B::Product64>(DType::kBFloat16),  product<H::Product64>(DType::kFloat16),
    product<B::Product128>(DType::kBFloat16), product<H::Product128>(DType::kFloat16),
    product<B::Product256>(DType::kBFloat16), product<H::Product256>(DType::kFloat16),
};
constexpr std::span<const Instance<Run>> kKeyTable = kKeyInstances;
constexpr std::span<const Instance<Run>> kQueryTable = kQueryInstances;
constexpr std::span<const Instance<Run>> kProductTable = kProductInstances;

struct Call {
  DenseInputs inputs;
  Choice<Instance<Run>> keys, queries;
  RowStats* stats = nullptr;
  DenseParams dense;
};

// Whether each element of the bias belongs to one pair alone.
bool is_own(const TensorView& bias, const Geometry& geometry) {
  return bias.rank == 4 && bias.shape[0] == geometry.num_sequences && bias.shape[1] == geometry.heads_q &&
         bias.shape[2] == geometry.seqlen_q;
}

// Whether the bias's gradient is dS in the type of the products, where dQ's kernel can read it.
bool has_ds(const BackwardArgs& args, const Geometry& geometry) {
  return args.dbias.present() && is_own(args.bias, geometry) && args.dbias.dtype == args.query.dtype &&
         pair_tensor(args.dbias, geometry).vectors;
}

Call cut(Arena& arena, const BackwardArgs& args, int device) {
  Call call;
  call.inputs = dense_inputs(args);
  const Geometry& geometry = call.inputs.geometry;
  const int bias_bytes = copied_bytes(call.inputs.bias);
  call.keys = choose(kKeyTable, args.query, device, bias_bytes);
  call.queries = has_ds(args, geometry) ? choose(kProductTable, args.query, device)
                                        : choose(kQueryTable, args.query, device, bias_bytes);
  call.stats = arena.take<RowStats>(geometry.total_q() * geometry.heads_q);
  call.dense = {.lists = cut_dense_lists(arena, call.inputs, call.queries.instance->tile_m, true),
                .bias = call.inputs.bias,
                .dbias = pair_tensor(args.dbias, geometry),
                .staged = false};
  return call;
}

template <typename Element>
cudaError_t row_stats(const BackwardArgs& args, RowStats* stats, cudaStream_t stream) {
  const BackwardParams<Element> params = make_params<Element>(args, {}, stats);
  const std::int64_t rows = params.geometry.total_q() * params.geometry.heads_q;
  return launch(
      row_stats_kernel<Element>,
      {static_cast<unsigned>(ceil_div(rows, kStatsThreads / kLanesPerRow)), kStatsThreads, 0, stream},
      params);
}

}  // namespace

std::string dense_backward_why_not(const BackwardArgs& args, int device) {
  std::string reason = why_not(kKeyTable, args.query, device);
  if (reason.empty()) reason = why_not(kQueryTable, args.query, device);
  if (reason.empty()) reason = why_not(kProductTable, args.query, device);
  return reason.empty() ? shared_bias_grad_why_not(args, device) : reason;
}

std::vector<NamedTable> dense_backward_tables() {
  return {named("dense dK, dV", kKeyTable), named("dense dQ", kQueryTable),
          named("dense dQ from dS", kProductTable)};
}

std::size_t dense_backward_bytes(const BackwardArgs& args, int device) {
  Arena arena;
  cut(arena, args, device);
  return arena.bytes();
}

cudaError_t dense_backward(const BackwardArgs& args, const Workspace& workspace, int device,
                           cudaStream_t stream) {
  Arena arena(workspace);
  Call call = cut(arena, args, device);
  DenseParams& dense = call.dense;
  cudaError_t status = build_dense_lists(call.inputs, call.queries.instance->tile_m, dense.lists, stream);
  if (status != cudaSuccess) return status;
  status = args.query.dtype == DType::kBFloat16 ? row_stats<BFloat16>(args, call.stats, stream)
                                                : row_stats<Float16>(args, call.stats, stream);
  const bool own_bias = is_own(args.bias, call.inputs.geometry);
  if (status == cudaSuccess && args.dbias.present() && args.dbias.num_elements() > 0) {
    status = own_bias ? zero_bias_grad(call.inputs, dense.lists, dense.dbias, stream)
                      : shared_bias_grad(args, dense, call.stats, device, stream);
  }
  if (!own_bias) dense.dbias = {};
  if (status == cudaSuccess && (args.dk.present() || args.dv.present() || dense.dbias.present())) {
    dense.staged = call.keys.staged;
    status = sm90::takes_dense_key_grad(args, device)
                 ? sm90::dense_key_grad(args, dense, call.stats, device, stream)
                 : call.keys.instance->run(args, dense, call.stats, stream);
  }
  if (status == cudaSuccess && args.dq.present()) {
    dense.staged = call.queries.staged;
    status = call.queries.instance->run(args, dense, call.stats, stream);
  }
  return status;
}

}  // namespace flash_dmattn::cuda::sm80
