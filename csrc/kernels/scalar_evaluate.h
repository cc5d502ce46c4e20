// The evaluations of evaluators.h in portable code: what a table, and every ISA's own evaluation, is compared with.
#pragma once

#include "kernels.h"

namespace lstm_quant {

constexpr int kLeastEvaluated = -2048;   // the evaluations are compared for all steps
constexpr int kLargestEvaluated = 2047;  // from here to there, and used only within

float scalar_evaluate(Evaluator evaluator, float steps);

}  // namespace lstm_quant
