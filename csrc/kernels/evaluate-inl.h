// The evaluations of evaluators.h over a vector class V, the only place that may use fused multiply-adds, since every
// entry is checked. For this V has
//
//   fma(a, b, c), abs(F)
//   by_sign(v, a, b): a, or b where the sign of v is set
//   double_times(v, n): v * 2**m, m the integer in the lowest bits of n, from -100 to 100
//
// Include it inside the target region of an ISA.
#pragma once

#include "evaluators.h"
#include "kernels.h"

namespace lstm_quant {
namespace {

constexpr float kRounding = 384.0f;    // its unit in the last place is 2**-15
constexpr float kWhole = 12582912.0f;  // 1.5 * 2**23: from 2**23 to 2**24 floats are the integers

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

// Likewise, of any steps of a 16-bit grid.
template <class V, int N>
inline __attribute__((always_inline)) void power_within(const Power& c, typename V::F* steps) {
  typename V::F n[N], x[N], p[N];
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) {
    const auto magnitude = V::abs(steps[j]);
    n[j] = V::fma(magnitude, V::set(c.per_step), V::set(kWhole));  // rounds to an integer
    x[j] = V::fma(magnitude, V::set(c.per_step), V::sub(V::set(kWhole), n[j]));
    p[j] = V::set(c.p[kPowerDegree]);
  }
#pragma GCC unroll 8
  for (int i = kPowerDegree - 1; i >= 0; --i) {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) p[j] = V::fma(p[j], x[j], V::set(c.p[i]));
  }
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) {
    const auto power = V::double_times(p[j], n[j]);
    const auto slope = V::by_sign(steps[j], V::set(c.slope), V::set(c.slope_below));
    p[j] = V::div(V::fma(power, slope, V::set(c.numerator)), V::add(power, V::set(c.one)));
  }
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) {
    const auto missing = V::round(p[j]);
    auto value = V::by_sign(steps[j], V::sub(V::set(c.top), missing), V::add(V::set(c.bottom), missing));
    if (c.near > 0.0f) {
      const auto line = V::round(V::fma(steps[j], V::set(c.line_slope), V::set(c.line_start)));
      value = V::by_sign(V::sub(V::abs(steps[j]), V::set(c.near)), value, line);
    }
    steps[j] = V::mul(value, V::set(c.scale));
  }
}

template <class V>
inline __attribute__((always_inline)) typename V::F evaluate_one(Evaluator evaluator, typename V::F steps) {
  if (is_power(evaluator)) {
    power_within<V, 1>(power_of(evaluator), &steps);
    return steps;
  }
  const Rational& r = rational_of(evaluator);
  typename V::F value = V::min(V::max(steps, V::set(-r.limit)), V::set(r.limit));
  rational_within<V, 1>(r, &value);
  return value;
}

}  // namespace
}  // namespace lstm_quant
