// What the sm90 forward takes.
#pragma once

#include "cuda/common/geometry.cuh"
#include "cuda/common/plan.cuh"
#include "cuda/common/row_tiles.cuh"
#include "cuda/sm90/packed_keys.cuh"

namespace flash_dmattn::cuda::sm90 {

template <typename Element>
struct ForwardParams {
  Geometry geometry;
  PlanView plan;
  RowTiles tiles;
  PackedKeys packed;  // if fed with them
  RowsTensor<const Element> query, key, value;
  RowsTensor<Element> out;
  VectorTensor<float> lse;  // optional
  int first_head;           // kv heads first_head .. first_head + num_heads - 1
  int num_heads;
  int head_dim;
  float scale_log2;  // scale * log2(e), positive
  float bias_scale;  // 1 / scale_log2: biases of the plan times this are what S starts from
  bool causal;
};

}  // namespace flash_dmattn::cuda::sm90
