// Attention maps as warps hold them, and the second exponential. docs/maths.md derives both.
//
// A warp has tiles of 16 rows (queries) and 8 columns (keys) of maps: lane l has the columns 2 (l % 4) and the one after
// it, in rows l / 4 and l / 4 + 8. Rows of q and k go through shared memory in slices of 128 bytes, of which a step of
// the matrix product takes 32. No product may be fused into a sum unless fmaf says so: a map has to have the same bits
// wherever it is computed, or frames that are equal would differ.
#pragma once

#include "am_flow.h"
#include "device.h"

namespace amflow_cuda {

constexpr int PIECE = 16;  // bytes of one copy
constexpr int STEP = 2 * PIECE;
constexpr int SLICE = 4 * STEP;
constexpr int PITCH = SLICE + PIECE;  // of rows in shared memory, so that eight of them lie in different banks
constexpr int TILE_ROWS = 16, TILE_KEYS = 8;
constexpr float LOWEST = -3.4028234e38f;

template <class X>
constexpr int slice_elements = SLICE / static_cast<int>(sizeof(X));

template <class X>
constexpr bool is_bf16 = false;
template <>
constexpr bool is_bf16<bf16> = true;

// A float32 in two tf32 parts, and its first part without infinities, whose products with second parts would be NaN. Not
// every NaN stays one in the first part, but all make one of the second.
struct Split {
  uint32_t high, finite, low;
  __device__ explicit Split(uint32_t x) : high((x + 0x1000u) & TF32) {
    const bool infinite = fabsf(number(x)) == INFINITY;
    finite = infinite ? 0 : high;
    low = infinite ? 0 : bits(number(x) - number(high)) & TF32;
  }
  static constexpr uint32_t TF32 = 0xffffe000u;
};

// q k^T of float32 in two parts each: all but the product of the second parts.
__device__ inline void multiply(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float) {
  const Split x[4] = {Split(a[0]), Split(a[1]), Split(a[2]), Split(a[3])}, y0(b0), y1(b1);
  multiply_tf32(acc, {x[0].low, x[1].low, x[2].low, x[3].low}, y0.finite, y1.finite);
  multiply_tf32(acc, {x[0].finite, x[1].finite, x[2].finite, x[3].finite}, y0.low, y1.low);
  multiply_tf32(acc, {x[0].high, x[1].high, x[2].high, x[3].high}, y0.high, y1.high);
}

// The sign of a number is the first bit of its 2 or 4 bytes.
template <class X>
constexpr uint32_t SIGNS = sizeof(X) == 2 ? 0x80008000u : 0x80000000u;

// acc = +-q k^T of float32.
__device__ inline void multiply_first(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float) {
#pragma unroll
  for (int i = 0; i < 4; ++i) acc[i] = 0;
  multiply(acc, a, b0, b1, float{});
}

// s (16 rows, 8 NT keys) += +-q k^T of one slice, or = that of the first; q and k are those of the warp, in shared memory.
template <class X, int NT>
__device__ inline void add_products(float (&s)[NT][4], Shared q, Shared k, bool first, int steps, bool negate) {
  const uint32_t signs = negate ? SIGNS<X> : 0;
  const int lane = lane_id();
  const Shared q_row = q + lane % 16 * PITCH + lane / 16 * PIECE;
  const Shared k_row = k + lane % 8 * PITCH + lane / 8 % 2 * PIECE;
  const Shared second = lane / 16 * TILE_KEYS * PITCH;  // two tiles are loaded at once
#pragma unroll
  for (int step = 0; step < SLICE / STEP; ++step) {
    if (step >= steps) break;
    uint32_t a[4];
    load_matrices(a, q_row + step * STEP);
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] ^= signs;
#pragma unroll
    for (int n = 0; n < NT; n += 2) {
      uint32_t b[4];
      load_matrices(b, k_row + (n + 1 < NT ? second : 0) + n * TILE_KEYS * PITCH + step * STEP);
#pragma unroll
      for (int i = 0; i < 2 && n + i < NT; ++i)
        if (step == 0 && first)
          multiply_first(s[n + i], a, b[2 * i], b[2 * i + 1], X{});
        else
          multiply(s[n + i], a, b[2 * i], b[2 * i + 1], X{});
    }
  }
}

// Rows of a matrix (rows, D) from `first` on, their slice from column d0 on, into `count` rows of shared memory; 0 beyond
// D. Beyond the last row comes the last one again, or (ZERO) 0. The block's threads have `jump` rows at a time, `rounds`
// times and at most once more.
template <class X, bool ZERO>
__device__ inline void load_slice(Shared to, const X* x, int64_t stride, int first, int count, int jump, int rounds,
                                  int rows, int d0, int D) {
  constexpr int pieces = SLICE / PIECE, per_piece = PIECE / static_cast<int>(sizeof(X));
  const int piece = threadIdx.x % pieces, d = d0 + piece * per_piece;
  int n = threadIdx.x / pieces;
  to += n * PITCH + piece * PIECE;
  if (d >= D) {
    if (d0 + piece / 2 * 2 * per_piece >= D) return;  // no step takes it
#pragma unroll 1
    for (; n < count; n += jump, to += jump * PITCH) store_shared(to, {0, 0, 0, 0});
    return;
  }
  const unsigned row_bytes = static_cast<unsigned>(stride) * static_cast<unsigned>(sizeof(X));
  const char* const column = reinterpret_cast<const char*>(x + d);
  const auto copy = [&] {
    if (ZERO && first + n >= rows)
      store_shared(to, {0, 0, 0, 0});
    else
      copy_async(to, column + uint64_t{row_bytes} * static_cast<unsigned>(min(first + n, rows - 1)));
    n += jump;
    to += jump * PITCH;
  };
#pragma unroll 2
  for (int i = 0; i < rounds; ++i) copy();
  if (n < count) copy();
}

// The same, element by element, for rows that do not begin at multiples of 16 bytes.
template <class X, bool ZERO>
__device__ __noinline__ void load_elements(Shared to, const X* x, int64_t stride, int first, int count, int rows, int d0,
                                           int D) {
  constexpr int per_piece = PIECE / static_cast<int>(sizeof(X));
  const int piece = threadIdx.x % (SLICE / PIECE);
  const int d = d0 + piece * per_piece;
  for (int n = threadIdx.x / (SLICE / PIECE); n < count; n += blockDim.x / (SLICE / PIECE)) {
    const X* const from = x + min(first + n, rows - 1) * stride + d;
    const int elements = ZERO && first + n >= rows ? 0 : D - d;
    X part[per_piece];
    uint32_t whole[4] = {0, 0, 0, 0};
    memcpy(part, whole, PIECE);
#pragma unroll
    for (int i = 0; i < per_piece; ++i)
      if (i < elements) part[i] = from[i];
    memcpy(whole, part, PIECE);
    store_shared(to + n * PITCH + piece * PIECE, whole);
  }
}

__device__ inline float quotient(float x, float y) {
  const float inverse = reciprocal(y), found = x * inverse;
  return fmaf(fmaf(-y, found, x), inverse, found);
}

// How e^x - 1 is made for x >= 0. For x up to 1, or up to 64 (temperatures below 1), to 2.3e-7 relative; or rough, as e^x,
// which is good to 2.4e-7, in a third of the instructions: what 1 is added to has no use for more.
enum class Growth { small, large, rough };

// e^(a x) - 1, or e^(a x); exact for 0.
template <Growth GROWTH>
struct Expm1 {
  float c[GROWTH == Growth::small ? 6 : 1];

  __device__ explicit Expm1(float a) {
    if constexpr (GROWTH == Growth::large) {
      c[0] = a;
    } else if constexpr (GROWTH == Growth::rough) {
      c[0] = a * 1.44269504f;
    } else {  // minimax for (e^x - 1) / x on [0, 1]
      constexpr float fit[6] = {9.9999988e-1f, 5.0000882e-1f, 1.6656032e-1f, 4.2127855e-2f, 7.4502416e-3f, 2.1345359e-3f};
      float power = a;
#pragma unroll
      for (int i = 0; i < 6; ++i, power *= a) c[i] = power * fit[i];
    }
  }

  __device__ float operator()(float x) const {
    if constexpr (GROWTH == Growth::large) return large(c[0] * x);
    if constexpr (GROWTH == Growth::rough) return exp2_fast(c[0] * x);
    float y = c[5];
#pragma unroll
    for (int i = 4; i >= 0; --i) y = fmaf(y, x, c[i]);
    return x * y;
  }

  __device__ static float large(float x) {
    const float n = floorf(fmaf(x, 1.44269504f, 0.5f));
    float r = fmaf(n, -0.693145752f, x);  // ln 2 in two parts: n times the first is exact
    r = fmaf(n, -1.42860677e-6f, r);
    float y = fmaf(r, 1.3888873e-3f, 8.3690686e-3f);  // minimax for (e^r - 1) / r on [-ln 2 / 2, ln 2 / 2]
    y = fmaf(y, r, 4.1667137e-2f);
    y = fmaf(y, r, 1.6666506e-1f);
    y = fmaf(y, r, 4.9999997e-1f);
    y = fmaf(y, r, 1.f);
    const float power = exp2_fast(n);
    return fmaf(r * y, power, power - 1.f);
  }
};

// x with the sign of d, exactly 0 where d is 0.
__device__ inline float signed_by(float x, float d) {
  return d == 0 ? 0.f : number(bits(x) ^ (bits(d) & 0x80000000u));
}

template <class X>
__device__ inline const X* queries(const Frames& f, int64_t b, int64_t t, int64_t h, int64_t g) {
  const int64_t* const s = f.q_stride;
  return static_cast<const X*>(f.q) + b * s[0] + t * s[1] + h * s[2] + g * s[3];
}

template <class X>
__device__ inline const X* keys(const Frames& f, int64_t b, int64_t t, int64_t h, int64_t g) {
  const int64_t* const s = f.k_stride;
  return static_cast<const X*>(f.k) + b * s[0] + t * s[1] + h * s[2] + g * s[3];
}

// Whether rows can be copied 16 bytes at a time, and lie less than 4 GiB from each other.
inline bool vectors(const Problem& p) {
  const int64_t size = p.dtype == Dtype::f32 ? 4 : 2;
  bool whole = p.D * size % PIECE == 0;
  for (const Frames* f : {&p.first, &p.second})
    for (const int64_t row : {f->q_stride[4] * size, f->k_stride[4] * size}) whole = whole && row >> 32 == 0;
  for (const Frames* f : {&p.first, &p.second}) {
    whole = whole && reinterpret_cast<uintptr_t>(f->q) % PIECE == 0 && reinterpret_cast<uintptr_t>(f->k) % PIECE == 0;
    for (int i = 0; i < 5; ++i) whole = whole && f->q_stride[i] * size % PIECE == 0 && f->k_stride[i] * size % PIECE == 0;
  }
  return whole;
}

}  // namespace amflow_cuda
