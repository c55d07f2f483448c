// AVX2 with FMA and F16C; vec.h says what each function does.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace amflow::AMFLOW_ISA {

using vec = __m256;
constexpr int W = 8;
constexpr int TILE_VECTORS = 2;  // there are 16 registers
constexpr int tile_rows(int V) { return V == 2 ? 6 : 12; }

inline vec set1(float x) { return _mm256_set1_ps(x); }
inline vec set1_bits(uint32_t x) { return _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(x))); }
inline vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, vec x) { _mm256_storeu_ps(p, x); }
inline vec fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
inline vec bit_xor(vec a, vec b) { return _mm256_xor_ps(a, b); }
inline vec abs(vec x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.f), x); }
inline vec max(vec a, vec b) { return _mm256_max_ps(a, b); }
inline vec round(vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// Adds n to the exponent. 1 * 2^-127 gives 0, whose bits are 0; from any other x that would be a subnormal number
// instead of a slightly larger one.
inline vec scale_by_pow2(vec x, vec n) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), exponent));
}
inline vec fraction(vec x, vec& exponent) {
  x = max(set1(-127.f), x);  // 2^x is 0 for -127 and below; NaN stays NaN
  exponent = _mm256_floor_ps(x);
  return x - exponent;
}

inline vec multiply_by_sign(vec x, vec d) {
  const vec nonzero = _mm256_cmp_ps(d, _mm256_setzero_ps(), _CMP_NEQ_UQ);
  return _mm256_and_ps(nonzero, _mm256_xor_ps(x, _mm256_and_ps(d, _mm256_set1_ps(-0.f))));
}

template <int h>
inline void split(vec a, vec b, vec& lo, vec& hi) {
  if constexpr (h == 4) {
    lo = _mm256_permute2f128_ps(a, b, 0x20);
    hi = _mm256_permute2f128_ps(a, b, 0x31);
  } else if constexpr (h == 2) {
    lo = _mm256_shuffle_ps(a, b, 0x44);
    hi = _mm256_shuffle_ps(a, b, 0xEE);
  } else {
    lo = _mm256_blend_ps(a, _mm256_moveldup_ps(b), 0xAA);
    hi = _mm256_blend_ps(_mm256_movehdup_ps(a), b, 0xAA);
  }
}

inline vec load(const uint16_t* p, bool is_bf16) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return is_bf16 ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)) : _mm256_cvtph_ps(bits);
}
inline void store(uint16_t* p, vec x, bool is_bf16) {
  __m128i bits = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
  if (is_bf16) {
    const __m256i exact = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(exact, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(exact, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i upper = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
    bits = _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
  }
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bits);
}

}  // namespace amflow::AMFLOW_ISA
