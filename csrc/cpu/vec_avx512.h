// AVX-512, with bf16 dot products if compiled for AVX512_BF16; vec.h says what each function does.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace amflow::AMFLOW_ISA {

using vec = __m512;
constexpr int W = 16;
constexpr int TILE_VECTORS = 4;  // there are 32 registers
constexpr int tile_rows(int V) { return V == 4 ? 6 : V == 3 ? 8 : 12; }

inline vec set1(float x) { return _mm512_set1_ps(x); }
inline vec set1_bits(uint32_t x) { return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(x))); }
inline vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, vec x) { _mm512_storeu_ps(p, x); }
inline vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
inline vec bit_xor(vec a, vec b) { return _mm512_xor_ps(a, b); }
inline vec abs(vec x) { return _mm512_abs_ps(x); }
inline vec max(vec a, vec b) { return _mm512_max_ps(a, b); }
inline vec round(vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline vec scale_by_pow2(vec x, vec n) { return _mm512_scalef_ps(x, n); }
inline vec fraction(vec x, vec& exponent) {
  exponent = x;
  return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}

inline vec multiply_by_sign(vec x, vec d) {
  const __mmask16 nonzero = _mm512_cmp_ps_mask(d, _mm512_setzero_ps(), _CMP_NEQ_UQ);
  return _mm512_maskz_xor_ps(nonzero, x, _mm512_and_ps(d, _mm512_set1_ps(-0.f)));
}

template <int h>
inline void split(vec a, vec b, vec& lo, vec& hi) {
  if constexpr (h == 8) {
    lo = _mm512_shuffle_f32x4(a, b, 0x44);
    hi = _mm512_shuffle_f32x4(a, b, 0xEE);
  } else if constexpr (h == 4) {
    const __m512i l = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
    lo = _mm512_permutex2var_ps(a, l, b);
    hi = _mm512_permutex2var_ps(a, _mm512_add_epi32(l, _mm512_set1_epi32(4)), b);
  } else if constexpr (h == 2) {
    lo = _mm512_shuffle_ps(a, b, 0x44);
    hi = _mm512_shuffle_ps(a, b, 0xEE);
  } else {
    lo = _mm512_mask_blend_ps(0xAAAA, a, _mm512_moveldup_ps(b));
    hi = _mm512_mask_blend_ps(0xAAAA, _mm512_movehdup_ps(a), b);
  }
}

inline vec load(const uint16_t* p, bool is_bf16) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return is_bf16 ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)) : _mm512_cvtph_ps(bits);
}
inline void store(uint16_t* p, vec x, bool is_bf16) {
  __m256i bits = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
  if (is_bf16) {
    const __m512i exact = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(exact, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(exact, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i upper = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000)), 16);
    bits = _mm512_cvtepi32_epi16(upper);
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits);
}

#ifdef __AVX512BF16__
#define AMFLOW_DOT_BF16
using bf16_pair = vec;
inline bf16_pair load_pair(const char* p) {
  uint32_t bits;
  __builtin_memcpy(&bits, p, 4);
  return set1_bits(bits);
}
inline vec dot_bf16(bf16_pair b, vec x, vec sum) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(b), reinterpret_cast<__m512bh>(x));
}
inline vec pairs(__m256i a, __m256i b) {
  const __m512i upper = _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16);
  return _mm512_castsi512_ps(_mm512_or_si512(_mm512_cvtepu16_epi32(a), upper));
}
inline vec load_pairs(const uint16_t* a, const uint16_t* b) {
  return pairs(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)),
               _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
}
inline __m256i to_bf16(vec x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }
inline vec pair_bf16(vec a, vec b) { return pairs(to_bf16(a), to_bf16(b)); }
inline vec lower_bf16(vec x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x), 16)); }
inline vec upper_bf16(vec x) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0xffff << 16)));
}
inline void store_bf16(uint16_t* p, vec x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(x)); }
#endif

}  // namespace amflow::AMFLOW_ISA
