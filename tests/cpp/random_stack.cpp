#include "random_stack.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

namespace lstm_quant::testing {
namespace {

constexpr int kFields = 5;
// rows of the grids, as in blob.h
enum Row {
  kX,
  kHx,
  kCx,
  kIgates = 3,
  kHgates = 7,
  kGates4 = 11,
  kOutputs = 15,
  kFgateCx = 19,
  kIgateCgate,
  kCellState,
  kTanhInput,
  kTanhCyRow,
  kOgateCy,
  kHyRow  // where there is one
};

void set(double* row, double range_low, double range_high, int64_t quant_min, int64_t quant_max) {
  const float scale = static_cast<float>((range_high - range_low) / static_cast<double>(quant_max - quant_min));
  row[0] = scale;
  row[1] = 1.0f / scale;
  row[2] = std::nearbyint(static_cast<double>(quant_min) - range_low / scale);
  row[3] = static_cast<double>(quant_min);
  row[4] = static_cast<double>(quant_max);
}

// A grid of 2 to 16 bits around zero.
void set_random(Dice& dice, double* row, double range, int least_bits, int largest_bits) {
  const int64_t values = int64_t{1} << dice.integer(least_bits, largest_bits);
  const int64_t quant_min = dice.chance(0.5) ? 0 : -values / 2;
  set(row, -range * dice.real(0.5f, 1.0f), range * dice.real(0.5f, 1.0f), quant_min, quant_min + values - 1);
}

void set_steps(double* row, double scale, int64_t quant_min, int64_t quant_max) {
  const double values[kFields] = {static_cast<float>(scale), 1.0f / static_cast<float>(scale), 0,
                                  static_cast<double>(quant_min), static_cast<double>(quant_max)};
  std::memcpy(row, values, sizeof values);
}

}  // namespace

int64_t random_proj_size(Dice& dice, int64_t hidden_size) {
  if (dice.chance(0.6)) return 0;
  return dice.integer(1, dice.chance(0.2) ? 150 : hidden_size);
}

AlignedBytes::AlignedBytes(size_t count)
    : data_(static_cast<uint8_t*>(::operator new(count, std::align_val_t{kAlign}))), size_(count) {}
AlignedBytes::AlignedBytes(AlignedBytes&& other) noexcept : data_(other.data_), size_(other.size_) {
  other.data_ = nullptr;
}
AlignedBytes::AlignedBytes(const AlignedBytes& other) : AlignedBytes(other.size_) {
  std::memcpy(data_, other.data_, size_);
}
AlignedBytes::~AlignedBytes() {
  ::operator delete(data_, std::align_val_t{kAlign});
}

AlignedBytes zeros(size_t count) {
  AlignedBytes bytes(round_up(count, kAlign));
  std::memset(bytes.data(), 0, bytes.size());
  return bytes;
}

template <>
float* RandomStack::keep(std::vector<float> values) {
  return floats_.emplace_back(std::move(values)).data();
}
template <>
int8_t* RandomStack::keep(std::vector<int8_t> values) {
  return bytes_.emplace_back(std::move(values)).data();
}
template <>
int32_t* RandomStack::keep(std::vector<int32_t> values) {
  return words_.emplace_back(std::move(values)).data();
}
template <>
double* RandomStack::keep(std::vector<double> values) {
  return doubles_.emplace_back(std::move(values)).data();
}

RandomStack::RandomStack(Dice& dice, const Sizes& sizes, Style style) : sizes_(sizes) {
  for (int64_t i = 0; i < sizes.cells(); ++i) {
    CellSource source;
    const bool float_weights = style == Style::kFloat || (style == Style::kMixed && dice.chance(0.3));
    const bool affine = style == Style::kMixed && dice.chance(0.3);
    source.input =
        matrix(dice, kGates * sizes.hidden_size, sizes.depth(i / sizes.num_directions), float_weights, affine);
    source.hidden = matrix(dice, kGates * sizes.hidden_size, sizes.h_size(), float_weights, affine);
    std::vector<double> all_grids = grids(dice, style);
    if (sizes.proj_size != 0) {
      const bool other_weights = style == Style::kMixed && dice.chance(0.3);
      source.hy = matrix(dice, sizes.proj_size, sizes.hidden_size, float_weights != other_weights, affine);
      source.hy.bias = nullptr;
    }
    source.grid_rows = static_cast<int64_t>(all_grids.size()) / kFields;
    const double* rows = keep(std::move(all_grids));
    source.grids = rows;
    for (int f = 0; f <= kGates; ++f) {
      const double* input = rows + kFields * (f < kGates ? kGates4 + f : kTanhInput);
      if (f == kTanhCy && input[0] == 0) input = rows + kFields * kCellState;
      source.tables[f] =
          table(input, rows + kFields * (f < kGates ? kOutputs + f : kTanhCyRow), f == 2 || f == kTanhCy);
    }
    sources_.push_back(source);
  }
}

AlignedBytes RandomStack::pack() const {
  const Packer packer(sizes_, sources_);
  AlignedBytes blob(packer.bytes());
  packer.write(blob.data());
  return blob;
}

MatrixSource RandomStack::matrix(Dice& dice, int64_t rows, int64_t depth, bool is_float, bool affine) {
  MatrixSource source;
  source.depth = depth;
  std::vector<float> bias(rows);
  for (float& b : bias) b = dice.real(-1, 1);
  source.bias = keep(std::move(bias));
  const float range = 2.0f / std::sqrt(static_cast<float>(depth));
  if (is_float) {
    std::vector<float> weights(rows * depth);
    for (float& w : weights) w = dice.real(-range, range);
    source.float_weights = keep(std::move(weights));
    return source;
  }
  std::vector<int8_t> weights(rows * depth);
  const int64_t least = dice.chance(0.5) ? -128 : -127;
  for (int8_t& w : weights) w = static_cast<int8_t>(dice.integer(least, 127));
  source.int8_weights = keep(std::move(weights));
  std::vector<float> scales(rows);
  for (float& s : scales) s = range / 127 * dice.real(0.5f, 1.5f);
  source.scales = keep(std::move(scales));
  std::vector<int32_t> zero_points(rows);
  for (int32_t& z : zero_points) z = affine ? static_cast<int32_t>(dice.integer(-128, 127)) : 0;
  source.zero_points = keep(std::move(zero_points));
  return source;
}

std::vector<double> RandomStack::grids(Dice& dice, Style style) {
  const bool mixed = style == Style::kMixed;
  const bool projects = sizes_.proj_size != 0;
  // a part without a grid may have a row of zeros or none
  const int count = kParts + (projects && (!mixed || dice.chance(0.5)) && style != Style::kFloat);
  std::vector<double> all(count * kFields, 0.0);
  double* rows = all.data();
  const auto row = [&](int i) { return rows + i * kFields; };
  if (style == Style::kFloat) return all;
  if (style == Style::kInt8Preset) {
    for (int i : {kX, kHx}) set(row(i), i == kX ? -3.1 : -0.98, i == kX ? 2.7 : 1.0, 0, 255);
    for (int gate = 0; gate < kGates; ++gate) {
      set_steps(row(kGates4 + gate), 12.0 / 2047, -2048, 2047);
      set_steps(row(kOutputs + gate), 0x1p-15, gate == 2 ? -32768 : 0, 32768);
    }
    set_steps(row(kTanhInput), 10.0 / 2047, -2048, 2047);
    set_steps(row(kTanhCyRow), 0x1p-15, -32768, 32768);
    std::memcpy(row(projects ? kHyRow : kOgateCy), row(kHx), kFields * sizeof(double));
    if (projects) set(row(kOgateCy), -0.9, 0.95, 0, 255);
    return all;
  }
  for (int i = 0; i < count; ++i) {
    if (mixed && dice.chance(0.4)) continue;
    const double range = i == kX ? 3 : i >= kIgates && i < kOutputs ? 8 : i >= kFgateCx && i <= kTanhInput ? 4 : 1.1;
    const bool is_gates16 = style == Style::kGates16 || style == Style::kGates16Preset;
    const bool is_byte = style == Style::kAllInt8 || i == kX || i == kHx || (is_gates16 && i >= kOgateCy);
    const int bits = is_byte ? 8 : 16;
    set_random(dice, row(i), range, mixed ? 2 : bits, mixed ? 16 : bits);
  }
  if (style == Style::kGates16Preset) {
    for (int gate = 0; gate < kGates; ++gate) {
      set_steps(row(kGates4 + gate), 12.0 / 32767, -32768, 32767);
      set_steps(row(kOutputs + gate), 1.0 / 32767, -32767, 32767);
    }
    set_steps(row(kTanhInput), 10.0 / 32767, -32768, 32767);
    set_steps(row(kTanhCyRow), 1.0 / 32767, -32767, 32767);
  }
  if (!mixed || dice.chance(0.5)) {
    const int written = !projects ? kOgateCy : count > kParts ? kHyRow : kHx;
    std::memmove(row(kHx), row(written), kFields * sizeof(double));
    std::memcpy(row(kCx), row(kCellState), kFields * sizeof(double));
  }
  return all;
}

TableSource RandomStack::table(const double* input, const double* output, bool is_tanh) {
  if (input[0] == 0) return {};
  std::vector<float> values;
  for (double q = input[3]; q <= input[4]; ++q) {
    const double v = static_cast<float>(q - input[2]) * static_cast<float>(input[0]);
    double y = is_tanh ? std::tanh(v) : 1 / (1 + std::exp(-v));
    if (output[0] != 0) {
      const double steps = std::nearbyint(y / output[0]);
      const double cut = std::min(std::max(steps, output[3] - output[2]), output[4] - output[2]) + 0.0;
      values.push_back(static_cast<float>(cut) * static_cast<float>(output[0]));
    } else {
      values.push_back(static_cast<float>(y));
    }
  }
  const auto count = static_cast<int64_t>(values.size());
  return {keep(std::move(values)), count};
}

FloatCall::FloatCall(Dice& dice, const Sizes& all_sizes, int64_t all_steps, int64_t all_rows, bool with_states)
    : sizes(all_sizes), steps(all_steps), rows(all_rows) {
  x.resize(steps * rows * sizes.input_size);
  for (float& v : x) v = dice.real(-4, 4);
  const int64_t states = sizes.cells() * rows;
  if (with_states) {
    hx.resize(states * sizes.h_size());
    cx.resize(states * sizes.hidden_size);
    for (float& v : hx) v = dice.real(-1.2f, 1.2f);
    for (float& v : cx) v = dice.real(-3, 3);
  }
  // a value that no cell gives, so that what is not written shows
  output.assign(steps * rows * sizes.num_directions * sizes.h_size(), 1e30f);
  h_n.assign(states * sizes.h_size(), 1e30f);
  c_n.assign(states * sizes.hidden_size, 1e30f);
}

Call FloatCall::call() {
  Call call{};
  call.steps = steps;
  call.rows = rows;
  const auto row_bytes = static_cast<int64_t>(sizes.input_size * sizeof(float));
  call.x = {x.data(), DType::kFloat32, rows * row_bytes, row_bytes};
  call.hx = hx.empty() ? nullptr : hx.data();
  call.cx = cx.empty() ? nullptr : cx.data();
  call.output = output.data();
  call.h_n = h_n.data();
  call.c_n = c_n.data();
  return call;
}

void FloatCall::make_signal(Signal signal, int64_t period) {
  const int64_t items = rows * sizes.input_size;
  for (int64_t t = 1; t < steps; ++t) {
    float* now = x.data() + t * items;
    const float* before = now - items;
    if (signal == Signal::kSilence && t % (4 * period) >= period) std::fill_n(now, items, 0.0f);
    if (signal == Signal::kSlowSensor && t % period != 0) std::copy_n(before, items, now);
    if (signal == Signal::kOneByOne) {
      for (int64_t i = 0; i < items; ++i) {
        if (i % sizes.input_size != t % sizes.input_size) now[i] = before[i];
      }
    }
  }
}

}  // namespace lstm_quant::testing
