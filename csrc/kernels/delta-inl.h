// A single row's sums from those of the row before and what changed, over a class Dot, see sums-inl.h, whose operand is
// a change as Delta has it. Of Dot it needs, beside what is listed there, `Weights load_once(const char*)`: weights
// that one product reads, which need no register of their own, and kFetchesChanges: whether to fetch the weights of
// later changes beforehand, which the CPU cannot foresee. V needs, beside what others list,
//
//   add_i32(I, I), bit_xor(I, I)
//   uint32_t differing(I, I)     the lanes that differ
//   excess_u8(I a, I b)          a - b where that is positive, else 0
//   nonzero_bytes(I)             0xFF where they are
//
// Include it inside the target region of an ISA.
#pragma once

#include <cstring>

#include "kernels.h"
#include "sums-inl.h"

namespace lstm_quant {
namespace {

// Makes a Dot of one that multiplies uint8 with int8.
template <class Dot>
struct ChangeDot : Dot {
  using V = typename Dot::V;
  using Sum = typename Dot::Sum;
  using Weights = typename Dot::Weights;
  struct Operand {
    typename Dot::Operand magnitudes;
    typename V::I masks;
  };
  static constexpr int kOperandBytes = 2 * kGroup;

  static Operand operand(const char* p) {
    int32_t masks;
    std::memcpy(&masks, p + kGroup, kGroup);
    return {Dot::operand(p), V::set_i32(masks)};
  }
  static Sum add(Sum sum, const Operand& operand, Weights weights) {
    return Dot::add(sum, operand.magnitudes, V::bit_xor(weights, operand.masks));
  }
};

// Writes the changes of a Delta, in ascending order of their groups.
class ChangeWriter {
 public:
  explicit ChangeWriter(Delta& delta) : delta_(delta) {
    delta.count = 0;
    delta.negatives = 0;
  }

  // The differences of a group, of any size.
  void add(size_t group, uint32_t magnitudes, uint32_t masks) {
    constexpr uint32_t kTops = 0x80808080, kEveryOther = 0x00FF00FF;
    const uint32_t negative = magnitudes & masks;
    const uint32_t pairs = (negative & kEveryOther) + (negative >> 8 & kEveryOther);
    delta_.negatives += static_cast<int32_t>((pairs & 0xFFFF) + (pairs >> 16));
    const uint32_t tops = magnitudes & kTops;
    if (tops == 0) return append(group, magnitudes, masks);
    // a byte with its top bit set goes as kMostChange and what is left of it
    const uint32_t large = (tops >> 7) * (kMostChange - 1), rest = magnitudes & large;
    append(group, (magnitudes & ~large) | tops, masks);
    if (rest != 0) append(group, rest, masks);
  }
  void end() {
    const size_t count = delta_.count;
    for (size_t i = 0; i < kChangesBeyond; ++i) append(0, 0, 0);
    delta_.count = count;
  }

 private:
  void append(size_t group, uint32_t magnitudes, uint32_t masks) {
    uint8_t* change = delta_.differences + delta_.count * 2 * kGroup;
    std::memcpy(change, &magnitudes, kGroup);
    std::memcpy(change + kGroup, &masks, kGroup);
    delta_.groups[delta_.count++] = static_cast<int32_t>(group);
  }

  Delta& delta_;
};

// Operand rows may be read to the end of their last vector: the groups there do not count.
template <class V>
void list_all_changes(const uint8_t* before, const uint8_t* now, size_t groups, Delta& delta) {
  using I = typename V::I;
  ChangeWriter writer(delta);
  for (size_t first = 0; first < groups; first += V::kLanes) {
    const I a = V::load_i32(reinterpret_cast<const int32_t*>(before + first * kGroup));
    const I b = V::load_i32(reinterpret_cast<const int32_t*>(now + first * kGroup));
    uint32_t changed = V::differing(a, b);
    if (groups - first < V::kLanes) changed &= (1u << (groups - first)) - 1;
    if (changed == 0) continue;
    const I less = V::excess_u8(a, b);
    int32_t magnitudes[V::kLanes], masks[V::kLanes];
    V::store_i32(magnitudes, V::bit_xor(less, V::excess_u8(b, a)));
    V::store_i32(masks, V::nonzero_bytes(less));
    for (; changed != 0; changed &= changed - 1) {
      const int lane = __builtin_ctz(changed);
      writer.add(first + lane, static_cast<uint32_t>(magnitudes[lane]), static_cast<uint32_t>(masks[lane]));
    }
  }
  writer.end();
}

// Never inlined, as sum_tile.
template <class Dot, class Sink>
__attribute__((noinline)) void sum_changes(const BlockWeights& block, const Delta& delta, int32_t* kept,
                                           const Sink& sink) {
  using V = typename Dot::V;
  static_assert(Dot::kOperandBytes == 2 * kGroup);
  constexpr int kVectors = kBlock / V::kLanes, kSplit = Dot::kSplit;
  constexpr size_t kVectorBytes = V::kLanes * sizeof(float);
  typename V::I totals[kSplit][kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    totals[0][v] = V::add_i32(V::load_i32(kept + v * V::kLanes), V::set_i32(delta.negatives));
#pragma GCC unroll 8
    for (int s = 1; s < kSplit; ++s) totals[s][v] = Dot::zero();
  }
  const auto weights_of = [&](size_t change) {
    return block.weights + static_cast<size_t>(delta.groups[change]) * kWeightBytes;
  };
  const char* differences = reinterpret_cast<const char*>(delta.differences);
  for (size_t change = 0; change < delta.count; change += kSplit) {
#pragma GCC unroll 8
    for (int s = 0; s < kSplit; ++s) {
      const auto values = Dot::operand(differences);
      const char* weights = weights_of(change + s);
      if constexpr (Dot::kFetchesChanges) {
        const char* later = weights_of(change + s + kChangesBeyond - kSplit);
        for (size_t line = 0; line < kWeightBytes; line += kAlign) __builtin_prefetch(later + line);
      }
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        totals[s][v] = Dot::add(totals[s][v], values, Dot::load_once(weights + v * kVectorBytes));
      }
      differences += Dot::kOperandBytes;
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    auto sum = totals[0][v];
#pragma GCC unroll 8
    for (int s = 1; s < kSplit; ++s) sum = Dot::join(sum, totals[s][v]);
    V::store_i32(kept + v * V::kLanes, sum);
    sink(0, v * V::kLanes, Dot::total(sum));
  }
}

template <class Dot>
class DeltaSums {
 public:
  DeltaSums(const Projection& projection, const Delta& delta) : projection_(projection), delta_(delta) {}

  template <class Sink>
  void operator()(int32_t block, size_t, size_t, const Sink& sink) const {
    sum_changes<Dot>(BlockWeights(projection_, block), delta_, delta_.sums + block * kBlock, sink);
  }

 private:
  const Projection& projection_;
  const Delta& delta_;
};

}  // namespace
}  // namespace lstm_quant
