// Calls of forward and backward as data: a Case is made into tensors, run, and compared with the oracle.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "oracle.h"
#include "support.h"

namespace flash_dmattn::testing {

struct Lengths {
  std::int64_t q, k;
};

// Which keys a row sees: all (before it, if causal), the keep_window of highest score, or what random
// integers say.
enum class Visibility { kAll, kWindow, kRandomExpiry };

// The axes of a mask or of a bias with a query axis: each has its full size or 1, the heads also that of
// keys.
struct DenseForm {
  enum Heads { kOne, kOfKeys, kOfQueries };
  bool batch = true;
  Heads heads = kOfQueries;
  bool rows = true;
};

struct Case {
  DType dtype = DType::kFloat32;
  std::vector<Lengths> sequences;
  bool packed = false;
  std::int64_t heads_kv = 1;
  std::int64_t group = 1;
  std::int64_t head_dim = 16;
  bool causal = true;
  Visibility visibility = Visibility::kAll;
  std::int64_t keep_window = 1;
  bool bias = true;
  bool dlse = true;
  double scale = 0.25;
  Strides strides = Strides::kContiguous;
  double disabled_keys = 0;  // share of the keys whose score, or without scores bias, is -inf
  bool tied_scores = false;
  bool on_cuda = false;  // tensors are aligned, and P and dS are rounded to dtype before the products
  // Not packed:
  std::optional<DenseForm> mask{};        // of which `masked` is false
  std::optional<DenseForm> dense_bias{};  // in place of the key-only one; one in ten is -inf
  DType dense_dtype = DType::kFloat32;
  double masked = 0.5;
};

// The CPU's kernels keep float32 between reading and writing 16-bit tensors, so only their outputs are
// rounded to 16 bits.
Precision precision_of(DType dtype, bool on_cuda = false);

std::string describe(const Case& c);

// The tensors of a case.
class Problem {
 public:
  Problem(const Case& c, std::uint64_t seed);

  ForwardArgs forward_args() const;
  BackwardArgs backward_args() const;  // no gradient asked for yet
  bool inputs_unchanged() const;

  Tensor like_query() const { return Tensor(c.dtype, query.shape(), c.strides, c.on_cuda); }
  Tensor like_key() const { return Tensor(c.dtype, key.shape(), c.strides, c.on_cuda); }
  Tensor like_bias() const { return Tensor(bias.view().dtype, bias.shape(), c.strides, c.on_cuda); }
  Tensor like_lse() const { return Tensor(accumulation_dtype(c.dtype), dlse.shape(), c.strides, c.on_cuda); }

  // Places in the tensors of row, key or query `i` of sequence s.
  Index q_row(std::int64_t s, std::int64_t i, std::int64_t head, std::int64_t column) const;
  Index k_row(std::int64_t s, std::int64_t i, std::int64_t head, std::int64_t column) const;
  Index per_key(std::int64_t s, std::int64_t i, std::int64_t head) const;
  Index per_query(std::int64_t s, std::int64_t i, std::int64_t head) const;
  // Of the mask or the dense bias: query row i and key j of a query head.
  Index dense(const Tensor& tensor, std::int64_t s, std::int64_t head, std::int64_t i, std::int64_t j) const;
  bool has_bias() const { return c.bias || c.dense_bias.has_value(); }

  const Case c;
  Tensor query, key, value, bias, mask, expiry, cu_seqlens_q, cu_seqlens_k;
  Tensor dout, dlse;
  std::vector<std::vector<std::vector<char>>> visible;  // [sequence][head_q][Sq * Sk]

 private:
  Tensor make_dense(const DenseForm& form, DType dtype) const;
  void make_visible(Random& random);
  bool sees(std::int64_t s, std::int64_t head, std::int64_t i, std::int64_t j, std::int64_t expires) const;
  std::vector<const Tensor*> inputs() const;

  std::vector<std::int64_t> begin_q_{0}, begin_k_{0};
  std::vector<std::vector<unsigned char>> input_bytes_;
};

// The oracle's results, [sequence][head_q]; those of keys sum over the group and stand at its first head.
using Expectation = std::vector<std::vector<HeadResults>>;
Expectation expect(const Problem& problem);

struct Gradients {
  Tensor dq, dk, dv, dbias;
};

struct Outputs {
  Tensor out, lse;
  Gradients gradients;
};

// How run_case calls the two passes: through C++, or through another interface.
struct Passes {
  void (*forward)(const ForwardArgs&, const Target&, Poison);
  void (*backward)(const BackwardArgs&, const Target&, Poison);
};
extern const Passes kCppPasses;

// Runs both passes; the backward reads the oracle's out and lse, rounded, so that its errors are its own. It
// computes the gradients whose bits are set: dq 1, dk 2, dv 4, dbias 8.
Outputs run_case(const Problem& problem, const Expectation& expectation, const Target& target = {},
                 Poison poison = Poison::kNaN, int gradients = 15, const Passes& passes = kCppPasses);

// "" or one line about the worst element that the error budget does not cover.
std::string compare(const Problem& problem, const Expectation& expectation, const Outputs& outputs);
inline std::int64_t elements_compared = 0;

// Everything: run, compare, inputs unchanged, gaps and guard bands untouched.
void check_case(const Case& c, std::uint64_t seed, const Target& target = {});

// A case of random shape, drawn from the sizes at which kernels break.
Case random_case(Random& random);

}  // namespace flash_dmattn::testing
