// Evaluation of Segments over a vector class V, which for this has a fused `fma(a, b, c)` and `pick(const float*, F)`:
// the entry of kPieces whose number the lowest bits of a float give. With q the steps of the input's grid, within low
// and high, and all constants those of q's piece,
//
//   output's steps = value + rne(t * P(t)), t = q - origin
//
// where the origin is a place at which the function passes through an integer, and value this integer. The last fused
// multiply-add does the one rounding that counts, as float32 has no fractions beyond kWhole; those before it cost less
// than a thousandth of a step. Include it inside the target region of an ISA.
#pragma once

#include "evaluate-inl.h"
#include "kernels.h"

namespace lstm_quant {
namespace {

// Of N vectors of steps within the limits, in place.
template <class V, int N>
inline __attribute__((always_inline)) void segments_within(const Segments& s, typename V::F* steps) {
  typename V::F piece[N], p[N];
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) piece[j] = V::fma(steps[j], V::set(s.per_step), V::set(s.first));
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) {
    steps[j] = V::sub(steps[j], V::pick(s.origin, piece[j]));
    p[j] = V::pick(s.coefficients[s.degree - 1], piece[j]);
  }
  for (int i = s.degree - 2; i >= 0; --i) {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) p[j] = V::fma(p[j], steps[j], V::pick(s.coefficients[i], piece[j]));
  }
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) {
    steps[j] = V::sub(V::fma(p[j], steps[j], V::pick(s.value, piece[j])), V::set(kWhole));
  }
}

}  // namespace
}  // namespace lstm_quant
