#include "scalar_sums.h"

namespace lstm_quant {
namespace {

template <class T>
const T* block_weights(const Projection& projection, int32_t block) {
  return reinterpret_cast<const T*>(projection.block_weights(block));
}

void int8_sums(const Projection& projection, const uint8_t* operand, int32_t block, float* sums) {
  const int8_t* weights = block_weights<int8_t>(projection, block);
  const int32_t* weight_sums = projection.weight_sums + block * kBlock;
  // unsigned, since the parts of a sum may wrap where the whole does not
  uint32_t totals[kBlock];
  for (int i = 0; i < kBlock; ++i) {
    totals[i] = static_cast<uint32_t>(projection.offset) * static_cast<uint32_t>(weight_sums[i]);
  }
  for (int32_t k = 0; k < projection.padded_depth; k += kGroup, weights += kBlock * kGroup) {
    for (int i = 0; i < kBlock; ++i) {
      int32_t dot = 0;
      for (int e = 0; e < kGroup; ++e) dot += operand[k + e] * weights[i * kGroup + e];
      totals[i] += static_cast<uint32_t>(dot);
    }
  }
  for (int i = 0; i < kBlock; ++i) sums[i] = static_cast<float>(static_cast<int32_t>(totals[i]));
}

void wide_sums(const Projection& projection, const int32_t* operand, int32_t block, float* sums) {
  const int8_t* weights = block_weights<int8_t>(projection, block);
  const int32_t* zero_points = projection.weight_zero_points + block * kBlock;
  int64_t totals[kBlock] = {};
  for (int32_t k = 0; k < projection.depth; ++k) {
    const int8_t* column = weights + (k / kGroup) * kBlock * kGroup + k % kGroup;
    for (int i = 0; i < kBlock; ++i) {
      totals[i] += static_cast<int64_t>(operand[k]) * (column[i * kGroup] - zero_points[i]);
    }
  }
  for (int i = 0; i < kBlock; ++i) sums[i] = static_cast<float>(totals[i]);
}

void float_sums(const Projection& projection, const float* operand, int32_t block, float* sums) {
  const float* weights = block_weights<float>(projection, block);
  for (int i = 0; i < kBlock; ++i) sums[i] = 0.0f;
  for (int32_t k = 0; k < projection.depth; ++k, weights += kBlock) {
    for (int i = 0; i < kBlock; ++i) sums[i] = sums[i] + operand[k] * weights[i];
  }
}

}  // namespace

void scalar_sums(const Projection& projection, const void* operand, int32_t block, float* sums) {
  switch (projection.sums) {
    case Sums::kInt8:
      return int8_sums(projection, static_cast<const uint8_t*>(operand), block, sums);
    case Sums::kWide:
      return wide_sums(projection, static_cast<const int32_t*>(operand), block, sums);
    case Sums::kFloat:
      return float_sums(projection, static_cast<const float*>(operand), block, sums);
  }
}

void scalar_sums(const Projection& projection, const Delta& delta, int32_t block, float* sums) {
  int32_t* kept = delta.sums + block * kBlock;
  uint32_t totals[kBlock];
  for (int i = 0; i < kBlock; ++i) totals[i] = static_cast<uint32_t>(kept[i]) + static_cast<uint32_t>(delta.negatives);
  for (size_t change = 0; change < delta.count; ++change) {
    const int8_t* weights = block_weights<int8_t>(projection, block) + delta.groups[change] * kBlock * kGroup;
    const uint8_t* magnitudes = delta.differences + change * 2 * kGroup;
    const uint8_t* masks = magnitudes + kGroup;
    for (int i = 0; i < kBlock; ++i) {
      int32_t dot = 0;
      for (int e = 0; e < kGroup; ++e) dot += magnitudes[e] * static_cast<int8_t>(weights[i * kGroup + e] ^ masks[e]);
      totals[i] += static_cast<uint32_t>(dot);
    }
  }
  for (int i = 0; i < kBlock; ++i) {
    kept[i] = static_cast<int32_t>(totals[i]);
    sums[i] = static_cast<float>(kept[i]);
  }
}

}  // namespace lstm_quant
