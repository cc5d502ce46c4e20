#include "team.h"

namespace lstm_quant {
namespace {

constexpr uint32_t kMostSleeps = 4;         // a crew breaks up when it slept so often,
constexpr uint32_t kMeetingsPerSleep = 64;  // and no less often than once in so many meetings
constexpr int kSpinsBetweenClocks = 64;     // reading the clock costs as much as a few pauses

}  // namespace

void Crew::meet(int members) {
  if (members == 1) return;
  const uint32_t meeting = meetings_.count();
  if (arrived_.fetch_add(1) + 1 < members) {
    if (meetings_.wait(meeting, pauses_)) sleeps_.fetch_add(1);
    return;
  }
  arrived_.store(0);
  const uint32_t sleeps = sleeps_.load();
  broken_up_ = broken_up_ || (sleeps >= kMostSleeps && sleeps >= meeting / kMeetingsPerSleep);
  meetings_.advance();
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
