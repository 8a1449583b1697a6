#include <type_traits>

#include "cuda/common/arguments.h"
#include "cuda/common/launch.h"
#include "cuda/sm80/dense.h"
#include "cuda/sm80/dense_lists_kernels.cuh"

namespace flash_dmattn::cuda::sm80 {
namespace {

PairType pair_type(DType dtype) {
  switch (dtype) {
    case DType::kBool:
      return PairType::kBool;
    case DType::kBFloat16:
      return PairType::kBFloat16;
    case DType::kFloat16:
      return PairType::kFloat16;
    default:
      return PairType::kFloat32;
  }
}

bool differs_by_batch(const PairTensor& tensor) { return tensor.present() && tensor.batch_stride != 0; }
bool differs_by_head(const PairTensor& tensor) { return tensor.present() && tensor.kv_stride != 0; }
bool differs_in_group(const PairTensor& tensor) { return tensor.present() && tensor.group_stride != 0; }

void cut_key_lists(Arena& arena, KeyLists& lists, std::size_t count, const DenseLists& dense) {
  lists.counts = arena.take<int2>(count);
  lists.blocks = arena.take<int>(count * dense.num_blocks);
  lists.keys = arena.take<int>(count * dense.num_gathered * kBlock);
  lists.seen = arena.take<std::uint64_t>(count * dense.num_blocks);
  lists.gathered = arena.take<std::uint64_t>(count * dense.num_gathered * lists.rows);
}

std::size_t num_tile_lists(const DenseLists& lists, const RowTiles& tiling) {
  return static_cast<std::size_t>(lists.num_units) * tiling.head_chunks * tiling.per_sequence;
}

}  // namespace

PairTensor pair_tensor(const TensorView& view, const Geometry& geometry) {
  if (!view.present()) return {};
  PairTensor tensor;
  tensor.data = static_cast<unsigned char*>(view.data);
  tensor.type = pair_type(view.dtype);
  const auto stride = [&](int axis) { return view.shape[axis] == 1 ? 0 : view.stride[axis]; };
  tensor.batch_stride = stride(0);
  if (view.rank == 3) {
    tensor.kv_stride = stride(1);
    tensor.key_stride = view.stride[2];
  } else {
    if (view.shape[1] == geometry.heads_kv) {
      tensor.kv_stride = stride(1);
    } else {
      tensor.kv_stride = geometry.group() * stride(1);
      tensor.group_stride = stride(1);
    }
    tensor.row_stride = stride(2);
    tensor.key_stride = view.stride[3];
  }
  const int bytes = tensor.element_bytes();
  tensor.vectors = tensor.key_stride == 1 && reinterpret_cast<std::uintptr_t>(tensor.data) % 16 == 0;
  for (const std::int64_t step :
       {tensor.batch_stride, tensor.kv_stride, tensor.group_stride, tensor.row_stride}) {
    tensor.vectors = tensor.vectors && step * bytes % 16 == 0;
  }
  return tensor;
}

template <typename Args>
DenseInputs dense_inputs(const Args& args) {
  const Geometry geometry = make_geometry(args);
  DenseInputs inputs = {.geometry = geometry,
                        .mask = pair_tensor(args.mask, geometry),
                        .bias = pair_tensor(args.bias, geometry),
                        .expiry = key_tensor<const int>(args.expiry),
                        .causal = args.causal};
  if constexpr (!std::is_same_v<Args, PlanArgs>) {
    if (args.plan.present()) {
      inputs.plan = {args.plan.data, static_cast<std::size_t>(args.plan.num_elements()) * sizeof(int)};
    }
  }
  return inputs;
}
template DenseInputs dense_inputs(const PlanArgs&);
template DenseInputs dense_inputs(const ForwardArgs&);
template DenseInputs dense_inputs(const BackwardArgs&);

DenseLists cut_dense_bits(Arena& arena, const DenseInputs& inputs) {
  const Geometry& geometry = inputs.geometry;
  const VectorTensor<const int>& expiry = inputs.expiry;
  DenseLists lists;
  lists.per_batch = differs_by_batch(inputs.mask) || differs_by_batch(inputs.bias) ||
                    (expiry.present() && expiry.batch_stride != 0);
  lists.per_head = differs_by_head(inputs.mask) || differs_by_head(inputs.bias) ||
                   (expiry.present() && expiry.head_stride != 0);
  lists.unit_heads = lists.per_head ? geometry.heads_kv : 1;
  lists.num_units = lists.unit_heads * (lists.per_batch ? geometry.num_sequences : 1);
  lists.bit_heads = differs_in_group(inputs.mask) || differs_in_group(inputs.bias) ? geometry.group() : 1;
  lists.num_blocks = static_cast<int>(ceil_div(geometry.seqlen_k, kBlock));
  lists.num_gathered = lists.num_blocks / 2 + 1;
  lists.seqlen_q = geometry.seqlen_q;
  const std::size_t units = static_cast<std::size_t>(lists.num_units);
  lists.bits = arena.take<std::uint64_t>(units * lists.all_rows() * lists.num_blocks);
  return lists;
}

cudaError_t build_dense_bits(const DenseInputs& inputs, const DenseLists& bits, cudaStream_t stream) {
  const Geometry& geometry = inputs.geometry;
  const ListParams params = {.geometry = geometry,
                             .tiling = {},
                             .lists = bits,
                             .mask = inputs.mask,
                             .bias = inputs.bias,
                             .expiry = inputs.expiry,
                             .causal = inputs.causal};
  const std::int64_t ctas = static_cast<std::int64_t>(bits.num_units) * bits.bit_heads *
                            ceil_div(geometry.seqlen_q, kFoldRows) * ceil_div(geometry.seqlen_k, kFoldKeys);
  return launch(fold_kernel, {static_cast<unsigned>(ctas), kListThreads, 0, stream}, params);
}

DenseLists cut_dense_lists(Arena& arena, const DenseInputs& inputs, int tile_m, bool all_keys) {
  const Geometry& geometry = inputs.geometry;
  Arena plan(inputs.plan);
  DenseLists lists = cut_dense_bits(inputs.plan.data == nullptr ? arena : plan, inputs);
  const std::size_t units = static_cast<std::size_t>(lists.num_units);
  lists.tiles.rows = tile_m;
  const RowTiles tiling = RowTiles::make(geometry, inputs.causal, tile_m);
  cut_key_lists(arena, lists.tiles, num_tile_lists(lists, tiling), lists);
  if (!all_keys) return lists;
  lists.all.rows = static_cast<int>(lists.all_rows());
  cut_key_lists(arena, lists.all, units, lists);
  lists.row_counts = arena.take<int>(units * lists.num_blocks);
  lists.rows = arena.take<int>(units * lists.num_blocks * lists.all_rows());
  return lists;
}

cudaError_t build_dense_lists(const DenseInputs& inputs, int tile_m, const DenseLists& lists,
                              cudaStream_t stream) {
  const Geometry& geometry = inputs.geometry;
  const ListParams params = {.geometry = geometry,
                             .tiling = RowTiles::make(geometry, inputs.causal, tile_m),
                             .lists = lists,
                             .mask = {},
                             .bias = {},
                             .expiry = {},
                             .causal = inputs.causal};
  const auto start = [&](void (*kernel)(ListParams), std::int64_t ctas) {
    return launch(kernel, {static_cast<unsigned>(ctas), kListThreads, 0, stream}, params);
  };
  cudaError_t status = inputs.plan.data == nullptr ? build_dense_bits(inputs, lists, stream) : cudaSuccess;
  const std::int64_t blocks = static_cast<std::int64_t>(lists.num_units) * lists.num_blocks;
  const bool all_keys = lists.rows != nullptr;
  if (status == cudaSuccess && all_keys) {
    status =
        cudaMemsetAsync(lists.all.seen, 0, static_cast<std::size_t>(blocks) * sizeof(std::uint64_t), stream);
  }
  if (status == cudaSuccess) {
    status = start(tile_lists_kernel, static_cast<std::int64_t>(num_tile_lists(lists, params.tiling)));
  }
  if (status != cudaSuccess || !all_keys) return status;
  status = start(all_keys_kernel, lists.num_units);
  return status == cudaSuccess ? start(row_lists_kernel, blocks) : status;
}

cudaError_t zero_bias_grad(const DenseInputs& inputs, const DenseLists& lists, const PairTensor& dbias,
                           cudaStream_t stream) {
  const ListParams params = {.geometry = inputs.geometry,
                             .tiling = {},
                             .lists = lists,
                             .mask = {},
                             .bias = {},
                             .expiry = {},
                             .causal = inputs.causal};
  const std::int64_t ctas =
      static_cast<std::int64_t>(inputs.geometry.num_sequences) * inputs.geometry.heads_kv * lists.num_blocks;
  return launch(zero_bias_grad_kernel, {static_cast<unsigned>(ctas), kListThreads, 0, stream}, params, dbias);
}

}  // namespace flash_dmattn::cuda::sm80
