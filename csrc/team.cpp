#include "team.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace lstm_quant {
namespace {

constexpr int kSpins = 2000;             // pauses before a barrier sleeps: some tens of microseconds
constexpr int kSpinsBetweenClocks = 64;  // reading the clock costs as much as a few pauses

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

void Barrier::wait(int threads) {
  if (threads == 1) return;
  const uint32_t generation = generation_.load();
  if (arrived_.fetch_add(1) + 1 == threads) {
    arrived_.store(0);
    generation_.store(generation + 1);
    // a sleeper counts itself before it looks at the generation, so one of the two sees the other
    if (sleepers_.load() != 0) {
      const std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    return;
  }
  for (int i = 0; i < kSpins; ++i) {
    if (passed(generation)) return;
    pause();
  }
  sleep(generation);
}

void Barrier::sleep(uint32_t generation) {
  std::unique_lock<std::mutex> lock(mutex_);
  sleepers_.fetch_add(1);
  wake_.wait(lock, [&] { return passed(generation); });
  sleepers_.fetch_sub(1);
}

int Team::join(int slots) {
  uint64_t before = state_.load();
  uint64_t after;
  do {
    if ((before & kClosed) != 0) return kTooLate;
    after = before + (uint64_t{1} << kMembersShift) + static_cast<uint64_t>(slots);
    if ((after & kMask) == static_cast<uint64_t>(slots_)) after |= kClosed;
  } while (!state_.compare_exchange_weak(before, after));

  const auto deadline = std::chrono::steady_clock::now() + patience_;
  for (int i = 1; !is_closed(); ++i) {
    pause();
    if (i % kSpinsBetweenClocks == 0 && std::chrono::steady_clock::now() > deadline) state_.fetch_or(kClosed);
  }
  return static_cast<int>(before >> kMembersShift & kMask);
}

}  // namespace lstm_quant
