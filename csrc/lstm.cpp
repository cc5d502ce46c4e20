#include "lstm.h"

#include "plan.h"
#include "stack.h"

namespace lstm_quant {

void run_lstm(const Blob& blob, const CheckedKernels& kernels, Parallel& parallel, const Call& call, const Plan& plan) {
  const Stack stack(blob, kernels);
  stack.check_dtypes(call);
  if (call.rows == 0) return;
  if (call.steps == 0) return stack.copy_states(call);
  stack.run(call, parallel, Buffers(stack.sizes(), stack.cells(), plan));
}

void run_lstm(const Blob& blob, const CheckedKernels& kernels, Parallel& parallel, const Call& call) {
  const Rates& rates = kernels.kernels.rates;
  run_lstm(blob, kernels, parallel, call, make_plan(blob.sizes(), rates, call.steps, call.rows, parallel.threads()));
}

}  // namespace lstm_quant
