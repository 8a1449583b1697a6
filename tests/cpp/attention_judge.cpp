// Runs a case, and compares what came out with what the oracle expects.
#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>

#include "attention_case.h"

namespace flash_dmattn::testing {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

double smallest_subnormal(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 0x1p-1074;
    case DType::kFloat32:
      return 0x1p-149;
    case DType::kFloat16:
      return 0x1p-24;
    default:
      return 0x1p-133;
  }
}

// The gradient of the dense bias: the sums over what shares its elements.
template <typename Visit>
void for_each_dense_result(const Problem& p, const Expectation& expectation, const Visit& visit) {
  const Index& shape = p.bias.shape();
  Result sums(p.bias.view().num_elements(), 1);
  for (std::size_t n = 0; n < expectation.size(); ++n) {
    for (std::size_t head = 0; head < expectation[n].size(); ++head) {
      const Result& found = expectation[n][head].dense_dbias;
      for (std::int64_t i = 0; i < found.value.rows; ++i) {
        const Index row =
            p.dense(p.bias, static_cast<std::int64_t>(n), static_cast<std::int64_t>(head), i, 0);
        const std::int64_t first = ((row[0] * shape[1] + row[1]) * shape[2] + row[2]) * shape[3];
        for (std::int64_t j = 0; j < found.value.columns; ++j) {
          sums.add(first + j, 0, found.value[i][j], found.magnitude[i][j], found.variance[i][j]);
        }
      }
    }
  }
  std::int64_t element = 0;
  p.bias.for_each([&](const Index& place) {
    visit(place, *sums.value[element], *sums.variance[element], *sums.magnitude[element]);
    ++element;
  });
}

// Visits every place of a tensor with the result that belongs there.
enum class Kind { kQueryRows, kKeyRows, kPerKey, kPerQuery, kDense };

template <typename Visit>
void for_each_result(const Problem& p, const Expectation& expectation, Kind kind, Result HeadResults::*member,
                     const Visit& visit) {
  if (kind == Kind::kDense) return for_each_dense_result(p, expectation, visit);
  for (std::size_t n = 0; n < p.c.sequences.size(); ++n) {
    const auto s = static_cast<std::int64_t>(n);
    const bool of_keys = kind == Kind::kKeyRows || kind == Kind::kPerKey;
    const std::int64_t heads = of_keys ? p.c.heads_kv : p.c.heads_kv * p.c.group;
    const std::int64_t rows = of_keys ? p.c.sequences[n].k : p.c.sequences[n].q;
    const std::int64_t columns = kind == Kind::kQueryRows || kind == Kind::kKeyRows ? p.c.head_dim : 1;
    const Result nothing(rows, columns);  // what keys get that no query head reads
    for (std::int64_t head = 0; head < heads; ++head) {
      const bool unread = of_keys && p.c.group == 0;
      const auto at = static_cast<std::size_t>(of_keys ? head * p.c.group : head);
      const Result& result = unread ? nothing : expectation[n][at].*member;
      for (std::int64_t i = 0; i < rows; ++i) {
        for (std::int64_t column = 0; column < columns; ++column) {
          const Index place = kind == Kind::kQueryRows ? p.q_row(s, i, head, column)
                              : kind == Kind::kKeyRows ? p.k_row(s, i, head, column)
                              : kind == Kind::kPerKey  ? p.per_key(s, i, head)
                                                       : p.per_query(s, i, head);
          visit(place, result.value[i][column], result.variance[i][column], result.magnitude[i][column]);
        }
      }
    }
  }
}

struct Named {
  const char* name;
  const Tensor* tensor;
  Kind kind;
  Result HeadResults::*member;
};

// Half a unit of the stored type, six standard deviations of the kernel's own error, and a floor for the
// accumulation of terms that cancel. float64: 1e-12 of the sum of magnitudes.
double budget(DType dtype, const Named& named, double value, double variance, double magnitude) {
  const bool is_double = dtype == DType::kFloat64;
  if (named.member == &HeadResults::lse) {
    return is_double ? 1e-12 * magnitude : 1e-5 + 0x1p-20 * std::abs(value);
  }
  const DType stored = named.tensor->view().dtype;
  if (is_double && stored == DType::kFloat64) return 1e-12 * magnitude + 0x1p-1020;
  const double rounding = named.member == &HeadResults::dbias ? 0x1p-22 : precision_of(stored).output;
  if (is_double) return 1e-12 * magnitude + rounding * std::abs(value) + smallest_subnormal(stored);
  return rounding * std::abs(value) + 6 * std::sqrt(variance) + 4 * 0x1p-24 * magnitude +
         smallest_subnormal(stored) / 2 + 0x1p-124;
}

std::string compare_one(const Problem& p, const Expectation& expectation, const Named& named) {
  double worst = 1;
  std::string message;
  for_each_result(p, expectation, named.kind, named.member,
                  [&](const Index& place, double want, double variance, double magnitude) {
                    ++elements_compared;
                    const double got = named.tensor->get(place);
                    if (got == want) return;
                    const double ratio =
                        std::abs(got - want) / budget(p.c.dtype, named, want, variance, magnitude);
                    if (ratio <= worst) return;  // NaN falls through
                    worst = std::isnan(ratio) ? kInf : ratio;
                    std::ostringstream text;
                    text << named.name << "[";
                    for (const std::int64_t& i : place) text << (&i == &place.front() ? "" : ", ") << i;
                    text.precision(17);
                    text << "] = " << got << ", expected " << want << ", " << worst << " times the budget";
                    message = text.str();
                  });
  return message;
}

}  // namespace

const Passes kCppPasses = {
    [](const ForwardArgs& args, const Target& target, Poison poison) { run(forward, args, target, poison); },
    [](const BackwardArgs& args, const Target& target, Poison poison) {
      run(backward, args, target, poison);
    }};

Outputs run_case(const Problem& problem, const Expectation& expectation, const Target& target, Poison poison,
                 int gradients, const Passes& passes) {
  Outputs outputs{.out = problem.like_query(),
                  .lse = problem.like_lse(),
                  .gradients = {.dq = problem.like_query(),
                                .dk = problem.like_key(),
                                .dv = problem.like_key(),
                                .dbias = problem.like_bias()}};
  ForwardArgs forward_args = problem.forward_args();
  forward_args.out = outputs.out.view();
  forward_args.lse = outputs.lse.view();
  passes.forward(forward_args, target, poison);

  Tensor out = problem.like_query(), lse = problem.like_lse();
  const auto set = [](Tensor& tensor) {
    return [&](const Index& place, double value, double, double) { tensor.set(place, value); };
  };
  for_each_result(problem, expectation, Kind::kQueryRows, &HeadResults::out, set(out));
  for_each_result(problem, expectation, Kind::kPerQuery, &HeadResults::lse, set(lse));
  BackwardArgs backward_args = problem.backward_args();
  backward_args.out = out.view();
  backward_args.lse = lse.view();
  if ((gradients & 1) != 0) backward_args.dq = outputs.gradients.dq.view();
  if ((gradients & 2) != 0) backward_args.dk = outputs.gradients.dk.view();
  if ((gradients & 4) != 0) backward_args.dv = outputs.gradients.dv.view();
  if ((gradients & 8) != 0 && problem.has_bias()) backward_args.dbias = outputs.gradients.dbias.view();
  passes.backward(backward_args, target, poison);
  return outputs;
}

std::string compare(const Problem& problem, const Expectation& expectation, const Outputs& outputs) {
  const Gradients& gradients = outputs.gradients;
  std::vector<Named> all = {{"out", &outputs.out, Kind::kQueryRows, &HeadResults::out},
                            {"lse", &outputs.lse, Kind::kPerQuery, &HeadResults::lse},
                            {"dq", &gradients.dq, Kind::kQueryRows, &HeadResults::dq},
                            {"dk", &gradients.dk, Kind::kKeyRows, &HeadResults::dk},
                            {"dv", &gradients.dv, Kind::kKeyRows, &HeadResults::dv}};
  if (problem.c.dense_bias.has_value()) {
    all.push_back({"dbias", &gradients.dbias, Kind::kDense, &HeadResults::dense_dbias});
  } else if (problem.c.bias) {
    all.push_back({"dbias", &gradients.dbias, Kind::kPerKey, &HeadResults::dbias});
  }
  std::string messages;
  for (const Named& named : all) {
    const std::string message = compare_one(problem, expectation, named);
    if (!message.empty()) messages += (messages.empty() ? "" : "; ") + message;
  }
  return messages;
}

void check_case(const Case& c, std::uint64_t seed, const Target& target) {
  SCOPED_TRACE(describe(c) + ", seed " + std::to_string(seed));
  const Problem problem(c, seed);
  const Expectation expectation = expect(problem);
  const Outputs outputs = run_case(problem, expectation, target);
  EXPECT_EQ(compare(problem, expectation, outputs), "");
  EXPECT_TRUE(problem.inputs_unchanged()) << "an input was written";
  const Gradients& gradients = outputs.gradients;
  for (const Tensor* tensor :
       {&outputs.out, &outputs.lse, &gradients.dq, &gradients.dk, &gradients.dv, &gradients.dbias}) {
    EXPECT_TRUE(tensor->surroundings_untouched()) << "written outside of an output";
  }
}

}  // namespace flash_dmattn::testing
