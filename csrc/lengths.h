// Rows of one call that have different numbers of steps.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace lstm_quant {

// How many steps each row of a call has. Rows count from the longest to the shortest, so that those that a step has are
// the first ones. In memory they are packed, as in torch's PackedSequence: step after step, each with the rows it has;
// or padded to the same number of steps, in any order.
class Lengths {
 public:
  // Of packed rows, from how many each step has. Throws std::runtime_error unless the sizes are positive, never grow
  // and add up to `total`.
  static Lengths of_packed(const int64_t* batch_sizes, int64_t steps, int64_t total);
  // Of padded rows, from the length of each. Throws std::runtime_error unless each is from 1 to `padded_steps`.
  static Lengths of_padded(const int64_t* lengths, int64_t rows, int64_t padded_steps);

  // Of the longest row.
  int64_t steps() const { return static_cast<int64_t>(starts_.size()) - 1; }
  int64_t rows() const { return rows_at(0); }
  int64_t rows_at(int64_t step) const { return step < steps() ? starts_[step + 1] - starts_[step] : 0; }
  // Over all steps.
  int64_t total() const { return starts_.back(); }
  // Of padded rows, an output: zeros where rows have ended.
  void clear_padding(void* output, int64_t padded_steps, int64_t row_bytes) const;
  // Whether no row ends before another.
  bool all_equal() const { return steps() == 0 || rows_at(steps() - 1) == rows(); }
  // Packed: how many rows of memory come before each step. Padded: null.
  const int64_t* starts() const { return order_.empty() ? starts_.data() : nullptr; }
  // Padded: which of the caller's rows each is. Packed: null, the states too are in the order of the rows.
  const int64_t* order() const { return order_.empty() ? nullptr : order_.data(); }

 private:
  std::vector<int64_t> starts_{0};
  std::vector<int64_t> order_;
};

// The rows of a call that go through it together: every `apart`th from `first` on.
struct TileRows {
  const Lengths* lengths;  // null: all rows have all steps
  int64_t call_steps;
  int64_t first;
  int64_t apart;
  int64_t count;

  // How many of them a step has: the first ones.
  int64_t at(int64_t step) const {
    if (lengths == nullptr) return step < call_steps ? count : 0;
    return (std::max<int64_t>(lengths->rows_at(step) - first, 0) + apart - 1) / apart;
  }
  // How many steps a row has; those of row 0 are the most.
  int64_t steps_of(int64_t row) const;
  // Which of the caller's rows one is.
  int64_t index(int64_t row) const {
    const int64_t ordered = first + row * apart;
    return lengths == nullptr || lengths->order() == nullptr ? ordered : lengths->order()[ordered];
  }
};

// Where rows of steps are in memory.
struct RowLayout {
  int64_t step_bytes;               // from a step to the next
  int64_t row_bytes;                // from a row to the next
  int64_t apart = 1;                // rows, from one of those that are meant to the next
  const int64_t* starts = nullptr;  // how many rows come before each step, where that is not the same at every step
  const int64_t* order = nullptr;   // which row each is, where they are not in order

  int64_t offset(int64_t step, int64_t row) const {
    const int64_t ordered = row * apart;
    const int64_t before = starts == nullptr ? step * step_bytes : starts[step] * row_bytes;
    return before + (order == nullptr ? ordered : order[ordered]) * row_bytes;
  }
};

}  // namespace lstm_quant
