#include "lengths.h"

#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>

namespace lstm_quant {

Lengths Lengths::of_packed(const int64_t* batch_sizes, int64_t steps, int64_t total) {
  Lengths lengths;
  lengths.starts_.reserve(steps + 1);
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t size = batch_sizes[step];
    if (size < 1 || (step > 0 && size > batch_sizes[step - 1])) {
      throw std::runtime_error("batch_sizes must be positive and never grow, got " + std::to_string(size) +
                               " at step " + std::to_string(step) +
                               (step > 0 ? " after " + std::to_string(batch_sizes[step - 1]) : ""));
    }
    // a sum beyond the total is not formed: it could overflow
    if (size > total - lengths.total()) {
      throw std::runtime_error("batch_sizes must add up to the " + std::to_string(total) +
                               " rows of the packed input, got more");
    }
    lengths.starts_.push_back(lengths.total() + size);
  }
  if (lengths.total() != total) {
    throw std::runtime_error("batch_sizes must add up to the " + std::to_string(total) +
                             " rows of the packed input, got " + std::to_string(lengths.total()));
  }
  return lengths;
}

Lengths Lengths::of_padded(const int64_t* row_lengths, int64_t rows, int64_t padded_steps) {
  Lengths lengths;
  int64_t steps = 0;
  for (int64_t row = 0; row < rows; ++row) {
    if (row_lengths[row] < 1 || row_lengths[row] > padded_steps) {
      throw std::runtime_error("lengths must be from 1 to the " + std::to_string(padded_steps) +
                               " steps of the input, got " + std::to_string(row_lengths[row]) + " for row " +
                               std::to_string(row));
    }
    steps = std::max(steps, row_lengths[row]);
  }
  lengths.order_.resize(rows);
  std::iota(lengths.order_.begin(), lengths.order_.end(), 0);
  std::stable_sort(lengths.order_.begin(), lengths.order_.end(),
                   [&](int64_t a, int64_t b) { return row_lengths[a] > row_lengths[b]; });
  lengths.starts_.reserve(steps + 1);
  int64_t going = rows;
  for (int64_t step = 0; step < steps; ++step) {
    while (row_lengths[lengths.order_[going - 1]] <= step) --going;
    lengths.starts_.push_back(lengths.total() + going);
  }
  return lengths;
}

void Lengths::clear_padding(void* output, int64_t padded_steps, int64_t row_bytes) const {
  char* step_output = static_cast<char*>(output);
  for (int64_t step = 0; step < padded_steps; ++step, step_output += rows() * row_bytes) {
    for (int64_t row = rows_at(step); row < rows(); ++row)
      std::memset(step_output + order_[row] * row_bytes, 0, row_bytes);
  }
}

int64_t TileRows::steps_of(int64_t row) const {
  if (lengths == nullptr) return call_steps;
  // the first step that has no more rows than come before this one
  int64_t low = 0, high = lengths->steps();
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (at(middle) > row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace lstm_quant
