// Instructions that compute each lane by itself: integers, floating point, comparisons, conversions.

#include <limits>

#include "machine.h"

namespace ptx {

namespace {

constexpr u64 EX2 = 1, RCP = 2, DIV = 3;  // functions whose errors differ

u64 error_seed;  // of the run that is under way: see set_error_seed

// In [-1, 1], the same for the same function and arguments.
double deviation(u64 function, float x, float y = 0) {
  const u64 random = mix(error_seed ^ function << 60, u64{bits<u32>(y)} << 32 | bits<u32>(x));
  return static_cast<double>(random >> 11) * 0x1p-52 - 1;
}

// The unit in the last place of the float nearest to x; below the normal numbers, and for 0, it is 2^-149.
double ulp(double x) {
  int exponent = 0;
  std::frexp(x, &exponent);
  return std::ldexp(1., (x == 0 || exponent < -125 ? -125 : exponent) - 24);
}

// Reciprocals and quotients are made of significands: exponents don't change their errors in units in the last place.
float significand(float x) {
  int exponent;
  return std::frexp(std::fabs(x), &exponent);
}

float flush(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.f, x) : x; }

// The maximum error is 2 units in the last place from the correctly rounded result. The manual promises exactly 1 only
// for 0; all arguments that no float beside 1 is nearer to give it here, since hardware makes a fixed-point number of
// the argument.
float ex2(float x) {
  if (!(std::fabs(x) > 0x1p-25f)) return std::isnan(x) ? x : 1.f;
  if (std::isinf(x)) return x > 0 ? x : 0.f;
  const double rounded = static_cast<float>(std::exp2(static_cast<double>(x)));
  return static_cast<float>(rounded + 2 * ulp(rounded) * deviation(EX2, x));
}

// The maximum error is 1 unit in the last place, half of which is the rounding to float.
float rcp(float x) {
  const double exact = 1 / static_cast<double>(x);
  if (x == 0 || !std::isfinite(x)) return static_cast<float>(exact);
  return static_cast<float>(exact + 0.5 * ulp(exact) * deviation(RCP, significand(x)));
}

// The maximum error is 2 units in the last place, half a unit of which is the rounding to float.
float div_full(float a, float b) {
  const double exact = static_cast<double>(a) / b;
  if (!std::isfinite(exact) || exact == 0) return static_cast<float>(exact);
  return static_cast<float>(exact + 1.5 * ulp(exact) * deviation(DIV, significand(a), significand(b)));
}

// As the instructions: a NaN operand is ignored, and -0 is less than +0.
float max_f32(float a, float b) {
  if (a != a) return b;
  if (b != b) return a;
  if (a == b) return std::signbit(a) ? b : a;
  return a > b ? a : b;
}

float min_f32(float a, float b) { return -max_f32(-a, -b); }

template <class T>
T divide(T a, T b) {
  if (b == 0) return static_cast<T>(-1);  // unspecified; lanes that are off come here too
  if constexpr (std::is_signed_v<T>)
    if (b == -1) return -a;
  return a / b;
}

template <class T>
T remainder(T a, T b) {
  if (b == 0) return a;
  if constexpr (std::is_signed_v<T>)
    if (b == -1) return 0;
  return a % b;
}

// Shifts by more than the width fill with zeros, or with the sign.
template <class T>
T shift_left(T a, u32 n) {
  return n < sizeof(T) * 8 ? static_cast<T>(a << n) : T{0};
}

template <class T>
T shift_right(T a, u32 n) {
  const u32 most = sizeof(T) * 8 - 1;
  if constexpr (std::is_signed_v<T>) return static_cast<T>(a >> (n < most ? n : most));
  else return n <= most ? static_cast<T>(a >> n) : T{0};
}

u32 extract(u32 a, u32 position, u32 length, bool is_signed) {
  position &= 255, length &= 255;
  const u64 field = shift_right<u64>(a, position) & ((u64{1} << (length < 32 ? length : 32)) - 1);
  const u32 last = position + length - 1 < 31 ? position + length - 1 : 31;
  const bool negative = is_signed && length && a >> last & 1;
  return static_cast<u32>(negative && length < 32 ? field | ~u64{0} << length : field);
}

// Each byte of the result is one of the 8 of a and b, or 8 times its sign, as the 4 bits of the selector say.
u32 permute(u32 a, u32 b, u32 selector) {
  u32 result = 0;
  for (int n = 0; n < 4; ++n) {
    const u32 choice = selector >> 4 * n & 15;
    const u32 byte = (u64{b} << 32 | a) >> 8 * (choice & 7) & 255;
    result |= (choice & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * n;
  }
  return result;
}

u16 to_bf16(float x) {
  const u32 b = bits<u32>(x);
  if (x != x) return 0x7fff;
  return static_cast<u16>((b + 0x7fff + (b >> 16 & 1)) >> 16);
}

float from_bf16(u16 x) { return bits<float>(u32{x} << 16); }
u16 to_f16(float x) { return x != x ? u16{0x7fff} : bits<u16>(static_cast<_Float16>(x)); }
float from_f16(u16 x) { return static_cast<float>(bits<_Float16>(x)); }

// Ties away from zero. The 13 bits below tf32 are documented as unspecified: here they are what they become by adding.
u32 to_tf32(float x) {
  const u32 b = bits<u32>(x);
  return std::isfinite(x) ? (b + 0x1000) & ~0x1fffu : b;
}

template <class T>
void add_integers(const std::string& type) {
  using U = std::make_unsigned_t<T>;
  each("add." + type, [](U a, U b) { return static_cast<U>(a + b); });
  each("sub." + type, [](U a, U b) { return static_cast<U>(a - b); });
  each("mul.lo." + type, [](U a, U b) { return static_cast<U>(a * b); });
  each("mad.lo." + type, [](U a, U b, U c) { return static_cast<U>(a * b + c); });
  each("div." + type, [](T a, T b) { return divide(a, b); });
  each("rem." + type, [](T a, T b) { return remainder(a, b); });
  each("min." + type, [](T a, T b) { return a < b ? a : b; });
  each("max." + type, [](T a, T b) { return a > b ? a : b; });
  each("neg." + type, [](U a) { return static_cast<U>(-a); });
  each("shr." + type, [](T a, u32 n) { return shift_right(a, n); });
  each("setp.lt." + type, [](T a, T b) { return a < b; });
  each("setp.le." + type, [](T a, T b) { return a <= b; });
  each("setp.gt." + type, [](T a, T b) { return a > b; });
  each("setp.ge." + type, [](T a, T b) { return a >= b; });
  each("selp." + type, [](U a, U b, bool p) { return p ? a : b; });
}

template <class T>
void add_bits(const std::string& width) {
  each("and.b" + width, [](T a, T b) { return static_cast<T>(a & b); });
  each("or.b" + width, [](T a, T b) { return static_cast<T>(a | b); });
  each("xor.b" + width, [](T a, T b) { return static_cast<T>(a ^ b); });
  each("not.b" + width, [](T a) { return static_cast<T>(~a); });
  each("shl.b" + width, [](T a, u32 n) { return shift_left(a, n); });
  each("selp.b" + width, [](T a, T b, bool p) { return p ? a : b; });
  for (const char* type : {"b", "s", "u"}) {
    each_spreading("mov." + (type + width), [](T a) { return a; });
    each("setp.eq." + (type + width), [](T a, T b) { return a == b; });
    each("setp.ne." + (type + width), [](T a, T b) { return a != b; });
  }
}

void add_f32() {
  each_spreading("mov.f32", [](float a) { return a; });
  each("selp.f32", [](float a, float b, bool p) { return p ? a : b; });
  for (const char* rounding : {"", ".rn"}) {
    each_spreading("add" + std::string(rounding) + ".f32", [](float a, float b) { return a + b; });
    each("sub" + std::string(rounding) + ".f32", [](float a, float b) { return a - b; });
    each("mul" + std::string(rounding) + ".f32", [](float a, float b) { return a * b; });
  }
  each("fma.rn.f32", [](float a, float b, float c) { return std::fma(a, b, c); });
  // What the assembler makes of a product and a difference (machine.py).
  each("fma.rn.f32 a*b-c", [](float a, float b, float c) { return std::fma(a, b, -c); });
  each("fma.rn.f32 c-a*b", [](float a, float b, float c) { return std::fma(-a, b, c); });
  each("div.rn.f32", [](float a, float b) { return a / b; });
  each("div.full.f32", [](float a, float b) { return div_full(a, b); });
  each("abs.f32", [](float a) { return std::fabs(a); });
  each("neg.f32", [](float a) { return -a; });
  each("copysign.f32", [](float a, float b) { return std::copysign(b, a); });  // the sign is that of the first
  each_spreading("max.f32", [](float a, float b) { return max_f32(a, b); });
  each("min.f32", [](float a, float b) { return min_f32(a, b); });
  each("ex2.approx.ftz.f32", [](float a) { return flush(ex2(flush(a))); });
  each("rcp.approx.ftz.f32", [](float a) { return flush(rcp(flush(a))); });
  each("setp.eq.f32", [](float a, float b) { return a == b; });
  each("setp.neu.f32", [](float a, float b) { return !(a == b); });
  each("setp.lt.f32", [](float a, float b) { return a < b; });
  each("setp.le.f32", [](float a, float b) { return a <= b; });
  each("setp.gt.f32", [](float a, float b) { return a > b; });
  each("setp.ge.f32", [](float a, float b) { return a >= b; });
  each("setp.num.f32", [](float a, float b) { return a == a && b == b; });
  each("setp.nan.f32", [](float a, float b) { return a != a || b != b; });
}

void add_conversions() {
  each("cvt.f32.bf16", [](u16 a) { return from_bf16(a); });
  each("cvt.f32.f16", [](u16 a) { return from_f16(a); });
  each("cvt.rn.bf16.f32", [](float a) { return to_bf16(a); });
  each("cvt.rn.f16.f32", [](float a) { return to_f16(a); });
  each("cvt.rn.bf16x2.f32", [](float a, float b) { return u32{to_bf16(a)} << 16 | to_bf16(b); });
  each("cvt.rn.f16x2.f32", [](float a, float b) { return u32{to_f16(a)} << 16 | to_f16(b); });
  each("cvt.rna.tf32.f32", [](float a) { return to_tf32(a); });
  each("cvt.rmi.f32.f32", [](float a) { return std::floor(a); });
  each("cvt.rmi.ftz.f32.f32", [](float a) { return flush(std::floor(flush(a))); });
  each("cvt.rn.f32.s32", [](i32 a) { return static_cast<float>(a); });
  each("cvt.rn.f32.u32", [](u32 a) { return static_cast<float>(a); });
  each("cvt.s64.s32", [](i32 a) { return i64{a}; });
  each("cvt.s64.s32", [](u64 a) { return i64{static_cast<i32>(a)}; });  // of the low half of a register
  each("cvta.to.global.u64", [](u64 a) { return a; });                  // generic addresses are those of global memory
  each("cvt.u64.u32", [](u32 a) { return u64{a}; });
  each("cvt.u32.u64", [](u64 a) { return static_cast<u32>(a); });
  each("cvt.u32.u16", [](u16 a) { return u32{a}; });
  each("cvt.u16.u32", [](u32 a) { return static_cast<u16>(a); });
}

}  // namespace

void set_error_seed(u64 seed) { error_seed = seed; }

void add_arithmetic() {
  add_integers<i16>("s16");
  add_integers<u16>("u16");
  add_integers<i32>("s32");
  add_integers<u32>("u32");
  add_integers<i64>("s64");
  add_integers<u64>("u64");
  add_bits<u16>("16");
  add_bits<u32>("32");
  add_bits<u64>("64");
  each("mul.wide.s32", [](i32 a, i32 b) { return i64{a} * b; });
  each("mul.wide.u32", [](u32 a, u32 b) { return u64{a} * b; });
  each("mad.wide.s32", [](i32 a, i32 b, i64 c) { return i64{a} * b + c; });
  each("mad.wide.u32", [](u32 a, u32 b, u64 c) { return u64{a} * b + c; });
  each("mul.hi.s32", [](i32 a, i32 b) { return static_cast<i32>(i64{a} * b >> 32); });
  each("mul.hi.u32", [](u32 a, u32 b) { return static_cast<u32>(u64{a} * b >> 32); });
  each("bfe.u32", [](u32 a, u32 position, u32 length) { return extract(a, position, length, false); });
  each("bfe.s32", [](u32 a, u32 position, u32 length) { return extract(a, position, length, true); });
  each("prmt.b32", [](u32 a, u32 b, u32 selector) { return permute(a, b, selector); });
  whole("mov.b32", "w=hh", [](Warp& warp, const Operand* o, u32 lanes) {
    u32 values[LANES];
    for (int l = 0; l < LANES; ++l) values[l] = warp.get<u16>(o[1])[l] | u32{warp.get<u16>(o[2])[l]} << 16;
    warp.set(o[0], values, lanes);
  });
  whole("mov.b32", "hh=w", [](Warp& warp, const Operand* o, u32 lanes) {
    u16 low[LANES], high[LANES];
    for (int l = 0; l < LANES; ++l) low[l] = warp.get<u32>(o[2])[l], high[l] = warp.get<u32>(o[2])[l] >> 16;
    warp.set(o[0], low, lanes);
    warp.set(o[1], high, lanes);
  });
  each("and.pred", [](bool a, bool b) { return a && b; });
  each("or.pred", [](bool a, bool b) { return a || b; });
  each("xor.pred", [](bool a, bool b) { return a != b; });
  each("not.pred", [](bool a) { return !a; });
  each("mov.pred", [](bool a) { return a; });
  add_f32();
  add_conversions();
}

}  // namespace ptx
