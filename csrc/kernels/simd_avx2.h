// The vector class of AVX2 with FMA: tail-inl.h says what its members are. Include it inside the target region.
#pragma once

#include <immintrin.h>

#include "evaluate-inl.h"
#include "kernels.h"

namespace lstm_quant {
namespace {

struct Avx2 {
  static constexpr int kLanes = 8;
  static constexpr bool kHasSegments = false;
  using F = __m256;
  using I = __m256i;

  static F set(float v) { return _mm256_set1_ps(v); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static void store_first(float* p, F v, int count) {
    const I lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    _mm256_maskstore_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane), v);
  }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F round(F v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F abs(F v) { return _mm256_andnot_ps(set(-0.0f), v); }
  static F by_sign(F v, F a, F b) { return _mm256_blendv_ps(a, b, v); }
  static F double_times(F v, F n) {
    return _mm256_castsi256_ps(add_i32(_mm256_castps_si256(v), _mm256_slli_epi32(_mm256_castps_si256(n), 23)));
  }
  static I to_int(F v) { return _mm256_cvtps_epi32(v); }
  static F to_float(I v) { return _mm256_cvtepi32_ps(v); }
  static I load_i32(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static I set_i32(int32_t v) { return _mm256_set1_epi32(v); }
  static I add_i32(I a, I b) { return _mm256_add_epi32(a, b); }
  static I bit_xor(I a, I b) { return _mm256_xor_si256(a, b); }
  static uint32_t differing(I a, I b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(a, b)))) ^ 0xFF;
  }
  static I excess_u8(I a, I b) { return _mm256_subs_epu8(a, b); }
  static I nonzero_bytes(I v) { return bit_xor(_mm256_cmpeq_epi8(v, _mm256_setzero_si256()), _mm256_set1_epi8(-1)); }
  // a + b * c, modulo 2**32
  static I add_product(I a, I b, int32_t c) { return _mm256_add_epi32(a, _mm256_mullo_epi32(b, set_i32(c))); }
  static I even_bytes(I v) { return _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8); }
  static I odd_bytes(I v) { return _mm256_srai_epi16(v, 8); }
  static I add_pairs(I sum, I a, I b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
  static I high_part(I v) { return _mm256_srai_epi32(v, 8); }
  static I low_part(I v) { return _mm256_and_si256(v, set_i32(0xFF)); }
  // in halves: sums are exact in double
  static F join_parts(I high, I low) {
    const __m128 first = join_half(_mm256_castsi256_si128(high), _mm256_castsi256_si128(low));
    const __m128 second = join_half(_mm256_extracti128_si256(high, 1), _mm256_extracti128_si256(low, 1));
    return _mm256_set_m128(second, first);
  }
  static __m128 join_half(__m128i high, __m128i low) {
    const __m256d high_sum = _mm256_mul_pd(_mm256_cvtepi32_pd(high), _mm256_set1_pd(256));
    return _mm256_cvtpd_ps(_mm256_add_pd(high_sum, _mm256_cvtepi32_pd(low)));
  }
  static F lookup(const float* table, I i) { return _mm256_i32gather_ps(table, i, sizeof(float)); }
  static F lookup16(const uint16_t* table, I i) {
    const I pair = _mm256_i32gather_epi32(reinterpret_cast<const int*>(table), i, sizeof(uint16_t));
    return to_float(_mm256_and_si256(pair, _mm256_set1_epi32(0xFFFF)));
  }
  static void store_u8(uint8_t* p, I v) {
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
  }
  static void store_i32(int32_t* p, I v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static F evaluate(Evaluator evaluator, F steps) { return evaluate_one<Avx2>(evaluator, steps); }
};

}  // namespace
}  // namespace lstm_quant
