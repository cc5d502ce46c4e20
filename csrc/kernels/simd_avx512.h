// The vector class of AVX-512: tail-inl.h says what its members are. Include it inside the target region.
#pragma once

#include <immintrin.h>

#include "evaluate-inl.h"
#include "kernels.h"
#include "segments-inl.h"

namespace lstm_quant {
namespace {

struct Avx512 {
  static constexpr int kLanes = 16;
  static constexpr bool kHasSegments = true;
  using F = __m512;
  using I = __m512i;

  static F set(float v) { return _mm512_set1_ps(v); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static void store_first(float* p, F v, int count) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), v);
  }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F round(F v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F abs(F v) { return _mm512_abs_ps(v); }
  static F by_sign(F v, F a, F b) { return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(v)), a, b); }
  static F double_times(F v, F n) {
    return _mm512_castsi512_ps(add_i32(_mm512_castps_si512(v), _mm512_slli_epi32(_mm512_castps_si512(n), 23)));
  }
  static I to_int(F v) { return _mm512_cvtps_epi32(v); }
  static F to_float(I v) { return _mm512_cvtepi32_ps(v); }
  static I load_i32(const int32_t* p) { return _mm512_loadu_si512(p); }
  static I set_i32(int32_t v) { return _mm512_set1_epi32(v); }
  static I add_i32(I a, I b) { return _mm512_add_epi32(a, b); }
  static I bit_xor(I a, I b) { return _mm512_xor_si512(a, b); }
  static uint32_t differing(I a, I b) { return _mm512_cmpneq_epi32_mask(a, b); }
  static I excess_u8(I a, I b) { return _mm512_subs_epu8(a, b); }
  static I nonzero_bytes(I v) { return _mm512_movm_epi8(_mm512_test_epi8_mask(v, v)); }
  // a + b * c, modulo 2**32
  static I add_product(I a, I b, int32_t c) { return _mm512_add_epi32(a, _mm512_mullo_epi32(b, set_i32(c))); }
  static I even_bytes(I v) { return _mm512_srai_epi16(_mm512_slli_epi16(v, 8), 8); }
  static I odd_bytes(I v) { return _mm512_srai_epi16(v, 8); }
  static I add_pairs(I sum, I a, I b) { return _mm512_dpwssd_epi32(sum, a, b); }
  static I high_part(I v) { return _mm512_srai_epi32(v, 8); }
  static I low_part(I v) { return _mm512_and_si512(v, set_i32(0xFF)); }
  // in halves: sums are exact in double
  static F join_parts(I high, I low) {
    const __m256 first = join_half(_mm512_castsi512_si256(high), _mm512_castsi512_si256(low));
    const __m256 second = join_half(_mm512_extracti64x4_epi64(high, 1), _mm512_extracti64x4_epi64(low, 1));
    return _mm512_insertf32x8(_mm512_castps256_ps512(first), second, 1);
  }
  static __m256 join_half(__m256i high, __m256i low) {
    const __m512d high_sum = _mm512_mul_pd(_mm512_cvtepi32_pd(high), _mm512_set1_pd(256));
    return _mm512_cvtpd_ps(_mm512_add_pd(high_sum, _mm512_cvtepi32_pd(low)));
  }
  static F lookup(const float* table, I i) { return _mm512_i32gather_ps(i, table, sizeof(float)); }
  static F lookup16(const uint16_t* table, I i) {
    const I pair = _mm512_i32gather_epi32(i, table, sizeof(uint16_t));
    return to_float(_mm512_and_si512(pair, _mm512_set1_epi32(0xFFFF)));
  }
  static F pick(const float* table, F number) {
    return _mm512_permutex2var_ps(load(table), _mm512_castps_si512(number), load(table + kLanes));
  }
  static void store_u8(uint8_t* p, I v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v)); }
  static void store_i32(int32_t* p, I v) { _mm512_storeu_si512(p, v); }
  static F evaluate(Evaluator evaluator, F steps) { return evaluate_one<Avx512>(evaluator, steps); }
};

}  // namespace
}  // namespace lstm_quant
