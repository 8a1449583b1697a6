#include "oracle.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace flash_dmattn::testing {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

bool enabled(const std::vector<double>& score, std::int64_t key) {
  return score[static_cast<std::size_t>(key)] > -kInf;  // false for NaN
}

double squared(double x) { return x * x; }

double dot(const double* a, const double* b, std::int64_t size) {
  double sum = 0;
  for (std::int64_t c = 0; c < size; ++c) sum += a[c] * b[c];
  return sum;
}

double dot_of_magnitudes(const double* a, const double* b, std::int64_t size) {
  double sum = 0;
  for (std::int64_t c = 0; c < size; ++c) sum += std::abs(a[c] * b[c]);
  return sum;
}

// The softmax of one row.
struct Row {
  std::vector<std::int64_t> keys;  // the visible ones of finite logit
  std::vector<double> weight;      // P, one per key
  double lse = -kInf;
  double logit_error = 0;  // at most, in units of roundoff: of the product's terms, and of the exponential
};

Row softmax(const HeadInputs& in, std::int64_t i) {
  Row row;
  std::vector<double> logits;
  for (std::int64_t j = 0; j < in.key.rows; ++j) {
    if (!in.visible[static_cast<std::size_t>(i * in.key.rows + j)]) continue;
    const double logit = in.scale * dot(in.query[i], in.key[j], in.query.columns) + in.bias_of(i, j);
    if (logit == -kInf) continue;
    row.keys.push_back(j);
    logits.push_back(logit);
    const double terms = std::abs(in.scale) * dot_of_magnitudes(in.query[i], in.key[j], in.query.columns) +
                         std::abs(in.bias_of(i, j));
    row.logit_error = std::max(row.logit_error, std::abs(logit) + terms);
  }
  if (logits.empty()) return row;
  const double top = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (double logit : logits) sum += std::exp(logit - top);
  for (double logit : logits) row.weight.push_back(std::exp(logit - top) / sum);
  row.lse = top + std::log(sum);
  return row;
}

void add_row(const HeadInputs& in, const Precision& precision, std::int64_t i, const Row& row,
             HeadResults& r) {
  const std::int64_t dim = in.query.columns;
  const double* dout = in.dout[i];
  const double half = std::hypot(precision.matrix * (8 + row.logit_error), precision.operand) / 2;

  // out_i = sum_j P_ij v_j. An error of a logit moves its own weight, and by the normalisation all others.
  for (std::int64_t c = 0; c < dim; ++c) {
    double out = 0;
    for (std::size_t n = 0; n < row.keys.size(); ++n) out += row.weight[n] * in.value[row.keys[n]][c];
    for (std::size_t n = 0; n < row.keys.size(); ++n) {
      const double weight = row.weight[n], value = in.value[row.keys[n]][c];
      const double variance = squared(half * weight) * (squared(value) + squared(value - out));
      r.out.add(i, c, weight * value, std::abs(weight * value), variance);
    }
  }

  // delta_i = sum_c dout_ic out_ic - dlse_i, of the stored out
  double delta = -in.dlse[i], delta_magnitude = std::abs(delta), delta_variance = 0;
  for (std::int64_t c = 0; c < dim; ++c) {
    const double out = r.out.value[i][c];
    delta += dout[c] * out;
    delta_magnitude += std::abs(dout[c] * out);
    delta_variance += squared(dout[c]) * (squared(precision.output / 2 * out) + r.out.variance[i][c]);
  }

  std::vector<double> mean_key(static_cast<std::size_t>(dim), 0.0);
  for (std::size_t n = 0; n < row.keys.size(); ++n) {
    const std::int64_t j = row.keys[n];
    const double weight = row.weight[n];
    // dS_ij = P_ij (dout_i . v_j - delta_i)
    const double dscore = weight * (dot(dout, in.value[j], dim) - delta);
    const double products = dot_of_magnitudes(dout, in.value[j], dim);
    const double magnitude = weight * (products + delta_magnitude);
    const double own_variance =
        squared(half * dscore) + squared(8 * precision.matrix * weight * (products + std::abs(delta)));
    const double variance = own_variance + squared(weight) * delta_variance;
    r.dbias.add(j, 0, dscore, magnitude, variance);
    if (in.dense_bias.rows > 0) r.dense_dbias.add(i, j, dscore, magnitude, variance);
    for (std::int64_t c = 0; c < dim; ++c) {
      const double query = in.scale * in.query[i][c], key = in.scale * in.key[j][c];
      r.dq.add(i, c, dscore * key, magnitude * std::abs(key), own_variance * squared(key));
      r.dk.add(j, c, dscore * query, magnitude * std::abs(query), variance * squared(query));
      const double term = weight * dout[c];
      r.dv.add(j, c, term, std::abs(term), squared(half * term));
      mean_key[c] += weight * key;
    }
  }
  // The error of delta is common to the row.
  for (std::int64_t c = 0; c < dim; ++c) r.dq.variance[i][c] += delta_variance * squared(mean_key[c]);
}

}  // namespace

void attend(const HeadInputs& inputs, const Precision& precision, HeadResults& results) {
  for (std::int64_t i = 0; i < inputs.query.rows; ++i) {
    const Row row = softmax(inputs, i);
    results.lse.add(i, 0, row.lse, 1 + row.logit_error, 0);
    if (!row.keys.empty()) add_row(inputs, precision, i, row, results);
  }
}

bool outranks(const std::vector<double>& score, std::int64_t a, std::int64_t b) {
  const double x = score[static_cast<std::size_t>(a)], y = score[static_cast<std::size_t>(b)];
  return x > y || (x == y && a > b);
}

bool selected(const std::vector<double>& score, std::int64_t key, std::int64_t end,
              std::int64_t keep_window) {
  if (!enabled(score, key)) return false;
  std::int64_t better = 0;
  for (std::int64_t other = 0; other < end; ++other)
    better += enabled(score, other) && outranks(score, other, key);
  return better < keep_window;
}

std::int64_t first_unselected(const std::vector<double>& score, std::int64_t key, std::int64_t keep_window) {
  if (!enabled(score, key)) return key;
  const auto seqlen = static_cast<std::int64_t>(score.size());
  std::int64_t better = 0;
  for (std::int64_t other = 0; other < seqlen; ++other) {
    better += enabled(score, other) && outranks(score, other, key);
    if (other >= key && better >= keep_window) return other;
  }
  return seqlen;
}

}  // namespace flash_dmattn::testing
