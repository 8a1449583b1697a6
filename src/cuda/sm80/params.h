// What the sm80 kernels take.
#pragma once

#include "cuda/common/geometry.cuh"
#include "cuda/common/plan.cuh"
#include "cuda/common/row_tiles.cuh"

namespace flash_dmattn::cuda::sm80 {

// Of one query row and head: what the backward needs to know of the forward.
struct __align__(8) RowStats {
  float lse_log2;  // lse * log2(e); +inf for a row that saw no key, so that each probability comes out as 0
  float delta;     // rowsum(dout * out) - dlse
};

template <typename Element>
struct ForwardParams {
  Geometry geometry;
  PlanView plan;
  RowTiles tiles;
  RowsTensor<const Element> query, key, value;
  RowsTensor<Element> out;
  VectorTensor<float> lse;  // optional
  int head_dim;
  float scale_log2;  // scale * log2(e)
  bool causal;
};

template <typename Element>
struct BackwardParams {
  Geometry geometry;
  PlanView plan;
  RowTiles tiles;  // of dQ
  RowsTensor<const Element> query, key, value, out, dout;
  VectorTensor<const float> lse, dlse;  // dlse optional
  RowsTensor<Element> dq, dk, dv;       // optional
  VectorTensor<float> dbias;            // optional
  RowStats* stats;                      // [heads_q][total_q]
  // Keys that live in several segments have a float32 row per segment, added up afterwards: [rows][2 *
  // kHeadDim + 1], dK (without the scale), dV and dbias. partial_rows [heads][total_k] is the number of a
  // key's first one.
  float* partials;
  const int* partial_rows;
  int max_partial_rows;
  int first_head;  // kv heads first_head .. first_head + num_heads - 1 are worked on
  int num_heads;
  int head_dim;
  float scale;
  float scale_log2;
  bool causal;
};

}  // namespace flash_dmattn::cuda::sm80
