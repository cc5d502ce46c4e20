// The rational evaluations of evaluators.h over a vector class V, which for this has a fused `fma(a, b, c)`: the only
// place that may use one, since every entry is checked. Include it inside the target region of an ISA.
#pragma once

#include "evaluators.h"
#include "kernels.h"

namespace lstm_quant {

template <class V>
inline __attribute__((always_inline)) typename V::F rational(Evaluator evaluator, typename V::F steps) {
  const Rational& r = kRationals[static_cast<uint32_t>(evaluator)];
  const auto q = V::min(V::max(steps, V::set(-r.limit)), V::set(r.limit));
  const auto square = V::mul(q, q);
  auto p = V::set(r.p[4]);
  for (int i = 3; i >= 0; --i) p = V::fma(p, square, V::set(r.p[i]));
  auto d = V::set(r.q[2]);
  for (int i = 1; i >= 0; --i) d = V::fma(d, square, V::set(r.q[i]));
  d = V::fma(d, square, V::set(1.0f));
  // adding 384 rounds to multiples of 2**-15, ties to even, and taking it away again leaves +0.0 for zero
  const auto value = V::div(V::mul(p, q), d);
  return V::sub(V::add(value, V::set(384.0f + r.center)), V::set(384.0f));
}

}  // namespace lstm_quant
