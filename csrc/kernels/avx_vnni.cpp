// AVX-VNNI: vpdpbusd in 256 bits, for CPUs without AVX-512 (Intel's client cores from Alder Lake on): 32 products of
// uint8 and int8 into 8 int32 sums, two a cycle. Of 16 registers, six rows of 16 sums take 12 and the weights 2; a
// single row takes all 64 sums of a block at a time, in 8.
//
// Measured through its EVEX twin on Zen 4 (EPYC, 3.7 GHz, one thread), which has no AVX-VNNI: 1024->1024 with 64 rows
// 214 G products/s of 236; one row reads 1 to 4 MB of weights at 90 GB/s, plain reads 100 to 118; tail 2.4 ns a unit.
#ifdef __x86_64__

#include "evaluators.h"
#include "float_function.h"
#include "kernels.h"
#include "scalar_sums.h"
#include "target.h"

LSTM_QUANT_BEGIN_TARGET("avx2,fma,avxvnni")

#include "simd_avx2.h"
#include "steps-inl.h"

namespace lstm_quant {
namespace {

struct VnniDot {
  using V = Avx2;
  using Operand = __m256i;
  using Weights = __m256i;
  using Sum = __m256i;
  static constexpr int kGroups = 1;
  static constexpr bool kApart = false;
  static constexpr size_t kPartedGroups = 0;
  static constexpr int kOperandBytes = kGroup;
  static constexpr bool kFetchesChanges = true;
  static constexpr int kMaxRows = 6;
  static constexpr bool kFetchesLater = false;
  static constexpr int kSplit = 1;
  static constexpr int kFetchBytes = 0;

  static constexpr int vectors(int rows) { return rows > 2 ? 2 : rows > 1 ? 4 : 8; }
  static Operand operand(const char* p) {
    int32_t group;
    std::memcpy(&group, p, sizeof group);
    return _mm256_set1_epi32(group);
  }
  static Sum start(const BlockWeights& block, int column, int32_t) {
    return first_sums<V>(block, column, block.offset, 0);
  }
  static Sum zero() { return _mm256_setzero_si256(); }
  static Weights load_once(const char* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
  static Weights load(const char* p) { return in_register(_mm256_load_si256(reinterpret_cast<const __m256i*>(p))); }
  static Sum add(Sum sum, Operand operand, Weights weights) {
    return in_register(_mm256_dpbusd_avx_epi32(sum, operand, weights));
  }
  static Sum join(Sum a, Sum b) { return _mm256_add_epi32(a, b); }
  static V::F total(Sum sum) { return V::to_float(sum); }
};

struct Isa {
  using V = Avx2;
  using Int8 = DotSums<VnniDot>;
  using Wide = WideSums<WideDot<Avx2, 4, 2>>;
  using DeltaDot = ChangeDot<VnniDot>;
  using Ahead = void;
  static constexpr size_t kTailVectors = 4;
  static constexpr size_t kOverlapBytes = 0;
  using Float = DotSums<FloatDot<Avx2, 3, 4>>;
};

}  // namespace

const Kernels kAvxVnniKernels = KernelsOf<Isa>::table("avx_vnni", {150, 100, 2.5});

}  // namespace lstm_quant

LSTM_QUANT_END_TARGET

#endif  // __x86_64__
