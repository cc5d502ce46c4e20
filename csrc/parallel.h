// How the core runs on several threads: a parallel-for handed down by its caller, and one that is serial.
#pragma once

#include <functional>

namespace lstm_quant {

class Parallel {
 public:
  using Task = std::function<void(int begin, int end)>;

  virtual ~Parallel() = default;
  // How many threads the caller allows; `run` may use fewer.
  virtual int threads() const = 0;
  // Calls task(begin, end) for parts that together are [0, slots). Nothing else is promised: a part may hold several
  // slots, parts may run at the same time or one after another, on any threads. Returns when all have returned. Tasks
  // do not throw.
  virtual void run(int slots, const Task& task) = 0;
};

class SerialParallel final : public Parallel {
 public:
  int threads() const override { return 1; }
  void run(int slots, const Task& task) override { task(0, slots); }
};

}  // namespace lstm_quant
