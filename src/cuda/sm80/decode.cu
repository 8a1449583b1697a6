#include "cuda/sm80/decode.h"

#include <algorithm>

#include "cuda/common/arguments.h"
#include "cuda/common/launch.h"
#include "cuda/common/log2.h"
#include "cuda/sm80/decode_kernel.cuh"
#include "cuda/sm80/instances.h"

namespace flash_dmattn::cuda::sm80 {
namespace {

using Run = cudaError_t (*)(const ForwardArgs&, const DecodeBuffers&, cudaStream_t);

// A window's keys make short splits, enough for every multiprocessor. A whole cache makes longer ones, which
// spare sums to combine. How many keys a caller's own expiry leaves is known on the device alone.
constexpr int kWindowSplit = kDecodeLeastSplit;
constexpr int kCacheSplit = 1024;

bool is_listed(const ForwardArgs& args) { return args.expiry.present() || args.bias.present(); }

DecodeSizes decode_sizes(const ForwardArgs& args, const Geometry& geometry) {
  const std::int64_t seqlen_k = geometry.seqlen_k;
  const bool windowed = args.keep_window > 0 && args.keep_window < seqlen_k;
  DecodeSizes sizes;
  if (is_listed(args)) sizes.lists = static_cast<int>(ceil_div(seqlen_k, kDecodeListTile));
  // Every row may bring one key more into sight.
  const std::int64_t most =
      windowed ? std::min<std::int64_t>(args.keep_window + kDecodeMaxRows, seqlen_k) : seqlen_k;
  const std::int64_t least_split = ceil_div(ceil_div(most, kDecodeMaxSplits), kWindowSplit) * kWindowSplit;
  sizes.split_keys =
      static_cast<int>(std::max<std::int64_t>(windowed ? kWindowSplit : kCacheSplit, least_split));
  sizes.splits = static_cast<int>(std::max<std::int64_t>(ceil_div(most, sizes.split_keys), 1));
  if (args.expiry.present() && !windowed) {
    sizes.split_keys = 0;
    // CTAs that find nothing to do take time as well.
    sizes.splits =
        static_cast<int>(std::min<std::int64_t>(ceil_div(seqlen_k, kDecodeLeastSplit), kDecodeUnknownSplits));
  }
  sizes.tiles_m = static_cast<int>(ceil_div(geometry.seqlen_q * geometry.group(), kDecodeTileM));
  return sizes;
}

template <typename Config>
cudaError_t run(const ForwardArgs& args, const DecodeBuffers& buffers, cudaStream_t stream) {
  using Element = typename Config::Element;
  const Geometry geometry = make_geometry(args);
  const DecodeParams<Element> params = {
      .geometry = geometry,
      .buffers = buffers,
      .query = rows_tensor<const Element>(args.query),
      .key = rows_tensor<const Element>(args.key),
      .value = rows_tensor<const Element>(args.value),
      .out = rows_tensor<Element>(args.out),
      .lse = query_tensor<float>(args.lse),
      .bias = key_tensor<const float>(args.bias),
      .expiry = key_tensor<const int>(args.expiry),
      .head_dim = static_cast<int>(args.query.shape[3]),
      .scale_log2 = static_cast<float>(args.scale * kLog2E),
      .causal = args.causal,
  };
  const DecodeSizes& sizes = buffers.sizes;
  const std::int64_t lines = static_cast<std::int64_t>(geometry.num_sequences) * geometry.heads_kv;
  cudaError_t status;
  if (sizes.lists > 0) {
    status = launch(list_keys<Element>, {static_cast<unsigned>(lines * sizes.lists), kListThreads, 0, stream},
                    params);
  } else {
    status = cudaMemsetAsync(buffers.finished, 0, lines * sizes.tiles_m * sizeof(unsigned), stream);
  }
  if (status != cudaSuccess) return status;
  return launch(decode_kernel<Config>,
                {static_cast<unsigned>(lines * sizes.tiles_m * sizes.splits), Config::kThreads,
                 sizeof(typename Config::SharedMemory), stream, sizes.lists > 0},
                params);
}

template <typename Config>
constexpr Instance<Run> instance(DType dtype) {
  return {configuration<Config>(dtype, kDecodeTileM), run<Config>};
}

template <typename Element>
using Config64 = DecodeConfig<Element, 64, 128, 2>;
template <typename Element>
using Config128 = DecodeConfig<Element, 128, 128, 2>;
template <typename Element>
using Config256 = DecodeConfig<Element, 256, 64, 2>;

constexpr Instance<Run> kInstances[] = {
    instance<Config64<BFloat16>>(DType::kBFloat16),  instance<Config64<Float16>>(DType::kFloat16),
    instance<Config128<BFloat16>>(DType::kBFloat16), instance<Config128<Float16>>(DType::kFloat16),
    instance<Config256<BFloat16>>(DType::kBFloat16), instance<Config256<Float16>>(DType::kFloat16),
};
constexpr std::span<const Instance<Run>> kTable = kInstances;

}  // namespace

std::string decode_why_not(const ForwardArgs& args, int device) {
  if (args.cu_seqlens_k.present()) return "takes no packed sequences";
  if (args.plan.present()) return "takes no plan";
  if (args.mask.present() || args.bias.rank == 4) return "takes no mask or bias with a query axis";
  const Geometry geometry = make_geometry(args);
  const auto count = [](const char* what, std::int64_t limit, std::int64_t got) {
    return std::string("takes ") + what + " " + std::to_string(limit) + ", got " + std::to_string(got);
  };
  if (geometry.seqlen_q > kDecodeMaxRows)
    return count("rows of a sequence up to", kDecodeMaxRows, geometry.seqlen_q);
  if (geometry.seqlen_k < kDecodeMinKeys) return count("keys from", kDecodeMinKeys, geometry.seqlen_k);
  constexpr std::int64_t kMostKeys = std::int64_t{kDecodeMaxLists} * kDecodeListTile;
  if (geometry.seqlen_k > kMostKeys) return count("keys up to", kMostKeys, geometry.seqlen_k);
  return why_not(kTable, args.query, device);
}

std::vector<NamedTable> decode_tables() { return {named("decode", kTable)}; }

DecodeBuffers cut_decode(Arena& arena, const ForwardArgs& args, int device) {
  const Geometry geometry = make_geometry(args);
  const auto lines = static_cast<std::size_t>(geometry.num_sequences) * geometry.heads_kv;
  DecodeBuffers buffers;
  buffers.sizes = decode_sizes(args, geometry);
  const DecodeSizes& sizes = buffers.sizes;
  if (sizes.lists > 0) {
    buffers.entries = arena.take<PlanEntry>(lines * geometry.seqlen_k);
    buffers.counts = arena.take<int>(lines * sizes.lists);
  }
  const std::size_t tiles = lines * sizes.tiles_m;
  const auto rows = tiles * sizes.splits * kDecodeTileM;
  buffers.finished = arena.take<unsigned>(tiles);
  buffers.partials = arena.take<float>(rows * choose(kTable, args.query, device).instance->head_dim);
  buffers.stats = arena.take<float2>(rows);
  return buffers;
}

cudaError_t decode(const ForwardArgs& args, const DecodeBuffers& buffers, int device, cudaStream_t stream) {
  return choose(kTable, args.query, device).instance->run(args, buffers, stream);
}

}  // namespace flash_dmattn::cuda::sm80
