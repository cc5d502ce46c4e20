// The sums of a projection as tiles of operand rows against the columns of a block, written once over a class Dot,
// which multiplies one group of a row (4 bytes: four uint8, or one float32) with the weights of one vector of columns:
//
//   V                      the ISA's vector class
//   kGroups                neighbouring groups that it takes at once
//   kApart                 whether there are groups that it cannot take, see Apart
//   kPartedGroups          groups after which sums go through Sum part(Sum), lest they overflow; 0: never
//   kOperandBytes          bytes of an operand row that hold as many groups
//   kMaxRows               rows of the highest tile
//   vectors(rows)          vectors of columns in a tile of so many rows
//   kFetchesLater          whether tiles of several rows fetch weights that are read later, see LaterWeights
//   kSplit                 sums that the groups of a single row go to in turn, to hide the latency of one
//   kFetchBytes            how far ahead a single row's weights are fetched, across the end of the block into
//                          LaterWeights; 0: the CPU's own prefetchers do it
//   Operand operand(const char*)
//   Sum start(const BlockWeights&, int column, int32_t row_sum)         for the vector that begins at `column`
//   Weights load(const char*)
//   Sum zero(), Sum add(Sum, Operand, Weights), Sum join(Sum, Sum)
//   V::F total(Sum)
//
// Include it inside the target region of an ISA.
#pragma once

#include <algorithm>

#include "kernels.h"

namespace lstm_quant {
namespace {

constexpr int kWeightBytes = kBlock * kGroup;  // of one group's weights in a block; also kBlock floats

// A group of an operand row that Dot cannot take in its place: zeros stand there, and it is multiplied by itself, by
// Dot::Single. After the last of a row comes one whose group is negative.
struct Apart {
  int32_t group;
  char operand[2 * kGroup];
};

// The operand rows of a call, and where sums may write them in a form of their own.
struct CallRows {
  const char* first;
  size_t stride;
  size_t count;
  char* scratch;
  bool written;  // the form is there, from the call before

  const uint8_t* row(size_t i) const { return reinterpret_cast<const uint8_t*>(first) + i * stride; }
};

// Operand rows in the form that Dot reads.
struct OperandRows {
  const char* first;
  size_t stride;            // bytes
  const int32_t* row_sums;  // what each row adds to the sums of all columns; null: nothing
  size_t apart_at = 0;      // bytes from a row's begin to its groups that are kept apart, where Dot::kApart

  const char* row(size_t i) const { return first + i * stride; }
  const Apart* apart(size_t i) const { return reinterpret_cast<const Apart*>(row(i) + apart_at); }
};

// The weights of a block.
struct BlockWeights {
  const char* weights;
  size_t groups;
  const int32_t* weight_sums;  // kInt8, kWide
  const int32_t* zero_points;  // kWide
  int32_t offset;

  BlockWeights(const Projection& projection, int32_t block)
      : weights(projection.block_weights(block)),
        groups(projection.sums == Sums::kFloat ? projection.depth : projection.padded_depth / kGroup),
        weight_sums(projection.sums == Sums::kFloat ? nullptr : projection.weight_sums + block * kBlock),
        zero_points(projection.sums == Sums::kWide ? projection.weight_zero_points + block * kBlock : nullptr),
        offset(projection.offset) {}
};

// Weights that are read after the block. A single row fetches the first of them before it is through with the block,
// see Dot::kFetchBytes; several rows, a line of them into the second-level cache with each group of a tile, so that the
// first rows that need them do not wait for them.
struct LaterWeights {
  const char* next = nullptr;
  size_t step = 0;  // bytes from a line to the next, of several rows

  void fetch() {
    __builtin_prefetch(next, 0, 2);
    next += step;
  }
};

// The blocks that a call of a kernel goes through, and the weights that the next call begins with, or null.
struct Walk {
  int32_t first_block;
  int32_t last_block;
  bool descending;
  const char* then;

  // The weights that are read after those of `block`, or null.
  const char* after(const Projection& projection, int32_t block) const {
    if (block == (descending ? first_block : last_block - 1)) return then;
    return projection.block_weights(block + (descending ? -1 : 1));
  }
};

// What integer sums of products start from.
template <class V>
inline __attribute__((always_inline)) typename V::I first_sums(const BlockWeights& block, int column, int32_t offset,
                                                               int32_t row_sum) {
  return V::add_product(V::set_i32(row_sum), V::load_i32(block.weight_sums + column), offset);
}

// Gives a vector a register of its own: g++ 12 would carry every sum of a tile twice around its loop, some in memory,
// and fetch weights anew for every row.
template <class Vector>
inline __attribute__((always_inline)) Vector in_register(Vector v) {
  asm("" : "+v"(v));
  return v;
}

// Adds the products of the groups that a row keeps apart.
template <class Single, int kVectors, class Sum>
inline __attribute__((always_inline)) void add_apart(const Apart* apart, const BlockWeights& block, Sum* totals) {
  constexpr size_t kVectorBytes = Single::V::kLanes * sizeof(float);
  for (; apart->group >= 0; ++apart) {
    const char* columns = block.weights + apart->group * kWeightBytes;
    const auto values = Single::operand(apart->operand);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      totals[v] = Single::add(totals[v], values, Single::load(columns + v * kVectorBytes));
    }
  }
}

// Whether start_rows gives what the sums of a tile start from.
template <class Dot, int kRows>
constexpr bool kStarted = Dot::kApart && kRows > 1;

// What the sums of a tile's rows start from, with the products of the groups that each row keeps apart: once for all
// columns, as the CPU does not foresee where such a list ends.
template <class Dot>
__attribute__((noinline)) void start_rows(const OperandRows& rows, size_t first_row, size_t count,
                                          const BlockWeights& block, int32_t (*starts)[kBlock]) {
  using V = typename Dot::V;
  constexpr int kVectors = kBlock / V::kLanes;
  typename Dot::Sum common[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) common[v] = Dot::start(block, v * V::kLanes, 0);
  for (size_t r = 0; r < count; ++r) {
    const auto row_sum = V::set_i32(rows.row_sums[first_row + r]);
    typename Dot::Sum totals[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) totals[v] = Dot::join(common[v], row_sum);
    add_apart<typename Dot::Single, kVectors>(rows.apart(first_row + r), block, totals);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) V::store_i32(starts[r] + v * V::kLanes, totals[v]);
  }
}

// Never inlined: g++ 12 spills the sums of a tile that it inlines into its caller.
// `starts`: what start_rows gave, where kStarted.
// sink(row, column, V::F) takes the sums of a row for a vector of columns.
template <class Dot, int kRows, int kVectors, int kSplit, class Sink>
__attribute__((noinline)) void sum_tile(const OperandRows& rows, size_t first_row, const BlockWeights& block,
                                        int first_vector, const int32_t (*starts)[kBlock], const Sink& sink,
                                        LaterWeights later) {
  using V = typename Dot::V;
  constexpr size_t kVectorBytes = V::kLanes * sizeof(float);
  const char* weights = block.weights + first_vector * kVectorBytes;
  const char* operand = rows.row(first_row);
  const size_t stride = rows.stride;
  typename Dot::Sum totals[kSplit][kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const int32_t row_sum = rows.row_sums == nullptr ? 0 : rows.row_sums[first_row + r];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const int column = (first_vector + v) * V::kLanes;
      if constexpr (kStarted<Dot, kRows>) {
        totals[0][r][v] = V::load_i32(starts[r] + column);
      } else {
        totals[0][r][v] = Dot::start(block, column, row_sum);
      }
#pragma GCC unroll 8
      for (int s = 1; s < kSplit; ++s) totals[s][r][v] = Dot::zero();
    }
  }
  constexpr bool kFetches = kRows == 1 && Dot::kFetchBytes > 0;
  constexpr int kGroupsBytes = kSplit * Dot::kGroups * kWeightBytes;
  static_assert(!kFetches || Dot::kFetchBytes % kGroupsBytes == 0, "what is fetched is to meet the end of the block");
  // of a block that is no longer than that, it is beyond the end from the begin, and goes on to the block behind it
  [[maybe_unused]] const char* ahead = weights + Dot::kFetchBytes;
  [[maybe_unused]] const char* const end_of_weights = weights + block.groups * kWeightBytes;
  for (size_t group = 0; group < block.groups;) {
    const size_t end = Dot::kPartedGroups > 0 ? std::min(block.groups, group + Dot::kPartedGroups) : block.groups;
    for (; group < end; group += kSplit * Dot::kGroups) {
      if constexpr (kFetches) {
#pragma GCC unroll 8
        for (int line = 0; line < kGroupsBytes; line += kAlign) __builtin_prefetch(ahead + line);
        ahead += kGroupsBytes;
        if (ahead == end_of_weights) ahead = later.next;
      }
      if constexpr (Dot::kFetchesLater && kRows > 1) {
#pragma GCC unroll 8
        for (int g = 0; g < Dot::kGroups; ++g) later.fetch();
      }
#pragma GCC unroll 8
      for (int s = 0; s < kSplit; ++s) {
        typename Dot::Weights columns[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) columns[v] = Dot::load(weights + v * kVectorBytes);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const auto values = Dot::operand(operand + r * stride);
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) totals[s][r][v] = Dot::add(totals[s][r][v], values, columns[v]);
        }
        weights += Dot::kGroups * kWeightBytes;
        operand += Dot::kOperandBytes;
      }
    }
    if constexpr (Dot::kPartedGroups > 0) {
#pragma GCC unroll 8
      for (auto& row : totals[0]) {
#pragma GCC unroll 8
        for (auto& sum : row) sum = Dot::part(sum);
      }
    }
  }
  if constexpr (Dot::kApart && !kStarted<Dot, kRows>) {
    static_assert(kVectors * V::kLanes == kBlock, "a single row's tile has all columns");
    add_apart<typename Dot::Single, kVectors>(rows.apart(first_row), block, totals[0][0]);
  }
  const Sink own_sink = sink;  // its own: the compiler cannot tell that what is written leaves the caller's as it is
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      auto sum = totals[0][r][v];
#pragma GCC unroll 8
      for (int s = 1; s < kSplit; ++s) sum = Dot::join(sum, totals[s][r][v]);
      own_sink(first_row + r, (first_vector + v) * V::kLanes, Dot::total(sum));
    }
  }
}

// The sums of `count` rows, 1 <= count <= kRows, all columns.
template <class Dot, int kRows, class Sink>
void sum_rows(const OperandRows& rows, size_t first_row, size_t count, const BlockWeights& block, const Sink& sink,
              LaterWeights& later) {
  constexpr int kVectors = Dot::vectors(kRows);
  constexpr int kSplit = kRows == 1 ? Dot::kSplit : 1;
  if constexpr (kRows > 1) {
    if (count < kRows) return sum_rows<Dot, kRows - 1>(rows, first_row, count, block, sink, later);
  }
  alignas(kAlign) int32_t starts[kStarted<Dot, kRows> ? kRows : 1][kBlock];
  if constexpr (kStarted<Dot, kRows>) start_rows<Dot>(rows, first_row, kRows, block, starts);
  for (int vector = 0; vector < kBlock / Dot::V::kLanes; vector += kVectors) {
    sum_tile<Dot, kRows, kVectors, kSplit>(rows, first_row, block, vector, starts, sink, later);
    if constexpr (Dot::kFetchesLater) later.next += block.groups * later.step;
  }
}

// Sums of any number of rows: in tiles of nearly equal heights, as a last tile of one row would waste most of its work.
template <class Dot, class Sink>
void sum_all_rows(const OperandRows& rows, size_t first_row, size_t count, const BlockWeights& block, const Sink& sink,
                  LaterWeights later = {}) {
  for (size_t tiles = (count + Dot::kMaxRows - 1) / Dot::kMaxRows; tiles > 0; --tiles) {
    const size_t height = (count + tiles - 1) / tiles;
    sum_rows<Dot, Dot::kMaxRows>(rows, first_row, height, block, sink, later);
    first_row += height;
    count -= height;
  }
}

// float32 operand and weights: k ascending, each product rounded before it is added.
template <class Vector, int kTileRows, int kTileVectors>
struct FloatDot {
  using V = Vector;
  using Operand = typename V::F;
  using Weights = typename V::F;
  using Sum = typename V::F;
  static constexpr int kGroups = 1;
  static constexpr bool kApart = false;
  static constexpr size_t kPartedGroups = 0;
  static constexpr int kOperandBytes = sizeof(float);
  static constexpr int kMaxRows = kTileRows;
  static constexpr bool kFetchesLater = false;
  static constexpr int kSplit = 1;
  static constexpr int kFetchBytes = 0;

  static constexpr int vectors(int) { return kTileVectors; }
  static Operand operand(const char* p) { return V::set(*reinterpret_cast<const float*>(p)); }
  static Sum start(const BlockWeights&, int, int32_t) { return zero(); }
  static Sum zero() { return V::set(0.0f); }
  static Weights load(const char* p) { return V::load(reinterpret_cast<const float*>(p)); }
  static Sum add(Sum sum, Operand operand, Weights weights) { return V::add(sum, V::mul(operand, weights)); }
  static Sum join(Sum a, Sum) { return a; }
  static typename V::F total(Sum sum) { return sum; }
};

}  // namespace
}  // namespace lstm_quant
