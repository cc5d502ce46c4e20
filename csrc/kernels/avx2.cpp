// AVX2: vpmaddubsw adds two products of uint8 and int8 in int16, and saturates: 255 * 127 twice would be cut. So a row
// of uint8 is first brought into a form whose products fit, and what was taken from its values is given back through
// the sums of the weights:
//
//   kSeven   value - the row's smallest, if its values span at most 127: 2 * 127 * 128 fits
//   kSigned  |value - 128| times the weights with its sign (vpsignb): 2 * 128 * 127 fits; but vpsignb cannot negate
//   -128 kWords   value - 128 in int16, times the weights widened to int16 (vpmaddwd): any weights
#include <immintrin.h>

#include <cstring>

#include "evaluators.h"
#include "float_function.h"
#include "kernels.h"
#include "scalar_sums.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma")

#include "simd_avx2.h"
#include "steps-inl.h"

namespace lstm_quant {
namespace {

constexpr int kMiddle = 128;
constexpr int kSevenBits = 127;
constexpr size_t kHalf = 16;  // values of a row that are brought into another form at a time

__m256i load256(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
__m128i load128(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}
void store256(void* p, __m256i v) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), v);
}

struct ByteRange {
  uint8_t low = 255;
  uint8_t high = 0;

  void include(uint8_t value) {
    low = value < low ? value : low;
    high = value > high ? value : high;
  }
};

ByteRange range_of(const uint8_t* values, size_t count) {
  ByteRange range;
  size_t i = 0;
  if (count >= sizeof(__m256i)) {
    __m256i lows = load256(values), highs = lows;
    for (i = sizeof(__m256i); i + sizeof(__m256i) <= count; i += sizeof(__m256i)) {
      lows = _mm256_min_epu8(lows, load256(values + i));
      highs = _mm256_max_epu8(highs, load256(values + i));
    }
    uint8_t lanes[2 * sizeof(__m256i)];
    store256(lanes, lows);
    store256(lanes + sizeof(__m256i), highs);
    for (const uint8_t lane : lanes) range.include(lane);
  }
  for (; i < count; ++i) range.include(values[i]);
  return range;
}

// Both byte forms hold for each group of four values 4 bytes of the magnitude and then 4 of the value with its sign, so
// that rows of either may stand in one tile.
void write_groups(__m128i magnitude, __m128i with_sign, char* out) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_unpacklo_epi32(magnitude, with_sign));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out + kHalf), _mm_unpackhi_epi32(magnitude, with_sign));
}

void write_seven(const uint8_t* values, size_t count, uint8_t low, char* out) {
  for (size_t i = 0; i < count; i += kHalf) {
    const __m128i shifted = _mm_sub_epi8(load128(values + i), _mm_set1_epi8(static_cast<char>(low)));
    write_groups(shifted, shifted, out + 2 * i);
  }
}

void write_signed(const uint8_t* values, size_t count, char* out) {
  for (size_t i = 0; i < count; i += kHalf) {
    const __m128i shifted = _mm_xor_si128(load128(values + i), _mm_set1_epi8(static_cast<char>(kMiddle)));
    write_groups(_mm_abs_epi8(shifted), shifted, out + 2 * i);
  }
}

void write_words(const uint8_t* values, size_t count, char* out) {
  for (size_t i = 0; i < count; i += kHalf) {
    store256(out + 2 * i, _mm256_sub_epi16(_mm256_cvtepu8_epi16(load128(values + i)), _mm256_set1_epi16(kMiddle)));
  }
}

// What the three forms have in common; a group of a row takes 8 bytes in each.
struct FormedDot {
  using V = Avx2;
  static constexpr int kOperandBytes = 2 * kGroup;
  static constexpr int kMaxRows = 2;
  static constexpr int kSplit = 1;

  static __m256i broadcast(const char* p) {
    int32_t four;
    std::memcpy(&four, p, sizeof four);
    return _mm256_set1_epi32(four);
  }
  template <class Sum>
  static Sum join(Sum a, Sum) {
    return a;
  }
};

struct ByteDot : FormedDot {
  using Sum = __m256i;
  static constexpr int kVectors = 4;
  static constexpr int kRowVectors = 8;

  static Sum zero() { return _mm256_setzero_si256(); }
  static Sum add_products(Sum sum, __m256i unsigned_bytes, __m256i signed_bytes) {
    const __m256i pairs = _mm256_maddubs_epi16(unsigned_bytes, signed_bytes);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static V::F total(Sum sum, const BlockWeights& block, int column, int32_t shift) {
    return total_of<V>(sum, block, column, shift);
  }
};

struct SevenDot : ByteDot {
  using Operand = __m256i;

  static Operand operand(const char* p) { return broadcast(p); }
  static Sum add(Sum sum, Operand operand, const char* weights) { return add_products(sum, operand, load256(weights)); }
};

struct SignedDot : ByteDot {
  struct Operand {
    __m256i magnitude;
    __m256i with_sign;
  };

  static Operand operand(const char* p) { return {broadcast(p), broadcast(p + kGroup)}; }
  static Sum add(Sum sum, Operand operand, const char* weights) {
    return add_products(sum, operand.magnitude, _mm256_sign_epi8(load256(weights), operand.with_sign));
  }
};

struct WordDot : FormedDot {
  using Operand = __m256i;
  struct Sum {  // of the products with the even and odd pairs of a group's values, side by side: units 0-3, units 4-7
    __m256i low;
    __m256i high;
  };
  static constexpr int kVectors = 2;
  static constexpr int kRowVectors = 4;

  static Operand operand(const char* p) {
    int64_t four;
    std::memcpy(&four, p, sizeof four);
    return _mm256_set1_epi64x(four);
  }
  static Sum zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static Sum add(Sum sum, Operand operand, const char* weights) {
    const __m256i low = _mm256_madd_epi16(_mm256_cvtepi8_epi16(load128(weights)), operand);
    const __m256i high = _mm256_madd_epi16(_mm256_cvtepi8_epi16(load128(weights + kHalf)), operand);
    return {_mm256_add_epi32(sum.low, low), _mm256_add_epi32(sum.high, high)};
  }
  static V::F total(Sum sum, const BlockWeights& block, int column, int32_t shift) {
    // the halves' lanes come out as units 0 1 4 5 | 2 3 6 7
    const __m256i units = _mm256_permute4x64_epi64(_mm256_hadd_epi32(sum.low, sum.high), _MM_SHUFFLE(3, 1, 2, 0));
    return total_of<V>(units, block, column, shift);
  }
};

// The sums of rows, each first brought into a form that is exact. Bytes are faster; all rows are words where any is
// wider than seven bits and its weights cannot be negated.
class FormedSums {
 public:
  FormedSums(const Projection& projection, const void* operand, size_t stride, size_t rows, char* scratch)
      : projection_(projection) {
    const size_t formed_stride = 2 * round_up(projection.padded_depth, kAlign);
    auto* shifts = reinterpret_cast<int32_t*>(scratch + rows * formed_stride);
    rows_ = {scratch, formed_stride, shifts};
    for (size_t row = 0; row < rows; ++row) {
      const ByteRange range = range_of(static_cast<const uint8_t*>(operand) + row * stride, projection.depth);
      shifts[row] = range.high - range.low <= kSevenBits ? range.low : kMiddle;
      words_ |= range.high - range.low > kSevenBits && !projection.negatable;
    }
    const size_t count = projection.padded_depth;
    for (size_t row = 0; row < rows; ++row) {
      const auto* values = static_cast<const uint8_t*>(operand) + row * stride;
      char* formed = scratch + row * formed_stride;
      if (words_) {
        write_words(values, count, formed);
        shifts[row] = kMiddle;
      } else if (shifts[row] == kMiddle) {
        write_signed(values, count, formed);
      } else {
        write_seven(values, count, static_cast<uint8_t>(shifts[row]), formed);
      }
    }
  }

  void operator()(int32_t block, size_t first_row, size_t rows, float* sums) const {
    const BlockWeights weights(projection_, block);
    if (words_) return sum_all_rows<WordDot>(rows_, first_row, rows, weights, sums);
    bool seven = true;
    for (size_t row = first_row; row < first_row + rows; ++row) seven &= rows_.shifts[row] != kMiddle;
    if (seven) return sum_all_rows<SevenDot>(rows_, first_row, rows, weights, sums);
    sum_all_rows<SignedDot>(rows_, first_row, rows, weights, sums);
  }

 private:
  const Projection& projection_;
  OperandRows rows_;
  bool words_ = false;
};

struct Isa {
  using V = Avx2;
  using Int8 = FormedSums;
  using Float = DotSums<FloatDot<Avx2, 3, 4, 8>>;
};

}  // namespace

const Kernels kAvx2Kernels{"avx2", KernelsOf<Isa>::quantize, KernelsOf<Isa>::project, KernelsOf<Isa>::step,
                           KernelsOf<Isa>::evaluate};

}  // namespace lstm_quant

#pragma GCC pop_options
