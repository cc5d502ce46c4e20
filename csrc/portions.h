// Dividing a step's work among threads as they get on with it.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

namespace lstm_quant {

// The blocks of units of a step, for members who take a few at a time: first of their own, then of what others have
// left. So nobody waits long for a slower CPU, and each has mostly the same blocks at every step, whose weights its
// cache may hold.
class Portions {
 public:
  struct Blocks {
    int32_t begin;
    int32_t end;

    bool empty() const { return begin == end; }
  };

  // For up to that many members; 0: for none.
  explicit Portions(int members) : members_(members), left_(members > 0 ? new Left[members] : nullptr) {}

  // Begins a step for a member, whose own blocks these are. All have ended the step before: who has not begun yet has
  // none that others could take.
  void begin(int member, Blocks own) { left_[member].blocks.store(own); }
  // The next blocks for a member, at most `most`: from the first to the last of its own, or backwards. None: all are
  // taken.
  Blocks take(int member, int32_t most, bool backwards);
  // At most that many of what is left, from one end or the other.
  static Blocks cut(Blocks& left, int32_t most, bool from_end);

 private:
  // apart in memory, since each is mostly one member's business
  struct alignas(64) Left {
    std::atomic<Blocks> blocks{Blocks{0, 0}};
    static_assert(std::atomic<Blocks>::is_always_lock_free);
  };

  Blocks take_from(std::atomic<Blocks>& left, int32_t most, bool from_end) const;

  const int members_;
  const std::unique_ptr<Left[]> left_;
};

}  // namespace lstm_quant
