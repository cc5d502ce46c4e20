// A stack of layers that goes on from call to call: the states stay inside, as the kernels hold them.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "blob.h"
#include "dispatch.h"
#include "lstm.h"
#include "memory.h"
#include "parallel.h"
#include "stack.h"

namespace lstm_quant {

// Which rows of a stream a call is for, in the order in which it takes and gives them.
struct ChosenRows {
  const int64_t* numbers;  // null: all of them
  int64_t count;

  int64_t operator[](int64_t i) const { return numbers == nullptr ? i : numbers[i]; }
};

// The states of rows that take their steps together, and memory for calls like the last one.
struct RowGroup {
  int64_t room = 0;
  AlignedMemory memory;
  std::vector<CellState> states;
  std::vector<float> h;  // the last h as it went out; the states hold what the next step makes of it
  // of calls with as many steps, rows and threads as the last one
  int64_t steps = 0;
  int64_t rows = 0;
  Threads threads = 0;
  std::optional<Buffers> buffers;

  RowGroup() = default;
  RowGroup(const RowGroup&) = delete;
  RowGroup& operator=(const RowGroup&) = delete;
  // Where there was room for fewer rows, their states are lost.
  void reserve(const Stack& stack, int64_t rows);
};

class Stream {
 public:
  // Throws std::runtime_error where the blob does not hold layers of one direction, or memory is short. `packed` must
  // outlive it.
  Stream(const void* packed, size_t bytes, const CheckedKernels& checked, int64_t rows);
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  const Sizes& sizes() const { return stack_.sizes(); }
  int64_t rows() const { return all_.room; }
  ChosenRows all_rows() const { return {nullptr, rows()}; }
  // Whether it has all of `rows`, and none of them is chosen twice: what the functions below rely on.
  bool has(const ChosenRows& rows);

  // The states to go on from, float32 [layers, rows.count, h_size] and [layers, rows.count, hidden_size]; null: zeros.
  void reset(const float* hx, const float* cx, const ChosenRows& rows);
  void reset(const float* hx, const float* cx) { reset(hx, cx, all_rows()); }
  // These rows go on for `steps` steps of `x`, float32, which writes `output`, float32 [steps, rows.count, h_size]; the
  // others stay as they are. Any division of a sequence into calls, and whichever rows share them, gives the same
  // values.
  void run(Parallel& parallel, int64_t steps, const Sequence& x, float* output, const ChosenRows& rows);
  void run(Parallel& parallel, int64_t steps, const Sequence& x, float* output) {
    run(parallel, steps, x, output, all_rows());
  }
  // The states after the last step, shaped as for reset: reset to them, rows go on as these.
  void copy_state(float* h_n, float* c_n, const ChosenRows& rows) const;
  void copy_state(float* h_n, float* c_n) const { copy_state(h_n, c_n, all_rows()); }

 private:
  void divide(RowGroup& group, int64_t steps, int64_t rows, const Threads& threads) const;
  void run_group(RowGroup& group, Parallel& parallel, int64_t steps, int64_t rows, const Sequence& x,
                 float* output) const;

  const Blob blob_;
  const Stack stack_;
  const Kernels& kernels_;
  RowGroup all_;
  RowGroup some_;  // where chosen rows are brought together for a call
  std::vector<char> is_chosen_;
};

}  // namespace lstm_quant
