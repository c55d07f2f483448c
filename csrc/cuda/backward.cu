// The backward, for q and k of AMFLOW_NUMBER. docs/maths.md derives it. First the coefficients of every pair's rows, from strips of the maps as in the
// forward; then dq and dk of every frame, from tiles of its map and of those it is paired with.
//
// Maps here are A / temperature, and gradients of them are scale * temperature * dL/dA. With y = S e^|A - A'| a pair adds
// y slope (g - delta) to the gradient of A, and takes it from that of A'.

#include "strip.h"
#include "table.h"

namespace amflow_cuda {

namespace {

template <class X, int MT, int NT, bool MEAN_MAP>
struct Coefficients : Strip<X, MT, NT, MEAN_MAP> {
  using Base = Strip<X, MT, NT, MEAN_MAP>;
  using typename Base::Tiles;
  using Base::Base, Base::p, Base::plan, Base::pairs, Base::warp;

  // Pair n of the run, (A, B).
  template <bool SHARP>
  __device__ void add_pair(const Tiles& A, const Tiles& B, int n) {
    const float* const g = p.dflow + Base::pair_of(n) * p.Nk + Base::key0() + lane_id() % 4 * 2;
    const int left = p.Nk - Base::key0() - lane_id() % 4 * 2;
    float sum[5][MT][2] = {};  // h g, A y, A y g, B y, B y g
#pragma unroll
    for (int c = 0; c < NT; ++c)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool inside = c * TILE_KEYS + i < left;
        const float g_j = inside ? g[c * TILE_KEYS + i] : 0.f;
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float a = A[m][c][2 * half + i], b = B[m][c][2 * half + i];
            const float h = 1 + expm1_of<SHARP>(fabsf(a - b));
            const float y = inside ? signed_by(h, a - b) : 0.f, y_g = y * g_j;
            sum[0][m][half] = fmaf(h, g_j, sum[0][m][half]);
            sum[1][m][half] = fmaf(a, y, sum[1][m][half]);
            sum[2][m][half] = fmaf(a, y_g, sum[2][m][half]);
            sum[3][m][half] = fmaf(b, y, sum[3][m][half]);
            sum[4][m][half] = fmaf(b, y_g, sum[4][m][half]);
          }
      }
    Base::sum_rows(sum);
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = Base::row0() + Base::row_of(m, half);
        if (warp > 0 || lane_id() % 4 > 0 || row >= p.Nq) continue;
        const int64_t to = Base::pair_of(n) * p.Nq + row;
        const float w = reciprocal(p.Nk + p.e_sum[to]);
        const float delta = w * sum[0][m][half], slope = p.slope * w, by = slope / p.inv_temperature;
        p.slopes[to] = slope;
        p.deltas[to] = delta;
        p.rho[to] = by * (sum[2][m][half] - delta * sum[1][m][half]);
        p.next_rho[to] = -by * (sum[4][m][half] - delta * sum[3][m][half]);
      }
  }

  template <bool SHARP>
  __device__ void run() {
    Tiles A, B;
    float by[MT][2];
    Base::load_first();
    if (!Base::active()) {
      for (int n = 0; n <= pairs; ++n) Base::skip_map();
      return;
    }
    for (int n = 0;; n += 2) {  // two at a time: no map is moved between registers
      Base::next_map(A, by, n);
      Base::scale_rows(A, by);
      if (n > 0) add_pair<SHARP>(B, A, n - 1);
      if (n == pairs) break;
      Base::next_map(B, by, n + 1);
      Base::scale_rows(B, by);
      add_pair<SHARP>(A, B, n);
      if (n + 1 == pairs) break;
    }
  }
};

template <class X, int MT, int NT, bool MEAN_MAP, bool SHARP>
__global__ void __launch_bounds__(block_warps(NT) * 32, 1)
    am_flow_coefficients(const __grid_constant__ Problem p, const __grid_constant__ Plan plan) {
  Coefficients<X, MT, NT, MEAN_MAP> strip(p, plan);
  if (strip.pairs > 0) strip.template run<SHARP>();
}

// Where a frame's map stands: it is first in a pair with `after` if t < n_after, second in one with `before` if
// t >= n_before.
struct Side {
  Frames before, own, after;
  int n_before, n_after;
};

enum class Result { dq, dk, rho };

constexpr int WARPS = 4, OWN = WARPS * TILE_ROWS, OTHERS = 32, TILES = OTHERS / TILE_KEYS;
constexpr int GRADIENT_SHARED = (OWN + OTHERS) * PITCH;

// A block: OWN queries (or keys, for dk) of one frame and head; the other side of the map passes by, OTHERS at a time.
// DT x 8 columns of dq or dk.
template <class X, int DT, Result RESULT>
struct Gradient {
  using Tile = float[TILES][4];
  static constexpr bool TURNED = RESULT == Result::dk;  // rows of tiles are keys

  const Problem& p;
  const Side& side;
  const bool vector;
  int b, t, h, g, own0;

  __device__ Gradient(const Problem& p, const Side& side, bool vector) : p(p), side(side), vector(vector) {
    unsigned at = blockIdx.x;
    const auto next = [&at](unsigned n) {
      const unsigned found = at % n;
      at /= n;
      return static_cast<int>(found);
    };
    own0 = next((owns() + OWN - 1) / OWN) * OWN;
    g = next(p.G);
    h = next(p.H);
    t = next(p.T);
    b = static_cast<int>(at);
  }

  __device__ int owns() const { return TURNED ? p.Nk : p.Nq; }
  __device__ int others() const { return TURNED ? p.Nq : p.Nk; }
  __device__ Shared own_slice() const { return shared_memory(); }
  __device__ Shared other_slice() const { return shared_memory() + OWN * PITCH; }
  __device__ int own_row(int half) const { return own0 + warp_id() * TILE_ROWS + half * 8 + lane_id() / 4; }
  __device__ static int other_column(int n, int i) { return n * TILE_KEYS + lane_id() % 4 * 2 + i % 2; }

  template <bool ZERO>
  __device__ void load(Shared to, bool of_keys, const Frames& f, int t, int h, int first, int count, int d0) const {
    const X* const x = of_keys ? keys<X>(f, b, t, h, g) : queries<X>(f, b, t, h, g);
    const int64_t stride = of_keys ? f.k_stride[4] : f.q_stride[4];
    const int rows = of_keys ? p.Nk : p.Nq;
    if (vector)
      load_slice<X, ZERO>(to, x, stride, first, count, rows, d0, p.D);
    else
      load_elements<X, ZERO>(to, x, stride, first, count, rows, d0, p.D);
  }

  // A / temperature of head h, times a factor.
  __device__ void head_map(Tile& A, const Frames& f, int t, int h, int other0, float factor) const {
    float s[1][TILES][4] = {};
    for (int d0 = 0; d0 < p.D; d0 += slice_elements<X>) {
      sync_block();
      load<false>(own_slice(), TURNED, f, t, h, own0, OWN, d0);
      load<true>(other_slice(), !TURNED, f, t, h, other0, OTHERS, d0);
      wait_copies();
      sync_block();
      const int steps = (min(p.D - d0, slice_elements<X>) * static_cast<int>(sizeof(X)) + STEP - 1) / STEP;
      add_products<X>(s, own_slice() + warp_id() * TILE_ROWS * PITCH, other_slice(), steps, p.negate);
    }
    const int64_t row0 = (((int64_t{b} * p.T + t) * p.H + h) * p.G + g) * p.Nq;
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t row = row0 + query(other0, n, i);
        const float x = exp2_fast(fmaf(s[0][n][i], p.scale, -f.row_max[row]));
        A[n][i] = x * (f.row_norm[row] * factor);
      }
  }

  // The query of an element of a tile, or the last one.
  __device__ int query(int other0, int n, int i) const {
    return min(TURNED ? other0 + other_column(n, i) : own_row(i / 2), p.Nq - 1);
  }

  __device__ int key(int other0, int n, int i) const {
    return min(TURNED ? own_row(i / 2) : other0 + other_column(n, i), p.Nk - 1);
  }

  // The map whose change is measured.
  __device__ void any_map(Tile& A, const Frames& f, int t, int other0) const {
    if (!p.mean_map) return head_map(A, f, t, h, other0, p.inv_temperature);
    head_map(A, f, t, 0, other0, p.inv_temperature / p.H);
    for (int head = 1; head < p.H; ++head) {
      Tile x;
      head_map(x, f, t, head, other0, p.inv_temperature / p.H);
#pragma unroll
      for (int n = 0; n < TILES; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) A[n][i] += x[n][i];
    }
  }

  // The pair's first row in (B, P, Z, G, N), N rows or keys.
  __device__ int64_t pair_row(int pair, int N) const {
    return (((int64_t{b} * p.P + pair) * p.Z + (p.mean_map ? 0 : h)) * p.G + g) * N;
  }

  // What the pair (A, B) adds to the gradient of A, times a sign.
  template <bool SHARP>
  __device__ void add_pair(Tile& dA, const Tile& A, const Tile& B, int pair, int other0, float sign) const {
    const int64_t row0 = pair_row(pair, p.Nq), key0 = pair_row(pair, p.Nk);
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float y = signed_by(1 + expm1_of<SHARP>(fabsf(A[n][i] - B[n][i])), A[n][i] - B[n][i]);
        const int64_t row = row0 + query(other0, n, i);
        dA[n][i] += sign * y * p.slopes[row] * (p.dflow[key0 + key(other0, n, i)] - p.deltas[row]);
      }
  }

  // A of head h, and the gradient of the map whose change is measured.
  template <bool SHARP>
  __device__ void gradient(Tile& A, Tile& dA, int other0) const {
    Tile B;
    any_map(A, side.own, t, other0);
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) dA[n][i] = 0;
    if (t < side.n_after) {
      any_map(B, side.after, t + p.shift, other0);
      add_pair<SHARP>(dA, A, B, t, other0, 1);
    }
    if (t >= side.n_before) {
      any_map(B, side.before, t - p.shift, other0);
      add_pair<SHARP>(dA, B, A, t - p.shift, other0, -1);
    }
    if (p.mean_map) head_map(A, side.own, t, h, other0, p.inv_temperature);
  }

  // temperature * rowsum(A * gradient), of a query.
  __device__ float rho(int query) const {
    if (p.mean_map) return p.head_rho[(((int64_t{b} * p.T + t) * p.H + h) * p.G + g) * p.Nq + query];
    float found = 0;
    if (t < side.n_after) found += p.rho[pair_row(t, p.Nq) + query];
    if (t >= side.n_before) found += p.next_rho[pair_row(t - p.shift, p.Nq) + query];
    return found;
  }

  // acc += dlogits times the other side's rows, whose slice is in shared memory.
  template <int FIRST>
  __device__ void add_product(float (&acc)[DT][4], const Tile& dlogits) const {
    const Shared others = other_slice() + lane_id() % 4 * 2 * PITCH + lane_id() / 4 * static_cast<int>(sizeof(X));
    constexpr int here = slice_elements<X> / 8;
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
      const uint32_t a[4] = {bits(dlogits[n][0]), bits(dlogits[n][2]), bits(dlogits[n][1]), bits(dlogits[n][3])};
#pragma unroll
      for (int d = 0; d < here && FIRST * here + d < DT; ++d) {
        if ((FIRST * here + d) * 8 >= p.D) break;
        const Shared at = others + n * TILE_KEYS * PITCH + d * 8 * static_cast<int>(sizeof(X));
        const float b0 = load_shared(at, X{}), b1 = load_shared(at + PITCH, X{});
        if constexpr (sizeof(X) == 4) {
          multiply(acc[FIRST * here + d], a, bits(b0), bits(b1), float{});
        } else {  // bf16 and f16 fit in tf32; gradients reach far below the range of f16
          const uint32_t rounded[4] = {to_tf32(number(a[0])), to_tf32(number(a[1])), to_tf32(number(a[2])),
                                       to_tf32(number(a[3]))};
          multiply_tf32(acc[FIRST * here + d], rounded, bits(b0), bits(b1));
        }
      }
    }
  }

  template <int FIRST = 0>
  __device__ void add_products_with(float (&acc)[DT][4], const Tile& dlogits, int other0) const {
    constexpr int d0 = FIRST * slice_elements<X>;
    if constexpr (d0 < DT * 8) {
      if (d0 >= p.D) return;
      sync_block();
      load<true>(other_slice(), !TURNED, side.own, t, h, other0, OTHERS, d0);
      wait_copies();
      sync_block();
      add_product<FIRST>(acc, dlogits);
      add_products_with<FIRST + 1>(acc, dlogits, other0);
    }
  }

  template <bool SHARP>
  __device__ void run() {
    float acc[DT][4] = {};
    float sum[2] = {};
    const float of_head = p.mean_map ? 1.f / p.H : 1.f;
    if (t < side.n_after || t >= side.n_before)
      for (int other0 = 0; other0 < others(); other0 += OTHERS) {
        Tile A, dA;
        gradient<SHARP>(A, dA, other0);
#pragma unroll
        for (int n = 0; n < TILES; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const bool inside = other0 + other_column(n, i) < others();
            if constexpr (RESULT == Result::rho)
              sum[i / 2] += inside ? A[n][i] * dA[n][i] : 0.f;
            else
              A[n][i] = inside ? A[n][i] * (dA[n][i] - rho(query(other0, n, i))) * of_head : 0.f;
          }
        if constexpr (RESULT != Result::rho) add_products_with(acc, A, other0);
      }
    const int64_t map = ((int64_t{b} * p.T + t) * p.H + h) * p.G + g;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = own_row(half);
      float total = sum[half];
      total += shuffle_xor(total, 1);
      total += shuffle_xor(total, 2);
      if (row >= owns()) continue;
      if constexpr (RESULT == Result::rho) {
        if (lane_id() % 4 == 0) p.head_rho[map * p.Nq + row] = total / p.inv_temperature;
      } else {
        X* const to = static_cast<X*>(TURNED ? side.own.dk : side.own.dq) + (map * owns() + row) * p.D;
#pragma unroll
        for (int d = 0; d < DT; ++d)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int column = other_column(d, i);
            if (column < p.D) round_to(to[column], acc[d][2 * half + i]);
          }
      }
    }
  }
};

template <class X, int DT, Result RESULT>
__global__ void __launch_bounds__(WARPS * 32)
    am_flow_gradient(const __grid_constant__ Problem p, const __grid_constant__ Side side, bool vector) {
  Gradient<X, DT, RESULT> gradient(p, side, vector);
  if (p.inv_temperature > 1)
    gradient.template run<true>();
  else
    gradient.template run<false>();
}

template <class X, int DT, Result RESULT>
const char* run_gradient(const Problem& p, const Side& side, const Device& device, void* stream) {
  const int owned = divide_up(RESULT == Result::dk ? p.Nk : p.Nq, OWN);
  const int64_t blocks = int64_t{owned} * p.G * p.H * p.T * p.B;
  if (blocks > 0x7fffffff) return "more blocks of threads than one launch can have";
  return launch(device, am_flow_gradient<X, DT, RESULT>, blocks, WARPS * 32, GRADIENT_SHARED, stream, p, side, vectors(p));
}

template <class X>
const char* run_side(const Problem& p, const Side& side, const Device& device, void* stream) {
  if (!side.own.dq && !side.own.dk) return nullptr;
  const char* wrong = nullptr;
  if (p.mean_map) wrong = run_gradient<X, 8, Result::rho>(p, side, device, stream);
  if (!wrong && side.own.dq)
    wrong = p.D <= 64 ? run_gradient<X, 8, Result::dq>(p, side, device, stream)
                      : run_gradient<X, 16, Result::dq>(p, side, device, stream);
  if (!wrong && side.own.dk)
    wrong = p.D <= 64 ? run_gradient<X, 8, Result::dk>(p, side, device, stream)
                      : run_gradient<X, 16, Result::dk>(p, side, device, stream);
  return wrong;
}

template <class X>
struct Launch {
  template <int MT, int NT, bool MEAN_MAP, bool SHARP>
  const char* run(const Problem& p, const Plan& plan, const Device& device, void* stream) const {
    return launch(device, am_flow_coefficients<X, MT, NT, MEAN_MAP, SHARP>, plan.launched(p), plan.threads, plan.shared_bytes, stream, p,
                  plan);
  }
};

}  // namespace

template <class X>
const char* run_backward(const Problem& p, const Plan& plan, const Device& device, void* stream) {
  if (const char* wrong = run_strips<X>(Launch<X>{}, p, plan, device, stream)) return wrong;
  if (p.shift > 0) return run_side<X>(p, {p.first, p.first, p.first, p.shift, p.P}, device, stream);
  if (const char* wrong = run_side<X>(p, {p.second, p.first, p.second, p.P, p.P}, device, stream)) return wrong;
  return run_side<X>(p, {p.first, p.second, p.first, 0, 0}, device, stream);
}

template const char* run_backward<AMFLOW_NUMBER>(const Problem&, const Plan&, const Device&, void*);

}  // namespace amflow_cuda
