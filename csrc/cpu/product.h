// The matrix product of all kernels: out[r][:] (+)= sum_k b[r][k] * x[k][:], where b is broadcast from its own memory.
#pragma once

#include "vec.h"

namespace amflow::AMFLOW_ISA {

// Element types of b and x. One step along k takes 4 bytes of b and one row of x.
struct Float {
  static vec broadcast(const char* b) {
    float value;
    __builtin_memcpy(&value, b, 4);
    return set1(value);
  }
  static vec multiply_add(vec b, vec x, vec sum) { return fma(b, x, sum); }
};

#ifdef AMFLOW_DOT_BF16
struct Bf16Pair {  // two bf16 values in 4 bytes
  static bf16_pair broadcast(const char* b) { return load_pair(b); }
  static vec multiply_add(bf16_pair b, vec x, vec sum) { return dot_bf16(b, x, sum); }
};
#endif

enum class Epilogue {
  none,
  max,          // also the columns' maxima
  max_blocked,  // the same for K > SUM_BLOCK
};

struct ProductArgs {
  const char* b;
  int64_t b_row, b_k;  // bytes from row to row and from k to k; one of them is 4, see rows_adjacent
  const float* x;      // [K][x_row]
  int64_t x_row;
  int64_t K;
  float* out;  // row r, vector v at out + r * out_row + v * out_vector
  int64_t out_row, out_vector;
  bool add = false;         // to the values in `out`
  float* maxima = nullptr;  // [V] vectors, updated with the columns' maxima (Epilogue::max)
  // Rows to prefetch, one for each row of b: enough to keep the memory busy, but never so many at once that the CPU
  // stalls.
  const char* prefetch = nullptr;
  int64_t prefetch_row = 0, prefetch_bytes = 0;
};

// Prefetches n rows of so many bytes into the second-level cache.
inline void prefetch_rows(const char* first, int64_t row, int64_t bytes, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(first + i * row + byte, 0, 2);
}

// With Epilogue::max_blocked, terms that are summed from 0 before they are added to the total: rounding errors grow
// with the length of a sum. Blocks of 16 halve the errors of logits and took 5 to 11 % more of the forward's time (Zen
// 4, 197 and 577 tokens, D = 64); blocks of 32 took 1 to 5 %.
constexpr int64_t SUM_BLOCK = 64;

// R rows by V vectors in registers; rows_adjacent: b_row is 4, otherwise b_k is. Never inlined: in a larger function
// the compiler would spill the sums.
template <int R, int V, class E, Epilogue epilogue, bool rows_adjacent>
__attribute__((noinline)) void product_tile(const ProductArgs& a) {
  constexpr bool blocked = epilogue == Epilogue::max_blocked;
  const int64_t b_row = rows_adjacent ? 4 : a.b_row;
  const int64_t b_k = rows_adjacent ? a.b_k : 4;
  const char* b = a.b;
  const float* x = a.x;
  const int64_t x_row = a.x_row, out_row = a.out_row, out_vector = a.out_vector;
  float *const out_tile = a.out, *const maxima = a.maxima;
  bool add = a.add;
  int64_t left = a.K;
  do {
    vec sum[R][V] = {};
    for (int64_t k = blocked && left > SUM_BLOCK ? SUM_BLOCK : left; k > 0; --k) {
      vec xs[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) xs[v] = load(x + v * W);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const auto bs = E::broadcast(b + r * b_row);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[r][v] = E::multiply_add(bs, xs[v], sum[r][v]);
      }
      b += b_k;
      x += x_row;
    }
    left = blocked ? left - SUM_BLOCK : 0;
    const bool update_maxima = epilogue != Epilogue::none && left <= 0;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      vec top = update_maxima ? load(maxima + v * W) : vec{};
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        float* out = out_tile + r * out_row + v * out_vector;
        if (add) sum[r][v] = load(out) + sum[r][v];
        store(out, sum[r][v]);
        top = max(top, sum[r][v]);
      }
      if (update_maxima) store(maxima + v * W, top);
    }
    add = true;
  } while (blocked && left > 0);
}

template <int R, int V, class E, Epilogue epilogue, bool rows_adjacent>
void product_rows(ProductArgs& a, int64_t& rows) {
  while (rows >= R) {
    if (a.prefetch) {
      prefetch_rows(a.prefetch, a.prefetch_row, a.prefetch_bytes, R);
      a.prefetch += R * a.prefetch_row;
    }
    product_tile<R, V, E, epilogue, rows_adjacent>(a);
    a.b += R * (rows_adjacent ? 4 : a.b_row);
    a.out += R * a.out_row;
    rows -= R;
  }
  if constexpr (R > 1) product_rows<(R > 8 ? 8 : R > 4 ? 4 : R / 2), V, E, epilogue, rows_adjacent>(a, rows);
}

template <class E, Epilogue epilogue, bool rows_adjacent>
void product(ProductArgs a, int64_t rows, int64_t vectors) {
  while (vectors > 0) {  // 5 vectors are 3 + 2 rather than 4 + 1
    const int64_t tiles = (vectors + TILE_VECTORS - 1) / TILE_VECTORS;
    const int64_t V = (vectors + tiles - 1) / tiles;
    ProductArgs tile = a;
    int64_t left = rows;
    switch (V) {
      case 1: product_rows<tile_rows(1), 1, E, epilogue, rows_adjacent>(tile, left); break;
      case 2: product_rows<tile_rows(2), 2, E, epilogue, rows_adjacent>(tile, left); break;
      case 3:
        if constexpr (TILE_VECTORS > 2) product_rows<tile_rows(3), 3, E, epilogue, rows_adjacent>(tile, left);
        break;
      case 4:
        if constexpr (TILE_VECTORS > 3) product_rows<tile_rows(4), 4, E, epilogue, rows_adjacent>(tile, left);
        break;
    }
    a.prefetch = nullptr;  // once is enough
    a.x += V * W;
    a.out += V * a.out_vector;
    if constexpr (epilogue != Epilogue::none) a.maxima += V * W;
    vectors -= V;
  }
}

// out = b x and its columns' maxima.
template <class E>
void product_and_max(const ProductArgs& a, int64_t rows, int64_t vectors) {
  if (a.K > SUM_BLOCK) product<E, Epilogue::max_blocked, false>(a, rows, vectors);
  else product<E, Epilogue::max, false>(a, rows, vectors);
}

}  // namespace amflow::AMFLOW_ISA
