// Converts rows between the tensors' dtype and float scratch memory.
#pragma once

#include "am_flow.h"
#include "vec.h"

namespace amflow::AMFLOW_ISA {

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
inline int64_t element_size(Dtype t) { return t == Dtype::f32 ? 4 : 2; }

// Reads one row of D values as floats, padded with zeros to a multiple of W.
template <Dtype t>
inline void load_row(const char* src, int64_t D, float* dst) {
  int64_t d = 0;
  if constexpr (t == Dtype::f32) {
    for (; d + W <= D; d += W) store(dst + d, load(reinterpret_cast<const float*>(src) + d));
    if (d < D) {
      store(dst + d, set1(0.f));
      __builtin_memcpy(dst + d, src + 4 * d, 4 * (D - d));
    }
  } else {
    constexpr bool is_bf16 = t == Dtype::bf16;
    const auto* bits = reinterpret_cast<const uint16_t*>(src);
    for (; d + W <= D; d += W) store(dst + d, load(bits + d, is_bf16));
    if (d < D) {
      uint16_t tail[W] = {};
      __builtin_memcpy(tail, bits + d, 2 * (D - d));
      store(dst + d, load(tail, is_bf16));
    }
  }
}

template <Dtype t>
inline void load_rows(const char* src, int64_t pitch, int64_t n, int64_t D, float* dst, int64_t cols) {
  for (int64_t i = 0; i < n; ++i) load_row<t>(src + i * pitch, D, dst + i * cols);
}

// The same for n rows at a pitch of so many bytes, to [n][cols].
inline void load_rows(Dtype t, const char* src, int64_t pitch, int64_t n, int64_t D, float* dst, int64_t cols) {
  if (t == Dtype::f32) load_rows<Dtype::f32>(src, pitch, n, D, dst, cols);
  else if (t == Dtype::bf16) load_rows<Dtype::bf16>(src, pitch, n, D, dst, cols);
  else load_rows<Dtype::f16>(src, pitch, n, D, dst, cols);
}

// Writes one row of D floats as dtype t. src is readable up to a multiple of W.
inline void store_row(Dtype t, const float* src, int64_t D, char* dst) {
  if (t == Dtype::f32) {
    __builtin_memcpy(dst, src, 4 * D);
    return;
  }
  auto* bits = reinterpret_cast<uint16_t*>(dst);
  int64_t d = 0;
  for (; d + W <= D; d += W) store(bits + d, load(src + d), t == Dtype::bf16);
  if (d < D) {
    uint16_t tail[W];
    store(tail, load(src + d), t == Dtype::bf16);
    __builtin_memcpy(bits + d, tail, 2 * (D - d));
  }
}

// in [rows][in_row] -> out [cols][out_row] with every bit pattern xor `flip`. rows and cols are multiples of W.
inline void transpose_rows(const float* in, int64_t rows, int64_t cols, int64_t in_row, float* out, int64_t out_row,
                           uint32_t flip) {
  const vec flips = set1_bits(flip);
  for (int64_t i = 0; i < rows; i += W)
    for (int64_t j = 0; j < cols; j += W) {
      vec r[W];
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) r[l] = bit_xor(load(in + (i + l) * in_row + j), flips);
      transpose(r);
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) store(out + (j + l) * out_row + i, r[l]);
    }
}

}  // namespace amflow::AMFLOW_ISA
