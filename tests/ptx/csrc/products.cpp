// Matrix products: mma.sync, and wgmma, of which each warp of a group computes 16 rows.
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

constexpr int TOGETHER = 8;  // columns that are computed at once

// sum (TOGETHER) += a (K) b (K, TOGETHER) for K from `begin` to `end`; rows of b lie MOST_COLUMNS apart.
void add_block(double* sum, const double* a, const double* b, int begin, int end, int extra) {
  double largest[TOGETHER], total[TOGETHER], scale[TOGETHER], back[TOGETHER];
  for (int n = 0; n < TOGETHER; ++n) largest[n] = std::fabs(sum[n]);
  for (int k = begin; k < end; ++k)
    for (int n = 0; n < TOGETHER; ++n) {
      const double x = std::fabs(a[k] * b[k * MOST_COLUMNS + n]);
      largest[n] = x > largest[n] || x != x ? x : largest[n];
    }
  bool finite = true;
  for (int n = 0; n < TOGETHER; ++n) {
    u64 exponent = bits<u64>(largest[n]) >> 52;  // of a NaN or infinity: 2047
    finite = finite && exponent < 2047;
    exponent = exponent < 64 ? 64 : exponent;  // below it, all are 0 or as good as that
    scale[n] = bits<double>((2046 + 23 + extra - exponent) << 52);
    back[n] = bits<double>((exponent - 23 - extra) << 52);
    total[n] = std::trunc(sum[n] * scale[n]);
  }
  for (int k = begin; k < end; ++k)
    for (int n = 0; n < TOGETHER; ++n) total[n] += std::trunc(a[k] * b[k * MOST_COLUMNS + n] * scale[n]);
  for (int n = 0; n < TOGETHER; ++n) {
    double plain = sum[n];
    if (!finite)
      for (int k = begin; k < end; ++k) plain += a[k] * b[k * MOST_COLUMNS + n];
    sum[n] = std::isfinite(largest[n]) ? cut_to_float(total[n] * back[n]) : plain;
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
      for (int n = 0; n < N; n += TOGETHER) add_block(sum + n, x.a[row], &x.b[0][n], begin, begin + length, extra);
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

// A matrix in shared memory as a descriptor of wgmma says. Rows are those of a, or the columns of b; either the
// elements of a row lie one after the other (K-major), or those of a column (MN-major, "transposed").
struct Matrix {
  u32 begin, leading, stride, width;  // bytes; the swizzled pattern is `width` wide, 16 without swizzle

  explicit Matrix(u64 descriptor) {
    begin = (descriptor & 0x3fff) << 4;
    leading = (descriptor >> 16 & 0x3fff) << 4;
    stride = (descriptor >> 32 & 0x3fff) << 4;
    const u32 mode = descriptor >> 62;
    width = mode ? 256 >> mode : 16;
    if (descriptor >> 49 & 7) fail(Kind::misaligned, -1, "the base offset of a wgmma's descriptor is not 0");
  }

  // The address of 16 bytes: of a row at byte `at`, or with `transposed` of column `row` at byte `at`.
  u32 address(u32 row, u32 at, bool transposed) const {
    u32 result = begin;
    if (width == 16 && transposed) fail(Kind::bounds, -1, "a transposed matrix without swizzle: not implemented");
    if (width == 16)  // 8 rows of 16 bytes lie together
      result += row % 8 * 16 + row / 8 * stride + at / 16 * leading;
    else if (transposed) result += row % 8 * width + row / 8 * stride + at % width + at / width * leading;
    else result += row % 8 * width + row / 8 * stride + at;
    return result ^ ((result >> 7 & (width / 16 - 1)) << 4);
  }
};

// Reads element (row, k) for rows from `first` on and all k of T.
template <class T, class SET>
void read_matrix(Warp& warp, u64 descriptor, u32 first, u32 rows, bool transposed, Product& product, const SET& set) {
  const Matrix matrix(descriptor);
  SharedMemory& shared = warp.block->shared;
  const u32 together = 16 / T::BYTES;
  const u32 outer = transposed ? T::K : rows, inner = transposed ? rows : T::K;
  for (u32 row = 0; row < outer; ++row)
    for (u32 n = 0; n < inner; n += together) {
      const u32 address = transposed ? matrix.address(row, (first + n) * T::BYTES, true)
                                     : matrix.address(first + row, n * T::BYTES, false);
      shared.check(address, 16, 16, ALL);
      const u8* from = shared.read_products(warp, address, 16);
      product.reads.push_back({address, 16});
      for (u32 i = 0; i < together; ++i)
        transposed ? set(n + i, row, T::value(from + i * T::BYTES)) : set(row, n + i, T::value(from + i * T::BYTES));
    }
}

// Triton's compiler sets accumulators to 0 after the wgmma.fence that ought to come between; ptxas sees it and waits.
// So which registers a fence covers is not checked.

// Marks the accumulators as in use by a wgmma. One that adds to the same registers may already be under way.
void claim(Warp& warp, const Operand* d, int count, bool adds, Product& product) {
  for (int n = 0; n < count; ++n) {
    const u32 number = static_cast<u32>(d[n].value);
    if (adds && !warp.busy[number] && ~warp.ready[number])
      fail(Kind::uninitialised, -1, "accumulator %d of a wgmma has never been written", n);
    warp.busy[number] = 1;
    warp.ready[number] = 0;
    product.accumulators.push_back(number);
  }
}

// The operands: N / 2 accumulators, a (4 registers, or a descriptor with IN_SHARED), b's descriptor, whether to add to
// the accumulators, the signs of a and b, and for 16-bit elements whether a (if in shared memory) and b are transposed.
template <class T, int N, bool IN_SHARED>
void wgmma(Warp& warp, const Operand* o, u32 lanes) {
  warp.require_all(lanes, "wgmma");
  if (!warp.registers_fenced) fail(Kind::async_copy, -1, "wgmma without a wgmma.fence before it");
  Product product{warp.product_groups, {}, {}};
  Operands x;
  const Operand* rest = o + N / 2 + (IN_SHARED ? 1 : 4);
  const bool adds = *warp.get<u32>(rest[1]);
  const double sign = static_cast<double>(rest[2].value * rest[3].value);
  const bool transposes = T::BYTES == 2;
  if (IN_SHARED) {
    const u32 first = warp.index % 4 * ROWS;
    const auto set = [&](u32 row, u32 k, double value) { x.a[row][k] = sign * value; };
    const bool transposed = transposes && rest[4].value;
    read_matrix<T>(warp, *warp.get<u64>(o[N / 2]), first, ROWS, transposed, product, set);
  } else {
    registers_a<T>(warp, o + N / 2, x);
    for (auto& row : x.a)
      for (double& value : row) value *= sign;
  }
  const bool transposed = transposes && rest[IN_SHARED ? 5 : 4].value;
  const auto set = [&](u32 column, u32 k, double value) { x.b[k][column] = value; };
  read_matrix<T>(warp, *warp.get<u64>(rest[0]), 0, N, transposed, product, set);
  claim(warp, o, N / 2, adds, product);
  multiply<T>(warp, x, o, adds ? o : nullptr, N, lanes);
  warp.products.push_back(product);
}

// Ends the products, except for those of the `kept` last groups. What they read must have stayed as it was.
void wait_products(Warp& warp, u32 kept) {
  std::vector<Product> left;
  for (const Product& product : warp.products) {
    if (product.group + kept >= warp.product_groups) {
      left.push_back(product);
      continue;
    }
    for (const Range& range : product.reads) warp.block->shared.read_products(warp, range.address, range.bytes);
    for (u32 number : product.accumulators) {
      warp.busy[number] = 0;
      warp.ready[number] = ~0u;
    }
  }
  for (const Product& product : left)
    for (u32 number : product.accumulators) {
      warp.busy[number] = 1;
      warp.ready[number] = 0;
    }
  warp.products = left;
  warp.registers_fenced = false;
}

template <class T, int N>
void add_wgmma(const std::string& type) {
  const std::string name = "wgmma.mma_async.sync.aligned.m64n" + std::to_string(N) + "k" + std::to_string(T::K) +
                           ".f32." + type + "." + type;
  const std::string accumulators = "=" + std::string(N / 2, 'a');
  const bool transposes = T::BYTES == 2;
  whole(name, accumulators + "ddpii" + (transposes ? "ii" : ""), wgmma<T, N, true>);
  whole(name, accumulators + "wwwwdpii" + (transposes ? "i" : ""), wgmma<T, N, false>);
}

template <int N>
void add_wgmma() {
  add_wgmma<F16, N>("f16");
  add_wgmma<BF16, N>("bf16");
  add_wgmma<TF32, N>("tf32");
}

}  // namespace

void add_products() {
  const std::string registers = "wwww=wwwwwwwwww";
  whole("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", registers, mma<F16>);
  whole("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", registers, mma<BF16>);
  whole("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", registers, mma<TF32>);
  add_wgmma<8>();
  add_wgmma<16>();
  add_wgmma<32>();
  add_wgmma<64>();
  add_wgmma<128>();
  add_wgmma<256>();
  whole("wgmma.fence.sync.aligned", "=", [](Warp& warp, const Operand*, u32) { warp.registers_fenced = true; });
  whole("wgmma.commit_group.sync.aligned", "=", [](Warp& warp, const Operand*, u32) { ++warp.product_groups; });
  whole("wgmma.wait_group.sync.aligned", "=i",
        [](Warp& warp, const Operand* o, u32) { wait_products(warp, static_cast<u32>(o[0].value)); });
}

}  // namespace ptx
