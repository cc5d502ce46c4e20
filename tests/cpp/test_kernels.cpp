// The kernels of every ISA that this machine can run, against the scalar ones: the same bits.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "blob.h"
#include "check.h"
#include "convert.h"
#include "dispatch.h"
#include "random_stack.h"
#include "tested_kernels.h"

namespace lstm_quant::testing {
namespace {

std::vector<const Kernels*> vector_kernels() {
  auto kernels = tested_kernels();
  kernels.pop_back();  // scalar
  return kernels;
}

AlignedBytes zeros(size_t count) {
  AlignedBytes bytes(round_up(count, kAlign));
  std::memset(bytes.data(), 0, bytes.size());
  return bytes;
}

float* floats(AlignedBytes& bytes) {
  return reinterpret_cast<float*>(bytes.data());
}

// Operand rows of a projection: values of all kinds, and arbitrary ones beyond its depth, where rows may be read.
struct Operand {
  Operand(Dice& dice, const Projection& projection, const Grid& grid, size_t rows)
      : stride(round_up(projection.padded_depth * operand_item_bytes(projection.sums), kAlign)),
        bytes(zeros(rows * stride)) {
    for (size_t row = 0; row < rows; ++row) fill(dice, projection, grid, bytes.data() + row * stride);
  }

  void fill(Dice& dice, const Projection& projection, const Grid& grid, uint8_t* row) const {
    const Sums sums = projection.sums;
    const int64_t kind = dice.integer(0, 4), base = dice.integer(0, 128);
    for (size_t i = 0; i < stride / operand_item_bytes(sums); ++i) {
      const int64_t bytes_of[] = {0, 255, dice.integer(0, 1) * 255, base + dice.integer(0, 127), dice.integer(0, 255)};
      if (sums == Sums::kInt8) row[i] = static_cast<uint8_t>(bytes_of[kind]);
      if (sums == Sums::kWide) {
        const auto low = static_cast<int64_t>(grid.low), high = static_cast<int64_t>(grid.high);
        const int64_t steps[] = {low, high, dice.chance(0.5) ? low : high, 0, dice.integer(low, high)};
        const bool beyond = i >= static_cast<size_t>(projection.depth);  // from which nothing is to be subtracted
        reinterpret_cast<int32_t*>(row)[i] =
            beyond ? std::numeric_limits<int32_t>::min() : static_cast<int32_t>(steps[kind]);
      }
      if (sums == Sums::kFloat) {
        reinterpret_cast<float*>(row)[i] = dice.real(-1, 1) * (dice.chance(0.1) ? 1e4f : 1.0f);
      }
    }
  }

  size_t stride;
  AlignedBytes bytes;
};

// What a step gives, in arrays of exactly their size.
struct Outcome {
  AlignedBytes igates, c, h;
  std::vector<float> output;
};

bool same_floats(const float* a, const float* b, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    if (std::memcmp(a + i, b + i, sizeof *a) != 0 && !(std::isnan(a[i]) && std::isnan(b[i]))) return false;
  }
  return true;
}

struct Case {
  size_t rows;
  int32_t first_block, last_block;
  bool descending;
};

Outcome run(const Kernels& kernels, const Cell& cell, const Case& one, const Operand& x, const Operand& h,
            const AlignedBytes& c) {
  const size_t stride = static_cast<size_t>(one.last_block - one.first_block) * kBlock;
  const size_t c_stride = static_cast<size_t>(cell.blocks) * kUnits;
  const size_t depth = std::max(cell.input.padded_depth, cell.hidden.padded_depth);
  const size_t next_stride = round_up(c_stride * operand_item_bytes(cell.next_sums), kAlign);
  Outcome outcome{zeros(one.rows * stride * sizeof(float)), c, zeros(one.rows * next_stride),
                  std::vector<float>(one.rows * cell.hidden_size, -7.0f)};
  // the operand's rows are as wide as those of whole blocks of units
  const size_t units = round_up(cell.hidden.depth, kUnits);
  const size_t h_stride = round_up(units * operand_item_bytes(cell.hidden.sums), kAlign);
  AlignedBytes h_now = zeros(one.rows * h_stride);
  for (size_t row = 0; row < one.rows; ++row) {
    std::memcpy(h_now.data() + row * h_stride, h.bytes.data() + row * h.stride, std::min(h.stride, h_stride));
  }
  AlignedBytes scratch(kernels.scratch_bytes(one.rows, depth));
  kernels.project({&cell.input, one.rows, x.bytes.data(), x.stride, floats(outcome.igates), stride, one.first_block,
                   one.last_block, scratch.data()});
  kernels.step({&cell, one.rows, h_now.data(), h_stride, floats(outcome.igates), stride, floats(outcome.c), c_stride,
                outcome.h.data(), next_stride, outcome.output.data(), static_cast<size_t>(cell.hidden_size),
                one.first_block, one.last_block, one.descending, scratch.data()});
  return outcome;
}

AlignedBytes random_states(Dice& dice, const Cell& cell, size_t rows) {
  AlignedBytes c = zeros(rows * cell.blocks * kUnits * sizeof(float));
  const float specials[] = {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
                            std::numeric_limits<float>::quiet_NaN(), -0.0f, 1e-40f};
  for (size_t i = 0; i < c.size() / sizeof(float); ++i) {
    floats(c)[i] = dice.chance(0.01) ? specials[dice.integer(0, 4)] : dice.real(-4, 4);
  }
  return c;
}

void compare(Dice& dice, Style style, int64_t input_size, int64_t hidden_size, size_t rows) {
  const int64_t proj_size = random_proj_size(dice, hidden_size);
  const RandomStack stack(dice, {input_size, hidden_size, 1, 1, proj_size}, style);
  const AlignedBytes bytes = stack.pack();
  const BoundCell bound = Blob(bytes.data(), bytes.size()).cell(0);
  Cell plain = bound.cell;
  for (Function& function : plain.functions) function.evaluator = Evaluator::kNone;
  const auto first = static_cast<int32_t>(dice.chance(0.5) ? 0 : dice.integer(0, plain.blocks - 1));
  const auto last = static_cast<int32_t>(dice.chance(0.5) ? plain.blocks : dice.integer(first + 1, plain.blocks));
  const Case one{rows, first, last, dice.chance(0.5)};
  const Operand x(dice, plain.input, bound.x, rows), h(dice, plain.hidden, bound.hx, rows);
  const AlignedBytes c = random_states(dice, plain, rows);
  const Outcome want = run(kScalarKernels, plain, one, x, h, c);
  for (const Kernels* kernels : vector_kernels()) {
    const Outcome got = run(*kernels, bound.cell, one, x, h, c);
    const auto check = [&](bool same, const char* what) {
      CHECK(same) << "in " << what << " of " << kernels->name << ", style " << static_cast<int>(style) << ", "
                  << input_size << " -> " << hidden_size << " -> " << proj_size << ", " << rows << " rows, blocks "
                  << first << " to " << last;
    };
    const auto values = [](const AlignedBytes& b) { return reinterpret_cast<const float*>(b.data()); };
    check(same_floats(values(want.igates), values(got.igates), want.igates.size() / sizeof(float)), "igates");
    check(same_floats(values(want.c), values(got.c), want.c.size() / sizeof(float)), "c");
    check(same_floats(want.output.data(), got.output.data(), want.output.size()), "output");
    const bool is_float = plain.next_sums == Sums::kFloat;
    check(is_float ? same_floats(values(want.h), values(got.h), want.h.size() / sizeof(float))
                   : std::memcmp(want.h.data(), got.h.data(), want.h.size()) == 0,
          "the operand for h");
  }
}

TEST(every_isa_projects_and_steps_as_scalar_does) {
  Dice dice(21);
  for (const Style style : kStyles) {
    for (size_t rows = 1; rows <= 9; ++rows) {
      compare(dice, style, dice.integer(1, 70), dice.integer(1, 40), rows);
      compare(dice, style, dice.integer(1, 9), dice.integer(60, 140), rows);
    }
    for (const size_t rows : {23, 24, 25, 49}) compare(dice, style, dice.integer(1, 40), dice.integer(1, 40), rows);
    for (int64_t size = 1; size <= 20; ++size) compare(dice, style, size, size, 1);
    compare(dice, style, 600, 130, 3);
  }
}

// Room for the changes of a row and the sums that go on by them, of exactly their size.
struct Kept {
  explicit Kept(const Projection& projection, int32_t blocks)
      : groups(zeros((2 * count(projection) + kChangesBeyond) * sizeof(int32_t))),
        differences(zeros((2 * count(projection) + kChangesBeyond) * 2 * kGroup)),
        sums(zeros(static_cast<size_t>(blocks) * kBlock * sizeof(int32_t))) {
    auto* start = reinterpret_cast<int32_t*>(sums.data());  // of a row of zeros
    for (int32_t i = 0; i < blocks * kBlock; ++i) start[i] = projection.offset * projection.weight_sums[i];
  }
  static size_t count(const Projection& projection) { return static_cast<size_t>(projection.padded_depth) / kGroup; }

  Delta changes(const Kernels& kernels, const Projection& projection, const uint8_t* before, const uint8_t* now) {
    Delta delta{0, reinterpret_cast<int32_t*>(groups.data()), differences.data(), 0,
                reinterpret_cast<int32_t*>(sums.data())};
    kernels.list_changes(before, now, count(projection), delta);
    return delta;
  }

  AlignedBytes groups, differences, sums;
};

TEST(sums_by_changes_are_those_of_whole_rows) {
  Dice dice(22);
  for (int i = 0; i < 150; ++i) {
    const RandomStack stack(dice, {dice.integer(1, 300), dice.integer(1, 80), 1, 1}, Style::kInt8Preset);
    const AlignedBytes bytes = stack.pack();
    const BoundCell bound = Blob(bytes.data(), bytes.size()).cell(0);
    const Projection& projection = bound.cell.input;
    const int32_t blocks = bound.cell.blocks;
    const size_t columns = static_cast<size_t>(blocks) * kBlock;
    constexpr size_t kRows = 6;
    Operand rows(dice, projection, bound.x, kRows);
    for (size_t row = 1; row < kRows; ++row) {  // some share of the row before stays
      const float share = dice.real(0, 1.2f);
      for (size_t k = 0; k < rows.stride; ++k) {
        uint8_t* now = rows.bytes.data() + row * rows.stride + k;
        if (dice.chance(std::min(1.0f, share))) *now = *(now - rows.stride);
      }
    }
    AlignedBytes want = zeros(kRows * columns * sizeof(float));
    kScalarKernels.project(
        {&projection, kRows, rows.bytes.data(), rows.stride, floats(want), columns, 0, blocks, nullptr});
    for (const Kernels* kernels : tested_kernels()) {
      AlignedBytes scratch(kernels->scratch_bytes(1, projection.padded_depth));
      Kept kept(projection, blocks);
      AlignedBytes got = zeros(columns * sizeof(float)), before = zeros(rows.stride);
      for (size_t row = 0; row < kRows; ++row) {
        const uint8_t* now = rows.bytes.data() + row * rows.stride;
        const Delta delta = kept.changes(*kernels, projection, before.data(), now);
        kernels->project({&projection, 1, nullptr, 0, floats(got), columns, 0, blocks, scratch.data(), &delta});
        CHECK(same_floats(floats(want) + row * columns, floats(got), columns))
            << "in row " << row << " of " << kernels->name << ", " << projection.depth << " deep, " << blocks
            << " blocks";
        std::memcpy(before.data(), now, rows.stride);
      }
    }
  }
}

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
