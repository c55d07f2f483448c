// Matrix products: mma.sync of a warp, wgmma of a warp's 16 rows.
//
// As tensor cores were found to compute (Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores",
// 2021): products are exact; those of a block and the accumulator are aligned to the largest of them, cut off some bits
// below float's last one, and summed exactly; the sum is cut off to float. The seed picks whether a block is all of an
// instruction's products or half of them, which half comes first, and whether 1 or 2 more bits are kept.

#include <cmath>

#include "machine.h"

namespace ptx {

namespace {

constexpr int ROWS = 16, MOST_COLUMNS = 256;

struct F16 {
  static constexpr int K = 16;
  static constexpr u32 BYTES = 2;
  static double value(const u8* from) { return static_cast<double>(*reinterpret_cast<const _Float16*>(from)); }
};

struct BF16 {
  static constexpr int K = 16;
  static constexpr u32 BYTES = 2;
  static double value(const u8* from) { return bits<float>(u32{*reinterpret_cast<const u16*>(from)} << 16); }
};

// The lowest 13 bits are ignored.
struct TF32 {
  static constexpr int K = 8;
  static constexpr u32 BYTES = 4;
  static double value(const u8* from) { return bits<float>(*reinterpret_cast<const u32*>(from) & ~0x1fffu); }
};

double cut_to_float(double x) { return bits<double>(bits<u64>(x) & ~((u64{1} << 29) - 1)); }

// sum (N) += a (K) b (K, MOST_COLUMNS) for K from `begin` to `end`.
void add_block(double* sum, const double* a, const double (*b)[MOST_COLUMNS], int begin, int end, int N, int extra) {
  double largest[MOST_COLUMNS], total[MOST_COLUMNS], scale[MOST_COLUMNS];
  for (int n = 0; n < N; ++n) largest[n] = std::fabs(sum[n]);
  for (int k = begin; k < end; ++k)
    for (int n = 0; n < N; ++n) {
      const double x = std::fabs(a[k] * b[k][n]);
      largest[n] = x > largest[n] || x != x ? x : largest[n];
    }
  bool plain = true;
  for (int n = 0; n < N; ++n) {
    const u64 exponent = bits<u64>(largest[n]) >> 52;  // of a NaN or infinity: 2047
    plain = plain && exponent < 2047;
    scale[n] =
        exponent < 64 ? 0 : bits<double>((2046 + 23 + extra - exponent) << 52);  // 0: all are 0, or as good as that
    total[n] = std::trunc(sum[n] * scale[n]);
  }
  for (int k = begin; k < end; ++k)
    for (int n = 0; n < N; ++n) total[n] += std::trunc(a[k] * b[k][n] * scale[n]);
  if (plain) {
    for (int n = 0; n < N; ++n) sum[n] = scale[n] > 0 ? cut_to_float(total[n] / scale[n]) : 0;
    return;
  }
  for (int n = 0; n < N; ++n) {
    if (std::isfinite(largest[n])) {
      sum[n] = scale[n] > 0 ? cut_to_float(total[n] / scale[n]) : 0;
      continue;
    }
    for (int k = begin; k < end; ++k) sum[n] += a[k] * b[k][n];
  }
}

struct Operands {
  double a[ROWS][16], b[16][MOST_COLUMNS];
};

// Lane l holds elements 2 (l % 4) and the next one of rows l / 4 and l / 4 + 8, for every 8 columns.
// The accumulators are N / 2 registers each of `c` and `d`, or zero without c.
template <class T>
void multiply(Warp& warp, const Operands& x, const Operand* d, const Operand* c, int N, u32 lanes) {
  const u64 choice = mix(warp.block->seed, 77);
  const int blocks = choice & 1 ? 2 : 1, length = T::K / blocks, extra = 1 + (choice >> 2 & 1);
  std::vector<float> results(size_t{LANES} * N / 2);
  for (int row = 0; row < ROWS; ++row) {
    double sum[MOST_COLUMNS];
    const auto at = [&](int column) { return column / 8 * 4 + row / 8 * 2 + column % 2; };
    const auto lane = [&](int column) { return row % 8 * 4 + column % 8 / 2; };
    for (int n = 0; n < N; ++n) sum[n] = c ? warp.get<float>(c[at(n)])[lane(n)] : 0;
    for (int block = 0; block < blocks; ++block) {
      const int begin = length * (choice & 2 ? blocks - 1 - block : block);
      add_block(sum, x.a[row], x.b, begin, begin + length, N, extra);
    }
    for (int n = 0; n < N; ++n) results[at(n) * LANES + lane(n)] = static_cast<float>(sum[n]);
  }
  for (int n = 0; n < N / 2; ++n) warp.set(d[n], &results[n * LANES], lanes);
}

// Register n of a: rows 8 (n % 2) to 8 (n % 2) + 7, of which lane l holds row l / 4, bytes 4 (l % 4) and on of
// bytes 16 (n / 2) to 16 (n / 2) + 15. Those of b are the same of b's transpose, without the rows beyond 8.
template <class T>
void registers_a(const Warp& warp, const Operand* a, Operands& x) {
  for (int n = 0; n < 4; ++n)
    for (int l = 0; l < LANES; ++l)
      for (u32 i = 0; i < 4 / T::BYTES; ++i)
        x.a[n % 2 * 8 + l / 4][(n / 2 * 16 + l % 4 * 4) / T::BYTES + i] =
            T::value(reinterpret_cast<const u8*>(warp.get<u32>(a[n]) + l) + i * T::BYTES);
}

template <class T>
void mma(Warp& warp, const Operand* o, u32 lanes) {
  warp.require_all(lanes, "mma.sync");
  Operands x;
  registers_a<T>(warp, o + 4, x);
  for (int n = 0; n < 2; ++n)
    for (int l = 0; l < LANES; ++l)
      for (u32 i = 0; i < 4 / T::BYTES; ++i)
        x.b[(n * 16 + l % 4 * 4) / T::BYTES + i][l / 4] =
            T::value(reinterpret_cast<const u8*>(warp.get<u32>(o[8 + n]) + l) + i * T::BYTES);
  multiply<T>(warp, x, o, o + 10, 8, lanes);
}

}  // namespace

void add_products() {
  const std::string registers = "wwww=wwwwwwwwww";
  whole("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", registers, mma<F16>);
  whole("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", registers, mma<BF16>);
  whole("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", registers, mma<TF32>);
}

}  // namespace ptx
