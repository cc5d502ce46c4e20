// Evaluations of sigmoid and tanh that give every entry of a known table, so that nothing is looked up: with q the
// steps of the table's input grid, cut to [-limit, limit] beyond which the entries no longer change,
//
//   value = q * P(q * q) / Q(q * q) + center, rounded to a multiple of 2**-15
//
// P has degree 4, Q degree 3 and a constant term of 1. The coefficients are a minimax fit put right by a search over
// neighbouring float32 numbers until no entry missed. They hold for Horner's rule with fused multiply-adds, one rounded
// division, and the order of operations in evaluate-inl.h; the driver checks every entry before it relies on them.
#pragma once

#include "kernels.h"

namespace lstm_quant {

struct Rational {
  float limit;
  float center;  // 0.5 for sigmoid, 0 for tanh
  float p[5];
  float q[3];  // of the powers 1 to 3
};

constexpr Rational kRationals[kEvaluators] = {
    {},
    // kSigmoid12: sigmoid, steps of 12/2047
    {2047.0f,
     0.5f,
     {1.465559355e-03f, 1.619664292e-09f, 3.088400975e-16f, 7.864551950e-24f, -7.064473607e-32f},
     {3.968968031e-06f, 1.735412920e-12f, 1.381562229e-19f}},
    // kTanh12: tanh, steps of 12/2047
    {1023.0f,
     0.0f,
     {5.862236954e-03f, 2.591502124e-08f, 1.976723838e-14f, 2.013762719e-21f, -7.237667601e-29f},
     {1.587593397e-05f, 2.776762847e-11f, 8.843197677e-18f}},
    // kTanh10: tanh, steps of 10/2047
    {1228.0f,
     0.0f,
     {4.885197617e-03f, 1.499694946e-08f, 7.943602034e-15f, 5.619170076e-22f, -1.402218134e-29f},
     {1.102492115e-05f, 1.339067572e-11f, 2.961290049e-18f}},
};

}  // namespace lstm_quant
