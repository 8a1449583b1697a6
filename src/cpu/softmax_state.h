// The state of an online softmax: what is known of a row after some of its keys. States of disjoint sets of
// keys form a monoid under merge, up to rounding, with SoftmaxState{} as its neutral element.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

namespace flash_dmattn::cpu {

// Logits are in units of log 2. Whoever holds a state also holds weighted sums of values, relative to max.
template <class T>
struct SoftmaxState {
  T max = -std::numeric_limits<T>::infinity();  // the largest logit
  T sum = 0;                                    // of 2^(logit - max)
};

// The state of two sets together, and what their weighted sums are multiplied by before they are added.
template <class T>
struct MergedState {
  SoftmaxState<T> state;
  T left_factor, right_factor;
};

// What sums relative to `max` are multiplied by to be relative to `new_max`. -inf: no key yet, which stays 0;
// subtract 0, since (-inf) - (-inf) is NaN.
template <class T>
T rescale_factor(T max, T new_max) {
  return std::exp2(max - (new_max == -std::numeric_limits<T>::infinity() ? T(0) : new_max));
}

template <class T>
MergedState<T> merge(const SoftmaxState<T>& left, const SoftmaxState<T>& right) {
  const T max = std::max(left.max, right.max);
  const T left_factor = rescale_factor(left.max, max);
  const T right_factor = rescale_factor(right.max, max);
  return {{max, left.sum * left_factor + right.sum * right_factor}, left_factor, right_factor};
}

}  // namespace flash_dmattn::cpu
