// Forms of operand rows for AVX2: what masked_avx2.h and signed_avx2.h have in common. Include it inside the target
// region.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "simd_avx2.h"
#include "sums-inl.h"

namespace lstm_quant {
namespace {

constexpr int kMiddle = 128;  // of a row's values
// Values of a row that form a pair of groups.
constexpr size_t kPair = 2 * kGroup;
static_assert(kPair == kDepthStep);

inline __m256i load256(const void* p) {
  return _mm256_load_si256(static_cast<const __m256i*>(p));
}

// The next 32 values of a row, of which only `count` may be there: then the middle stands for the others.
inline __m256i load_values(const uint8_t* values, size_t count) {
  uint8_t last[sizeof(__m256i)];
  if (count < sizeof last) {
    std::memset(last, kMiddle, sizeof last);
    std::memcpy(last, values, count);
    values = last;
  }
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
}

// Of sums as vpsadbw leaves them.
inline int32_t total_of_sads(__m256i sums) {
  __m128i sum = _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  sum = _mm_add_epi64(sum, _mm_unpackhi_epi64(sum, sum));
  return _mm_cvtsi128_si32(sum);
}

// For each int16 of a pair's first group: what there is of both groups. `twos`: of two neighbouring values.
inline __m256i of_pairs(__m256i twos) {
  return _mm256_add_epi16(twos, _mm256_srli_epi64(twos, 32));
}

// For each pair whose first group has an int16 above `most`: all ones at its second group, else zeros.
inline __m256i seconds_above(__m256i v, int16_t most) {
  const __m256i above = _mm256_cmpgt_epi16(v, _mm256_set1_epi16(most));
  const __m256i none = _mm256_cmpeq_epi32(above, _mm256_setzero_si256());
  return _mm256_slli_epi64(_mm256_xor_si256(none, _mm256_set1_epi32(-1)), 32);
}

// Which of eight groups are marked, a bit each.
inline unsigned marked(__m256i groups) {
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(groups)));
}

// What all Dots here have in common: int32 sums of values less the middle.
struct Int32Dot {
  using V = Avx2;
  using Sum = __m256i;
  static constexpr size_t kPartedGroups = 0;
  static constexpr bool kFetchesLater = true;
  static constexpr int kSplit = 1;

  static Sum start(const BlockWeights& block, int column, int32_t row_sum) {
    return first_sums<V>(block, column, block.offset + kMiddle, row_sum);
  }
  static Sum zero() { return _mm256_setzero_si256(); }
  static Sum join(Sum a, Sum b) { return _mm256_add_epi32(a, b); }
  static V::F total(Sum sum) { return V::to_float(sum); }
};

// The groups that a row keeps apart, for which there may be too little room.
class ApartList {
 public:
  ApartList(Apart* first, size_t most) : first_(first), next_(first), end_(first + most) {}

  void add(size_t group, const void* operand, size_t bytes) {
    overflows_ = overflows_ || next_ == end_;
    if (overflows_) return;
    next_->group = static_cast<int32_t>(group);
    std::memcpy(next_->operand, operand, bytes);
    ++next_;
  }
  // Writes the end, for which there is always room.
  void close() { next_->group = -1; }
  bool overflows() const { return overflows_; }
  size_t size() const { return next_ - first_; }

 private:
  Apart* first_;
  Apart* next_;
  Apart* end_;
  bool overflows_ = false;
};

}  // namespace
}  // namespace lstm_quant
