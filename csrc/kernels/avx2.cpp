// AVX2 without VNNI: vpmaddubsw multiplies uint8 with int8 and adds two products in int16, where 255 * 127 twice does
// not fit and is cut. So the operand goes in as magnitude |s| and sign of s = value - 128, and where s is negative the
// weight is replaced by its complement, -weight - 1, which int8 always holds:
//
//   s * weight = |s| * (weight ^ mask) + (|s| where s < 0, else 0)       mask = -1 where s < 0, else 0
//
// Two such products fit: 2 * 127 * 128 where |s| <= 127; and |s| = 128 is negative and meets complements, of which the
// largest is 127 and the smallest gives 2 * 128 * -128 = -32768. What the second term adds is the same for all columns.
//
// For 32 products that is vpxor, vpmaddubsw, vpmaddwd and vpaddd: one cycle on the four vector ports of Zen 3 and 4.
// Mostly values lie near the middle, and the products of two groups fit int16 together: then one vpaddw stands for a
// vpmaddwd and a vpaddd. Of the pairs that do not fit, the second group is multiplied by itself, after all others.
// vpsignb, which would negate the weights outright (all but -128), competes with the multiplications and takes half a
// cycle more.
//
// Several rows leave time to read weights, but the CPU does not foresee the next block. So while the rows go through a
// block, the weights that are read next are fetched, a line with each group.
//
// Measured on Zen 4 (EPYC, 3.7 GHz, one thread): 512->512 with 64 rows 96 G products/s of 118 (with vpsignb 71); one
// row reads 1 to 4 MB of weights at 77 to 84 GB/s, plain reads 100 to 118; tail 2.6 ns a unit with its loads.
// On Zen 3 (EPYC, 3.0 GHz, one thread), with all in the first-level cache: 96 G products/s in pairs of groups, 87 one
// by one; on a machine with busy neighbours 70 and 59. Fetching the next block's weights took 13 to 29 % off 64 rows of
// 512.
#ifdef __x86_64__

#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "evaluators.h"
#include "float_function.h"
#include "kernels.h"
#include "scalar_sums.h"
#include "target.h"

LSTM_QUANT_BEGIN_TARGET("avx2,fma")

#include "simd_avx2.h"
#include "steps-inl.h"

namespace lstm_quant {
namespace {

constexpr int kMiddle = 128;
// Largest sum of the four magnitudes whose products go to one int16: 255 * 128 fits.
constexpr int kMostTogether = 255;
// Rows of which more than one in so many pairs does not fit together are multiplied a group at a time: pairs save an
// eighth of the operations, a group that is kept apart costs half of those of a pair.
constexpr size_t kPairsApart = 8;
// A single row of fewer values gains less than looking at them costs.
constexpr size_t kLeastPaired = 256;

__m256i load256(const void* p) {
  return _mm256_load_si256(static_cast<const __m256i*>(p));
}

// Where the products of two neighbouring groups do not fit int16 together, the second goes to where `apart` points.
void keep_apart(char* pair, int32_t second_group, Apart*& apart) {
  const auto* first = reinterpret_cast<const uint8_t*>(pair);
  const uint8_t* second = first + sizeof apart->operand;
  const auto fit = [&](int i) { return first[i] + first[i + 1] + second[i] + second[i + 1] <= kMostTogether; };
  if (fit(0) && fit(2)) return;
  apart->group = second_group;
  std::memcpy(apart->operand, second, sizeof apart->operand);
  std::memset(pair + sizeof apart->operand, 0, sizeof apart->operand);
  ++apart;
}

// Writes a row's groups of 4 values as 4 magnitudes and 4 masks, and returns the sum of the magnitudes under a mask.
// Unless `apart` is null, pairs of groups that do not fit together are parted, and it is moved beyond the last.
int32_t write_row(const uint8_t* values, size_t count, char* out, Apart** apart) {
  const __m256i zero = _mm256_setzero_si256(), middle = _mm256_set1_epi8(static_cast<char>(kMiddle));
  const auto part = [&](size_t i, size_t end) {
    for (; i < end; i += kDepthStep) keep_apart(out + 2 * i, static_cast<int32_t>(i / kGroup) + 1, *apart);
  };
  __m256i masked_sum = zero;
  size_t i = 0;
  for (; i + sizeof(__m256i) <= count; i += sizeof(__m256i)) {
    const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + i));
    // the unpacking goes by halves of a vector
    const __m256i s = _mm256_permute4x64_epi64(_mm256_xor_si256(value, middle), 0b11011000);
    const __m256i magnitude = _mm256_abs_epi8(s), mask = _mm256_cmpgt_epi8(zero, s);
    masked_sum = _mm256_add_epi64(masked_sum, _mm256_sad_epu8(_mm256_and_si256(magnitude, mask), zero));
    auto* to = reinterpret_cast<__m256i*>(out + 2 * i);
    _mm256_store_si256(to, _mm256_unpacklo_epi32(magnitude, mask));
    _mm256_store_si256(to + 1, _mm256_unpackhi_epi32(magnitude, mask));
    // what each int16 gets of a pair of groups, in the lower half of 64 bits
    const __m256i twos = _mm256_maddubs_epi16(magnitude, _mm256_set1_epi8(1));
    const __m256i fours = _mm256_add_epi16(twos, _mm256_srli_epi64(twos, 32));
    const __m256i large = _mm256_cmpgt_epi16(fours, _mm256_set1_epi16(kMostTogether));
    if (apart != nullptr && !_mm256_testz_si256(large, _mm256_set1_epi64x(0xFFFFFFFF))) part(i, i + sizeof(__m256i));
  }
  __m128i sum = _mm_add_epi64(_mm256_castsi256_si128(masked_sum), _mm256_extracti128_si256(masked_sum, 1));
  sum = _mm_add_epi64(sum, _mm_unpackhi_epi64(sum, sum));
  // only the lower half holds values from here on
  for (; i < count; i += kDepthStep) {
    const __m128i value = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values + i));
    const __m128i s = _mm_xor_si128(value, _mm256_castsi256_si128(middle));
    const __m128i magnitude = _mm_abs_epi8(s), mask = _mm_cmpgt_epi8(_mm_setzero_si128(), s);
    sum = _mm_add_epi64(sum, _mm_sad_epu8(_mm_and_si128(magnitude, mask), _mm_setzero_si128()));
    _mm_store_si128(reinterpret_cast<__m128i*>(out + 2 * i), _mm_unpacklo_epi32(magnitude, mask));
    if (apart != nullptr) part(i, i + kDepthStep);
  }
  return _mm_cvtsi128_si32(sum);
}

struct MaskedDot {
  using V = Avx2;
  using Weights = __m256i;
  using Sum = __m256i;
  struct Operand {
    __m256i magnitude;
    __m256i mask;
  };
  static constexpr int kGroups = 1;
  static constexpr size_t kPartedGroups = 0;
  static constexpr int kOperandBytes = 2 * kGroup;
  static constexpr bool kPrefetches = true;
  static constexpr int kMaxRows = 3;
  static constexpr bool kFetchesLater = true;
  static constexpr int kSplit = 1;
  static constexpr int kFetchBytes = 1024;

  static constexpr int vectors(int rows) { return rows > 1 ? 4 : 8; }
  static Operand operand(const char* p) {
    int32_t magnitude, mask;
    std::memcpy(&magnitude, p, kGroup);
    std::memcpy(&mask, p + kGroup, kGroup);
    return {_mm256_set1_epi32(magnitude), _mm256_set1_epi32(mask)};
  }
  static Sum start(const BlockWeights& block, int column, int32_t row_sum) {
    return first_sums<V>(block, column, block.offset + kMiddle, row_sum);
  }
  static Sum zero() { return _mm256_setzero_si256(); }
  static Weights load_once(const char* p) { return load256(p); }
  static Weights load(const char* p) { return load256(p); }
  // In int16, two neighbours together.
  static __m256i products(Operand operand, Weights weights) {
    return _mm256_maddubs_epi16(operand.magnitude, _mm256_xor_si256(weights, operand.mask));
  }
  static Sum add(Sum sum, Operand operand, Weights weights) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(products(operand, weights), _mm256_set1_epi16(1)));
  }
  static Sum join(Sum a, Sum b) { return _mm256_add_epi32(a, b); }
  static V::F total(Sum sum) { return V::to_float(sum); }
};

// Two groups at once, whose products fit int16 together.
struct PairedDot : MaskedDot {
  using Single = MaskedDot;
  struct Weights {
    __m256i first, second;
  };
  struct Operand {
    MaskedDot::Operand first, second;
  };
  static constexpr int kGroups = 2;
  static constexpr int kOperandBytes = 2 * MaskedDot::kOperandBytes;

  static Operand operand(const char* p) {
    return {MaskedDot::operand(p), MaskedDot::operand(p + MaskedDot::kOperandBytes)};
  }
  static Weights load(const char* p) { return {load256(p), load256(p + kWeightBytes)}; }
  static Sum add(Sum sum, Operand operand, Weights weights) {
    const __m256i fours =
        _mm256_add_epi16(products(operand.first, weights.first), products(operand.second, weights.second));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(fours, _mm256_set1_epi16(1)));
  }
};

class MaskedSums {
 public:
  MaskedSums(const Projection& projection, const void* operand, size_t stride, size_t rows, const Walk& walk,
             char* scratch)
      : projection_(projection), walk_(walk), all_rows_(rows) {
    const size_t count = projection.padded_depth, pairs = count / kDepthStep;
    const size_t apart_at = 2 * round_up(count, kAlign);
    const size_t masked_stride = apart_at + round_up((pairs + 1) * sizeof(Apart), kAlign);
    auto* row_sums = reinterpret_cast<int32_t*>(scratch + rows * masked_stride);
    rows_ = {scratch, masked_stride, row_sums, apart_at};
    paired_ = rows > 1 || count >= kLeastPaired;
    const auto values = [&](size_t row) { return static_cast<const uint8_t*>(operand) + row * stride; };
    for (size_t row = 0; row < rows && paired_; ++row) {
      char* out = scratch + row * masked_stride;
      auto* const first = reinterpret_cast<Apart*>(out + apart_at);
      Apart* apart = first;
      row_sums[row] = write_row(values(row), count, out, &apart);
      apart->group = -1;
      paired_ = static_cast<size_t>(apart - first) <= pairs / kPairsApart;
    }
    for (size_t row = 0; row < rows && !paired_; ++row) {
      row_sums[row] = write_row(values(row), count, scratch + row * masked_stride, nullptr);
    }
  }

  template <class Sink>
  void operator()(int32_t block, size_t first_row, size_t rows, const Sink& sink) const {
    const BlockWeights weights(projection_, block);
    const LaterWeights later_weights = later(block, first_row, rows);
    if (paired_) return sum_all_rows<PairedDot>(rows_, first_row, rows, weights, sink, later_weights);
    sum_all_rows<MaskedDot>(rows_, first_row, rows, weights, sink, later_weights);
  }

 private:
  // These rows' part of the weights that are read after the block's. Their tiles go through the depth twice, as a tile
  // has half of the columns.
  LaterWeights later(int32_t block, size_t first_row, size_t rows) const {
    constexpr size_t kMaxRows = MaskedDot::kMaxRows;
    const char* after = walk_.after(projection_, block);
    const size_t groups = 2 * ((rows + kMaxRows - 1) / kMaxRows) * (projection_.padded_depth / kGroup);
    const size_t bytes = projection_.block_bytes * rows / all_rows_;
    const size_t step = (bytes + groups - 1) / groups;
    // fewer groups than lines: so few rows are bound by reading anyway
    if (after == nullptr || step > kAlign) return {static_cast<const char*>(projection_.weights), 0};
    return {after + projection_.block_bytes * first_row / all_rows_, step};
  }

  const Projection& projection_;
  const Walk walk_;
  const size_t all_rows_;
  bool paired_;  // PairedDot takes all rows
  OperandRows rows_;
};

struct Isa {
  using V = Avx2;
  using Int8 = MaskedSums;
  using Wide = WideSums<WideDot<Avx2, 4, 2>>;
  using DeltaDot = MaskedDot;
  using Ahead = void;
  static constexpr size_t kTailVectors = 4;
  static constexpr size_t kOverlapBytes = 0;
  using Float = DotSums<FloatDot<Avx2, 3, 4>>;
};

}  // namespace

const Kernels kAvx2Kernels = KernelsOf<Isa>::table("avx2", {92, 80, 3, 4 << 20});

}  // namespace lstm_quant

LSTM_QUANT_END_TARGET

#endif  // __x86_64__
