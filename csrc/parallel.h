// How the core runs on several threads: a parallel-for handed down by its caller, and one that is serial.
#pragma once

#include <functional>

namespace lstm_quant {

// The threads that a call may use.
struct Threads {
  static constexpr double kStartNs = 4000;

  // A plain number stands for threads that are ready.
  Threads(int count_, double start_ns_ = kStartNs) : count(count_), start_ns(start_ns_) {}
  bool operator==(const Threads& other) const { return count == other.count && start_ns == other.start_ns; }

  int count;
  double start_ns;  // to start them, and to wait for the last to end
};

class Parallel {
 public:
  using Task = std::function<void(int begin, int end)>;

  virtual ~Parallel() = default;
  // Those that the caller allows; `run` may use fewer.
  virtual Threads threads() const = 0;
  // Calls task(begin, end) for parts that together are [0, slots). Nothing else is promised: a part may hold several
  // slots, parts may run at the same time or one after another, on any threads. Returns when all have returned. Tasks
  // do not throw.
  virtual void run(int slots, const Task& task) = 0;
};

class SerialParallel final : public Parallel {
 public:
  Threads threads() const override { return 1; }
  void run(int slots, const Task& task) override { task(0, slots); }
};

}  // namespace lstm_quant
