// Products of unsigned operands and signed weights for AVX2. vpmaddubsw adds two of them in int16, where 255 * 127
// twice does not fit and is cut. So an operand goes in as magnitude |s| and sign of s = value - 128, and where s is
// negative the weight is replaced by its complement, -weight - 1, which int8 always holds:
//
//   s * weight = |s| * (weight ^ mask) + (|s| where s < 0, else 0)       mask = -1 where s < 0, else 0
//
// Two such products fit: 2 * 127 * 128 where |s| <= 127; and |s| = 128 is negative and meets complements, of which the
// largest is 127 and the smallest gives 2 * 128 * -128 = -32768. What the second term adds is the same for all columns.
//
// For 32 products that is vpxor, vpmaddubsw, vpmaddwd and vpaddd: one cycle on the four vector ports of Zen 3 and 4.
// Mostly values lie near the middle, and the products of two groups fit int16 together: then one vpaddw stands for a
// vpmaddwd and a vpaddd. Of the pairs that do not fit, the second group is kept apart.
// vpsignb, which would negate the weights outright (all but -128), competes with the multiplications and takes half a
// cycle more.
//
// Include it inside the target region.
#pragma once

#include "operands_avx2.h"

namespace lstm_quant {
namespace {

// Any row.
struct MaskedDot : Int32Dot {
  using Weights = __m256i;
  struct Operand {
    __m256i magnitude;
    __m256i mask;
  };
  static constexpr int kGroups = 1;
  static constexpr bool kApart = false;
  static constexpr int kOperandBytes = 2 * kGroup;
  static constexpr bool kFetchesChanges = true;
  static constexpr int kMaxRows = 3;
  static constexpr int kFetchBytes = 1024;

  static constexpr int vectors(int rows) { return rows > 1 ? 4 : 8; }
  static Operand operand(const char* p) {
    int32_t magnitude, mask;
    std::memcpy(&magnitude, p, kGroup);
    std::memcpy(&mask, p + kGroup, kGroup);
    return {_mm256_set1_epi32(magnitude), _mm256_set1_epi32(mask)};
  }
  static Weights load_once(const char* p) { return load256(p); }
  static Weights load(const char* p) { return load256(p); }
  // In int16, two neighbours together.
  static __m256i products(Operand operand, Weights weights) {
    return _mm256_maddubs_epi16(operand.magnitude, _mm256_xor_si256(weights, operand.mask));
  }
  static Sum add(Sum sum, Operand operand, Weights weights) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(products(operand, weights), _mm256_set1_epi16(1)));
  }

  // Writes a row, and returns what it adds to the sums of all columns.
  static int32_t write(const uint8_t* values, size_t count, char* out, ApartList&) {
    __m256i masked_sum = _mm256_setzero_si256();
    for (size_t i = 0; i < count; i += sizeof(__m256i)) {
      const Values s = masked(load_values(values + i, count - i), masked_sum);
      store(s, s.magnitude, out, i, count);
    }
    return total_of_sads(masked_sum);
  }

 protected:
  // Eight groups.
  struct Values {
    __m256i magnitude;
    __m256i mask;
  };

  // Adds the magnitudes under a mask to `sums`.
  static Values masked(__m256i value, __m256i& sums) {
    const __m256i zero = _mm256_setzero_si256();
    const __m256i s = _mm256_xor_si256(value, _mm256_set1_epi8(static_cast<char>(kMiddle)));
    const Values v{_mm256_abs_epi8(s), _mm256_cmpgt_epi8(zero, s)};
    sums = _mm256_add_epi64(sums, _mm256_sad_epu8(_mm256_and_si256(v.magnitude, v.mask), zero));
    return v;
  }

  // Stores the groups from the i-th value on as four magnitudes and four masks each, as far as there are values.
  static void store(const Values& v, __m256i magnitude, char* out, size_t i, size_t count) {
    // the unpacking goes by halves of a vector
    const __m256i magnitudes = _mm256_permute4x64_epi64(magnitude, 0b11011000);
    const __m256i masks = _mm256_permute4x64_epi64(v.mask, 0b11011000);
    auto* to = reinterpret_cast<__m256i*>(out + 2 * i);
    _mm256_store_si256(to, _mm256_unpacklo_epi32(magnitudes, masks));
    if (i + sizeof(__m256i) / 2 < count) _mm256_store_si256(to + 1, _mm256_unpackhi_epi32(magnitudes, masks));
  }
};

// Two groups at once.
struct MaskedPairs : MaskedDot {
  using Single = MaskedDot;
  struct Weights {
    __m256i first, second;
  };
  struct Operand {
    MaskedDot::Operand first, second;
  };
  static constexpr int kGroups = 2;
  static constexpr bool kApart = true;
  static constexpr int kOperandBytes = 2 * MaskedDot::kOperandBytes;
  // Rows of which more than one in so many pairs does not fit are multiplied a group at a time: pairs save an eighth of
  // the operations, a group that is kept apart costs half of those of a pair.
  static constexpr size_t kPairsApart = 8;

  static Operand operand(const char* p) {
    return {MaskedDot::operand(p), MaskedDot::operand(p + MaskedDot::kOperandBytes)};
  }
  static Weights load(const char* p) { return {load256(p), load256(p + kWeightBytes)}; }
  static Sum add(Sum sum, Operand operand, Weights weights) {
    const __m256i fours =
        _mm256_add_epi16(products(operand.first, weights.first), products(operand.second, weights.second));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(fours, _mm256_set1_epi16(1)));
  }

  static int32_t write(const uint8_t* values, size_t count, char* out, ApartList& apart) {
    __m256i masked_sum = _mm256_setzero_si256();
    for (size_t i = 0; i < count; i += sizeof(__m256i)) {
      const Values s = masked(load_values(values + i, count - i), masked_sum);
      const __m256i twos = _mm256_maddubs_epi16(s.magnitude, _mm256_set1_epi8(1));
      const __m256i kept_apart = seconds_above(of_pairs(twos), kMostTogether);
      store(s, _mm256_andnot_si256(kept_apart, s.magnitude), out, i, count);
      if (marked(kept_apart) != 0) keep_apart(s, marked(kept_apart), i / kGroup, apart);
    }
    return total_of_sads(masked_sum);
  }

 private:
  // Largest sum of the four magnitudes whose products go to one int16: 255 * 128 fits.
  static constexpr int kMostTogether = 255;

  static void keep_apart(const Values& v, unsigned groups, size_t first_group, ApartList& apart) {
    alignas(kAlign) int32_t magnitudes[8], masks[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(magnitudes), v.magnitude);
    _mm256_store_si256(reinterpret_cast<__m256i*>(masks), v.mask);
    for (; groups != 0; groups &= groups - 1) {
      const int group = __builtin_ctz(groups);
      const int32_t operand[] = {magnitudes[group], masks[group]};
      apart.add(first_group + group, operand, sizeof operand);
    }
  }
};

}  // namespace
}  // namespace lstm_quant
