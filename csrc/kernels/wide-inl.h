// The sums of 16-bit operands over a vector class V, exact at any depth. Steps less the middle of their grid fit int16;
// their products with int8 weights are summed in int32 for as many groups as cannot overflow, then parted: 256 times a
// high part, and a low part, each summed in int32. Of V this needs, beside what tail-inl.h lists:
//
//   even_bytes(I), odd_bytes(I)     the int8 at even or odd places, each widened to int16
//   add_pairs(I sum, I a, I b)      sum + a * b over pairs of neighbouring int16
//   high_part(I), low_part(I)       v >> 8 and v & 255
//   join_parts(I high, I low) -> F  the float32 nearest to 256 * high + low
//
// For 32 products of AVX2 that is two vpmaddwd and two vpaddd, beside three operations to widen weights, which the rows
// of a tile share. Split into bytes instead, as vpmaddubsw and vpdpbusd would take them, operands cost twice what bytes
// do: seven operations with AVX2.
//
// Include it inside the target region of an ISA.
#pragma once

#include "kernels.h"
#include "scalar_sums.h"
#include "sums-inl.h"

namespace lstm_quant {
namespace {

// Depth up to which the sums of the parts, and of a row's steps, fit int32: steps have 16 bits and a sign, and weights
// less their zero points differ from zero by at most 255.
constexpr int32_t kMaxWideDepth = (1 << 15) - 1;

// A group of four steps less the middle, as pairs of int16 for the weights at even and at odd places.
struct WideGroup {
  int16_t even[2], odd[2];
};

// Takes the steps of a row, and their sum; beyond its depth, where weights are zero, there are zeros. False where a
// step less the middle does not fit.
inline bool take_row(const int32_t* steps, const Projection& projection, WideGroup* groups, int32_t& row_sum) {
  const int32_t depth = projection.depth, middle = projection.offset;
  int32_t sum = 0, lost = 0;
  const auto take = [&](int32_t k) {
    const int32_t from_middle = steps[k] - middle;
    const auto taken = static_cast<int16_t>(from_middle);
    sum += steps[k];
    lost |= from_middle ^ taken;
    return taken;
  };
  int32_t k = 0;
  for (; k + kGroup <= depth; k += kGroup) *groups++ = {{take(k), take(k + 2)}, {take(k + 1), take(k + 3)}};
  for (; k < projection.padded_depth; k += kGroup) {
    int16_t rest[kGroup] = {};
    for (int32_t i = 0; i < depth - k; ++i) rest[i] = take(k + i);
    *groups++ = {{rest[0], rest[2]}, {rest[1], rest[3]}};
  }
  row_sum = sum;
  return lost == 0;
}

template <class Vector, int kTileRows, int kTileVectors>
struct WideDot {
  using V = Vector;
  using I = typename V::I;
  struct Operand {
    I even, odd;
  };
  struct Weights {
    I even, odd;
  };
  struct Sum {
    I recent, high, low;
  };
  static constexpr int kGroups = 1;
  static constexpr bool kApart = false;
  // A group adds at most 4 * 2^15 * 2^7 = 2^24 to a sum.
  static constexpr size_t kPartedGroups = 127;
  static constexpr int kOperandBytes = sizeof(WideGroup);
  static constexpr int kMaxRows = kTileRows;
  static constexpr bool kFetchesLater = false;
  static constexpr int kSplit = 1;
  static constexpr int kFetchBytes = 0;

  static constexpr int vectors(int rows) { return rows > 1 ? kTileVectors : 4; }
  static Operand operand(const char* p) {
    int32_t even, odd;
    std::memcpy(&even, p, sizeof even);
    std::memcpy(&odd, p + sizeof even, sizeof odd);
    return {V::set_i32(even), V::set_i32(odd)};
  }
  // middle * sum of weights - zero point * sum of steps, in two parts: middle and sum of steps are parted.
  static Sum start(const BlockWeights& block, int column, int32_t row_sum) {
    const I weight_sums = V::load_i32(block.weight_sums + column),
            zero_points = V::load_i32(block.zero_points + column);
    const auto part = [&](int32_t of_middle, int32_t of_steps) {
      return V::add_product(V::add_product(V::set_i32(0), weight_sums, of_middle), zero_points, -of_steps);
    };
    return {V::set_i32(0), part(block.offset >> 8, row_sum >> 8), part(block.offset & 0xFF, row_sum & 0xFF)};
  }
  static Sum zero() { return {V::set_i32(0), V::set_i32(0), V::set_i32(0)}; }
  static Weights load(const char* p) {
    const I group = V::load_i32(reinterpret_cast<const int32_t*>(p));
    return {in_register(V::even_bytes(group)), in_register(V::odd_bytes(group))};
  }
  static Sum add(const Sum& sum, const Operand& operand, const Weights& weights) {
    const I even = in_register(V::add_pairs(sum.recent, operand.even, weights.even));
    return {in_register(V::add_pairs(even, operand.odd, weights.odd)), sum.high, sum.low};
  }
  static Sum part(const Sum& sum) {
    return {V::set_i32(0), V::add_i32(sum.high, V::high_part(sum.recent)),
            V::add_i32(sum.low, V::low_part(sum.recent))};
  }
  static Sum join(const Sum& a, const Sum&) { return a; }
  static typename V::F total(const Sum& sum) { return V::join_parts(sum.high, sum.low); }
};

template <class Dot>
class WideSums {
 public:
  WideSums(const Projection& projection, const CallRows& rows, const Walk&)
      : projection_(projection), operand_(rows.first), stride_(rows.stride) {
    if (projection.depth > kMaxWideDepth) return;
    const size_t groups = projection.padded_depth / kGroup;
    auto* taken = reinterpret_cast<WideGroup*>(rows.scratch);
    auto* row_sums = reinterpret_cast<int32_t*>(taken + rows.count * groups);
    auto* fits = reinterpret_cast<bool*>(row_sums + rows.count);
    for (size_t r = 0; r < rows.count && !rows.written; ++r) {
      fits[r] = take_row(steps(r), projection, taken + r * groups, row_sums[r]);
    }
    rows_ = {rows.scratch, groups * sizeof(WideGroup), row_sums};
    fits_ = fits;
  }

  static size_t scratch_bytes(size_t rows, size_t padded_depth) {
    return rows * (padded_depth / kGroup * sizeof(WideGroup) + sizeof(int32_t) + sizeof(bool));
  }

  template <class Sink>
  void operator()(int32_t block, size_t first_row, size_t rows, const Sink& sink) const {
    using V = typename Dot::V;
    for (size_t row = first_row, end = first_row + rows; row < end;) {
      const size_t first = row;
      while (row < end && fits(row)) ++row;
      sum_all_rows<Dot>(rows_, first, row - first, BlockWeights(projection_, block), sink);
      for (; row < end && !fits(row); ++row) {
        float sums[kBlock];
        scalar_sums(projection_, operand_ + row * stride_, block, sums);
        for (int column = 0; column < kBlock; column += V::kLanes) sink(row, column, V::load(sums + column));
      }
    }
  }

 private:
  const int32_t* steps(size_t row) const { return reinterpret_cast<const int32_t*>(operand_ + row * stride_); }
  bool fits(size_t row) const { return fits_ != nullptr && fits_[row]; }

  const Projection& projection_;
  const char* operand_;
  size_t stride_;
  OperandRows rows_{};
  // Whether vectors take a row: not where its grid has 2^16 + 1 values, and the last occurs. Null: they take none.
  const bool* fits_ = nullptr;
};

}  // namespace
}  // namespace lstm_quant
