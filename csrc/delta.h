// Delta steps: a single row's integer sums go on from those of the step before, by what changed in the operand. Sums
// are exact, so they are the same either way; where little changed, far fewer weights are read.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/kernels.h"
#include "memory.h"

namespace lstm_quant {

// Room for the changes of a row, for use by one projection after the other.
struct ChangeList {
  int32_t* groups = nullptr;
  uint8_t* differences = nullptr;

  static ChangeList take(Arena& arena, size_t depth);
};

// What a member of a crew keeps of one projection, for the blocks that it works on: sums, and the operand row that they
// stand for. Whatever row comes next, and from wherever, its changes lead to its sums; watching the rows only tells
// which way is likely to be the faster one.
class KeptSums {
 public:
  KeptSums() = default;
  // Of a Sums::kInt8 projection of `blocks` blocks, which must outlive it.
  KeptSums(Arena& arena, const Projection& projection, int32_t blocks);

  // Those that the next rows are for: sums of others are dropped.
  void set_blocks(int32_t first, int32_t last);
  // Whether the next row is to be summed by its changes. Asked once for each row.
  bool watch(const uint8_t* row);
  // Whether the next rows are to be summed by their changes, one after the other, rather than projected together.
  bool watch_all(const uint8_t* rows, size_t stride, size_t count);
  // What watch said last.
  bool quiet() const { return quiet_; }
  bool kept() const { return kept_; }
  // The changes that lead to the sums of `row`, which is kept from now on.
  Delta change(const Kernels& kernels, const uint8_t* row, const ChangeList& list);

 private:
  size_t groups() const { return static_cast<size_t>(projection_->padded_depth) / kGroup; }
  bool at_most(double share, size_t changed, size_t rows) const;
  void drop();
  void copy(const uint8_t* row);
  void begin();

  const Projection* projection_ = nullptr;
  uint8_t* operand_ = nullptr;  // that the sums stand for; without sums, the last row that was looked at
  int32_t* sums_ = nullptr;
  int32_t first_block_ = 0, last_block_ = 0;
  bool kept_ = false;   // there are sums, those of the operand
  bool quiet_ = false;  // little changed when it was looked at last
  int turn_ = 0;        // without sums: rows since then
  int leaps_ = 0;       // with sums: rows on end in which much changed
};

// Of a cell.
struct CellDelta {
  KeptSums input;
  KeptSums hidden;
  float* igates = nullptr;  // what `input` gives, as Kernels::project leaves it

  CellDelta(Arena& arena, const Cell& cell);
  void set_blocks(int32_t first, int32_t last) {
    input.set_blocks(first, last);
    hidden.set_blocks(first, last);
  }
};

}  // namespace lstm_quant
