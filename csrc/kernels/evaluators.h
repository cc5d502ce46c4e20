// Evaluations of sigmoid and tanh that give every entry of a known table, so that nothing is looked up. They hold for
// the order of operations in evaluate-inl.h, with fused multiply-adds and one rounded division; the driver checks every
// entry before it relies on them. With q the steps of the table's input grid:
//
// Rational, for grids of 12 bits, with q cut to [-limit, limit] beyond which the entries no longer change:
//
//   value = q * P(q * q) / Q(q * q) + center, rounded to a multiple of 2**-15
//
// P and Q have degree 3. A linear program gives the coefficients that keep farthest from the points halfway between two
// multiples (by 0.0006 to 0.0012 of one; no lower degree fits at all); multiplied by a common factor and put right by a
// search over neighbouring float32 numbers, they miss no entry.
//
// Power, for grids of 16 bits, where most entries are near an end of the function's range, and what is missing there is
// small, and so are its errors:
//
//   missing = (numerator + slope * power) / (one + power), rounded to an integer
//   value   = (top - missing) * scale, or (bottom + missing) * scale with the slope `slope_below` where q is negative
//   power   = 2**n * P(y - n), y = |q| * per_step, n the integer nearest to y; about exp(|q| * input's scale) for
//             sigmoid, and its square for tanh
//
// P has degree 5 and is 2**x interpolated in Chebyshev nodes. The coefficients too are multiplied by a common factor
// and put right by a search. The slopes are there as 1 / scale is not quite an integer, on which some entries depend.
// Where |q| < near, sigmoid is so close to the halves between integers that no division's rounding tells its side:
// there it is a line, (q * line_slope + line_start, rounded to an integer) * scale.
#pragma once

#include "kernels.h"

namespace lstm_quant {

constexpr int kRationalDegree = 3;
constexpr int kPowerDegree = 5;

struct Rational {
  float limit;
  float center;  // 0.5 for sigmoid, 0 for tanh
  float p[kRationalDegree + 1];
  float q[kRationalDegree + 1];
};

struct Power {
  float per_step;
  float p[kPowerDegree + 1];
  float one;
  float numerator;
  float slope;
  float slope_below;
  float top;
  float bottom;
  float scale;
  float near;  // 0: none
  float line_slope;
  float line_start;
};

constexpr Rational kRationals[] = {
    {},
    // kSigmoid12: sigmoid, steps of 12/2047
    {2047.0f,
     0.5f,
     {1.661757939e-03f, 1.779775882e-09f, 2.981944021e-16f, 5.001657001e-24f},
     {1.133876204e+00f, 4.461544449e-06f, 1.821759540e-12f, 1.150139066e-19f}},
    // kTanh12: tanh, steps of 12/2047
    {1023.0f,
     0.0f,
     {6.647051312e-03f, 2.847029812e-08f, 1.903431094e-14f, 1.260991809e-21f},
     {1.133876681e+00f, 1.784536653e-05f, 2.912430713e-11f, 7.310008486e-18f}},
    // kTanh10: tanh, steps of 10/2047
    {1228.0f,
     0.0f,
     {6.404312793e-03f, 1.901926971e-08f, 8.779914933e-15f, 3.992482849e-22f},
     {1.310964346e+00f, 1.432191493e-05f, 1.617816298e-11f, 2.795653129e-18f}},
};
constexpr uint32_t kFirstPower = sizeof kRationals / sizeof *kRationals;
static_assert(kFirstPower == static_cast<uint32_t>(Evaluator::kFineSigmoid12));

constexpr Power kPowers[] = {
    // kFineSigmoid12: sigmoid, steps of 12/32767, to steps of 1/32767
    {5.283468054e-04f,
     {1.722960830e+00f, 1.194265246e+00f, 4.138932824e-01f, 9.563294053e-02f, 1.667096093e-02f, 2.307280432e-03f},
     1.722959876e+00f,
     5.645624609e+04f,
     -3.039095463e-05f,
     0.0f,
     32767.0f,
     0.0f,
     1.0f / 32767.0f,
     40.0f,
     2.9978f,
     16383.5166f},
    // kFineTanh12: tanh, steps of 12/32767, to steps of 1/32767
    {1.056693727e-03f,
     {1.680616617e+00f, 1.164914727e+00f, 4.037193954e-01f, 9.328027815e-02f, 1.626177877e-02f, 2.250379650e-03f},
     1.680616617e+00f,
     1.101375312e+05f,
     -3.051356362e-05f,
     -3.051356362e-05f,
     32767.0f,
     -32767.0f,
     1.0f / 32767.0f,
     0.0f,
     0.0f,
     0.0f},
    // kFineTanh10: tanh, steps of 10/32767, to steps of 1/32767
    {8.805781254e-04f,
     {1.236434937e+00f, 8.570314050e-01f, 2.970179319e-01f, 6.862687320e-02f, 1.196381822e-02f, 1.655718544e-03f},
     1.236435175e+00f,
     8.102853125e+04f,
     -3.051271779e-05f,
     -3.051271779e-05f,
     32767.0f,
     -32767.0f,
     1.0f / 32767.0f,
     0.0f,
     0.0f,
     0.0f},
};
static_assert(kFirstPower + sizeof kPowers / sizeof *kPowers == kEvaluators);

constexpr bool is_rational(Evaluator evaluator) {
  return evaluator != Evaluator::kNone && static_cast<uint32_t>(evaluator) < kFirstPower;
}
constexpr bool is_power(Evaluator evaluator) {
  return static_cast<uint32_t>(evaluator) >= kFirstPower;
}
// Of one that is.
constexpr const Rational& rational_of(Evaluator evaluator) {
  return kRationals[static_cast<uint32_t>(evaluator)];
}
constexpr const Power& power_of(Evaluator evaluator) {
  return kPowers[static_cast<uint32_t>(evaluator) - kFirstPower];
}

}  // namespace lstm_quant
