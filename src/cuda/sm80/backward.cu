// The backward: row statistics; then, some kv heads at a time, dK, dV and dbias with the sum of their partial
// rows; then dQ. What no gradient that was asked for needs is left out.
#include <cub/device/device_scan.cuh>

#include <algorithm>

#include "cuda/common/arguments.h"
#include "cuda/common/launch.h"
#include "cuda/sm80/backward_dkv_kernel.cuh"
#include "cuda/sm80/backward_dq_kernel.cuh"
#include "cuda/sm80/backward_params.h"
#include "cuda/sm80/instances.h"
#include "cuda/sm80/kernels.h"
#include "cuda/sm80/partials.cuh"
#include "cuda/sm80/row_stats.cuh"

namespace flash_dmattn::cuda::sm80 {
namespace {

// Partial rows of as many kv heads at a time as fit, at least of one.
constexpr std::int64_t kPartialBytes = std::int64_t{512} << 20;

using Run = cudaError_t (*)(const BackwardArgs&, const PlanView&, const BackwardBuffers&, cudaStream_t);

bool needs_keys(const BackwardArgs& args) {
  return args.dk.present() || args.dv.present() || args.dbias.present();
}

// The most rows of partial sums that one kv head can need: a key has one per segment that it is in, if it is
// in several. Of w keys alive at a time, at most w live on in the next segment, and each of these has a row
// on both sides.
std::int64_t partial_rows_per_head(const BackwardArgs& args, const Geometry& geometry, const PlanView& plan) {
  if (!args.causal || !plan.layout.num_entries || plan.layout.segment_length >= geometry.seqlen_k) return 0;
  const std::int64_t most = plan.layout.num_entries;
  if (args.keep_window <= 0 || args.keep_window > most) return most;
  return std::min(most, 2 * args.keep_window * plan.layout.num_segments);
}

// dK, dV and dbias of kv heads params.first_head .. params.first_head + params.num_heads - 1.
template <typename Config>
cudaError_t run_keys(const BackwardParams<typename Config::Element>& params, const KeyInputs& inputs,
                     const BackwardBuffers& buffers, cudaStream_t stream) {
  using Element = typename Config::Element;
  const std::int64_t total_k = params.geometry.total_k();
  const std::int64_t keys = params.num_heads * total_k;
  cudaError_t status = cudaSuccess;
  if (buffers.max_partial_rows > 0) {
    status = launch(count_partials_kernel<BackwardParams<Element>>,
                    {static_cast<unsigned>(ceil_div(keys, kReduceThreads)), kReduceThreads, 0, stream},
                    params, inputs, buffers.partial_rows);
    if (status != cudaSuccess) return status;
    std::size_t scan_bytes = buffers.scan_bytes;
    status = cub::DeviceScan::ExclusiveSum(buffers.scan, scan_bytes, buffers.partial_rows,
                                           buffers.partial_rows, static_cast<int>(keys), stream);
    if (status != cudaSuccess) return status;
  }
  const std::int64_t blocks_per_head = KeyBlocks::per_head(params.geometry, params.plan);
  status = launch(key_grad_kernel<Config>,
                  {static_cast<unsigned>(params.num_heads * blocks_per_head), Config::kThreads,
                   sizeof(typename Config::SharedMemory), stream},
                  params, blocks_per_head);
  if (status != cudaSuccess || !params.plan.present()) return status;
  return launch(reduce_partials_kernel<Element, Config::kHeadDim>,
                {static_cast<unsigned>(ceil_div(keys, kReduceThreads / 32)), kReduceThreads, 0, stream},
                params, inputs);
}

template <typename KeyConfig, typename QueryConfig>
cudaError_t run(const BackwardArgs& args, const PlanView& plan, const BackwardBuffers& buffers,
                cudaStream_t stream) {
  using Element = typename KeyConfig::Element;
  BackwardParams<Element> params = make_params<Element>(args, plan, buffers.stats);
  params.dbias = key_tensor<float>(args.dbias);
  params.partials = buffers.partials;
  params.partial_rows = buffers.partial_rows;
  params.max_partial_rows = buffers.max_partial_rows;
  const Geometry& geometry = params.geometry;
  const std::int64_t rows = geometry.total_q() * geometry.heads_q;
  cudaError_t status =
      launch(row_stats_kernel<Element>,
             {static_cast<unsigned>(ceil_div(rows, kStatsThreads / kLanesPerRow)), kStatsThreads, 0, stream},
             params);
  if (needs_keys(args)) {
    const KeyInputs inputs = {key_tensor<const int>(args.expiry), key_tensor<const float>(args.bias)};
    for (int head = 0; head < geometry.heads_kv && status == cudaSuccess; head += buffers.heads_per_wave) {
      params.first_head = head;
      params.num_heads = std::min(buffers.heads_per_wave, geometry.heads_kv - head);
      status = run_keys<KeyConfig>(params, inputs, buffers, stream);
    }
  }
  if (status != cudaSuccess || !args.dq.present()) return status;
  params.tiles = RowTiles::make(geometry, args.causal, QueryConfig::kTileM);
  return launch(query_grad_kernel<QueryConfig>,
                {static_cast<unsigned>(params.tiles.grid(geometry)), QueryConfig::kThreads,
                 sizeof(typename QueryConfig::SharedMemory), stream},
                params);
}

template <typename KeyConfig, typename QueryConfig>
constexpr Instance<Run> instance(DType dtype) {
  static_assert(KeyConfig::kHeadDim == QueryConfig::kHeadDim);
  return {{dtype, KeyConfig::kHeadDim, 0, std::max(KeyConfig::kThreads, QueryConfig::kThreads),
           std::max(KeyConfig::kCtasPerSm, QueryConfig::kCtasPerSm),
           [](int) { return std::max(shared_bytes<KeyConfig>(0), shared_bytes<QueryConfig>(0)); }},
          run<KeyConfig, QueryConfig>};
}

template <typename Element>
using KeyConfig64 = KeyGradConfig<Element, 64, 64, 2, 1, 3>;
template <typename Element>
using KeyConfig128 = KeyGradConfig<Element, 128, 64, 2, 1, 2>;
template <typename Element>
using KeyConfig256 = KeyGradConfig<Element, 256, 32, 1, 2, 1>;
template <typename Element>
using QueryConfig64 = QueryGradConfig<Element, 64, 64, 2, 4>;
template <typename Element>
using QueryConfig128 = QueryGradConfig<Element, 128, 64, 2, 2>;
template <typename Element>
using QueryConfig256 = QueryGradConfig<Element, 256, 32, 1, 2>;

constexpr Instance<Run> kInstances[] = {
    instance<KeyConfig64<BFloat16>, QueryConfig64<BFloat16>>(DType::kBFloat16),
    instance<KeyConfig64<Float16>, QueryConfig64<Float16>>(DType::kFloat16),
    instance<KeyConfig128<BFloat16>, QueryConfig128<BFloat16>>(DType::kBFloat16),
    instance<KeyConfig128<Float16>, QueryConfig128<Float16>>(DType::kFloat16),
    instance<KeyConfig256<BFloat16>, QueryConfig256<BFloat16>>(DType::kBFloat16),
    instance<KeyConfig256<Float16>, QueryConfig256<Float16>>(DType::kFloat16),
};
constexpr std::span<const Instance<Run>> kTable = kInstances;

}  // namespace

std::string backward_why_not(const BackwardArgs& args, int device) {
  return why_not(kTable, args.query, device);
}

std::vector<NamedTable> backward_tables() { return {named("backward", kTable)}; }

BackwardBuffers cut_backward(Arena& arena, const BackwardArgs& args, const PlanView& plan, int device) {
  const Geometry geometry = make_geometry(args);
  const Instance<Run>& instance = *choose(kTable, args.query, device).instance;
  BackwardBuffers buffers;
  buffers.stats = arena.take<RowStats>(geometry.total_q() * geometry.heads_q);
  buffers.heads_per_wave = std::max(geometry.heads_kv, 1);
  const std::int64_t rows_per_head = needs_keys(args) ? partial_rows_per_head(args, geometry, plan) : 0;
  if (rows_per_head == 0) return buffers;
  const std::int64_t row_bytes = partial_stride(instance.head_dim) * sizeof(float);
  buffers.heads_per_wave = static_cast<int>(
      std::clamp<std::int64_t>(kPartialBytes / (rows_per_head * row_bytes), 1, buffers.heads_per_wave));
  buffers.max_partial_rows = static_cast<int>(buffers.heads_per_wave * rows_per_head);
  const std::int64_t keys = buffers.heads_per_wave * geometry.total_k();
  buffers.partial_rows = arena.take<int>(keys);
  buffers.partials =
      arena.take<float>(buffers.max_partial_rows * std::int64_t{partial_stride(instance.head_dim)});
  cub::DeviceScan::ExclusiveSum(nullptr, buffers.scan_bytes, buffers.partial_rows, buffers.partial_rows,
                                static_cast<int>(keys));
  buffers.scan = arena.take<unsigned char>(buffers.scan_bytes);
  return buffers;
}

cudaError_t backward(const BackwardArgs& args, const PlanView& plan, const BackwardBuffers& buffers,
                     int device, cudaStream_t stream) {
  return choose(kTable, args.query, device).instance->run(args, plan, buffers, stream);
}

}  // namespace flash_dmattn::cuda::sm80
