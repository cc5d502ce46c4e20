#include "lstm.h"

#include "plan.h"
#include "stack.h"

namespace lstm_quant {

namespace {

// Rows of equal lengths as what they are: a plain batch.
Call without_equal_lengths(Call call) {
  if (call.lengths == nullptr || !call.lengths->all_equal()) return call;
  if (call.lengths->starts() != nullptr) call.x.step_bytes = call.rows * call.x.row_bytes;
  call.lengths = nullptr;
  return call;
}

}  // namespace

void run_lstm(const Blob& blob, const CheckedKernels& kernels, Parallel& parallel, const Call& given,
              const Plan& plan) {
  const Call call = without_equal_lengths(given);
  const Stack stack(blob, kernels);
  stack.check_dtypes(call);
  if (call.rows == 0) return;
  if (call.steps == 0) return stack.copy_states(call);
  stack.run(call, parallel, Buffers(stack.sizes(), stack.cells(), kernels.kernels, plan));
}

void run_lstm(const Blob& blob, const CheckedKernels& kernels, Parallel& parallel, const Call& call) {
  const int64_t row_steps = call.lengths == nullptr ? call.steps * call.rows : call.lengths->total();
  run_lstm(blob, kernels, parallel, call,
           make_plan(blob.sizes(), kernels.kernels.rates, call.steps, call.rows, parallel.threads(), row_steps));
}

}  // namespace lstm_quant
