// From the arguments of the backward to what its kernels take.
#pragma once

#include "cuda/common/arguments.h"
#include "cuda/common/log2.h"
#include "cuda/sm80/params.h"
#include "flash_dmattn/attention.h"

namespace flash_dmattn::cuda::sm80 {

template <typename Element>
BackwardParams<Element> make_params(const BackwardArgs& args, const PlanView& plan, RowStats* stats) {
  const Geometry geometry = make_geometry(args);
  return {
      .geometry = geometry,
      .plan = plan,
      .tiles = {},
      .query = rows_tensor<const Element>(args.query),
      .key = rows_tensor<const Element>(args.key),
      .value = rows_tensor<const Element>(args.value),
      .out = rows_tensor<const Element>(args.out),
      .dout = rows_tensor<const Element>(args.dout),
      .lse = query_tensor<const float>(args.lse),
      .dlse = query_tensor<const float>(args.dlse),
      .dq = rows_tensor<Element>(args.dq),
      .dk = rows_tensor<Element>(args.dk),
      .dv = rows_tensor<Element>(args.dv),
      .dbias = {},
      .stats = stats,
      .partials = nullptr,
      .partial_rows = nullptr,
      .max_partial_rows = 0,
      .first_head = 0,
      .num_heads = geometry.heads_kv,
      .head_dim = static_cast<int>(args.query.shape[args.query.rank - 1]),
      .scale = static_cast<float>(args.scale),
      .scale_log2 = static_cast<float>(args.scale * kLog2E),
      .causal = args.causal,
  };
}

}  // namespace flash_dmattn::cuda::sm80
