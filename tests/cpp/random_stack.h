// Random stacks of cells and calls of them, for comparing one way of running them with another.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <list>
#include <random>
#include <vector>

#include "lstm.h"
#include "pack.h"

namespace lstm_quant::testing {

// What a cell's parts are, from the commonest to the strangest.
enum class Style { kInt8Preset, kAllInt8, kGates16, kGates16Preset, kAll16, kFloat, kMixed };
constexpr Style kStyles[] = {Style::kInt8Preset, Style::kAllInt8, Style::kGates16, Style::kGates16Preset,
                             Style::kAll16,      Style::kFloat,   Style::kMixed};

class Dice {
 public:
  explicit Dice(uint32_t seed) : engine_(seed) {}
  int64_t integer(int64_t least, int64_t largest) {
    return std::uniform_int_distribution<int64_t>(least, largest)(engine_);
  }
  int64_t one_of(std::initializer_list<int64_t> values) {
    return values.begin()[integer(0, static_cast<int64_t>(values.size()) - 1)];
  }
  float real(float least, float largest) { return std::uniform_real_distribution<float>(least, largest)(engine_); }
  bool chance(double probability) { return std::bernoulli_distribution(probability)(engine_); }

 private:
  std::mt19937 engine_;
};

// A proj_size for so many hidden units: often none, seldom more than they are.
int64_t random_proj_size(Dice& dice, int64_t hidden_size);

// Bytes, a blob's or others, at an aligned place of exactly their number, so that a sanitizer sees what is read beyond.
class AlignedBytes {
 public:
  explicit AlignedBytes(size_t count);
  ~AlignedBytes();
  AlignedBytes(AlignedBytes&& other) noexcept;
  AlignedBytes(const AlignedBytes& other);

  uint8_t* data() { return data_; }
  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  uint8_t* data_;
  size_t size_;
};

// Rounded up to whole lines.
AlignedBytes zeros(size_t count);

inline float* floats(AlignedBytes& bytes) {
  return reinterpret_cast<float*>(bytes.data());
}

// Arrays that CellSource points into.
class RandomStack {
 public:
  RandomStack(Dice& dice, const Sizes& sizes, Style style);

  const Sizes& sizes() const { return sizes_; }
  std::vector<CellSource>& sources() { return sources_; }
  AlignedBytes pack() const;

 private:
  template <class T>
  T* keep(std::vector<T> values);
  MatrixSource matrix(Dice& dice, int64_t rows, int64_t depth, bool is_float, bool affine);
  std::vector<double> grids(Dice& dice, Style style);
  TableSource table(const double* input, const double* output, bool is_tanh);

  Sizes sizes_;
  std::vector<CellSource> sources_;
  std::list<std::vector<float>> floats_;
  std::list<std::vector<int8_t>> bytes_;
  std::list<std::vector<int32_t>> words_;
  std::list<std::vector<double>> doubles_;
};

// How an input goes on from step to step.
enum class Signal { kNoise, kSilence, kSlowSensor, kOneByOne };
constexpr Signal kSignals[] = {Signal::kNoise, Signal::kSilence, Signal::kSlowSensor, Signal::kOneByOne};

// The arrays of a call with float32 in and out.
struct FloatCall {
  FloatCall(Dice& dice, const Sizes& sizes, int64_t steps, int64_t rows, bool with_states);
  Call call();
  // Makes of the noise that x is at first: bursts of `period` steps, then zeros for three times as long; values that
  // change every `period` steps; or one feature that changes at a step.
  void make_signal(Signal signal, int64_t period);

  Sizes sizes;
  int64_t steps, rows;
  std::vector<float> x, hx, cx, output, h_n, c_n;
};

}  // namespace lstm_quant::testing
