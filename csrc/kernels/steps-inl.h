// The functions of a Kernels table over the classes of an ISA. Include it inside the target region.
//
//   V              vector class, see tail-inl.h
//   kTailVectors   vectors that the tail of int8() takes side by side
//   kOverlapBytes  weights of a block up to which the tail of a single row of int8() goes block by block: then it runs
//                  while the next block's weights come in
//   Int8, Wide, Float    CallRows -> sums: constructed from (projection, rows, walk); called with (block, first_row,
//                  rows, sink), they give each row's sums to sink(row, column, V::F); scratch_bytes(rows, padded_depth)
//                  says what they write in the rows' scratch
//   DeltaDot       Dot for sums from what changed, see delta-inl.h
//   Ahead          StepArgs -> sums, for steps with StepArgs::ahead; void: the ISA does not project ahead
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "ahead-inl.h"
#include "delta-inl.h"
#include "kernels.h"
#include "sums-inl.h"
#include "tail-inl.h"
#include "wide-inl.h"

namespace lstm_quant {
namespace {

constexpr size_t kChunkRows = 24;  // most rows whose sums wait for the tail
constexpr size_t kWholeRows = 8;   // rows that the tail takes side by side at best
static_assert(kChunkRows % kWholeRows == 0);
// A step that reads more bytes of weights than these leaves nothing else in the second-level cache. Zen 3 has 512 KB,
// and steps of just these gained nothing from fetching the rest again.
constexpr size_t kEvictingBytes = 1 << 20;

template <class Dot>
class DotSums {
 public:
  DotSums(const Projection& projection, const CallRows& rows, const Walk&)
      : projection_(projection), rows_{rows.first, rows.stride, nullptr} {}

  static size_t scratch_bytes(size_t, size_t) { return 0; }

  template <class Sink>
  void operator()(int32_t block, size_t first_row, size_t rows, const Sink& sink) const {
    sum_all_rows<Dot>(rows_, first_row, rows, BlockWeights(projection_, block), sink);
  }

 private:
  const Projection& projection_;
  OperandRows rows_;
};

template <class Isa>
struct KernelsOf {
  using V = typename Isa::V;
  using F = typename V::F;
  static constexpr bool kProjectsAhead = !std::is_void_v<typename Isa::Ahead>;
  static constexpr size_t kColumns = kUnits / V::kLanes;  // vectors of units in a block
  // vectors and blocks that the tail takes side by side; its general form, which is mostly table look-ups, gains
  // nothing from more
  template <CellForm kForm>
  static constexpr size_t kTailVectors = kForm == CellForm::kAny     ? 4
                                         : kForm == CellForm::kGrids ? 8
                                                                     : Isa::kTailVectors;
  template <CellForm kForm>
  static constexpr size_t kTailBlocks = kTailVectors<kForm> / kColumns;

  static constexpr Kernels table(const char* name, const Rates& rates) {
    return {name, rates, quantize, project, step, scratch_bytes, list_changes, evaluate, kProjectsAhead};
  }

  static void quantize(const Grid& grid, const float* values, size_t count, uint8_t* operand) {
    const auto low = V::set(grid.low);
    size_t i = 0;
    for (; i + V::kLanes <= count; i += V::kLanes) {
      V::store_u8(operand + i, V::to_int(V::sub(round_to<V>(V::load(values + i), grid), low)));
    }
    if (i == count) return;
    float last[V::kLanes] = {};
    uint8_t quantized[V::kLanes];
    std::memcpy(last, values + i, (count - i) * sizeof(float));
    V::store_u8(quantized, V::to_int(V::sub(round_to<V>(V::load(last), grid), low)));
    std::memcpy(operand + i, quantized, count - i);
  }

  // On whole vectors; the rest is evaluated in a vector of its own.
  static void evaluate(const Function& function, const float* values, size_t count, float* results) {
    size_t i = 0;
    for (; i + V::kLanes <= count; i += V::kLanes) V::store(results + i, evaluate_vector(function, values + i));
    if (i == count) return;
    float last[V::kLanes] = {};
    std::memcpy(last, values + i, (count - i) * sizeof(float));
    V::store_first(results + i, evaluate_vector(function, last), static_cast<int>(count - i));
  }

  static void project(const ProjectArgs& args) {
    const Projection& projection = *args.projection;
    const CallRows rows{static_cast<const char*>(args.operand), args.operand_stride, args.rows, operand_scratch(args),
                        args.same_operand};
    const Walk walk{args.first_block, args.last_block, false, args.then};
    switch (projection.sums) {
      case Sums::kInt8:
        if (args.delta != nullptr) {
          return project_with(args, DeltaSums<typename Isa::DeltaDot>(projection, *args.delta));
        }
        return project_with(args, typename Isa::Int8(projection, rows, walk));
      case Sums::kFloat:
        return project_with(args, typename Isa::Float(projection, rows, walk));
      case Sums::kWide:
        return project_with(args, typename Isa::Wide(projection, rows, walk));
    }
  }

  static size_t scratch_bytes(size_t rows, size_t padded_depth) {
    return kSumsBytes +
           std::max({Isa::Int8::scratch_bytes(rows, padded_depth), Isa::Wide::scratch_bytes(rows, padded_depth),
                     Isa::Float::scratch_bytes(rows, padded_depth)});
  }

  static void list_changes(const uint8_t* before, const uint8_t* now, size_t groups, Delta& delta) {
    list_all_changes<V>(before, now, groups, delta);
  }

  static void step(const StepArgs& args) {
    const Projection& hidden = args.cell->hidden;
    const CallRows rows{static_cast<const char*>(args.h), args.h_stride, args.rows, operand_scratch(args), args.same_h};
    const Walk walk{args.first_block, args.last_block, args.descending, args.then};
    switch (hidden.sums) {
      case Sums::kInt8: {
        if (args.delta != nullptr) {
          return step_with_int8(args, DeltaSums<typename Isa::DeltaDot>(hidden, *args.delta));
        }
        if constexpr (kProjectsAhead) {
          if (args.ahead != nullptr) return step_with_int8(args, typename Isa::Ahead(args));
        }
        return step_with_int8(args, typename Isa::Int8(hidden, rows, walk));
      }
      case Sums::kFloat:
        return step_with<CellForm::kAny>(args, typename Isa::Float(hidden, rows, walk));
      case Sums::kWide:
        return step_with<CellForm::kAny>(args, typename Isa::Wide(hidden, rows, walk));
    }
  }

 private:
  static constexpr size_t kSumsBytes = kChunkRows * kBlock * sizeof(float);

  // What follows the sums that wait for the tail.
  template <class Args>
  static char* operand_scratch(const Args& args) {
    return static_cast<char*>(args.scratch) + kSumsBytes;
  }

  static F evaluate_vector(const Function& function, const float* values) {
    F v = V::load(values);
    apply<V, 1, CellForm::kAny>(function, &v);
    return v;
  }

  // Rows of the next chunk: even shares, so that the last one is not left with a few, rounded up to kWholeRows while as
  // many are left after it.
  static size_t chunk_rows(size_t left) {
    const size_t chunks = (left + kChunkRows - 1) / kChunkRows;
    const size_t even = (left + chunks - 1) / chunks;
    const size_t whole = round_up(even, kWholeRows);
    return whole + kWholeRows <= left ? whole : even;
  }

  // Keeps sums[row - first_row][gate][unit] for the tail.
  struct KeepSums {
    size_t first_row;
    float* sums;

    void operator()(size_t row, int column, F sum) const { V::store(sums + (row - first_row) * kBlock + column, sum); }
  };

  template <class BlockSums>
  static void project_with(const ProjectArgs& args, const BlockSums& block_sums) {
    for (int32_t block = args.first_block; block < args.last_block; ++block) {
      block_sums(block, 0, args.rows, WriteIgates<V>(args, block));
    }
  }

  template <class BlockSums>
  static void step_with_int8(const StepArgs& args, const BlockSums& block_sums) {
    if (has_int8_form<V>(*args.cell)) return step_with<CellForm::kInt8>(args, block_sums);
    if (has_grids_form(*args.cell)) return step_with<CellForm::kGrids>(args, block_sums);
    return step_with<CellForm::kAny>(args, block_sums);
  }

  template <CellForm kForm, class BlockSums>
  static void step_with(const StepArgs& args, const BlockSums& block_sums) {
    const bool overlaps = kForm == CellForm::kInt8 && args.cell->hidden.block_bytes <= Isa::kOverlapBytes;
    const bool several = args.rows == 1 && !overlaps;
    const int32_t at_a_time = several ? kTailBlocks<kForm> : 1;
    const int32_t total = args.last_block - args.first_block;
    for (int32_t done = 0; done < total; done += at_a_time) {
      const int32_t blocks = total - done < at_a_time ? total - done : at_a_time;
      const int32_t first = args.descending ? args.last_block - done - blocks : args.first_block + done;
      if (args.rows == 1) {
        step_row<kForm>(args, block_sums, first, blocks);
      } else {
        step_rows<kForm>(args, block_sums, first);
      }
    }
  }

  template <CellForm kForm, class BlockSums>
  static void step_row(const StepArgs& args, const BlockSums& block_sums, int32_t first_block, int32_t blocks) {
    float* sums = static_cast<float*>(args.scratch);
    const size_t bytes = args.cell->hidden.block_bytes * (args.last_block - args.first_block);
    if (bytes > kEvictingBytes && args.delta == nullptr) fetch_for_tail(args, first_block, blocks);
    for (int32_t done = 0; done < blocks; ++done) {
      const int32_t i = args.descending ? blocks - 1 - done : done;
      block_sums(first_block + i, 0, 1, KeepSums{0, sums + i * kBlock});
    }
    finish_all<kForm, kTailBlocks<kForm>, false>(args, 0, first_block * kUnits, sums, blocks);
  }

  // What the tail of a row reads beside sums, and the output that it writes: they come in while the sums are taken.
  // Inlined: g++ drops calls of a function that does nothing but prefetch.
  static LSTM_QUANT_INLINE void fetch_for_tail(const StepArgs& args, int32_t first_block, int32_t blocks) {
    const auto fetch = [](const float* values, size_t count) __attribute__((always_inline)) {
      for (size_t i = 0; i < count; i += kAlign / sizeof(float)) __builtin_prefetch(values + i, 0, 2);
    };
    const Projection& hidden = args.cell->hidden;
    const size_t first = first_block, count = blocks;
    fetch(hidden.multipliers + first * kBlock, count * kBlock);
    fetch(hidden.biases + first * kBlock, count * kBlock);
    fetch(args.igates + (first - args.first_block) * kBlock, count * kBlock);
    fetch(args.c + first * kUnits, count * kUnits);
    fetch(args.output + first * kUnits, count * kUnits);
  }

  template <CellForm kForm, class BlockSums>
  static void step_rows(const StepArgs& args, const BlockSums& block_sums, int32_t block) {
    float* sums = static_cast<float*>(args.scratch);
    for (size_t row = 0, rows; row < args.rows; row += rows) {
      rows = chunk_rows(args.rows - row);
      // the output was last touched long ago: it comes in while the sums are taken
      for (size_t r = row; r < row + rows; ++r)
        __builtin_prefetch(args.output + r * args.output_stride + block * kUnits, 1);
      block_sums(block, row, rows, KeepSums{row, sums});
      for (size_t column = 0; column < kUnits; column += V::kLanes) {
        finish_all<kForm, kTailVectors<kForm>, true>(args, row, block * kUnits + column, sums + column, rows);
      }
    }
  }

  // The tail of `count` rows or blocks, kPiece at a time while there are so many, then in smaller pieces.
  template <CellForm kForm, size_t kPiece, bool kAlongRows>
  static void finish_all(const StepArgs& args, size_t row, size_t unit, const float* sums, size_t count) {
    for (; count >= kPiece; count -= kPiece) {
      finish<kForm, kAlongRows ? kPiece : kPiece * kColumns, kAlongRows>(args, row, unit, sums);
      (kAlongRows ? row : unit) += kPiece * (kAlongRows ? 1 : kUnits);
      sums += kPiece * kBlock;
    }
    if constexpr (kPiece > 1) finish_all<kForm, kPiece / 2, kAlongRows>(args, row, unit, sums, count);
  }

  template <CellForm kForm, int N, bool kAlongRows>
  __attribute__((noinline)) static void finish(const StepArgs& args, size_t row, size_t unit, const float* sums) {
    tail<V, kForm>(args, Tile<V, N, kAlongRows>{row, unit}, sums);
  }
};

}  // namespace
}  // namespace lstm_quant
