#include "stream.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "cell_run.h"
#include "ieee_scope.h"
#include "plan.h"

namespace lstm_quant {

Stream::Stream(const void* packed, size_t bytes, const CheckedKernels& checked, int64_t rows)
    : blob_(packed, bytes), stack_(blob_, checked), kernels_(checked.kernels), rows_(rows) {
  if (sizes().num_directions != 1) throw std::runtime_error("a stream goes one way, the LSTM has two directions");
  if (rows < 1 || rows > kMaxSize) {
    throw std::runtime_error("a stream has 1 to " + std::to_string(kMaxSize) + " rows, got " + std::to_string(rows));
  }
  memory_ = allocate_for([&](Arena& arena) {
    states_.clear();
    for (const BoundCell& bound : stack_.cells()) states_.push_back(CellState::take(arena, bound.cell, rows));
  });
  h_.resize(sizes().cells() * rows * sizes().hidden_size);
  reset(nullptr, nullptr);
}

void Stream::divide(int64_t steps, const Threads& threads) {
  if (buffers_.has_value() && steps == steps_ && threads == threads_) return;
  // the old ones stay where there is no memory for new ones
  buffers_ = Buffers(sizes(), stack_.cells(), make_plan(sizes(), kernels_.rates, steps, rows_, threads), &states_);
  steps_ = steps;
  threads_ = threads;
}

void Stream::reset(const float* hx, const float* cx) {
  const IeeeScope ieee;
  const size_t items = rows_ * sizes().hidden_size;
  for (size_t i = 0; i < states_.size(); ++i) {
    const BoundCell& bound = stack_.cells()[i];
    const auto from = [&](const float* data) { return data == nullptr ? nullptr : data + i * items; };
    states_[i].load(kernels_, bound, Share::all(bound.cell), rows_,
                    {from(hx), DType::kFloat32, from(cx), DType::kFloat32});
  }
  if (hx == nullptr) {
    std::fill(h_.begin(), h_.end(), 0.0f);
  } else {
    std::copy_n(hx, h_.size(), h_.begin());
  }
}

void Stream::run(Parallel& parallel, int64_t steps, const Sequence& x, float* output) {
  if (steps == 0) return;
  divide(steps, parallel.threads());
  Call call{};
  call.steps = steps;
  call.rows = rows_;
  call.x = x;
  call.output = output;
  call.h_n = h_.data();
  stack_.run(call, parallel, *buffers_);
  if (steps % 2 == 1) {
    for (CellState& state : states_) std::swap(state.h[0], state.h[1]);
  }
}

void Stream::copy_state(float* h_n, float* c_n) const {
  std::copy(h_.begin(), h_.end(), h_n);
  const size_t units = sizes().hidden_size;
  for (const CellState& state : states_) {
    for (int64_t row = 0; row < rows_; ++row, c_n += units) {
      std::memcpy(c_n, state.c + row * state.c_stride, units * sizeof(float));
    }
  }
}

}  // namespace lstm_quant
