// One vector of floats, for the instruction set that this file is compiled for.
//
// Everything is in a namespace named after that instruction set, and nothing from the standard library is used: the
// linker keeps one copy of an inline function, which could contain instructions that the CPU lacks.
//
// The header of an instruction set has the only code that names its instructions:
//
//   vec, W                      a vector and its lanes; + - * / work on vectors, and are never fused
//   TILE_VECTORS, tile_rows(V)  the register tile of products: most vectors in a row, and the rows of V vectors
//   set1(x), set1_bits(x)       the same number, or the same bits, in every lane
//   load, store                 floats at any address; load(p, is_bf16) widens 16-bit numbers, store(p, x, is_bf16)
//                               rounds to them, to nearest even
//   fma(a, b, c)                a * b + c, rounded once
//   bit_xor, abs, round         round: to the nearest integer
//   max(a, b)                   NaN if b is; if only a is, either NaN or b
//   fraction(x, exponent)       x - floor(x), or 0 for -inf, for scale_by_pow2(.., exponent): x <= 0 or slightly above
//   scale_by_pow2(x, n)         x * 2^floor(n) for an x from 1 to 2 and an n from `fraction`, or a power of two x and a
//                               whole n, where the result is a normal number; exactly 0 for 1 * 2^-inf
//   multiply_by_sign(x, d)      x * sign(d): exactly 0 if d is 0, x if d is NaN
//   split<h>(a, b, lo, hi)      in every group of 2h lanes: lo = (first h of a, first h of b), hi = (last h of a and b)
//
// and, if AMFLOW_DOT_BF16 is defined:
//
//   bf16_pair, load_pair(p)     two bf16 numbers
//   dot_bf16(b, x, sum)         sum + b0 x0 + b1 x1 for a pair b and the two bf16 numbers in every lane of x
//   load_pairs(a, b)            lanes of pairs (a[i], b[i])
//   pair_bf16(a, b)             the same of vectors, rounded to bf16, subnormal numbers perhaps to 0; store_bf16(p, x)
//                               stores numbers rounded likewise
//   lower_bf16, upper_bf16      the first and the second number of every lane
#pragma once

#if defined(__AVX512F__)
#include "vec_avx512.h"
#elif defined(__AVX2__)
#include "vec_avx2.h"
#else
#include "vec_neon.h"
#endif

namespace amflow::AMFLOW_ISA {

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
