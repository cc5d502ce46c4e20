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
// vpsignb, which would negate the weights outright (all but -128), competes with the multiplications and takes half a
// cycle more.
//
// Several rows leave time to read weights, but the CPU does not foresee the next block. So while the rows go through a
// block, the weights that are read next are fetched, a line with each group.
//
// Measured on Zen 4 (EPYC, 3.7 GHz, one thread): 512->512 with 64 rows 96 G products/s of 118 (with vpsignb 71); one
// row reads 1 to 4 MB of weights at 77 to 84 GB/s, plain reads 100 to 118; tail 2.6 ns a unit with its loads.
// On Zen 3 (EPYC, 3.0 GHz, one thread), with all in the first-level cache: 85 G products/s, 94 without the vpxor; 16 to
// 64 rows of 1024, weights in the third level: 77 to 80, without fetching 50 to 65.
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
__m256i load256(const void* p) {
  return _mm256_load_si256(static_cast<const __m256i*>(p));
}

// Writes a row's groups of 4 values as 4 magnitudes and 4 masks, and returns the sum of the magnitudes under a mask.
int32_t write_row(const uint8_t* values, size_t count, char* out) {
  const __m256i zero = _mm256_setzero_si256(), middle = _mm256_set1_epi8(static_cast<char>(kMiddle));
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
  static Sum add(Sum sum, Operand operand, Weights weights) {
    const __m256i masked = _mm256_xor_si256(weights, operand.mask);
    const __m256i pairs = _mm256_maddubs_epi16(operand.magnitude, masked);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static Sum join(Sum a, Sum b) { return _mm256_add_epi32(a, b); }
  static V::F total(Sum sum) { return V::to_float(sum); }
};

class MaskedSums {
 public:
  MaskedSums(const Projection& projection, const void* operand, size_t stride, size_t rows, const Walk& walk,
             char* scratch)
      : projection_(projection), walk_(walk), all_rows_(rows) {
    const size_t count = projection.padded_depth;
    const size_t masked_stride = 2 * round_up(count, kAlign);
    auto* row_sums = reinterpret_cast<int32_t*>(scratch + rows * masked_stride);
    for (size_t row = 0; row < rows; ++row) {
      const auto* values = static_cast<const uint8_t*>(operand) + row * stride;
      row_sums[row] = write_row(values, count, scratch + row * masked_stride);
    }
    rows_ = {scratch, masked_stride, row_sums};
  }

  template <class Sink>
  void operator()(int32_t block, size_t first_row, size_t rows, const Sink& sink) const {
    const BlockWeights weights(projection_, block);
    sum_all_rows<MaskedDot>(rows_, first_row, rows, weights, sink, later(block, first_row, rows));
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
  OperandRows rows_;
};

struct Isa {
  using V = Avx2;
  using Int8 = MaskedSums;
  using Wide = WideSums<WideDot<Avx2, 1>>;
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
