// The geometry of one call, the same for batched and packed tensors: a call is a list of sequences, and each
// head of a sequence is a matrix of rows (query, key, value, out) or a vector (score, bias, expiry, lse).
// Backends see nothing else. Arguments are validated before a Layout is made of them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "flash_dmattn/attention.h"

namespace flash_dmattn {

// Element (row, column) of one head of one sequence. data is null where the tensor is absent.
template <typename T>
struct MatrixView {
  T* data = nullptr;
  std::int64_t row_stride = 0;     // in elements
  std::int64_t column_stride = 0;  // in elements

  bool present() const { return data != nullptr; }
  T* row(std::int64_t row) const { return data + row * row_stride; }
  T& at(std::int64_t row, std::int64_t column) const { return this->row(row)[column * column_stride]; }
};

template <typename T>
struct VectorView {
  T* data = nullptr;
  std::int64_t stride = 0;  // in elements

  bool present() const { return data != nullptr; }
  T& operator[](std::int64_t index) const { return data[index * stride]; }
};

// Whether a bias has a query axis: [B or 1, 1 or Hkv or H, Sq or 1, Sk].
inline bool is_dense(const TensorView& bias) { return bias.rank == 4; }

// Whether a row may see other keys than another for more reasons than its position. Args: PlanArgs,
// ForwardArgs or BackwardArgs.
template <typename Args>
bool has_dense(const Args& args) {
  return args.mask.present() || is_dense(args.bias);
}

// Query row i stands at position i + seqlen_k - seqlen_q; keys stand at their index.
struct Sequence {
  std::int64_t batch = 0;    // index on the batch axis; 0 if packed
  std::int64_t begin_q = 0;  // first row in the packed tensors; 0 if batched
  std::int64_t begin_k = 0;
  std::int64_t seqlen_q = 0;
  std::int64_t seqlen_k = 0;

  std::int64_t first_position() const { return seqlen_k - seqlen_q; }
};

// The sizes that the arguments of a call agree on, and its cut into sequences.
struct Layout {
  bool packed = false;
  std::int64_t num_sequences = 0;
  std::int64_t heads_q = 0;  // 0 in a selection, as head_dim and the query lengths are
  std::int64_t heads_kv = 0;
  std::int64_t head_dim = 0;
  std::int64_t max_seqlen_q = 0;
  std::int64_t max_seqlen_k = 0;
  std::int64_t total_q = 0;  // rows of all sequences together
  std::int64_t total_k = 0;

  std::int64_t group() const { return heads_kv == 0 ? 0 : heads_q / heads_kv; }

  Sequence sequence(std::int64_t index) const {
    if (!packed) return {.batch = index, .seqlen_q = max_seqlen_q, .seqlen_k = max_seqlen_k};
    Sequence sequence;
    if (cu_seqlens_q.present()) {
      sequence.begin_q = offset(cu_seqlens_q, index);
      sequence.seqlen_q = offset(cu_seqlens_q, index + 1) - sequence.begin_q;
    }
    sequence.begin_k = offset(cu_seqlens_k, index);
    sequence.seqlen_k = offset(cu_seqlens_k, index + 1) - sequence.begin_k;
    return sequence;
  }

  // Head `head` of query, out and their gradients: [B, S, H, D] or [total, H, D].
  template <typename T>
  MatrixView<T> q_rows(const TensorView& tensor, const Sequence& sequence, std::int64_t head) const {
    return rows<T>(tensor, sequence.batch, sequence.begin_q, head);
  }

  // Head `head` of key, value and their gradients.
  template <typename T>
  MatrixView<T> k_rows(const TensorView& tensor, const Sequence& sequence, std::int64_t head) const {
    return rows<T>(tensor, sequence.batch, sequence.begin_k, head);
  }

  // One number per key, [B, Hkv, Sk] or [total_k, Hkv]: score, bias, expiry, dbias.
  template <typename T>
  VectorView<T> per_key(const TensorView& tensor, const Sequence& sequence, std::int64_t head) const {
    if (!tensor.present()) return {};
    T* data = static_cast<T*>(tensor.data);
    const auto& stride = tensor.stride;
    if (!packed) return {data + sequence.batch * stride[0] + head * stride[1], stride[2]};
    return {data + sequence.begin_k * stride[0] + head * stride[1], stride[0]};
  }

  // One number per query row and query head, [B, H, Sq] or [H, total_q]: lse, dlse.
  template <typename T>
  VectorView<T> per_query(const TensorView& tensor, const Sequence& sequence, std::int64_t head) const {
    if (!tensor.present()) return {};
    T* data = static_cast<T*>(tensor.data);
    const auto& stride = tensor.stride;
    if (!packed) return {data + sequence.batch * stride[0] + head * stride[1], stride[2]};
    return {data + head * stride[0] + sequence.begin_q * stride[1], stride[1]};
  }

  // The mask or dense bias of query head `head`, [B or 1, 1 or Hkv or H, Sq or 1, Sk]: a row for each query
  // row, a column for each key.
  template <typename T>
  MatrixView<T> dense_rows(const TensorView& tensor, const Sequence& sequence, std::int64_t head) const {
    if (!tensor.present()) return {};
    const auto& shape = tensor.shape;
    const auto& stride = tensor.stride;
    const std::int64_t axis_head = shape[1] == 1 ? 0 : shape[1] == heads_q ? head : head / group();
    return {static_cast<T*>(tensor.data) + (shape[0] == 1 ? 0 : sequence.batch * stride[0]) +
                axis_head * stride[1],
            shape[2] == 1 ? 0 : stride[2], stride[3]};
  }

  // Whether the query heads of a group may differ in a mask or dense bias.
  bool tells_heads_apart(const TensorView& tensor) const {
    return tensor.present() && group() > 1 && tensor.shape[1] == heads_q;
  }

  TensorView cu_seqlens_q, cu_seqlens_k;  // present if packed; cu_seqlens_q absent in a selection

 private:
  static std::int64_t offset(const TensorView& cu_seqlens, std::int64_t index) {
    return static_cast<const std::int32_t*>(cu_seqlens.data)[index * cu_seqlens.stride[0]];
  }

  template <typename T>
  MatrixView<T> rows(const TensorView& tensor, std::int64_t batch, std::int64_t begin,
                     std::int64_t head) const {
    if (!tensor.present()) return {};
    T* data = static_cast<T*>(tensor.data);
    const auto& stride = tensor.stride;
    if (!packed) return {data + batch * stride[0] + head * stride[2], stride[1], stride[3]};
    return {data + begin * stride[0] + head * stride[1], stride[0], stride[2]};
  }
};

namespace detail {

inline void measure_sequences(Layout& layout) {
  layout.num_sequences = layout.cu_seqlens_k.shape[0] - 1;
  for (std::int64_t index = 0; index < layout.num_sequences; ++index) {
    const Sequence sequence = layout.sequence(index);
    layout.max_seqlen_q = std::max(layout.max_seqlen_q, sequence.seqlen_q);
    layout.max_seqlen_k = std::max(layout.max_seqlen_k, sequence.seqlen_k);
  }
}

}  // namespace detail

inline Layout make_layout(const SelectArgs& args) {
  Layout layout;
  layout.packed = args.cu_seqlens.present();
  layout.heads_kv = args.score.shape[1];
  if (layout.packed) {
    layout.cu_seqlens_k = args.cu_seqlens;
    layout.total_k = args.score.shape[0];
    detail::measure_sequences(layout);
  } else {
    layout.num_sequences = args.score.shape[0];
    layout.max_seqlen_k = args.score.shape[2];
    layout.total_k = layout.num_sequences * layout.max_seqlen_k;
  }
  return layout;
}

// Args: ForwardArgs or BackwardArgs.
template <typename Args>
Layout make_layout(const Args& args) {
  Layout layout;
  layout.packed = args.cu_seqlens_k.present();
  const int row_axis = layout.packed ? 0 : 1;
  layout.heads_q = args.query.shape[row_axis + 1];
  layout.heads_kv = args.key.shape[row_axis + 1];
  layout.head_dim = args.query.shape[row_axis + 2];
  if (layout.packed) {
    layout.cu_seqlens_q = args.cu_seqlens_q;
    layout.cu_seqlens_k = args.cu_seqlens_k;
    layout.total_q = args.query.shape[0];
    layout.total_k = args.key.shape[0];
    detail::measure_sequences(layout);
  } else {
    layout.num_sequences = args.query.shape[0];
    layout.max_seqlen_q = args.query.shape[1];
    layout.max_seqlen_k = args.key.shape[1];
    layout.total_q = layout.num_sequences * layout.max_seqlen_q;
    layout.total_k = layout.num_sequences * layout.max_seqlen_k;
  }
  return layout;
}

// The sizes of a plan's arguments where there is a mask or a dense bias, which may have 1 in place of any but
// Sk. H and Hkv are the numbers of heads that differ: what hides pairs depends on no others.
inline Layout dense_layout(const PlanArgs& args) {
  Layout layout;
  layout.num_sequences = 1;
  layout.max_seqlen_q = args.num_queries;
  for (const TensorView* tensor : {&args.expiry, &args.bias, &args.mask}) {
    if (!tensor->present()) continue;
    if (tensor->shape[0] != 1) layout.num_sequences = tensor->shape[0];
    layout.heads_q = std::max(layout.heads_q, tensor->shape[1]);
    layout.max_seqlen_k = tensor->shape[is_dense(*tensor) ? 3 : 2];
  }
  layout.heads_kv = layout.heads_q;
  // Key-only tensors, which have Hkv, come last.
  for (const TensorView* tensor : {&args.mask, &args.bias, &args.expiry}) {
    if (!tensor->present()) continue;
    const std::int64_t heads = tensor->shape[1];
    if (!is_dense(*tensor)) {
      layout.heads_kv = heads;
    } else if (heads != 1) {
      layout.heads_kv = std::min(layout.heads_kv, heads);
    }
  }
  return layout;
}

}  // namespace flash_dmattn
