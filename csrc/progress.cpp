#include "progress.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace lstm_quant {
void pause() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void Progress::advance() {
  count_.fetch_add(1);
  // a sleeper counts itself before it looks at the count, so one of the two sees the other
  if (sleepers_.load() == 0) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  wake_.notify_all();
}

bool Progress::wait(uint32_t seen, int64_t pauses) {
  for (int64_t i = 0; i < pauses; ++i) {
    if (count() != seen) return false;
    pause();
  }
  std::unique_lock<std::mutex> lock(mutex_);
  sleepers_.fetch_add(1);
  wake_.wait(lock, [&] { return count() != seen; });
  sleepers_.fetch_sub(1);
  return true;
}

}  // namespace lstm_quant
