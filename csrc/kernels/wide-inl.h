// The sums of 16-bit operands over a vector class V, exact at any depth. A step is 256 times a high part and a low
// part, each of which fits int16 and whose products with int8 weights are summed in int32; the two sums are joined in
// int64. Of V this needs, beside what tail-inl.h lists:
//
//   even_bytes(I), odd_bytes(I)     the int8 at even or odd places, each widened to int16
//   add_pairs(I sum, I a, I b)      sum + a * b over pairs of neighbouring int16
//
// Include it inside the target region of an ISA.
#pragma once

#include "kernels.h"
#include "scalar_sums.h"
#include "sums-inl.h"

namespace lstm_quant {
namespace {

// Depth up to which the int32 sums of the parts, and of a row's steps, cannot overflow: steps have 17 bits and a sign.
constexpr int32_t kMaxWideDepth = (1 << 15) - 1;

// A group of four steps, as pairs of int16 for the weights at even and at odd places.
struct WideGroup {
  int16_t high_even[2], high_odd[2], low_even[2], low_odd[2];
};

inline void split_steps(const int32_t* steps, WideGroup& group) {
  const auto high = [&](int i) { return static_cast<int16_t>(steps[i] >> 8); };
  const auto low = [&](int i) { return static_cast<int16_t>(steps[i] & 0xFF); };
  group = {{high(0), high(2)}, {high(1), high(3)}, {low(0), low(2)}, {low(1), low(3)}};
}

template <class Vector, int kTileRows>
struct WideDot {
  using V = Vector;
  using I = typename V::I;
  struct Operand {
    I high_even, high_odd, low_even, low_odd;
  };
  struct Weights {
    I even, odd;
  };
  struct Sum {
    I high, low;
  };
  static constexpr int kGroups = 1;
  static constexpr int kOperandBytes = sizeof(WideGroup);
  static constexpr int kMaxRows = kTileRows;
  static constexpr bool kFetchesLater = false;
  static constexpr int kSplit = 1;
  static constexpr int kFetchBytes = 0;

  static constexpr int vectors(int) { return 4; }
  static Operand operand(const char* p) {
    int32_t pairs[4];
    std::memcpy(pairs, p, sizeof pairs);
    return {V::set_i32(pairs[0]), V::set_i32(pairs[1]), V::set_i32(pairs[2]), V::set_i32(pairs[3])};
  }
  // What the zero points take away from the sum, in the same two parts.
  static Sum start(const BlockWeights& block, int column, int32_t row_sum) {
    int32_t high[V::kLanes], low[V::kLanes];
    for (int i = 0; i < V::kLanes; ++i) {
      const int64_t sum = -int64_t{block.zero_points[column + i]} * row_sum;
      high[i] = static_cast<int32_t>(sum >> 8);
      low[i] = static_cast<int32_t>(sum & 0xFF);
    }
    return {V::load_i32(high), V::load_i32(low)};
  }
  static Sum zero() { return {V::set_i32(0), V::set_i32(0)}; }
  static Weights load(const char* p) {
    const I group = V::load_i32(reinterpret_cast<const int32_t*>(p));
    return {V::even_bytes(group), V::odd_bytes(group)};
  }
  static Sum add(const Sum& sum, const Operand& operand, const Weights& weights) {
    return {V::add_pairs(V::add_pairs(sum.high, operand.high_even, weights.even), operand.high_odd, weights.odd),
            V::add_pairs(V::add_pairs(sum.low, operand.low_even, weights.even), operand.low_odd, weights.odd)};
  }
  static Sum join(const Sum& a, const Sum&) { return a; }
  static typename V::F total(const Sum& sum) {
    int32_t high[V::kLanes], low[V::kLanes];
    float totals[V::kLanes];
    V::store_i32(high, sum.high);
    V::store_i32(low, sum.low);
    for (int i = 0; i < V::kLanes; ++i) totals[i] = static_cast<float>(int64_t{high[i]} * 256 + low[i]);
    return V::load(totals);
  }
};

template <class Dot>
class WideSums {
 public:
  WideSums(const Projection& projection, const void* operand, size_t stride, size_t rows, const Walk&, void* scratch)
      : projection_(projection), operand_(static_cast<const char*>(operand)), stride_(stride) {
    if (projection.depth > kMaxWideDepth) return;
    const size_t groups = projection.padded_depth / kGroup;
    auto* split = static_cast<WideGroup*>(scratch);
    auto* row_sums = reinterpret_cast<int32_t*>(split + rows * groups);
    for (size_t r = 0; r < rows; ++r) {
      const auto* steps = reinterpret_cast<const int32_t*>(operand_ + r * stride);
      for (size_t g = 0; g < groups; ++g) split_steps(steps + g * kGroup, split[r * groups + g]);
      row_sums[r] = 0;
      for (int32_t k = 0; k < projection.depth; ++k) row_sums[r] += steps[k];
    }
    rows_ = {static_cast<const char*>(scratch), groups * sizeof(WideGroup), row_sums};
  }

  template <class Sink>
  void operator()(int32_t block, size_t first_row, size_t rows, const Sink& sink) const {
    using V = typename Dot::V;
    if (projection_.depth <= kMaxWideDepth) {
      return sum_all_rows<Dot>(rows_, first_row, rows, BlockWeights(projection_, block), sink);
    }
    for (size_t row = first_row; row < first_row + rows; ++row) {
      float sums[kBlock];
      scalar_sums(projection_, operand_ + row * stride_, block, sums);
      for (int column = 0; column < kBlock; column += V::kLanes) sink(row, column, V::load(sums + column));
    }
  }

 private:
  const Projection& projection_;
  const char* operand_;
  size_t stride_;
  OperandRows rows_{};
};

}  // namespace
}  // namespace lstm_quant
