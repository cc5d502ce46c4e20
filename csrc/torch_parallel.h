// torch's own threads, as the core asks for them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <thread>

#include "lateness.h"
#include "parallel.h"

namespace lstm_quant {

class TorchParallel final : public Parallel {
 public:
  Threads threads() const override {
    const auto pool = static_cast<int>(torch::stable::get_num_threads());
    if (pool == 1 || lateness().go_alone()) return 1;
    static const auto cpus = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    if (pool <= cpus) return pool;
    return {cpus, Threads::kStartNs + kWakeNs * pool};
  }
  void run(int slots, const Task& task) override {
    Attendance attendance;
    torch::stable::parallel_for(0, slots, 1, [&](int64_t begin, int64_t end) {
      attendance.begin();
      task(static_cast<int>(begin), static_cast<int>(end));
      attendance.end();
    });
    lateness().note(attendance.lost(), attendance.time());
  }

 private:
  // torch starts all its threads for any region; where they outnumber the CPUs they sleep in between
  static constexpr double kWakeNs = 10e3;

  // of the threads that all calls of this process share
  static Lateness& lateness() {
    static Lateness lateness;
    return lateness;
  }
};

}  // namespace lstm_quant
