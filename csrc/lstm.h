// A stack of layers in one or two directions over whole sequences.
#pragma once

#include <cstdint>

#include "blob.h"
#include "convert.h"
#include "dispatch.h"
#include "lengths.h"
#include "parallel.h"
#include "plan.h"

namespace lstm_quant {

// Rows of contiguous items that the caller owns.
struct Sequence {
  const void* data;
  DType dtype;
  int64_t step_bytes;  // from a step to the next
  int64_t row_bytes;   // from a row of the batch to the next
};

struct Call {
  int64_t steps;
  int64_t rows;
  Sequence x;  // [steps, rows, input_size]; integers are those of layer 0's grids of part x
  // [cells, rows, h_size] and [cells, rows, hidden_size], contiguous; null: zeros (and float32); integers are those of
  // each cell's grids of parts hx and cx
  const void* hx;
  DType hx_dtype;
  const void* cx;
  DType cx_dtype;
  // [steps, rows, num_directions * h_size] and states shaped as above, contiguous; integers are those of each cell's
  // grids of parts ogate_cy (hy with proj_size) and fgate_cx_igate_cgate; h_n may be null if there are steps: it is not
  // wanted
  void* output;
  void* h_n;
  DType h_dtype;
  void* c_n;
  DType c_dtype;
  // Null: every row has every step. Otherwise `steps` and `rows` are those of `lengths`; packed, x is
  // [total, input_size] without step_bytes, and output is [total, num_directions * h_size]; padded, what is padding in
  // the output is left as it is.
  const Lengths* lengths = nullptr;
};

// Runs the cells of `blob`. Throws std::runtime_error where integers come from or go to a part that has no grid, or
// whose grid does not fit their dtype. The results depend on neither `kernels` nor `parallel` nor `plan`.
void run_lstm(const Blob& blob, const CheckedKernels& kernels, Parallel& parallel, const Call& call, const Plan& plan);
// With the plan that fits the sizes and threads.
void run_lstm(const Blob& blob, const CheckedKernels& kernels, Parallel& parallel, const Call& call);

}  // namespace lstm_quant
