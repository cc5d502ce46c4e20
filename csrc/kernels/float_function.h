// Sigmoid and tanh of a float32 that has no grid: the same float64 operations on every machine, rounded once to
// float32.
#pragma once

namespace lstm_quant {

float float_function(bool is_tanh, float v);

}  // namespace lstm_quant
