// Sigmoid and tanh: the same float64 operations on every machine.
#pragma once

namespace lstm_quant {

double double_function(bool is_tanh, double v);

// Of a float32 that has no grid: rounded once to float32.
float float_function(bool is_tanh, float v);

}  // namespace lstm_quant
