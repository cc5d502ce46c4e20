// torch's own threads, as the core asks for them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

#include "parallel.h"

namespace lstm_quant {

class TorchParallel final : public Parallel {
 public:
  int threads() const override { return static_cast<int>(torch::stable::get_num_threads()); }
  void run(int slots, const Task& task) override {
    torch::stable::parallel_for(
        0, slots, 1, [&](int64_t begin, int64_t end) { task(static_cast<int>(begin), static_cast<int>(end)); });
  }
};

}  // namespace lstm_quant
