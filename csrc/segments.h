// Finds the polynomials of kernels/segments-inl.h for a table.
#pragma once

#include <optional>
#include <vector>

#include "kernels/kernels.h"

namespace lstm_quant {

// The table of a function whose input and output have grids, in steps of the output's.
struct StepsTable {
  bool is_tanh;
  Grid input;
  Grid output;
  std::vector<float> steps;  // from input.low to input.high
};

// What gives every entry, compared one by one; nothing where that is not found.
std::optional<Segments> find_segments(const StepsTable& table);

}  // namespace lstm_quant
