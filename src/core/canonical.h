// Strides that address nothing, of axes of size 1 and of tensors without elements, may be any number. Kernels
// multiply by them all the same, so they get numbers with which nothing overflows.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "flash_dmattn/attention.h"

namespace flash_dmattn {
namespace detail {

inline void canonicalize(TensorView& tensor) {
  if (tensor.rank < 1 || tensor.rank > kMaxRank) return;
  const auto* sizes = tensor.shape.data();
  const bool empty = std::find(sizes, sizes + tensor.rank, 0) != sizes + tensor.rank;
  for (int axis = 0; axis < tensor.rank; ++axis) {
    if (empty || sizes[axis] == 1) tensor.stride[axis] = axis == tensor.rank - 1 ? 1 : 0;
  }
}

inline void canonicalize(std::initializer_list<TensorView*> tensors) {
  for (TensorView* tensor : tensors) canonicalize(*tensor);
}

inline void canonicalize_all(SelectArgs& args) {
  canonicalize({&args.score, &args.cu_seqlens, &args.expiry});
}
inline void canonicalize_all(PlanArgs& args) {
  canonicalize({&args.expiry, &args.score, &args.bias, &args.mask, &args.cu_seqlens_q, &args.cu_seqlens_k,
                &args.plan});
}
inline void canonicalize_all(ForwardArgs& args) {
  canonicalize({&args.query, &args.key, &args.value, &args.bias, &args.mask, &args.expiry, &args.score,
                &args.plan, &args.cu_seqlens_q, &args.cu_seqlens_k, &args.out, &args.lse});
}
inline void canonicalize_all(BackwardArgs& args) {
  canonicalize({&args.query, &args.key, &args.value, &args.bias, &args.mask, &args.expiry, &args.score,
                &args.plan, &args.cu_seqlens_q, &args.cu_seqlens_k, &args.out, &args.lse, &args.dout,
                &args.dlse, &args.dq, &args.dk, &args.dv, &args.dbias});
}

}  // namespace detail

template <typename Args>
Args canonical(Args args) {
  detail::canonicalize_all(args);
  return args;
}

}  // namespace flash_dmattn
