// How calls are run and compared: threads of a test's own, plans, and bits.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "parallel.h"
#include "plan.h"
#include "random_stack.h"

namespace lstm_quant::testing {

// Each slot on a thread of its own, all at the same time, the later ones late if asked.
class ThreadedParallel final : public Parallel {
 public:
  explicit ThreadedParallel(int threads, std::chrono::milliseconds delay = {}) : threads_(threads), delay_(delay) {}
  Threads threads() const override { return threads_; }
  void run(int slots, const Task& task) override {
    std::vector<std::thread> others;
    for (int slot = 1; slot < slots; ++slot) {
      others.emplace_back([&, slot] {
        std::this_thread::sleep_for(slot * delay_);
        task(slot, slot + 1);
      });
    }
    task(0, 1);
    for (auto& other : others) other.join();
  }

 private:
  int threads_;
  std::chrono::milliseconds delay_;
};

// Any division of a call among `threads` threads.
inline Plan random_plan(Dice& dice, const Sizes& sizes, int64_t steps, int64_t rows, int threads) {
  Plan plan = make_plan(sizes, kScalarKernels.rates, steps, rows, threads);
  plan.slots = threads;
  const bool whole = sizes.num_directions == 2 || sizes.num_layers == 1;
  plan.sharing = static_cast<Sharing>(dice.integer(0, whole ? 1 : 2));
  plan.tile_rows = plan.sharing == Sharing::kLayers ? rows : dice.integer(1, rows);
  plan.chunk_steps = dice.integer(1, std::min<int64_t>(steps, 5));
  plan.group_blocks = plan.chunk_steps == 1 ? static_cast<int32_t>(dice.integer(1, 5)) : 1000;
  plan.delta = plan.delta && plan.group_blocks == 1000;
  plan.layer_steps = whole ? steps : dice.integer(1, steps);
  plan.pieces_between = plan.sharing == Sharing::kLayers ? dice.integer(1, 4) : 1;
  plan.zigzag = dice.chance(0.5);
  plan.pauses = dice.integer(0, 2000);
  plan.patience = std::chrono::microseconds(dice.integer(0, 2000));
  return plan;
}

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::memcmp(&a[i], &b[i], sizeof(float)) != 0 && !(a[i] != a[i] && b[i] != b[i])) return false;
  }
  return a.size() == b.size();
}

inline void check_same(const FloatCall& a, const FloatCall& b, const std::string& where) {
  CHECK(same_bits(a.output, b.output)) << "output, " << where;
  CHECK(same_bits(a.h_n, b.h_n)) << "h_n, " << where;
  CHECK(same_bits(a.c_n, b.c_n)) << "c_n, " << where;
}

}  // namespace lstm_quant::testing
