// AVX-512 with VNNI: vpdpbusd adds 64 products of uint8 and int8 to 16 int32 sums, exactly; Zen 4 does one a cycle, Zen
// 5 two. A single row is bound by reading weights; so that it is not bound by vpdpbusd's latency, its groups of four
// columns go to 4 sums of their own in turn, 8 in flight. Six rows of 64 sums, with the weights in 4 registers, fill 29
// of 32. What int8() evaluates is bound by the multipliers, where 12 of the operations of a gate go, the division
// counted twice; eight vectors at a time hide their latency.
//
// Measured on Zen 4 (EPYC, 3.7 GHz, one thread): 1024->1024 with 64 rows 232 G products/s of 236; from 3 rows 220 or
// more; one row reads 1 to 4 MB of weights at 95 to 100 GB/s, plain reads 100 to 118; tail 1.75 ns a unit with its
// loads, 2.4 with a 16-bit grid on every part.
#ifdef __x86_64__

#include "evaluators.h"
#include "float_function.h"
#include "kernels.h"
#include "scalar_sums.h"
#include "target.h"

#ifndef __clang__  // g++ 12 takes the undefined vectors in its own header for a mistake of ours (its bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

LSTM_QUANT_BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")

#include "simd_avx512.h"
#include "steps-inl.h"

namespace lstm_quant {
namespace {

struct VnniDot {
  using V = Avx512;
  using Operand = __m512i;
  using Weights = __m512i;
  using Sum = __m512i;
  static constexpr int kGroups = 1;
  static constexpr bool kApart = false;
  static constexpr size_t kPartedGroups = 0;
  static constexpr int kOperandBytes = kGroup;
  static constexpr bool kFetchesChanges = false;
  static constexpr int kMaxRows = 6;
  static constexpr bool kFetchesLater = false;
  static constexpr int kSplit = 2;
  static constexpr int kFetchBytes = 0;

  static constexpr int vectors(int) { return 4; }
  static Operand operand(const char* p) {
    int32_t group;
    std::memcpy(&group, p, sizeof group);
    return _mm512_set1_epi32(group);
  }
  static Sum start(const BlockWeights& block, int column, int32_t) {
    return first_sums<V>(block, column, block.offset, 0);
  }
  static Sum zero() { return _mm512_setzero_si512(); }
  static Weights load_once(const char* p) { return _mm512_load_si512(p); }
  static Weights load(const char* p) { return in_register(_mm512_load_si512(p)); }
  static Sum add(Sum sum, Operand operand, Weights weights) {
    return in_register(_mm512_dpbusd_epi32(sum, operand, weights));
  }
  static Sum join(Sum a, Sum b) { return _mm512_add_epi32(a, b); }
  static V::F total(Sum sum) { return V::to_float(sum); }
};

struct Isa {
  using V = Avx512;
  using Int8 = DotSums<VnniDot>;
  using Wide = WideSums<WideDot<Avx512, 4, 4>>;
  using DeltaDot = ChangeDot<VnniDot>;
  using Ahead = AheadSums<VnniDot>;
  static constexpr size_t kTailVectors = 8;
  static constexpr size_t kOverlapBytes = 16 << 10;
  using Float = DotSums<FloatDot<Avx512, 4, 4>>;
};

}  // namespace

const Kernels kAvx512VnniKernels = KernelsOf<Isa>::table("avx512_vnni", {220, 110, 2});

}  // namespace lstm_quant

LSTM_QUANT_END_TARGET

#endif  // __x86_64__
