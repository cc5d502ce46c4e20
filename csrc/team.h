// Threads that work through a sequence together, with a barrier at each step.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

#include "progress.h"

namespace lstm_quant {

// Threads that take the same steps, each some of the units. They meet after every step. Where they have to sleep again
// and again, waiting costs more than the others' help is worth, and the crew breaks up: the first member goes on alone.
class Crew {
 public:
  // They sleep after that many pauses: longer than a member should have to wait for another.
  explicit Crew(int64_t pauses = Progress::kPauses) : pauses_(pauses) {}

  // Returns when `members` threads wait; all give the same number.
  void meet(int members);
  // Whether it has broken up. The same for all members until they meet again.
  bool broken_up() const { return broken_up_; }

 private:
  const int64_t pauses_;
  std::atomic<int> arrived_{0};
  Progress meetings_;
  std::atomic<uint32_t> sleeps_{0};
  bool broken_up_ = false;  // written by the last to arrive, before it lets the others go
};

// Who takes part. A parallel-for promises neither a number of threads nor that its parts run at the same time, so
// barriers among its parts could wait for ever. Instead each part joins, with the number of slots it holds; when all
// slots are there, or `patience` is over, the team is closed: its members share the work, and parts that come later
// have nothing to do.
class Team {
 public:
  static constexpr int kTooLate = -1;

  Team(int slots, std::chrono::microseconds patience) : slots_(slots), patience_(patience) {}

  // Returns the caller's index among the members once the team is closed, or kTooLate.
  int join(int slots);
  // Number of members; final once join has returned.
  int size() const { return static_cast<int>(state_.load() >> kMembersShift & kMask); }

 private:
  static constexpr uint64_t kClosed = uint64_t{1} << 63;
  static constexpr int kMembersShift = 31;
  static constexpr uint64_t kMask = (uint64_t{1} << 31) - 1;

  bool is_closed() const { return (state_.load() & kClosed) != 0; }

  const int slots_;
  const std::chrono::microseconds patience_;
  std::atomic<uint64_t> state_{0};  // closed, number of members, number of slots
};

}  // namespace lstm_quant
