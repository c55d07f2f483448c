// Tiles of attention maps in a warp's registers, and the second exponential. docs/maths.md derives both.
//
// A warp has tiles of 16 rows (queries) and 8 columns (keys) of maps: lane l holds columns 2 (l % 4) and 2 (l % 4) + 1
// in rows l / 4 and l / 4 + 8. Rows of q and k pass through shared memory in slices of 128 bytes, 32 bytes of which go
// into one step of the matrix product. The compiler must not fuse products into sums, only fmaf does: a map needs the
// same bits wherever it is computed, or identical frames would differ.
#pragma once

#include "am_flow.h"
#include "device.h"

namespace amflow_cuda {

constexpr int COPY_BYTES = 16;  // of one asynchronous copy
constexpr int MMA_BYTES = 2 * COPY_BYTES;
constexpr int SLICE_BYTES = 4 * MMA_BYTES;
constexpr int PITCH = SLICE_BYTES + COPY_BYTES;  // of rows in shared memory: eight rows are in different banks
constexpr int TILE_ROWS = 16, TILE_KEYS = 8;
constexpr float LOWEST = -3.4028234e38f;

template <class X>
constexpr int slice_elements = SLICE_BYTES / static_cast<int>(sizeof(X));

// A float32 as the sum of two tf32 parts. `finite` is the high part without infinities, whose products with low parts
// would be NaN. A NaN may not survive in the high part, but always does in the low part.
struct Tf32Split {
  uint32_t high, finite, low;
  __device__ explicit Tf32Split(uint32_t x) : high((x + 0x1000u) & TF32) {
    const bool infinite = fabsf(as_float(x)) == INFINITY;
    finite = infinite ? 0 : high;
    low = infinite ? 0 : as_bits(as_float(x) - as_float(high)) & TF32;
  }
  static constexpr uint32_t TF32 = 0xffffe000u;
};

// acc += q k^T of float32, each split in two parts; the product of the low parts is left out.
__device__ inline void multiply(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float) {
  const Tf32Split x[4] = {Tf32Split(a[0]), Tf32Split(a[1]), Tf32Split(a[2]), Tf32Split(a[3])}, y0(b0), y1(b1);
  multiply_tf32(acc, {x[0].low, x[1].low, x[2].low, x[3].low}, y0.finite, y1.finite);
  multiply_tf32(acc, {x[0].finite, x[1].finite, x[2].finite, x[3].finite}, y0.low, y1.low);
  multiply_tf32(acc, {x[0].high, x[1].high, x[2].high, x[3].high}, y0.high, y1.high);
}

// The sign bits in 32 bits of elements.
template <class X>
constexpr uint32_t SIGNS = sizeof(X) == 2 ? 0x80008000u : 0x80000000u;

// acc = +-q k^T of float32.
__device__ inline void multiply_first(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float) {
#pragma unroll
  for (int i = 0; i < 4; ++i) acc[i] = 0;
  multiply(acc, a, b0, b1, float{});
}

// s (16 rows, 8 NT keys) += +-q k^T of one slice; the first slice overwrites s. q and k are in shared memory.
template <class X, int NT>
__device__ inline void add_products(float (&s)[NT][4], Shared q, Shared k, bool first, int steps, bool negate) {
  const uint32_t signs = negate ? SIGNS<X> : 0;
  const int lane = lane_id();
  const Shared q_row = q + lane % 16 * PITCH + lane / 16 * COPY_BYTES;
  const Shared k_row = k + lane % 8 * PITCH + lane / 8 % 2 * COPY_BYTES;
  const Shared second = lane / 16 * TILE_KEYS * PITCH;  // two tiles per load
#pragma unroll
  for (int step = 0; step < SLICE_BYTES / MMA_BYTES; ++step) {
    if (step >= steps) break;
    uint32_t a[4];
    load_matrices(a, q_row + step * MMA_BYTES);
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] ^= signs;
#pragma unroll
    for (int n = 0; n < NT; n += 2) {
      uint32_t b[4];
      load_matrices(b, k_row + (n + 1 < NT ? second : 0) + n * TILE_KEYS * PITCH + step * MMA_BYTES);
#pragma unroll
      for (int i = 0; i < 2 && n + i < NT; ++i)
        if (step == 0 && first) multiply_first(s[n + i], a, b[2 * i], b[2 * i + 1], X{});
        else multiply(s[n + i], a, b[2 * i], b[2 * i + 1], X{});
    }
  }
}

// How the threads of a block share the copying of rows: `rows` at once, `iterations` times and at most once more.
struct CopyRounds {
  int rows, iterations;
};

// x is a matrix (rows, D). Copies the slice from column d0 on of `count` rows from `first` on to shared memory, with 0
// beyond D. Rows beyond the last are copies of the last.
template <class X>
__device__ inline void load_slice(Shared to, const X* x, int64_t stride, int first, int count, CopyRounds rounds,
                                  int rows, int d0, int D) {
  const int copy_rows = rounds.rows, iterations = rounds.iterations;
  constexpr int pieces = SLICE_BYTES / COPY_BYTES, per_copy = COPY_BYTES / static_cast<int>(sizeof(X));
  const int piece = threadIdx.x % pieces, d = d0 + piece * per_copy;
  int n = threadIdx.x / pieces;
  to += n * PITCH + piece * COPY_BYTES;
  if (d >= D) {
    if (d0 + piece / 2 * 2 * per_copy >= D) return;  // no step of the product reads it
#pragma unroll 1
    for (; n < count; n += copy_rows, to += copy_rows * PITCH) store_shared(to, {0, 0, 0, 0});
    return;
  }
  const unsigned row_bytes = static_cast<unsigned>(stride) * static_cast<unsigned>(sizeof(X));
  const char* const column = reinterpret_cast<const char*>(x + d);
  const auto copy = [&] {
    copy_async(to, column + uint64_t{row_bytes} * static_cast<unsigned>(min(first + n, rows - 1)));
    n += copy_rows;
    to += copy_rows * PITCH;
  };
#pragma unroll 2
  for (int i = 0; i < iterations; ++i) copy();
  if (n < count) copy();
}

// The same, one element at a time, for rows whose addresses are not multiples of 16 bytes.
template <class X>
__device__ __noinline__ void load_elements(Shared to, const X* x, int64_t stride, int first, int count, int rows,
                                           int d0, int D) {
  constexpr int per_copy = COPY_BYTES / static_cast<int>(sizeof(X));
  const int piece = threadIdx.x % (SLICE_BYTES / COPY_BYTES);
  const int d = d0 + piece * per_copy;
  for (int n = threadIdx.x / (SLICE_BYTES / COPY_BYTES); n < count; n += blockDim.x / (SLICE_BYTES / COPY_BYTES)) {
    const X* const from = x + min(first + n, rows - 1) * stride + d;
    X part[per_copy];
    uint32_t whole[4] = {0, 0, 0, 0};
    memcpy(part, whole, COPY_BYTES);
#pragma unroll
    for (int i = 0; i < per_copy; ++i)
      if (i < D - d) part[i] = from[i];
    memcpy(whole, part, COPY_BYTES);
    store_shared(to + n * PITCH + piece * COPY_BYTES, whole);
  }
}

__device__ inline float quotient(float x, float y) {
  const float inverse = reciprocal(y), estimate = x * inverse;
  return fmaf(fmaf(-y, estimate, x), inverse, estimate);
}

// How e^x - 1 is computed for x >= 0: with a relative error of 2.3e-7 for x up to 1 (small) or up to 64 (large, for
// temperatures below 1); or as e^x with an error of 2.4e-7 in a third of the instructions (rough), which is sufficient
// where 1 is added to the result.
enum class Growth { small, large, rough };

// e^(a x) - 1, or e^(a x) if rough; exact for 0.
template <Growth GROWTH>
struct Expm1 {
  float c[GROWTH == Growth::small ? 6 : 1];

  __device__ explicit Expm1(float a) {
    if constexpr (GROWTH == Growth::large) {
      c[0] = a;
    } else if constexpr (GROWTH == Growth::rough) {
      c[0] = a * 1.44269504f;
    } else {  // minimax for (e^x - 1) / x on [0, 1]
      constexpr float fit[6] = {9.9999988e-1f, 5.0000882e-1f, 1.6656032e-1f,
                                4.2127855e-2f, 7.4502416e-3f, 2.1345359e-3f};
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

// The first row of a head and window, of queries or keys x.
template <class X>
__device__ inline const X* head_of(const void* x, const int64_t (&stride)[5], int64_t b, int64_t t, int64_t h,
                                   int64_t g) {
  return static_cast<const X*>(x) + b * stride[0] + t * stride[1] + h * stride[2] + g * stride[3];
}

// Whether rows can be copied 16 bytes at a time, and are less than 4 GiB apart.
inline bool rows_aligned(const Problem& p) {
  const int64_t size = p.dtype == Dtype::f32 ? 4 : 2;
  bool aligned = p.D * size % COPY_BYTES == 0;
  for (const Frames* f : {&p.first, &p.second})
    for (const int64_t row : {f->q_stride[4] * size, f->k_stride[4] * size}) aligned = aligned && row >> 32 == 0;
  for (const Frames* f : {&p.first, &p.second}) {
    aligned = aligned && reinterpret_cast<uintptr_t>(f->q) % COPY_BYTES == 0 &&
              reinterpret_cast<uintptr_t>(f->k) % COPY_BYTES == 0;
    for (int i = 0; i < 5; ++i)
      aligned = aligned && f->q_stride[i] * size % COPY_BYTES == 0 && f->k_stride[i] * size % COPY_BYTES == 0;
  }
  return aligned;
}

}  // namespace amflow_cuda
