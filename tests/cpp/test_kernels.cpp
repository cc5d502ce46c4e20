// The kernels of every ISA that this machine can run, against the scalar ones: the same bits.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "blob.h"
#include "check.h"
#include "convert.h"
#include "dispatch.h"
#include "random_stack.h"
#include "tested_kernels.h"

namespace lstm_quant::testing {
namespace {

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

}  // namespace
}  // namespace lstm_quant::testing
