// The integer sums of every ISA that this machine can run, where int16 or int32 would not hold them: exact.
#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "check.h"
#include "random_stack.h"
#include "tested_kernels.h"

namespace lstm_quant::testing {
namespace {

// Operands and weights that are all the same, and what is summed over them, in arrays of their own.
class Uniform {
 public:
  Uniform(Sums sums, int32_t depth, int weight, int32_t zero_point)
      : weights_(round_up(depth, kDepthStep) * kBlock + kAlign), depth_(depth) {
    projection_.sums = sums;
    projection_.depth = depth;
    projection_.padded_depth = static_cast<int32_t>(round_up(depth, kDepthStep));
    projection_.block_bytes = static_cast<size_t>(projection_.padded_depth) * kBlock;
    constexpr int32_t kGroupBytes = kGroup * kBlock;
    std::memset(weights_.data(), 0, weights_.size());
    std::memset(weights_.data(), weight, static_cast<size_t>(depth / kGroup) * kGroupBytes);
    for (int byte = 0; byte < kGroupBytes; ++byte) {  // the last group holds what is left
      if (byte % kGroup < depth % kGroup) {
        weights_.data()[depth / kGroup * kGroupBytes + byte] = static_cast<uint8_t>(weight);
      }
    }
    std::fill_n(floats(ones_), kBlock, 1.0f);
    std::fill_n(reinterpret_cast<int32_t*>(weight_sums_.data()), kBlock, weight * depth);
    std::fill_n(reinterpret_cast<int32_t*>(zero_points_.data()), kBlock, zero_point);
    projection_.weights = weights_.data();
    projection_.weight_sums = reinterpret_cast<const int32_t*>(weight_sums_.data());
    projection_.weight_zero_points = reinterpret_cast<const int32_t*>(zero_points_.data());
    projection_.multipliers = floats(ones_);
    projection_.biases = floats(biases_);
  }
  Uniform(const Uniform&) = delete;

  // Checks that every sum of rows of `value` is `sum`, which is rounded once.
  template <class Item>
  void check(Item value, int32_t offset, int64_t sum) {
    projection_.offset = offset;
    const size_t stride = round_up(projection_.padded_depth * sizeof(Item), kAlign);
    for (const size_t rows : {1, 2, 5}) {
      AlignedBytes operand = zeros(rows * stride);
      for (size_t row = 0; row < rows; ++row) {
        std::fill_n(reinterpret_cast<Item*>(operand.data() + row * stride), depth_, value);
      }
      check_sums(operand, stride, std::vector<int64_t>(rows, sum));
    }
  }

  // Checks the sums of `rows` rows of values, one after the other, with `padding` beyond each.
  void check_rows(const std::vector<uint8_t>& values, size_t rows, uint8_t padding) {
    projection_.offset = 0;
    const size_t stride = round_up(projection_.padded_depth, kAlign);
    AlignedBytes operand(rows * stride);
    std::memset(operand.data(), padding, operand.size());
    std::vector<int64_t> sums(rows);
    for (size_t row = 0; row < rows; ++row) {
      for (int32_t k = 0; k < depth_; ++k) {
        operand.data()[row * stride + k] = values[row * depth_ + k];
        sums[row] += int64_t{values[row * depth_ + k]} * static_cast<int8_t>(weights_.data()[0]);
      }
    }
    check_sums(operand, stride, sums);
  }

  // Checks that kernels write the same in the scratch for rows of values as for rows that the middle of 8 bits pads.
  void check_padding(const std::vector<uint8_t>& values, size_t rows, uint8_t padding) const {
    const size_t stride = round_up(projection_.padded_depth, kAlign);
    AlignedBytes operand(rows * stride), igates = zeros(rows * kBlock * 4);
    for (const Kernels* kernels : vector_kernels()) {
      AlignedBytes scratch = zeros(kernels->scratch_bytes(rows, projection_.padded_depth));
      const auto written = [&](uint8_t beyond) {
        std::memset(operand.data(), beyond, operand.size());
        for (size_t row = 0; row < rows; ++row) {
          std::copy_n(values.data() + row * depth_, depth_, operand.data() + row * stride);
        }
        std::memset(scratch.data(), 0, scratch.size());
        kernels->project({&projection_, rows, operand.data(), stride, floats(igates), kBlock, 0, 1, scratch.data()});
        return scratch;
      };
      const AlignedBytes want = written(128), got = written(padding);
      CHECK(std::memcmp(want.data(), got.data(), want.size()) == 0)
          << kernels->name << ", depth " << depth_ << ", " << rows << " rows padded with " << int{padding};
    }
  }

 private:
  // Of operand rows that are read, and again of what that left in the scratch; of deep ones once, as they take long,
  // and by the scalar kernel, which takes each row alone, of only one.
  void check_sums(const AlignedBytes& operand, size_t stride, const std::vector<int64_t>& sums) const {
    const size_t rows = sums.size();
    const bool deep = depth_ >= 4096;
    for (const Kernels* kernels : tested_kernels()) {
      if (deep && rows > 1 && kernels == &kScalarKernels) continue;
      AlignedBytes scratch(kernels->scratch_bytes(rows, projection_.padded_depth)), igates = zeros(rows * kBlock * 4);
      ProjectArgs args{&projection_, rows, operand.data(), stride, floats(igates), kBlock, 0, 1, scratch.data()};
      for (int call = 0; call < (deep ? 1 : 2); ++call) {
        args.same_operand = call > 0;
        std::memset(igates.data(), 0, igates.size());
        kernels->project(args);
        for (size_t i = 0; i < rows * kBlock; ++i) {
          CHECK(floats(igates)[i] == static_cast<float>(sums[i / kBlock]))
              << kernels->name << ", depth " << depth_ << ", row " << i / kBlock << ": " << floats(igates)[i] << " for "
              << sums[i / kBlock];
        }
      }
    }
  }

  AlignedBytes weights_;
  AlignedBytes ones_ = zeros(kBlock * 4 + kAlign), biases_ = zeros(kBlock * 4 + kAlign),
               weight_sums_ = zeros(kBlock * 4 + kAlign), zero_points_ = zeros(kBlock * 4 + kAlign);
  int32_t depth_;
  Projection projection_;
};

// Products at the limits of uint8 and int8, whose sums in int16 would be cut.
TEST(extreme_products_are_summed_exactly) {
  constexpr int kDepth = 72;
  for (const int weight : {-128, -127, 127, 1}) {
    Uniform uniform(Sums::kInt8, kDepth, weight, 0);
    for (const int value : {0, 1, 127, 128, 129, 255}) {
      for (const int offset : {0, -255, 128}) {
        uniform.check(static_cast<uint8_t>(value), offset, int64_t{value + offset} * weight * kDepth);
      }
    }
  }
}

// Operand values near the middle, among which some at the ends: few, so that kernels take values together that would
// not fit with those, and many; weights at their limits, where what does not fit would be cut. Of two groups' products,
// those with 63 fit int16 whatever their signs; with weights of one sign, those with 32, or 64 and zeros, just do. The
// last pair of groups is there in part, with anything beyond.
TEST(products_of_values_near_the_middle_are_summed_exactly) {
  Dice dice(7);
  for (const int most : {63, 64, 33, 32, 16}) {
    for (const int ends_in_100 : {0, 1, 3, 10, 50}) {
      for (const int weight : {-128, 127}) {
        for (const size_t rows : {1, 2, 3, 7, 13}) {
          const auto depth = static_cast<int32_t>(dice.integer(417, 424));
          Uniform uniform(Sums::kInt8, depth, weight, 0);
          std::vector<uint8_t> values(rows * depth);
          for (uint8_t& value : values) {
            const int64_t from_middle = dice.one_of({-most, -most / 2, 0, most / 2, most});
            value = static_cast<uint8_t>(dice.chance(ends_in_100 / 100.0) ? dice.one_of({0, 255}) : 128 + from_middle);
          }
          const auto padding = static_cast<uint8_t>(dice.integer(0, 255));
          uniform.check_rows(values, rows, padding);
          uniform.check_padding(values, rows, padding);
        }
      }
    }
  }
}

// Rows of which any number of pairs of groups do not fit, from none to all: through every number at which kernels take
// them otherwise, or run out of the room for what they keep apart, whether it is all of one row or some of each. The
// depths are about that from which kernels look for pairs, and one at which that room is full to the last byte.
TEST(sums_are_exact_however_many_pairs_do_not_fit) {
  constexpr size_t kPair = 2 * kGroup;
  // each group fits by itself, both together do not: neither signed values nor magnitudes
  constexpr uint8_t kMisfit[kPair] = {192, 192, 128, 128, 192, 192, 128, 128};
  for (const int32_t depth : {88, 96, 248}) {
    const size_t pairs = depth / kPair;
    for (const int weight : {-128, 127}) {
      Uniform uniform(Sums::kInt8, depth, weight, 0);
      for (const size_t rows : {1, 2, 3}) {
        for (size_t misfits = 0; misfits <= rows * pairs; ++misfits) {
          for (const bool row_by_row : {false, true}) {
            std::vector<uint8_t> values(rows * depth, 128);
            for (size_t i = 0; i < misfits; ++i) {
              const size_t row = row_by_row ? i / pairs : i % rows, pair = row_by_row ? i % pairs : i / rows;
              std::copy_n(kMisfit, kPair, values.data() + row * depth + pair * kPair);
            }
            uniform.check_rows(values, rows, 255);
          }
        }
      }
    }
  }
}

// The largest depth at which int32 holds every sum of 8 bits, though not every part of it.
TEST(sums_at_the_end_of_int32_are_exact) {
  constexpr int32_t kDepth = 65793;
  for (const int weight : {-128, 127}) {
    Uniform uniform(Sums::kInt8, kDepth, weight, 0);
    uniform.check(uint8_t{255}, 0, int64_t{255} * weight * kDepth);
    uniform.check(uint8_t{0}, -255, int64_t{-255} * weight * kDepth);
    uniform.check(uint8_t{160}, 0, int64_t{160} * weight * kDepth);
  }
}

// Rows so deep that only a grid of fewer values keeps their sums in int32: the values less the middle may leave it.
TEST(sums_of_narrow_grids_at_great_depths_are_exact) {
  constexpr int32_t kDepth = 140000;
  Uniform uniform(Sums::kInt8, kDepth, -128, 0);
  for (const int value : {0, 119}) uniform.check(static_cast<uint8_t>(value), 0, int64_t{value} * -128 * kDepth);
}

// Sums of 16 bits leave int32 from a depth of 512 on, which is also where vectors part them first, and their parts at
// some 33,000.
TEST(sums_beyond_int32_are_exact) {
  for (const int32_t depth : {508, 509, 512, 516, 600, 1016, 32767, 70000}) {
    for (const auto& [weight, zero_point] : {std::pair{-128, 0}, {-128, 127}, {127, -128}}) {
      Uniform uniform(Sums::kWide, depth, weight, zero_point);
      for (const auto& [steps, middle] :
           {std::pair{-65535, -32767}, {65535, 32768}, {-32768, 0}, {32767, 0}, {1, 32768}, {32768, 0}, {65536, 32768}})
        uniform.check(steps, middle, int64_t{steps} * (weight - zero_point) * depth);
    }
  }
}

}  // namespace
}  // namespace lstm_quant::testing
