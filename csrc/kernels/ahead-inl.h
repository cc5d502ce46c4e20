// A single row's sums together with a part of a projection that later steps will need. The row alone is bound by
// reading its weights, the projection of several rows by multiplying, so that together they take little more than the
// longer of the two. Include it inside the target region of an ISA.
#pragma once

#include "kernels.h"
#include "sums-inl.h"
#include "tail-inl.h"

namespace lstm_quant {
namespace {

// Writes what is projected for a block.
template <class V>
struct WriteIgates {
  const float* multipliers;
  const float* biases;
  const Grid* grids;
  float* igates;
  size_t stride;

  WriteIgates(const ProjectArgs& args, int32_t block)
      : multipliers(args.projection->multipliers + static_cast<size_t>(block) * kBlock),
        biases(args.projection->biases + static_cast<size_t>(block) * kBlock),
        grids(args.projection->output),
        igates(args.igates + static_cast<size_t>(block - args.first_block) * kBlock),
        stride(args.igates_stride) {}

  void operator()(size_t row, int column, typename V::F sum) const {
    const auto v = V::add(V::mul(sum, V::load(multipliers + column)), V::load(biases + column));
    V::store(igates + row * stride + column, on_grid<V>(v, grids[column / kUnits]));
  }
};

// One of the kAheadParts parts of a block's projection: eight rows, a vector of columns, half of the depth. The first
// half leaves its sums as integers in the place of the igates that the second writes.
struct AheadPart {
  static constexpr int kRows = 8;
  static constexpr int kHalves = 2;
  static constexpr int kRowParts = kAheadRows / kRows;
  static_assert(kRowParts * kHalves * kGates == kAheadParts);

  int gate;  // a vector of columns is one gate of a block
  size_t first_row;
  int half;

  explicit AheadPart(int part)
      : gate(part / (kHalves * kRowParts)), first_row(part / kHalves % kRowParts * kRows), half(part % kHalves) {}
};

// Of Dot it needs, beside what sums-inl.h lists, `Weights load_once(const char*)`: weights that one product reads,
// which need no register of their own. Never inlined, as sum_tile. `index` is the block's.
template <class Dot, class Sink>
__attribute__((noinline)) void sum_row_ahead(const BlockWeights& block, const char* operand, const Sink& sink,
                                             const ProjectArgs& project, int32_t index, const AheadPart& part) {
  using V = typename Dot::V;
  static_assert(V::kLanes == kUnits, "a vector of columns is to be a gate");
  constexpr int kRows = AheadPart::kRows, kHalves = AheadPart::kHalves;
  constexpr size_t kVectorBytes = V::kLanes * sizeof(float);
  const BlockWeights ahead(*project.projection, index);
  const WriteIgates<V> write(project, index);
  const int ahead_column = part.gate * kUnits;
  const size_t half_groups = ahead.groups / kHalves, first_group = part.half * half_groups;
  const char* ahead_weights = ahead.weights + first_group * kWeightBytes + part.gate * kVectorBytes;
  const size_t stride = project.operand_stride;
  const char* ahead_operand =
      static_cast<const char*>(project.operand) + part.first_row * stride + first_group * Dot::kOperandBytes;
  float* igates = write.igates + part.first_row * write.stride + ahead_column;

  typename Dot::Sum sums[kGates], ahead_sums[kRows];
#pragma GCC unroll 8
  for (int v = 0; v < kGates; ++v) sums[v] = Dot::start(block, v * V::kLanes, 0);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    ahead_sums[r] = part.half == 0 ? Dot::start(ahead, ahead_column, 0)
                                   : V::load_i32(reinterpret_cast<const int32_t*>(igates + r * write.stride));
  }

  const char* weights = block.weights;
  const size_t together = block.groups / kHalves < half_groups ? block.groups / kHalves : half_groups;
  for (size_t group = 0; group < together; ++group) {
    const auto ahead_column_weights = Dot::load(ahead_weights);
#pragma GCC unroll 8
    for (int s = 0; s < kHalves; ++s) {
      const auto values = Dot::operand(operand);
#pragma GCC unroll 8
      for (int v = 0; v < kGates; ++v) sums[v] = Dot::add(sums[v], values, Dot::load_once(weights + v * kVectorBytes));
#pragma GCC unroll 8
      for (int i = 0; i < kRows / kHalves; ++i) {
        const int r = s * (kRows / kHalves) + i;
        ahead_sums[r] = Dot::add(ahead_sums[r], Dot::operand(ahead_operand + r * stride), ahead_column_weights);
      }
      weights += kWeightBytes;
      operand += Dot::kOperandBytes;
    }
    ahead_weights += kWeightBytes;
    ahead_operand += Dot::kOperandBytes;
  }
  // what is left of the deeper one
  for (size_t group = together * kHalves; group < block.groups; ++group) {
    const auto values = Dot::operand(operand);
#pragma GCC unroll 8
    for (int v = 0; v < kGates; ++v) sums[v] = Dot::add(sums[v], values, Dot::load_once(weights + v * kVectorBytes));
    weights += kWeightBytes;
    operand += Dot::kOperandBytes;
  }
  for (size_t group = together; group < half_groups; ++group) {
    const auto ahead_column_weights = Dot::load(ahead_weights);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      ahead_sums[r] = Dot::add(ahead_sums[r], Dot::operand(ahead_operand + r * stride), ahead_column_weights);
    }
    ahead_weights += kWeightBytes;
    ahead_operand += Dot::kOperandBytes;
  }

#pragma GCC unroll 8
  for (int v = 0; v < kGates; ++v) sink(0, v * V::kLanes, Dot::total(sums[v]));
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    if (part.half == 0) {
      V::store_i32(reinterpret_cast<int32_t*>(igates + r * write.stride), ahead_sums[r]);
    } else {
      write(part.first_row + r, ahead_column, Dot::total(ahead_sums[r]));
    }
  }
}

// The sums of the hidden projection of a single row; with those of a block goes the part of a projection ahead.
template <class Dot>
class AheadSums {
 public:
  explicit AheadSums(const StepArgs& args) : args_(args), part_(args.ahead_part) {}

  template <class Sink>
  void operator()(int32_t block, size_t, size_t, const Sink& sink) const {
    const char* h = static_cast<const char*>(args_.h);
    sum_row_ahead<Dot>(BlockWeights(args_.cell->hidden, block), h, sink, *args_.ahead, block, part_);
  }

 private:
  const StepArgs& args_;
  AheadPart part_;
};

}  // namespace
}  // namespace lstm_quant
