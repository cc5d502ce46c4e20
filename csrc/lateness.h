// Going without other threads while they are held up.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace lstm_quant {

inline int64_t now_ns() {
  return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// When the parts of one parallel region began and ended.
class Attendance {
 public:
  void begin() { raise(last_begin_); }
  void end() { raise(last_end_); }
  std::chrono::nanoseconds time() const { return std::chrono::nanoseconds(now_ns() - start_); }
  // That of it which was waited for threads that had nothing to do yet, or nothing more.
  std::chrono::nanoseconds lost() const {
    return std::chrono::nanoseconds((last_begin_.load() - start_) + (now_ns() - last_end_.load()));
  }

 private:
  static void raise(std::atomic<int64_t>& latest) {
    const int64_t time = now_ns();
    int64_t before = latest.load();
    while (before < time && !latest.compare_exchange_weak(before, time)) {
    }
  }

  const int64_t start_ = now_ns();
  std::atomic<int64_t> last_begin_{start_};
  std::atomic<int64_t> last_end_{start_};
};

// On a busy machine two threads of a process may take turns on one CPU, each spinning to the end of its time slice
// while it waits for the other. Then a region takes milliseconds, whatever there is to do in it. So after some such
// regions on end calls go without other threads for many times as long: what is lost stays a small part of all. Threads
// that slept since the last burst of calls start late too, but the next time they do not.
class Lateness {
 public:
  bool go_alone() const {
    const int64_t until = alone_until_.load(std::memory_order_relaxed);
    return until != 0 && now_ns() < until;  // most processes never need the clock
  }
  // Of a region that took `time`.
  void note(std::chrono::nanoseconds lost, std::chrono::nanoseconds time) {
    if (lost < kLate || 2 * lost < time) return late_on_end_.store(0, std::memory_order_relaxed);
    if (late_on_end_.fetch_add(1, std::memory_order_relaxed) + 1 < kEnough) return;
    alone_until_.store(now_ns() + kTimesAsLong * lost.count(), std::memory_order_relaxed);
  }

 private:
  static constexpr std::chrono::nanoseconds kLate = std::chrono::milliseconds(1);
  static constexpr int64_t kTimesAsLong = 32;
  static constexpr int kEnough = 8;

  std::atomic<int> late_on_end_{0};
  std::atomic<int64_t> alone_until_{0};
};

}  // namespace lstm_quant
