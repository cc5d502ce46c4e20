// A count that threads wait for.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace lstm_quant {

// Counts what has been done, by any thread, for threads that wait for more of it: by spinning for a while, since it is
// normally a fraction of a microsecond away, then by sleeping: on a busy machine spinning would keep off the CPU the
// very thread that is waited for.
class Progress {
 public:
  static constexpr int64_t kPauses = 2000;  // some tens of microseconds

  uint32_t count() const { return count_.load(); }
  // Counts on, and lets those go on who wait.
  void advance();
  // Returns when the count is no longer `seen`, with whether it had to sleep, after that many pauses.
  bool wait(uint32_t seen, int64_t pauses = kPauses);

 private:
  std::atomic<uint32_t> count_{0};
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

// A moment of a loop that waits.
void pause();

}  // namespace lstm_quant
