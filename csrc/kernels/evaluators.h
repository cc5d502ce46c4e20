// Evaluations of sigmoid and tanh that give every entry of a known table, so that nothing is looked up: with q the
// steps of the table's input grid, cut to [-limit, limit] beyond which the entries no longer change,
//
//   value = q * P(q * q) / Q(q * q) + center, rounded to a multiple of 2**-15
//
// P and Q have degree 3. A linear program gives the coefficients that keep farthest from the points halfway between two
// multiples (by 0.0006 to 0.0012 of one; no lower degree fits at all); multiplied by a common factor and put right by a
// search over neighbouring float32 numbers, they miss no entry. They hold for Horner's rule with fused multiply-adds,
// one rounded division, and the order of operations in evaluate-inl.h; the driver checks every entry before it relies
// on them.
#pragma once

#include "kernels.h"

namespace lstm_quant {

constexpr int kRationalDegree = 3;

struct Rational {
  float limit;
  float center;  // 0.5 for sigmoid, 0 for tanh
  float p[kRationalDegree + 1];
  float q[kRationalDegree + 1];
};

constexpr Rational kRationals[kEvaluators] = {
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

}  // namespace lstm_quant
