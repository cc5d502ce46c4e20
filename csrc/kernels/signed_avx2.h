// Products of signed operands and unsigned weights for AVX2: s = value - 128 with weight + 128, so that
//
//   value * weight = s * (weight + 128) - 128 * s + 128 * weight
//
// of which the second term is the same for all columns and the third for all rows. vpmaddubsw adds two products in
// int16, and vpaddw those of a second group: four of them fit if the positive s among them add up to at most 128, and
// the negative ones too, as 128 * 255 fits. Of pairs of groups that do not fit, the second is kept apart, and a group
// that does not fit by itself goes there in two halves.
//
// For 64 products that is two vpmaddubsw, vpaddw, vpmaddwd and vpaddd, and a vpxor for each 32 weights, whatever the
// rows of a tile: 5.3 operations with six rows, where masked_avx2.h has 7. What fits seldom, as rows whose values
// spread over the whole of their grid, is left to that.
//
// Include it inside the target region.
#pragma once

#include "operands_avx2.h"

namespace lstm_quant {
namespace {

// A group that fits.
struct SignedDot : Int32Dot {
  using Operand = __m256i;
  using Weights = __m256i;

  static Operand operand(const char* p) {
    int32_t group;
    std::memcpy(&group, p, kGroup);
    return _mm256_set1_epi32(group);
  }
  static Weights load(const char* p) {
    return _mm256_xor_si256(load256(p), _mm256_set1_epi8(static_cast<char>(kMiddle)));
  }
  static Sum add(Sum sum, Operand operand, Weights weights) {
    return add_products(sum, _mm256_maddubs_epi16(weights, operand));
  }

 protected:
  static Sum add_products(Sum sum, __m256i products) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(products, _mm256_set1_epi16(1)));
  }
};

// Two groups at once.
struct SignedPairs : SignedDot {
  using Single = SignedDot;
  struct Weights {
    __m256i first, second;
  };
  struct Operand {
    __m256i first, second;
  };
  static constexpr int kGroups = 2;
  static constexpr bool kApart = true;
  static constexpr int kOperandBytes = 2 * kGroup;
  static constexpr int kMaxRows = 6;
  static constexpr int kFetchBytes = 0;
  // Of rows of which more than one in so many pairs does not fit, masked ones take less time.
  static constexpr size_t kPairsApart = 4;

  static constexpr int vectors(int rows) { return rows == 1 ? 8 : rows == 2 ? 4 : 2; }
  static Operand operand(const char* p) { return {SignedDot::operand(p), SignedDot::operand(p + kGroup)}; }
  static Weights load(const char* p) { return {SignedDot::load(p), SignedDot::load(p + kWeightBytes)}; }
  static Sum add(Sum sum, Operand operand, Weights weights) {
    return add_products(sum, _mm256_add_epi16(_mm256_maddubs_epi16(weights.first, operand.first),
                                              _mm256_maddubs_epi16(weights.second, operand.second)));
  }

  // Writes a row, and returns what it adds to the sums of all columns.
  static int32_t write(const uint8_t* values, size_t count, char* out, ApartList& apart) {
    const __m256i middle = _mm256_set1_epi8(static_cast<char>(kMiddle)), ones = _mm256_set1_epi8(1);
    __m256i sum = _mm256_setzero_si256();
    size_t i = 0;
    for (; i < count; i += sizeof(__m256i)) {
      const __m256i value = load_values(values + i, count - i), s = _mm256_xor_si256(value, middle);
      sum = _mm256_add_epi64(sum, _mm256_sad_epu8(value, _mm256_setzero_si256()));
      const __m256i positive = _mm256_maddubs_epi16(_mm256_subs_epu8(value, middle), ones);
      const __m256i negative = _mm256_maddubs_epi16(_mm256_subs_epu8(middle, value), ones);
      const __m256i large = _mm256_cmpgt_epi16(_mm256_max_epi16(positive, negative), _mm256_set1_epi16(kMost));
      const __m256i alone = _mm256_cmpeq_epi32(large, _mm256_setzero_si256());  // fits by itself
      const __m256i halved = _mm256_xor_si256(alone, _mm256_set1_epi32(-1));
      const __m256i second = seconds_above(_mm256_max_epi16(of_pairs(positive), of_pairs(negative)), kMost);
      const __m256i kept_apart = _mm256_or_si256(second, halved);
      _mm256_store_si256(reinterpret_cast<__m256i*>(out + i), _mm256_andnot_si256(kept_apart, s));
      if (marked(kept_apart) != 0) keep_apart(s, marked(kept_apart), marked(halved), i / kGroup, apart);
    }
    // what load_values adds counts as zeros; unsigned, since with very deep rows this may wrap
    const auto loaded = static_cast<uint32_t>(i), total = static_cast<uint32_t>(total_of_sads(sum));
    return static_cast<int32_t>(kMiddle * (kMiddle * loaded - total));
  }

 private:
  // Largest sum of positive, and of negative, values whose products go to one int16.
  static constexpr int kMost = 128;

  static void keep_apart(__m256i s, unsigned groups, unsigned halved, size_t first_group, ApartList& apart) {
    alignas(kAlign) int8_t values[8][kGroup];
    _mm256_store_si256(reinterpret_cast<__m256i*>(values), s);
    for (; groups != 0; groups &= groups - 1) {
      const int group = __builtin_ctz(groups);
      int8_t* const rest = values[group];
      if ((halved >> group & 1) != 0) {
        int8_t half[kGroup];
        for (int k = 0; k < kGroup; ++k) {
          half[k] = static_cast<int8_t>(rest[k] / 2);
          rest[k] = static_cast<int8_t>(rest[k] - half[k]);
        }
        apart.add(first_group + group, half, kGroup);
      }
      apart.add(first_group + group, rest, kGroup);
    }
  }
};

}  // namespace
}  // namespace lstm_quant
