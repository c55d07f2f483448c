// NEON, the vectors of every 64-bit ARM CPU, with bf16 dot products if compiled for them; vec.h says what each function
// does.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace amflow::AMFLOW_ISA {

using vec = float32x4_t;
constexpr int W = 4;
constexpr int TILE_VECTORS = 4;  // there are 32 registers
constexpr int tile_rows(int V) { return V == 4 ? 6 : V == 3 ? 8 : 12; }

inline vec set1(float x) { return vdupq_n_f32(x); }
inline vec set1_bits(uint32_t x) { return vreinterpretq_f32_u32(vdupq_n_u32(x)); }
inline vec load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, vec x) { vst1q_f32(p, x); }
inline vec fma(vec a, vec b, vec c) { return vfmaq_f32(c, a, b); }
inline vec bit_xor(vec a, vec b) {
  return vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(a), vreinterpretq_u32_f32(b)));
}
inline vec abs(vec x) { return vabsq_f32(x); }
inline vec max(vec a, vec b) { return vmaxq_f32(a, b); }
inline vec round(vec x) { return vrndnq_f32(x); }
// Adds n, as a fixed-point number with 23 fractional bits, to the exponent. 1 * 2^-127 gives 0, whose bits are 0; from
// any other x that would be a subnormal number instead of a slightly larger one.
inline vec scale_by_pow2(vec x, vec n) {
  return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(x), vcvtq_n_s32_f32(n, 23)));
}
inline vec fraction(vec x, vec& exponent) {
  x = max(x, set1(-127.f));  // 2^x is 0 for -127 and below
  exponent = vrndmq_f32(x);
  return x - exponent;
}

inline vec multiply_by_sign(vec x, vec d) {
  const uint32x4_t bits = vreinterpretq_u32_f32(d), sign = vandq_u32(bits, vdupq_n_u32(1u << 31));
  return vreinterpretq_f32_u32(vbicq_u32(veorq_u32(vreinterpretq_u32_f32(x), sign), vceqzq_f32(d)));
}

template <int h>
inline void split(vec a, vec b, vec& lo, vec& hi) {
  if constexpr (h == 2) {
    const float64x2_t x = vreinterpretq_f64_f32(a), y = vreinterpretq_f64_f32(b);
    lo = vreinterpretq_f32_f64(vzip1q_f64(x, y));
    hi = vreinterpretq_f32_f64(vzip2q_f64(x, y));
  } else {
    lo = vtrn1q_f32(a, b);
    hi = vtrn2q_f32(a, b);
  }
}

inline vec load(const uint16_t* p, bool is_bf16) {
  const uint16x4_t bits = vld1_u16(p);
  return is_bf16 ? vreinterpretq_f32_u32(vshll_n_u16(bits, 16)) : vcvt_f32_f16(vreinterpret_f16_u16(bits));
}
inline void store(uint16_t* p, vec x, bool is_bf16) {
  uint16x4_t bits = vreinterpret_u16_f16(vcvt_f16_f32(x));
  if (is_bf16) {
    const uint32x4_t exact = vreinterpretq_u32_f32(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(exact, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(exact, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    bits = vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), rounded, vdupq_n_u32(0x7fc00000)), 16);
  }
  vst1_u16(p, bits);
}

#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
#define AMFLOW_DOT_BF16
using bf16_pair = bfloat16x4_t;  // the instruction broadcasts the first two
inline bf16_pair load_pair(const char* p) {
  float pair;  // in a vector register, not in a general one
  __builtin_memcpy(&pair, p, 4);
  return vreinterpret_bf16_f32(float32x2_t{pair, 0.f});
}
inline vec dot_bf16(bf16_pair b, vec x, vec sum) { return vbfdotq_lane_f32(sum, vreinterpretq_bf16_f32(x), b, 0); }
inline vec pairs(uint16x4_t a, uint16x4_t b) {
  return vreinterpretq_f32_u32(vorrq_u32(vmovl_u16(a), vshll_n_u16(b, 16)));
}
inline vec load_pairs(const uint16_t* a, const uint16_t* b) { return pairs(vld1_u16(a), vld1_u16(b)); }
inline uint16x4_t to_bf16(vec x) { return vreinterpret_u16_bf16(vcvt_bf16_f32(x)); }
inline vec pair_bf16(vec a, vec b) { return pairs(to_bf16(a), to_bf16(b)); }
inline vec lower_bf16(vec x) { return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(x), 16)); }
inline vec upper_bf16(vec x) {
  return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(x), vdupq_n_u32(0xffff0000u)));
}
inline void store_bf16(uint16_t* p, vec x) { vst1_u16(p, to_bf16(x)); }
#endif

}  // namespace amflow::AMFLOW_ISA
