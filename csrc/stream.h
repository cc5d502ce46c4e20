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

class Stream {
 public:
  // Throws std::runtime_error where the blob does not hold layers of one direction, or memory is short. `packed` must
  // outlive it.
  Stream(const void* packed, size_t bytes, const CheckedKernels& checked, int64_t rows);
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  const Sizes& sizes() const { return stack_.sizes(); }
  int64_t rows() const { return rows_; }

  // The states to go on from, float32 [layers, rows, hidden_size]; null: zeros.
  void reset(const float* hx, const float* cx);
  // Goes on for `steps` steps of `x`, float32, and writes `output`, float32 [steps, rows, hidden_size]. Any division of
  // a sequence into calls gives the same values.
  void run(Parallel& parallel, int64_t steps, const Sequence& x, float* output);
  // The states after the last step, float32 [layers, rows, hidden_size]: reset to them, a stream goes on as this one.
  void copy_state(float* h_n, float* c_n) const;

 private:
  void divide(int64_t steps, const Threads& threads);

  const Blob blob_;
  const Stack stack_;
  const Kernels& kernels_;
  const int64_t rows_;
  AlignedMemory memory_;
  std::vector<CellState> states_;
  std::vector<float> h_;  // the last h as it went out; the states hold what the next step makes of it
  // of calls with as many steps and threads as the last one
  int64_t steps_ = 0;
  Threads threads_ = 0;
  std::optional<Buffers> buffers_;
};

}  // namespace lstm_quant
