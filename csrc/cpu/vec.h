// One vector of floats, for the instruction set that this file is compiled for.
//
// Everything is in a namespace named after that instruction set, and nothing from the standard library is used: the
// linker keeps one copy of an inline function, which could contain instructions that the CPU lacks.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace amflow::AMFLOW_ISA {

#ifdef __AVX512F__

using vec = __m512;
constexpr int W = 16;            // lanes
constexpr int TILE_VECTORS = 4;  // vectors in a row of a register tile (there are 32 registers)

inline vec set1(float x) { return _mm512_set1_ps(x); }
inline vec set1_bits(uint32_t x) { return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(x))); }
inline vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, vec x) { _mm512_storeu_ps(p, x); }
inline vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
inline vec bit_xor(vec a, vec b) { return _mm512_xor_ps(a, b); }
inline vec abs(vec x) { return _mm512_abs_ps(x); }
inline vec max(vec a, vec b) { return _mm512_max_ps(a, b); }  // b if either is NaN
inline vec round(vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline vec scale_by_pow2(vec x, vec n) { return _mm512_scalef_ps(x, n); }  // x * 2^floor(n)
// x - floor(x), or 0 for -inf; floor(exponent) is floor(x).
inline vec fraction(vec x, vec& exponent) {
  exponent = x;
  return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}

// x * sign(d): exactly 0 if d is 0, x if d is NaN.
inline vec multiply_by_sign(vec x, vec d) {
  const __mmask16 nonzero = _mm512_cmp_ps_mask(d, _mm512_setzero_ps(), _CMP_NEQ_UQ);
  return _mm512_maskz_xor_ps(nonzero, x, _mm512_and_ps(d, _mm512_set1_ps(-0.f)));
}

// In every group of 2h lanes: lo = (first h of a, first h of b), hi = (last h of a, last h of b).
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
inline void store_f16(uint16_t* p, vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

#else  // AVX2

using vec = __m256;
constexpr int W = 8;
constexpr int TILE_VECTORS = 2;  // there are 16 registers

inline vec set1(float x) { return _mm256_set1_ps(x); }
inline vec set1_bits(uint32_t x) { return _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(x))); }
inline vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, vec x) { _mm256_storeu_ps(p, x); }
inline vec fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
inline vec bit_xor(vec a, vec b) { return _mm256_xor_ps(a, b); }
inline vec abs(vec x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.f), x); }
inline vec max(vec a, vec b) { return _mm256_max_ps(a, b); }
inline vec round(vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x * 2^n for a whole n from -127 (gives 0) to 127.
inline vec scale_by_pow2(vec x, vec n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return x * _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
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
inline void store_f16(uint16_t* p, vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

#endif

// Swaps lane j of r[i] with lane i of r[j].
template <int h = W / 2>
inline void transpose(vec* r) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (!(i & h)) split<h>(r[i], r[i + h], r[i], r[i + h]);
  if constexpr (h > 1) transpose<h / 2>(r);
}

// Lane i of the result is the sum of all lanes of r[i].
template <int h = W / 2>
inline vec sum_lanes(vec* r) {
#pragma GCC unroll 8
  for (int i = 0; i < h; ++i) {
    vec lo, hi;
    split<h>(r[i], r[i + h], lo, hi);
    r[i] = lo + hi;
  }
  if constexpr (h > 1) return sum_lanes<h / 2>(r);
  else return r[0];
}

// 2^x for x <= 0 (or slightly above): at most 0.7e-7 relative error, exactly 0 for -inf, NaN for NaN. Exactly 1 for 0,
// because sums are rescaled by it repeatedly.
inline vec exp2(vec x) {
  vec exponent;
  const vec f = fraction(x, exponent);
  vec y = set1(2.1702256e-4f);  // minimax for 2^f on [0, 1]
  y = fma(y, f, set1(1.2439687e-3f));
  y = fma(y, f, set1(9.6788406e-3f));
  y = fma(y, f, set1(5.5483341e-2f));
  y = fma(y, f, set1(2.4022983e-1f));
  y = fma(y, f, set1(6.9314700e-1f));
  y = fma(y, f, set1(1.f));
  return scale_by_pow2(y, exponent);
}

// e^x - 1 for x in [0, 1]: at most 2.3e-7 relative error, exactly 0 for 0.
inline vec expm1_unit(vec x) {
  vec y = set1(2.1345359e-3f);  // minimax for (e^x - 1) / x on [0, 1]
  y = fma(y, x, set1(7.4502416e-3f));
  y = fma(y, x, set1(4.2127855e-2f));
  y = fma(y, x, set1(1.6656032e-1f));
  y = fma(y, x, set1(5.0000882e-1f));
  y = fma(y, x, set1(9.9999988e-1f));
  return x * y;
}

// unit (e^x - 1) for x in [0, 64] and a power of two `unit`, at no cost: the bits are those of e^x - 1.
inline vec expm1_wide(vec x, float unit) {
  const vec n = round(x * set1(1.44269504f));
  vec r = fma(n, set1(-0.693145752f), x);  // ln 2 in two parts: n * the first is exact
  r = fma(n, set1(-1.42860677e-6f), r);
  vec y = set1(1.3888873e-3f);  // minimax for (e^r - 1) / r on [-ln 2 / 2, ln 2 / 2]
  y = fma(y, r, set1(8.3690686e-3f));
  y = fma(y, r, set1(4.1667137e-2f));
  y = fma(y, r, set1(1.6666506e-1f));
  y = fma(y, r, set1(4.9999997e-1f));
  y = fma(y, r, set1(1.f));
  const vec pow2 = scale_by_pow2(set1(unit), n);
  return fma(r * y, pow2, pow2 - set1(unit));
}

}  // namespace amflow::AMFLOW_ISA
