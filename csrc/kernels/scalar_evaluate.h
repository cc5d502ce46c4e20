// The evaluations of evaluators.h and segments-inl.h in portable code: what a table, and every ISA's own evaluation, is
// compared with.
#pragma once

#include "kernels.h"

namespace lstm_quant {

// The steps for which an evaluation is compared, and the only ones for which it is used.
struct EvaluatedSteps {
  int least;
  int largest;
};
EvaluatedSteps evaluated_steps(Evaluator evaluator);

float scalar_evaluate(Evaluator evaluator, float steps);

// The output's steps for any of the input's.
float scalar_evaluate(const Segments& segments, float steps);
// The piece that `steps` belong to.
int scalar_piece(const Segments& segments, float steps);

}  // namespace lstm_quant
