#include "scalar_evaluate.h"

#include <cmath>
#include <cstring>

#include "evaluate-inl.h"
#include "segments-inl.h"

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
  static F round(F v) { return std::nearbyintf(v); }
  static F abs(F v) { return std::fabs(v); }
  static F by_sign(F v, F a, F b) { return std::signbit(v) ? b : a; }
  static uint32_t bits(F v) {
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    return bits;
  }
  static F double_times(F v, F n) {
    const uint32_t doubled = bits(v) + (bits(n) << 23);
    std::memcpy(&v, &doubled, sizeof v);
    return v;
  }
  static int lowest_bits(F number) { return static_cast<int>(bits(number) % kPieces); }
  static F pick(const float* table, F number) { return table[lowest_bits(number)]; }
};

}  // namespace

EvaluatedSteps evaluated_steps(Evaluator evaluator) {
  if (is_power(evaluator)) return {-32768, 32767};
  return {-2048, 2047};
}

float scalar_evaluate(Evaluator evaluator, float steps) {
  return evaluate_one<FusedScalar>(evaluator, steps);
}

float scalar_evaluate(const Segments& segments, float steps) {
  float value = FusedScalar::min(FusedScalar::max(steps, segments.low), segments.high);
  segments_within<FusedScalar, 1>(segments, &value);
  return value;
}

int scalar_piece(const Segments& segments, float steps) {
  return FusedScalar::lowest_bits(std::fmaf(steps, segments.per_step, segments.first));
}

}  // namespace lstm_quant
