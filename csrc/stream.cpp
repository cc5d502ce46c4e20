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
namespace {

void copy_row(const CellState& from, int64_t from_row, const CellState& to, int64_t to_row) {
  std::memcpy(to.h[0] + to_row * to.h_stride, from.h[0] + from_row * from.h_stride, from.h_stride);
  std::memcpy(to.c + to_row * to.c_stride, from.c + from_row * from.c_stride, from.c_stride * sizeof(float));
}

}  // namespace

void RowGroup::reserve(const Stack& stack, int64_t needed) {
  if (needed <= room) return;
  std::vector<CellState> larger;
  AlignedMemory larger_memory = allocate_for([&](Arena& arena) {
    larger.clear();
    for (const BoundCell& bound : stack.cells()) larger.push_back(CellState::take(arena, bound, needed));
  });
  h.resize(stack.sizes().cells() * needed * stack.sizes().h_size());
  memory = std::move(larger_memory);
  states = std::move(larger);
  room = needed;
}

Stream::Stream(const void* packed, size_t bytes, const CheckedKernels& checked, int64_t rows)
    : blob_(packed, bytes), stack_(blob_, checked), kernels_(checked.kernels) {
  if (sizes().num_directions != 1) throw std::runtime_error("a stream goes one way, the LSTM has two directions");
  if (rows < 1 || rows > kMaxSize) {
    throw std::runtime_error("a stream has 1 to " + std::to_string(kMaxSize) + " rows, got " + std::to_string(rows));
  }
  all_.reserve(stack_, rows);
  is_chosen_.resize(rows);
  reset(nullptr, nullptr);
}

void Stream::divide(RowGroup& group, int64_t steps, int64_t rows, const Threads& threads) const {
  if (group.buffers.has_value() && steps == group.steps && rows == group.rows && threads == group.threads) return;
  // the old ones stay where there is no memory for new ones
  const Plan plan = make_plan(sizes(), kernels_.rates, steps, rows, threads);
  group.buffers = Buffers(sizes(), stack_.cells(), kernels_, plan, &group.states);
  group.steps = steps;
  group.rows = rows;
  group.threads = threads;
}

bool Stream::has(const ChosenRows& rows) {
  if (rows.numbers == nullptr) return rows.count == this->rows();
  int64_t marked = 0;
  for (; marked < rows.count; ++marked) {
    const int64_t row = rows[marked];
    if (row < 0 || row >= this->rows() || is_chosen_[row] != 0) break;
    is_chosen_[row] = 1;
  }
  for (int64_t i = 0; i < marked; ++i) is_chosen_[rows[i]] = 0;
  return marked == rows.count;
}

void Stream::reset(const float* hx, const float* cx, const ChosenRows& rows) {
  const IeeeScope ieee;
  const FirstStates first{hx, DType::kFloat32, cx, DType::kFloat32};
  const int64_t h_size = sizes().h_size();
  for (size_t cell = 0; cell < all_.states.size(); ++cell) {
    const BoundCell& bound = stack_.cells()[cell];
    for (int64_t i = 0; i < rows.count; ++i) {
      const int64_t row = cell * rows.count + i;
      all_.states[cell].from_row(rows[i]).load(kernels_, bound, Share::all(bound), 1,
                                               first.from(row * h_size, row * sizes().hidden_size));
      float* h = all_.h.data() + (cell * this->rows() + rows[i]) * h_size;
      if (hx == nullptr) {
        std::fill_n(h, h_size, 0.0f);
      } else {
        std::copy_n(hx + row * h_size, h_size, h);
      }
    }
  }
}

void Stream::run(Parallel& parallel, int64_t steps, const Sequence& x, float* output, const ChosenRows& rows) {
  if (steps == 0 || rows.count == 0) return;
  if (rows.numbers == nullptr) return run_group(all_, parallel, steps, rows.count, x, output);
  some_.reserve(stack_, rows.count);
  for (size_t cell = 0; cell < all_.states.size(); ++cell) {
    for (int64_t i = 0; i < rows.count; ++i) copy_row(all_.states[cell], rows[i], some_.states[cell], i);
  }
  run_group(some_, parallel, steps, rows.count, x, output);
  const int64_t h_size = sizes().h_size();
  const float* h = some_.h.data();
  for (size_t cell = 0; cell < all_.states.size(); ++cell) {
    for (int64_t i = 0; i < rows.count; ++i, h += h_size) {
      copy_row(some_.states[cell], i, all_.states[cell], rows[i]);
      std::copy_n(h, h_size, all_.h.data() + (cell * this->rows() + rows[i]) * h_size);
    }
  }
}

void Stream::run_group(RowGroup& group, Parallel& parallel, int64_t steps, int64_t rows, const Sequence& x,
                       float* output) const {
  divide(group, steps, rows, parallel.threads());
  Call call{};
  call.steps = steps;
  call.rows = rows;
  call.x = x;
  call.output = output;
  call.h_n = group.h.data();
  stack_.run(call, parallel, *group.buffers);
  if (steps % 2 == 1) {
    for (CellState& state : group.states) std::swap(state.h[0], state.h[1]);
  }
}

void Stream::copy_state(float* h_n, float* c_n, const ChosenRows& rows) const {
  const int64_t h_size = sizes().h_size(), units = sizes().hidden_size;
  for (size_t cell = 0; cell < all_.states.size(); ++cell) {
    const CellState& state = all_.states[cell];
    for (int64_t i = 0; i < rows.count; ++i, h_n += h_size, c_n += units) {
      std::copy_n(all_.h.data() + (cell * this->rows() + rows[i]) * h_size, h_size, h_n);
      std::copy_n(state.c + rows[i] * state.c_stride, units, c_n);
    }
  }
}

}  // namespace lstm_quant
