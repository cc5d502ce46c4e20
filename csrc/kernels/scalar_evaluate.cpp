#include "scalar_evaluate.h"

#include <cmath>

#include "evaluate-inl.h"

namespace lstm_quant {
namespace {

struct FusedScalar {
  using F = float;

  static F set(float v) { return v; }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F div(F a, F b) { return a / b; }
  static F fma(F a, F b, F c) { return std::fmaf(a, b, c); }
  static F min(F a, F b) { return a < b ? a : b; }
  static F max(F a, F b) { return a > b ? a : b; }
};

}  // namespace

float scalar_evaluate(Evaluator evaluator, float steps) {
  return rational<FusedScalar>(evaluator, steps);
}

}  // namespace lstm_quant
