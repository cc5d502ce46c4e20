// The rational evaluations of evaluators.h over a vector class V, which for this has a fused `fma(a, b, c)`: the only
// place that may use one, since every entry is checked. Include it inside the target region of an ISA.
#pragma once

#include "evaluators.h"
#include "kernels.h"

namespace lstm_quant {
namespace {

constexpr float kRounding = 384.0f;  // its unit in the last place is 2**-15

// Of N vectors of steps within the limits, in place. Step by step for all of them, since each step waits for the one
// before.
template <class V, int N>
inline __attribute__((always_inline)) void rational_within(const Rational& r, typename V::F* steps) {
  typename V::F square[N], p[N], q[N];
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) {
    square[j] = V::mul(steps[j], steps[j]);
    p[j] = V::set(r.p[kRationalDegree]);
    q[j] = V::set(r.q[kRationalDegree]);
  }
#pragma GCC unroll 8
  for (int i = kRationalDegree - 1; i >= 0; --i) {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      p[j] = V::fma(p[j], square[j], V::set(r.p[i]));
      q[j] = V::fma(q[j], square[j], V::set(r.q[i]));
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) p[j] = V::div(V::mul(p[j], steps[j]), q[j]);
  // adding 384 rounds to multiples of 2**-15, ties to even, and taking it away again leaves +0.0 for zero
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) steps[j] = V::sub(V::add(p[j], V::set(kRounding + r.center)), V::set(kRounding));
}

template <class V>
inline __attribute__((always_inline)) typename V::F rational(Evaluator evaluator, typename V::F steps) {
  const Rational& r = kRationals[static_cast<uint32_t>(evaluator)];
  typename V::F value = V::min(V::max(steps, V::set(-r.limit)), V::set(r.limit));
  rational_within<V, 1>(r, &value);
  return value;
}

}  // namespace
}  // namespace lstm_quant
