// The portable path, which specifies the others.
#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "kernels.h"
#include "scalar_sums.h"
#include "tail-inl.h"

namespace lstm_quant {
namespace {

struct Scalar {
  static constexpr int kLanes = 1;
  static constexpr bool kHasSegments = false;
  using F = float;
  using I = int32_t;

  static F set(float v) { return v; }
  static F load(const float* p) { return *p; }
  static void store(float* p, F v) { *p = v; }
  static void store_first(float* p, F v, int) { *p = v; }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F min(F a, F b) { return a < b ? a : b; }
  static F max(F a, F b) { return a > b ? a : b; }
  static F round(F v) { return std::nearbyintf(v); }
  static I to_int(F v) { return static_cast<I>(v); }
  static F lookup(const float* table, I i) { return table[i]; }
  static F lookup16(const uint16_t* table, I i) { return table[i]; }
  static void store_u8(uint8_t* p, I v) { *p = static_cast<uint8_t>(v); }
  static void store_i32(int32_t* p, I v) { *p = v; }
  static F evaluate(Evaluator, F steps) { return steps; }
};

void quantize(const Grid& grid, const float* values, size_t count, uint8_t* operand) {
  for (size_t i = 0; i < count; ++i) {
    operand[i] = static_cast<uint8_t>(round_to<Scalar>(values[i], grid) - grid.low);
  }
}

// From what changed in the row; from the whole of it where `delta` is null.
void sum_row(const Projection& projection, const Delta* delta, const char* row, int32_t block, float* sums) {
  if (delta != nullptr) return scalar_sums(projection, *delta, block, sums);
  scalar_sums(projection, row, block, sums);
}

void project(const ProjectArgs& args) {
  const Projection& projection = *args.projection;
  for (int32_t block = args.first_block; block < args.last_block; ++block) {
    const float* multipliers = projection.multipliers + block * kBlock;
    const float* biases = projection.biases + block * kBlock;
    for (size_t row = 0; row < args.rows; ++row) {
      float sums[kBlock];
      sum_row(projection, args.delta, static_cast<const char*>(args.operand) + row * args.operand_stride, block, sums);
      float* igates = args.igates + row * args.igates_stride + (block - args.first_block) * kBlock;
      for (int i = 0; i < kBlock; ++i) {
        igates[i] = on_grid<Scalar>(sums[i] * multipliers[i] + biases[i], projection.output[i / kUnits]);
      }
    }
  }
}

void step_block(const StepArgs& args, int32_t block) {
  for (size_t row = 0; row < args.rows; ++row) {
    float sums[kBlock];
    sum_row(args.cell->hidden, args.delta, static_cast<const char*>(args.h) + row * args.h_stride, block, sums);
    for (int unit = 0; unit < kUnits; ++unit) {
      tail<Scalar, CellForm::kAny>(args, Tile<Scalar, 1, false>{row, static_cast<size_t>(block * kUnits + unit)},
                                   sums + unit);
    }
  }
}

void step(const StepArgs& args) {
  if (args.descending) {
    for (int32_t block = args.last_block - 1; block >= args.first_block; --block) step_block(args, block);
  } else {
    for (int32_t block = args.first_block; block < args.last_block; ++block) step_block(args, block);
  }
}

size_t scratch_bytes(size_t, size_t) {
  return 0;
}

void list_changes(const uint8_t* before, const uint8_t* now, size_t groups, Delta& delta) {
  delta.count = 0;
  delta.negatives = 0;
  for (size_t group = 0; group < groups; ++group, before += kGroup, now += kGroup) {
    int magnitudes[kGroup];
    for (int i = 0; i < kGroup; ++i) {
      magnitudes[i] = std::abs(now[i] - before[i]);
      if (now[i] < before[i]) delta.negatives += magnitudes[i];
    }
    while (std::any_of(magnitudes, magnitudes + kGroup, [](int m) { return m > 0; })) {
      uint8_t* change = delta.differences + delta.count * 2 * kGroup;
      for (int i = 0; i < kGroup; ++i) {
        const int part = std::min(magnitudes[i], kMostChange);
        change[i] = static_cast<uint8_t>(part);
        change[kGroup + i] = now[i] < before[i] ? 0xFF : 0;
        magnitudes[i] -= part;
      }
      delta.groups[delta.count++] = static_cast<int32_t>(group);
    }
  }
  std::fill_n(delta.groups + delta.count, kChangesBeyond, 0);
  std::fill_n(delta.differences + delta.count * 2 * kGroup, kChangesBeyond * 2 * kGroup, uint8_t{0});
}

}  // namespace

const Kernels kScalarKernels{"scalar", {7, 7, 20}, quantize, project, step, scratch_bytes, list_changes, nullptr};

}  // namespace lstm_quant
