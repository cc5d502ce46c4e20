#include "pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>

#include "ieee_scope.h"
#include "kernels/evaluators.h"
#include "kernels/scalar_evaluate.h"
#include "segments.h"

namespace lstm_quant {
namespace {

constexpr int kGridFields = 5;
constexpr double kUnbounded = 1 << 23;  // qparams.UNBOUNDED

constexpr int64_t kSmallTable = 4096;  // entries up to which a float32 table stays in the first-level cache

const char* const kFunctionNames[kGates + 1] = {"input_gate", "forget_gate", "cell_gate", "output_gate", "tanh_cy"};

std::string grid_name(int row) {
  static const char* const kFirst[] = {"x", "hx", "cx"};
  static const char* const kLast[] = {"fgate_cx",      "igate_cgate", "fgate_cx_igate_cgate",
                                      "tanh_cy_input", "tanh_cy",     "ogate_cy"};
  static const char* const kPerGate[] = {"igates.", "hgates.", "gates."};
  if (row < 3) return kFirst[row];
  row -= 3;
  if (row < 3 * kGates) return kPerGate[row / kGates] + std::string(kFunctionNames[row % kGates]);
  row -= 3 * kGates;
  if (row < kGates) return kFunctionNames[row];
  row -= kGates;
  if (row < 6) return kLast[row];
  row -= 6;
  if (row == kSecondGrids) return "hy";
  return (row < kGates ? "gates_again." : "outputs_again.") + std::string(kFunctionNames[row % kGates]);
}

bool is_integer(double v) {
  return std::abs(v) <= kUnbounded && v == std::floor(v);
}

Grid read_grid(const double* row) {
  if (std::all_of(row, row + kGridFields, [](double v) { return v == 0; })) return {};
  const double zero_point = row[2], quant_min = row[3], quant_max = row[4];
  if (!is_integer(zero_point) || !is_integer(quant_min) || !is_integer(quant_max)) {
    throw std::runtime_error("zero_point, quant_min and quant_max must be integers within +-2**23");
  }
  const bool unbounded = quant_min == -kUnbounded && quant_max == kUnbounded;
  if (quant_max - quant_min > kMaxTableSteps && !unbounded) throw std::runtime_error("a grid has at most 16 bits");
  Grid grid;
  grid.scale = static_cast<float>(row[0]);
  grid.inv_scale = static_cast<float>(row[1]);
  grid.zero_point = static_cast<int32_t>(zero_point);
  grid.low = static_cast<float>(quant_min - zero_point);
  grid.high = static_cast<float>(quant_max - zero_point);
  check_grid(grid);
  return grid;
}

// Which grid each row is.
std::vector<int> grids_of_rows(int64_t rows, bool projects) {
  const bool has_hy = rows == kParts + 1 || rows == kAllGrids;
  const int64_t others = rows - has_hy;
  if ((others != kParts && others != kParts + kSecondGrids) || (has_hy && !projects)) {
    throw std::runtime_error("grids must have " + std::to_string(kParts) + " or " +
                             std::to_string(kParts + kSecondGrids) + " rows" +
                             (projects ? ", and one more for hy" : "") + ", got " + std::to_string(rows));
  }
  std::vector<int> indices(others);
  std::iota(indices.begin(), indices.end(), 0);
  if (has_hy) indices.push_back(kAllGrids - 1);
  return indices;
}

Grids read_grids(const CellSource& source, bool projects) {
  Grids grids{};
  const double* row = source.grids;
  for (const int index : grids_of_rows(source.grid_rows, projects)) {
    try {
      (&grids.x)[index] = read_grid(row);
    } catch (const std::runtime_error& error) {
      throw std::runtime_error("part " + grid_name(index) + ": " + error.what());
    }
    row += kGridFields;
  }
  for (int gate = 0; gate < kGates; ++gate) {
    if (grids.gates_again[gate].present() && !grids.gates[gate].present()) {
      throw std::runtime_error("part gates_again." + std::string(kFunctionNames[gate]) +
                               " needs a first grid in part gates");
    }
  }
  return grids;
}

// int8 sums where every sum fits int32 and no weight has a zero point; else exact 64-bit ones; float32 where a side has
// no grid.
Sums choose_sums(const MatrixSource& source, const Grid& grid, int64_t outputs) {
  if (!grid.present() || source.int8_weights == nullptr) return Sums::kFloat;
  if (!is_idempotent(grid)) throw std::runtime_error("what a projection reads needs a grid of at most 16 bits");
  const bool symmetric =
      std::all_of(source.zero_points, source.zero_points + outputs, [](int32_t z) { return z == 0; });
  const double span = grid.high - grid.low;
  return symmetric && span <= 255 && span * 128 * source.depth < 0x1p31 ? Sums::kInt8 : Sums::kWide;
}

template <class T>
T* at(uint8_t* blob, uint64_t offset) {
  return reinterpret_cast<T*>(blob + offset);
}

// Of a row of weight_ih or weight_hh, the index in [block][gate][unit].
int64_t index_of_row(int64_t row, int64_t hidden_size) {
  const int64_t gate = row / hidden_size, unit = row % hidden_size;
  return unit / kUnits * kBlock + gate * kUnits + unit % kUnits;
}

float dequantized(const MatrixSource& source, int64_t row, int64_t k) {
  if (source.float_weights != nullptr) return source.float_weights[row * source.depth + k];
  return static_cast<float>(source.int8_weights[row * source.depth + k] - source.zero_points[row]) * source.scales[row];
}

bool is_same(float a, float b) {
  return std::memcmp(&a, &b, sizeof a) == 0;
}

// The table in steps from the zero of `grid`; empty unless these give every value back.
std::vector<float> in_steps(const TableSource& source, const Grid& grid) {
  std::vector<float> all(source.count);
  for (int64_t i = 0; i < source.count; ++i) {
    const float steps = std::nearbyint(source.values[i] / grid.scale) + 0.0f;
    if (!(grid.low <= steps && steps <= grid.high) || !is_same(steps * grid.scale, source.values[i])) return {};
    all[i] = steps;
  }
  return all;
}

// Steps from `low`; empty unless they fit.
std::vector<uint16_t> as_uint16(const std::vector<float>& steps, float low) {
  std::vector<uint16_t> entries;
  for (float s : steps) {
    if (s - low > UINT16_MAX) return {};
    entries.push_back(static_cast<uint16_t>(s - low));
  }
  return entries;
}

// The evaluation that gives every entry of the table.
Evaluator find_evaluator(const TableSource& source, const Grid& input) {
  for (uint32_t i = 1; i < kEvaluators; ++i) {
    const auto evaluator = static_cast<Evaluator>(i);
    const EvaluatedSteps evaluated = evaluated_steps(evaluator);
    if (input.low < evaluated.least || input.high > evaluated.largest) continue;
    int64_t entry = 0;
    while (entry < source.count && is_same(source.values[entry], scalar_evaluate(evaluator, input.low + entry)))
      ++entry;
    if (entry == source.count) return evaluator;
  }
  return Evaluator::kNone;
}

}  // namespace

Packer::Packer(const Sizes& sizes, std::vector<CellSource> cells) : sources_(std::move(cells)) {
  const IeeeScope ieee;
  header_ = {kBlobMagic, kBlobVersion, sizeof(CellRecord), 0, sizes, 0};
  header_.bytes = sizeof(BlobHeader) + sources_.size() * sizeof(CellRecord);
  for (size_t i = 0; i < sources_.size(); ++i) {
    const CellSource& source = sources_[i];
    CellRecord record{};
    try {
      record.grids = read_grids(source, sizes.proj_size != 0);
      const Grids& grids = record.grids;
      lay_out_projection(source.input, grids.x, kGates * sizes.hidden_size, record.input);
      lay_out_projection(source.hidden, grids.hx, kGates * sizes.hidden_size, record.hidden);
      if (sizes.proj_size != 0) lay_out_projection(source.hy, grids.ogate_cy, sizes.proj_size, record.hy);
      for (int gate = 0; gate < kGates; ++gate) {
        const Grid& again = grids.outputs_again[gate];
        lay_out_function(gate, source.tables[gate], grids.gates[gate],
                         again.present() ? again : grids.gate_outputs[gate], record.functions[gate]);
      }
      const Grid& tanh_input = grids.tanh_cy_input.present() ? grids.tanh_cy_input : grids.fgate_cx_igate_cgate;
      lay_out_function(kTanhCy, source.tables[kTanhCy], tanh_input, grids.tanh_cy, record.functions[kTanhCy]);
    } catch (const std::runtime_error& error) {
      throw std::runtime_error("layer " + std::to_string(i / sizes.num_directions) + ", direction " +
                               std::to_string(i % sizes.num_directions) + ": " + error.what());
    }
    records_.push_back(record);
  }
  header_.checksum = checksum(header_);
}

// Every section is followed by kAlign bytes that kernels may read.
uint64_t Packer::reserve(uint64_t bytes) {
  const uint64_t offset = round_up(header_.bytes, kAlign);
  header_.bytes = round_up(offset + bytes, kAlign) + kAlign;
  return offset;
}

void Packer::lay_out_projection(const MatrixSource& source, const Grid& grid, int64_t rows, ProjectionRecord& record) {
  // whole blocks, of kUnits units for each gate: as many for four gates of rows / kGates units each
  const uint64_t outputs = round_up(rows, kBlock);
  record.sums = choose_sums(source, grid, rows);
  record.depth = static_cast<int32_t>(source.depth);
  const bool is_float = record.sums == Sums::kFloat;
  record.weights =
      reserve(is_float ? outputs * source.depth * sizeof(float) : outputs * round_up(source.depth, kDepthStep));
  if (!is_float) record.weight_sums = reserve(outputs * sizeof(int32_t));
  if (record.sums == Sums::kWide) record.weight_zero_points = reserve(outputs * sizeof(int32_t));
  record.multipliers = reserve(outputs * sizeof(float));
  record.biases = reserve(outputs * sizeof(float));
}

// The place of an array; equal ones share it.
uint64_t Packer::share(const void* content, size_t bytes) {
  const char* first = static_cast<const char*>(content);
  const auto [place, is_new] = shared_.try_emplace({first, first + bytes}, 0);
  if (is_new) place->second = reserve(bytes);
  return place->second;
}

// `steps`: the table's, from the zero of a grid whose least is `low`; empty where there are none.
void Packer::lay_out_table(const TableSource& source, const std::vector<float>& steps, float low,
                           FunctionRecord& record) {
  std::vector<uint16_t> small;
  if (source.count > kSmallTable) small = as_uint16(steps, low);
  if (small.empty()) {
    record.form = TableForm::kFloat;
    record.table = share(source.values, source.count * sizeof(float));
  } else {
    record.form = TableForm::kUint16;
    record.table = share(small.data(), source.count * sizeof(uint16_t));
  }
}

void Packer::lay_out_function(int index, const TableSource& source, const Grid& input, const Grid& output,
                              FunctionRecord& record) {
  const int64_t entries = input.present() ? static_cast<int64_t>(input.high - input.low) + 1 : 0;
  if (source.count != entries) {
    throw std::runtime_error("part " + std::string(kFunctionNames[index]) + ": its table must have " +
                             std::to_string(entries) + " entries, got " + std::to_string(source.count));
  }
  if (entries == 0) return;
  LaidOutFunction function{is_tanh(index), input, output, {}};
  std::vector<float> steps;
  if (output.present()) steps = in_steps(source, output);
  lay_out_table(source, steps, output.low, function.record);
  const auto known = std::find_if(functions_.begin(), functions_.end(), [&](const LaidOutFunction& other) {
    return other.is_tanh == function.is_tanh && other.input == input && other.output == output &&
           other.record.form == function.record.form && other.record.table == function.record.table;
  });
  if (known != functions_.end()) {
    record = known->record;
    return;
  }
  find_evaluation(source, std::move(steps), function);
  functions_.push_back(function);
  record = function.record;
}

// What gives the table's values without looking them up, if anything does.
void Packer::find_evaluation(const TableSource& source, std::vector<float> steps, LaidOutFunction& function) {
  function.record.evaluator = find_evaluator(source, function.input);
  if (is_rational(function.record.evaluator) || steps.empty()) return;
  const auto segments = find_segments({function.is_tanh, function.input, function.output, std::move(steps)});
  if (segments) function.record.segments = share(&*segments, sizeof *segments);
}

void Packer::write_row(const MatrixSource& source, const ProjectionRecord& record, const Grid& grid, int64_t row,
                       int64_t index, uint8_t* blob) const {
  const bool is_float = record.sums == Sums::kFloat;
  const int64_t padded_depth = is_float ? source.depth : round_up(source.depth, kDepthStep);
  const int64_t block = index / kBlock, column = index % kBlock;
  at<float>(blob, record.multipliers)[index] = is_float ? 1.0f : grid.scale * source.scales[row];
  at<float>(blob, record.biases)[index] = source.bias == nullptr ? 0.0f : source.bias[row];
  if (is_float) {
    float* weights = at<float>(blob, record.weights) + block * kBlock * padded_depth + column;
    for (int64_t k = 0; k < source.depth; ++k) weights[k * kBlock] = dequantized(source, row, k);
    return;
  }
  const int8_t* values = source.int8_weights + row * source.depth;
  int8_t* weights = at<int8_t>(blob, record.weights) + block * kBlock * padded_depth + column * kGroup;
  int64_t sum = 0;
  for (int64_t k = 0; k < source.depth; ++k) {
    weights[k / kGroup * kBlock * kGroup + k % kGroup] = values[k];
    sum += values[k];
  }
  at<int32_t>(blob, record.weight_sums)[index] = static_cast<int32_t>(sum);
  if (record.sums == Sums::kWide) at<int32_t>(blob, record.weight_zero_points)[index] = source.zero_points[row];
}

void Packer::write(uint8_t* blob) const {
  const IeeeScope ieee;
  std::memset(blob, 0, header_.bytes);
  std::memcpy(blob, &header_, sizeof header_);
  std::memcpy(blob + sizeof header_, records_.data(), records_.size() * sizeof(CellRecord));
  const Sizes& sizes = header_.sizes;
  for (size_t i = 0; i < sources_.size(); ++i) {
    const CellSource& source = sources_[i];
    const CellRecord& record = records_[i];
    const auto write_gates = [&](const MatrixSource& matrix, const ProjectionRecord& projection, const Grid& grid) {
      for (int64_t row = 0; row < kGates * sizes.hidden_size; ++row)
        write_row(matrix, projection, grid, row, index_of_row(row, sizes.hidden_size), blob);
    };
    write_gates(source.input, record.input, record.grids.x);
    write_gates(source.hidden, record.hidden, record.grids.hx);
    for (int64_t row = 0; row < sizes.proj_size; ++row)
      write_row(source.hy, record.hy, record.grids.ogate_cy, row, row, blob);
  }
  for (const auto& [content, offset] : shared_) std::memcpy(blob + offset, content.data(), content.size());
}

}  // namespace lstm_quant
