// The definition of attention and of its gradients (docs/math.md), one query head in float64 on plain arrays,
// and with each result the error that a kernel may make. It shares no code with the library.
#pragma once

#include <cstdint>
#include <vector>

namespace flash_dmattn::testing {

struct Matrix {
  Matrix() = default;
  Matrix(std::int64_t rows, std::int64_t columns)
      : rows(rows), columns(columns), data(static_cast<std::size_t>(rows * columns), 0.0) {}

  double* operator[](std::int64_t row) { return data.data() + row * columns; }
  const double* operator[](std::int64_t row) const { return data.data() + row * columns; }

  std::int64_t rows = 0, columns = 0;
  std::vector<double> data;
};

// What a kernel computes with.
struct Precision {
  double matrix;       // unit roundoff of the arithmetic; a weight loses more, by the size of its logit
  double output;       // unit roundoff of stored results, out above all
  double operand = 0;  // unit roundoff of P and dS where they enter a product, if they are rounded for it
};

// A sum: its value, the variance of a kernel's error, and the sum of the magnitudes of its terms.
struct Result {
  Result() = default;
  Result(std::int64_t rows, std::int64_t columns)
      : value(rows, columns), variance(rows, columns), magnitude(rows, columns) {}

  void add(std::int64_t row, std::int64_t column, double term, double term_magnitude, double term_variance) {
    value[row][column] += term;
    magnitude[row][column] += term_magnitude;
    variance[row][column] += term_variance;
  }

  Matrix value, variance, magnitude;
};

struct HeadInputs {
  Matrix query, key, value, dout;  // [Sq, D], [Sk, D]
  std::vector<double> bias, dlse;  // [Sk], [Sq]
  Matrix dense_bias{};             // [Sq, Sk], or empty; then there is no other
  std::vector<char> visible{};     // [Sq, Sk]
  double scale = 1;

  double bias_of(std::int64_t row, std::int64_t key) const {
    return dense_bias.rows > 0 ? dense_bias[row][key] : bias[static_cast<std::size_t>(key)];
  }
};

struct HeadResults {
  HeadResults() = default;
  HeadResults(std::int64_t seqlen_q, std::int64_t seqlen_k, std::int64_t head_dim)
      : out(seqlen_q, head_dim),
        lse(seqlen_q, 1),
        dq(seqlen_q, head_dim),
        dk(seqlen_k, head_dim),
        dv(seqlen_k, head_dim),
        dbias(seqlen_k, 1) {}

  Result out, lse, dq, dk, dv, dbias;
  Result dense_dbias;  // [Sq, Sk] with a dense bias
};

// Adds the head's gradients of key, value and bias to what the results hold; sets the others.
void attend(const HeadInputs& inputs, const Precision& precision, HeadResults& results);

// Whether key a ranks above key b: by score, and of equal scores the later key.
bool outranks(const std::vector<double>& score, std::int64_t a, std::int64_t b);

// Whether the definition selects `key` among the keys [0, end): it is enabled (its score neither -inf nor
// NaN), and fewer than keep_window of the enabled keys outrank it.
bool selected(const std::vector<double>& score, std::int64_t key, std::int64_t end, std::int64_t keep_window);

// The first position, from the key's own on, for which it is not selected among the keys up to the position;
// the number of keys if there is none.
std::int64_t first_unselected(const std::vector<double>& score, std::int64_t key, std::int64_t keep_window);

}  // namespace flash_dmattn::testing
