// Tables as polynomials and powers: the table's entries on every ISA, and nothing where a table is not such a
// function's.
#include <algorithm>
#include <cmath>
#include <limits>

#include "check.h"
#include "kernels/float_function.h"
#include "random_stack.h"
#include "segments.h"
#include "tested_kernels.h"

namespace lstm_quant::testing {
namespace {

Grid grid(float scale, int64_t low, int64_t high) {
  return {scale, 1 / scale, static_cast<float>(low), static_cast<float>(high), 0};
}

StepsTable table_of(bool is_tanh, const Grid& input, const Grid& output) {
  StepsTable table{is_tanh, input, output, {}};
  for (float q = input.low; q <= input.high; ++q) {
    const double steps = std::nearbyint(double_function(is_tanh, q * input.scale) / output.scale);
    table.steps.push_back(static_cast<float>(std::min<double>(std::max<double>(steps, output.low), output.high) + 0.0));
  }
  return table;
}

// Compares what every ISA gives for every step of the input, and beyond its limits, with the table.
void check_on_every_isa(const StepsTable& table, const Segments* segments, Evaluator evaluator = Evaluator::kNone) {
  const Grid &input = table.input, &output = table.output;
  Function function;
  function.is_tanh = table.is_tanh;
  function.input = input;
  function.output = output;
  function.segments = segments;
  function.evaluator = evaluator;
  std::vector<float> entries;
  for (float steps : table.steps) entries.push_back(steps * output.scale);
  function.table = entries.data();
  const float inf = std::numeric_limits<float>::infinity();
  std::vector<float> values{-inf, inf, std::numeric_limits<float>::quiet_NaN(), -0.0f};
  std::vector<float> want{entries.front(), entries.back(), entries.front(), entries[static_cast<size_t>(-input.low)]};
  for (float q = input.low; q <= input.high; ++q) values.push_back(q * input.scale);
  want.insert(want.end(), entries.begin(), entries.end());
  for (const Kernels* kernels : tested_kernels()) {
    if (kernels->evaluate == nullptr) continue;
    std::vector<float> got(values.size());
    kernels->evaluate(function, values.data(), values.size(), got.data());
    for (size_t i = 0; i < values.size(); ++i) {
      CHECK(got[i] == want[i] && !(got[i] == 0 && std::signbit(got[i])))
          << kernels->name << ": " << got[i] << " for " << values[i] << ", not " << want[i] << ", in steps of "
          << input.scale << " to " << output.scale;
    }
  }
}

TEST(the_functions_of_the_presets_have_segments) {
  const Grid twelve = grid(12.0f / 32767, -32768, 32767), ten = grid(10.0f / 32767, -32768, 32767);
  const Grid unit = grid(1.0f / 32767, -32767, 32767), q4_11 = grid(0x1p-11f, -32768, 32767);
  const Grid q0_15 = grid(0x1p-15f, -32768, 32767), byte = grid(0.05f, -128, 127);
  const StepsTable tables[] = {table_of(false, twelve, unit),
                               table_of(true, twelve, unit),
                               table_of(true, ten, unit),
                               table_of(false, q4_11, q0_15),
                               table_of(true, q4_11, q0_15),
                               table_of(false, byte, grid(1.0f / 255, 0, 255)),
                               table_of(true, byte, grid(1.0f / 127, -128, 127))};
  for (const StepsTable& table : tables) {
    const auto segments = find_segments(table);
    CHECK(segments) << "tanh " << table.is_tanh << ", in steps of " << table.input.scale;
    CHECK(segments->degree < kMostPieceDegree) << "the slower, " << segments->degree;
    check_on_every_isa(table, &*segments);
  }
}

TEST(evaluators_of_16_bit_grids_give_every_entry) {
  const Grid unit = grid(1.0f / 32767, -32767, 32767);
  for (const int64_t high : {32767, 900}) {
    const Grid twelve = grid(12.0f / 32767, -high - 1, high), ten = grid(10.0f / 32767, -high - 1, high);
    check_on_every_isa(table_of(false, twelve, unit), nullptr, Evaluator::kFineSigmoid12);
    check_on_every_isa(table_of(true, twelve, unit), nullptr, Evaluator::kFineTanh12);
    check_on_every_isa(table_of(true, ten, unit), nullptr, Evaluator::kFineTanh10);
  }
}

TEST(segments_of_any_grids_give_every_entry) {
  Dice dice(31);
  int found = 0, tried = 0;
  for (const int bits : {2, 3, 5, 8, 8, 8, 8, 8, 12, 12, 12, 12, 16, 16, 16, 16, 16, 16}) {
    for (const bool is_tanh : {false, true}) {
      const int64_t values = int64_t{1} << bits, below = dice.chance(0.5) ? values / 2 : dice.integer(0, values - 1);
      const float scale = std::pow(10.0f, dice.real(-6, 0));
      const int64_t output_bits = dice.integer(2, 16), outputs = int64_t{1} << output_bits;
      const int64_t output_below = dice.chance(0.5) ? outputs / 2 : dice.integer(0, outputs - 1);
      const Grid output =
          grid(dice.real(0.5f, 3.0f) / static_cast<float>(outputs), -output_below, outputs - 1 - output_below);
      const StepsTable table = table_of(is_tanh, grid(scale, -below, values - 1 - below), output);
      const auto segments = find_segments(table);
      ++tried;
      if (!segments) continue;
      ++found;
      check_on_every_isa(table, &*segments);
    }
  }
  CHECK(found * 10 >= tried * 9) << found << " of " << tried;
}

TEST(tables_of_other_functions_have_no_segments_that_differ) {
  const StepsTable good = table_of(true, grid(12.0f / 32767, -32768, 32767), grid(1.0f / 32767, -32767, 32767));
  for (const size_t place : {0, 1, 20000, 32768, 40000, 65535}) {
    StepsTable changed = good;
    changed.steps[place] += 1;
    if (const auto segments = find_segments(changed)) check_on_every_isa(changed, &*segments);
  }
  StepsTable changed = good;
  for (size_t i = 0; i < changed.steps.size(); i += 7) changed.steps[i] = -changed.steps[i];
  CHECK(!find_segments(changed)) << "a table of two functions";
  changed = good;
  std::reverse(changed.steps.begin(), changed.steps.end());
  CHECK(!find_segments(changed)) << "a table that falls";
}

}  // namespace
}  // namespace lstm_quant::testing
