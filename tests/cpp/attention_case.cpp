#include "attention_case.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>

namespace flash_dmattn::testing {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr std::int64_t kInt32Max = std::numeric_limits<std::int32_t>::max();
constexpr std::int64_t kInt32Min = std::numeric_limits<std::int32_t>::min();

Tensor offsets(const std::vector<std::int64_t>& begins, Strides strides) {
  Tensor tensor(DType::kInt32, {static_cast<std::int64_t>(begins.size())}, strides);
  for (std::size_t i = 0; i < begins.size(); ++i) {
    tensor.set({static_cast<std::int64_t>(i)}, static_cast<double>(begins[i]));
  }
  return tensor;
}

}  // namespace

Precision precision_of(DType dtype, bool on_cuda) {
  if (on_cuda) {
    const double unit = dtype == DType::kFloat16 ? 0x1p-11 : 0x1p-8;
    return {0x1p-24, unit, unit};
  }
  switch (dtype) {
    case DType::kFloat64:
      return {0x1p-53, 0x1p-53};
    case DType::kFloat32:
      return {0x1p-24, 0x1p-24};
    case DType::kFloat16:
      return {0x1p-24, 0x1p-11};
    default:
      return {0x1p-24, 0x1p-8};
  }
}

std::string describe(const Case& c) {
  std::ostringstream text;
  text << dtype_name(c.dtype) << (c.packed ? " packed" : " batched") << (c.causal ? " causal" : "")
       << ", lengths";
  for (const Lengths& lengths : c.sequences) text << ' ' << lengths.q << '/' << lengths.k;
  text << ", Hkv " << c.heads_kv << " group " << c.group << " D " << c.head_dim << ", ";
  if (c.visibility == Visibility::kWindow) text << "w " << c.keep_window;
  if (c.visibility == Visibility::kAll) text << "all keys";
  if (c.visibility == Visibility::kRandomExpiry) text << "random expiry";
  text << ", scale " << c.scale << (c.bias ? " bias" : "") << (c.dlse ? " dlse" : "") << ", strides "
       << static_cast<int>(c.strides) << ", disabled " << c.disabled_keys << (c.tied_scores ? " tied" : "");
  const auto describe_form = [&text](const char* name, const std::optional<DenseForm>& form) {
    if (!form.has_value()) return;
    constexpr const char* kHeads[] = {"1", "Hkv", "H"};
    text << ", " << name << " [" << (form->batch ? "B " : "1 ") << kHeads[form->heads]
         << (form->rows ? " Sq" : " 1") << " Sk]";
  };
  describe_form("mask", c.mask);
  describe_form("bias", c.dense_bias);
  if (c.dense_bias.has_value()) text << ' ' << dtype_name(c.dense_dtype);
  return text.str();
}

Index Problem::q_row(std::int64_t s, std::int64_t i, std::int64_t head, std::int64_t column) const {
  return c.packed ? Index{begin_q_[s] + i, head, column} : Index{s, i, head, column};
}
Index Problem::k_row(std::int64_t s, std::int64_t i, std::int64_t head, std::int64_t column) const {
  return c.packed ? Index{begin_k_[s] + i, head, column} : Index{s, i, head, column};
}
Index Problem::per_key(std::int64_t s, std::int64_t i, std::int64_t head) const {
  return c.packed ? Index{begin_k_[s] + i, head} : Index{s, head, i};
}
Index Problem::per_query(std::int64_t s, std::int64_t i, std::int64_t head) const {
  return c.packed ? Index{head, begin_q_[s] + i} : Index{s, head, i};
}

Index Problem::dense(const Tensor& tensor, std::int64_t s, std::int64_t head, std::int64_t i,
                     std::int64_t j) const {
  const Index& shape = tensor.shape();
  const std::int64_t axis_head = shape[1] == c.heads_kv * c.group ? head : head / c.group;
  return {shape[0] == 1 ? 0 : s, shape[1] == 1 ? 0 : axis_head, shape[2] == 1 ? 0 : i, j};
}

Tensor Problem::make_dense(const DenseForm& form, DType dtype) const {
  const std::int64_t heads = form.heads == DenseForm::kOne      ? 1
                             : form.heads == DenseForm::kOfKeys ? c.heads_kv
                                                                : c.heads_kv * c.group;
  return Tensor(dtype,
                {form.batch ? query.shape()[0] : 1, heads, form.rows ? query.shape()[1] : 1, key.shape()[1]},
                c.strides);
}

Problem::Problem(const Case& the_case, std::uint64_t seed) : c(the_case) {
  Random random(seed);
  for (const Lengths& lengths : c.sequences) {
    begin_q_.push_back(begin_q_.back() + lengths.q);
    begin_k_.push_back(begin_k_.back() + lengths.k);
  }
  const auto batch = static_cast<std::int64_t>(c.sequences.size());
  const Lengths lengths = c.sequences.empty() ? Lengths{3, 5} : c.sequences[0];
  const std::int64_t heads_q = c.heads_kv * c.group, dim = c.head_dim, kv = c.heads_kv;
  const Index q_shape =
      c.packed ? Index{begin_q_.back(), heads_q, dim} : Index{batch, lengths.q, heads_q, dim};
  const Index k_shape = c.packed ? Index{begin_k_.back(), kv, dim} : Index{batch, lengths.k, kv, dim};
  const Index key_shape = c.packed ? Index{begin_k_.back(), kv} : Index{batch, kv, lengths.k};
  const Index query_shape = c.packed ? Index{heads_q, begin_q_.back()} : Index{batch, heads_q, lengths.q};

  query = Tensor(c.dtype, q_shape, c.strides, c.on_cuda);
  key = Tensor(c.dtype, k_shape, c.strides, c.on_cuda);
  value = Tensor(c.dtype, k_shape, c.strides, c.on_cuda);
  dout = Tensor(c.dtype, q_shape, c.strides, c.on_cuda);
  bias = Tensor(accumulation_dtype(c.dtype), key_shape, c.strides, c.on_cuda);
  dlse = Tensor(accumulation_dtype(c.dtype), query_shape, c.strides, c.on_cuda);
  for (Tensor* tensor : {&query, &key, &value, &dout, &bias, &dlse}) {
    tensor->fill([&] { return random.normal(); });
  }
  if (c.visibility != Visibility::kWindow) {
    bias.for_each([&](const Index& index) {
      if (random.chance(c.disabled_keys)) bias.set(index, -kInf);
    });
  }
  if (c.mask.has_value()) {
    mask = make_dense(*c.mask, DType::kBool);
    mask.fill([&] { return random.chance(c.masked) ? 0.0 : static_cast<double>(random.between(1, 255)); });
  }
  if (c.dense_bias.has_value()) {
    bias = make_dense(*c.dense_bias, c.dense_dtype);
    bias.fill([&] { return random.chance(0.1) ? -kInf : random.normal(); });
  }
  if (c.visibility != Visibility::kAll) expiry = Tensor(DType::kInt32, key_shape, c.strides, c.on_cuda);
  make_visible(random);
  if (c.packed) {
    cu_seqlens_q = offsets(begin_q_, c.strides);
    cu_seqlens_k = offsets(begin_k_, c.strides);
  }
  for (const Tensor* tensor : inputs()) input_bytes_.push_back(tensor->bytes());
}

bool Problem::sees(std::int64_t s, std::int64_t head, std::int64_t i, std::int64_t j,
                   std::int64_t expires) const {
  const auto [seqlen_q, seqlen_k] = c.sequences[static_cast<std::size_t>(s)];
  const std::int64_t position = c.causal ? i + seqlen_k - seqlen_q : seqlen_k - 1;
  if (j > position || position >= expires) return false;
  if (c.mask.has_value() && mask.get(dense(mask, s, head, i, j)) == 0) return false;
  if (!has_bias()) return true;
  return bias.get(c.dense_bias.has_value() ? dense(bias, s, head, i, j) : per_key(s, j, head / c.group)) !=
         -kInf;
}

// Fills `visible` and, from it or before it, `expiry`. What no row sees gets a key and a value of NaN.
void Problem::make_visible(Random& random) {
  visible.resize(c.sequences.size());
  for (std::size_t n = 0; n < c.sequences.size(); ++n) {
    const auto s = static_cast<std::int64_t>(n);
    const auto [seqlen_q, seqlen_k] = c.sequences[n];
    const std::vector<char> nothing(static_cast<std::size_t>(seqlen_q * seqlen_k), 0);
    visible[n].assign(static_cast<std::size_t>(c.heads_kv * c.group), nothing);
    for (std::int64_t head_kv = 0; head_kv < c.heads_kv; ++head_kv) {
      std::vector<double> score(static_cast<std::size_t>(seqlen_k));
      for (double& x : score) {
        x = random.chance(c.disabled_keys) ? -kInf : c.tied_scores ? random.between(0, 1) : random.normal();
      }
      for (std::int64_t j = 0; j < seqlen_k; ++j) {
        std::int64_t expires = seqlen_k;
        if (c.visibility == Visibility::kWindow) {
          expires = c.causal                                      ? first_unselected(score, j, c.keep_window)
                    : selected(score, j, seqlen_k, c.keep_window) ? seqlen_k
                                                                  : j;
        } else if (c.visibility == Visibility::kRandomExpiry) {
          expires = random.pick({random.between(0, seqlen_k), random.between(j, seqlen_k), seqlen_k,
                                 kInt32Max, kInt32Min, std::int64_t{-1}});
        }
        if (expiry.view().present()) expiry.set(per_key(s, j, head_kv), static_cast<double>(expires));
        bool seen = false;
        for (std::int64_t head = head_kv * c.group; head < (head_kv + 1) * c.group; ++head) {
          for (std::int64_t i = 0; i < seqlen_q; ++i) {
            const bool sees_key = sees(s, head, i, j, expires);
            visible[n][static_cast<std::size_t>(head)][static_cast<std::size_t>(i * seqlen_k + j)] = sees_key;
            seen |= sees_key;
          }
        }
        if (!seen) {
          for (std::int64_t column = 0; column < c.head_dim; ++column) {
            key.set(k_row(s, j, head_kv, column), kNaN);
            value.set(k_row(s, j, head_kv, column), kNaN);
          }
        }
      }
    }
  }
}

std::vector<const Tensor*> Problem::inputs() const {
  return {&query, &key, &value, &bias, &mask, &expiry, &cu_seqlens_q, &cu_seqlens_k, &dout, &dlse};
}

bool Problem::inputs_unchanged() const {
  const std::vector<const Tensor*> tensors = inputs();
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i]->bytes() != input_bytes_[i]) return false;
  }
  return true;
}

ForwardArgs Problem::forward_args() const {
  ForwardArgs args;
  args.query = query.view();
  args.key = key.view();
  args.value = value.view();
  if (has_bias()) args.bias = bias.view();
  args.mask = mask.view();
  args.expiry = expiry.view();
  args.cu_seqlens_q = cu_seqlens_q.view();
  args.cu_seqlens_k = cu_seqlens_k.view();
  args.scale = c.scale;
  args.causal = c.causal;
  return args;
}

BackwardArgs Problem::backward_args() const {
  const ForwardArgs forward_args = this->forward_args();
  BackwardArgs args;
  args.query = forward_args.query;
  args.key = forward_args.key;
  args.value = forward_args.value;
  args.bias = forward_args.bias;
  args.mask = forward_args.mask;
  args.expiry = forward_args.expiry;
  args.cu_seqlens_q = forward_args.cu_seqlens_q;
  args.cu_seqlens_k = forward_args.cu_seqlens_k;
  args.scale = c.scale;
  args.causal = c.causal;
  args.dout = dout.view();
  if (c.dlse) args.dlse = dlse.view();
  return args;
}

Expectation expect(const Problem& p) {
  const Case& c = p.c;
  const std::int64_t dim = c.head_dim;
  Expectation expectation(c.sequences.size());
  for (std::size_t n = 0; n < c.sequences.size(); ++n) {
    const auto [seqlen_q, seqlen_k] = c.sequences[n];
    const auto s = static_cast<std::int64_t>(n);
    for (std::int64_t head_kv = 0; head_kv < c.heads_kv; ++head_kv) {
      HeadInputs in{.query = Matrix(seqlen_q, dim),
                    .key = Matrix(seqlen_k, dim),
                    .value = Matrix(seqlen_k, dim),
                    .dout = Matrix(seqlen_q, dim),
                    .bias = std::vector<double>(seqlen_k, 0.0),
                    .dlse = std::vector<double>(seqlen_q, 0.0),
                    .scale = c.scale};
      for (std::int64_t j = 0; j < seqlen_k; ++j) {
        if (c.bias && !c.dense_bias.has_value()) in.bias[j] = p.bias.get(p.per_key(s, j, head_kv));
        for (std::int64_t column = 0; column < dim; ++column) {
          in.key[j][column] = p.key.get(p.k_row(s, j, head_kv, column));
          in.value[j][column] = p.value.get(p.k_row(s, j, head_kv, column));
        }
      }
      HeadResults shared(0, seqlen_k, dim);  // dk, dv, dbias of the group
      for (std::int64_t member = 0; member < c.group; ++member) {
        const std::int64_t head = head_kv * c.group + member;
        in.visible = p.visible[n][static_cast<std::size_t>(head)];
        if (c.dense_bias.has_value()) {
          in.dense_bias = Matrix(seqlen_q, seqlen_k);
          for (std::int64_t i = 0; i < seqlen_q; ++i) {
            for (std::int64_t j = 0; j < seqlen_k; ++j) {
              in.dense_bias[i][j] = p.bias.get(p.dense(p.bias, s, head, i, j));
            }
          }
        }
        for (std::int64_t i = 0; i < seqlen_q; ++i) {
          if (c.dlse) in.dlse[i] = p.dlse.get(p.per_query(s, i, head));
          for (std::int64_t column = 0; column < dim; ++column) {
            in.query[i][column] = p.query.get(p.q_row(s, i, head, column));
            in.dout[i][column] = p.dout.get(p.q_row(s, i, head, column));
          }
        }
        HeadResults results(seqlen_q, 0, dim);
        if (c.dense_bias.has_value()) results.dense_dbias = Result(seqlen_q, seqlen_k);
        std::swap(results.dk, shared.dk);
        std::swap(results.dv, shared.dv);
        std::swap(results.dbias, shared.dbias);
        attend(in, precision_of(c.dtype, c.on_cuda), results);
        std::swap(results.dk, shared.dk);
        std::swap(results.dv, shared.dv);
        std::swap(results.dbias, shared.dbias);
        expectation[n].push_back(std::move(results));
      }
      if (c.group == 0) continue;
      HeadResults& first = expectation[n][static_cast<std::size_t>(head_kv * c.group)];
      first.dk = std::move(shared.dk);
      first.dv = std::move(shared.dv);
      first.dbias = std::move(shared.dbias);
    }
  }
  return expectation;
}

Case random_case(Random& random) {
  Case c;
  c.dtype =
      random.pick({DType::kFloat64, DType::kFloat32, DType::kFloat32, DType::kBFloat16, DType::kFloat16});
  c.packed = random.chance(0.4);
  c.causal = random.chance(0.7);
  c.heads_kv = random.pick<std::int64_t>({1, 1, 2, 3});
  c.group = random.pick<std::int64_t>({1, 1, 2, 3, 4, 5, 7, 8, 16});
  c.head_dim =
      random.pick<std::int64_t>({1, 2, 3, 7, 8, 15, 16, 17, 24, 31, 32, 33, 40, 64, 65, 80, 96, 128, 130});
  const std::int64_t longest = c.group * c.head_dim > 300 ? 40 : 130;
  const std::int64_t sequences = random.pick<std::int64_t>({0, 1, 1, 1, 2, 3});
  for (std::int64_t i = 0; i < sequences; ++i) {
    if (i > 0 && !c.packed) {
      c.sequences.push_back(c.sequences[0]);
      continue;
    }
    const std::int64_t q =
        std::min(random.pick<std::int64_t>({0,  1,  2,  3,  7,  8,  11, 12, 13, 15, 16, 17,
                                            31, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97, 130}),
                 longest);
    const std::int64_t more = random.pick<std::int64_t>({0, 0, 1, 5, 31, 64});
    const std::int64_t fewer = c.causal ? 0 : random.between(0, q);
    c.sequences.push_back({q, q + more - std::min(fewer, q + more)});
  }
  c.visibility =
      random.pick({Visibility::kAll, Visibility::kWindow, Visibility::kWindow, Visibility::kRandomExpiry});
  c.keep_window = random.pick<std::int64_t>({1, 2, 3, 8, 31, 32, 33, 64, 100, 1000});
  c.bias = random.chance(0.75);
  c.dlse = random.chance(0.5);
  c.scale = random.pick({1.0, 1.0, 0.0, 3.0, -2.0}) / std::sqrt(static_cast<double>(c.head_dim));
  c.strides = random.pick({Strides::kContiguous, Strides::kPermuted, Strides::kGaps, Strides::kReversed});
  c.disabled_keys = random.pick({0.0, 0.0, 0.3, 1.0});
  c.tied_scores = random.chance(0.25);
  const auto any_form = [&random]() -> std::optional<DenseForm> {
    if (random.chance(0.6)) return {};
    return DenseForm{random.chance(0.5),
                     random.pick({DenseForm::kOne, DenseForm::kOfKeys, DenseForm::kOfQueries}),
                     random.chance(0.7)};
  };
  if (!c.packed) {
    c.mask = any_form();
    c.dense_bias = any_form();
    c.dense_dtype = random.pick({DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16});
    c.masked = random.pick({0.0, 0.3, 0.9, 1.0});
  }
  return c;
}

}  // namespace flash_dmattn::testing
