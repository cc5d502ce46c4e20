#include "portions.h"

#include <algorithm>

namespace lstm_quant {

Portions::Blocks Portions::cut(Blocks& left, int32_t most, bool from_end) {
  const int32_t count = std::min(most, left.end - left.begin);
  const Blocks before = left;
  const int32_t cut = from_end ? left.end - count : left.begin + count;
  (from_end ? left.end : left.begin) = cut;
  return from_end ? Blocks{cut, before.end} : Blocks{before.begin, cut};
}

Portions::Blocks Portions::take_from(std::atomic<Blocks>& left, int32_t most, bool from_end) const {
  Blocks before = left.load(), rest, taken;
  do {
    rest = before;
    // ever fewer towards the end, so that all end at about the same time
    taken = cut(rest, std::clamp((before.end - before.begin) / members_, 1, most), from_end);
  } while (!taken.empty() && !left.compare_exchange_weak(before, rest));
  return taken;
}

Portions::Blocks Portions::take(int member, int32_t most, bool backwards) {
  Blocks taken = take_from(left_[member].blocks, most, backwards);
  // of the others what they would come to last
  for (int i = 1; i < members_ && taken.empty(); ++i) {
    taken = take_from(left_[(member + i) % members_].blocks, most, !backwards);
  }
  return taken;
}

}  // namespace lstm_quant
