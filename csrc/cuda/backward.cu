// The backward, for q and k of AMFLOW_NUMBER. docs/maths.md derives it. First the coefficients of every pair's rows,
// from strips of the maps as in the forward; then dq and dk of every frame, from tiles of its map and of those it is
// paired with.
//
// Maps here are A / temperature, and gradients of them are scale * temperature * dL/dA. With y = S e^|A - A'| a pair
// adds y slope (g - delta) to the gradient of A, and takes it from that of A'.

#include "strip.h"
#include "table.h"

namespace amflow_cuda {

namespace {

template <class X, int NT, bool MEAN_MAP>
struct Coefficients : Strip<X, NT, MEAN_MAP> {
  using Base = Strip<X, NT, MEAN_MAP>;
  using Base::Base, Base::p, Base::plan, Base::pairs, Base::warp;
  using typename Base::Tiles;

  // Pair n of the run, (A, B).
  template <Growth GROWTH>
  __device__ void add_pair(const Tiles& A, const Tiles& B, int n) {
    const float* const g = p.dflow + Base::pair_of(n) * p.Nk + Base::key0() + lane_id() % 4 * 2;
    const int left = p.Nk - Base::key0() - lane_id() % 4 * 2;
    const Expm1<GROWTH> expm1(1.f);
    float sum[5][2] = {};  // h g, A y, A y g, B y, B y g
#pragma unroll
    for (int c = 0; c < NT; ++c)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool inside = c * TILE_KEYS + i < left;
        const float g_j = inside ? g[c * TILE_KEYS + i] : 0.f;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float a = A[c][2 * half + i], b = B[c][2 * half + i];
          const float h = 1 + expm1(fabsf(a - b));
          const float y = inside ? signed_by(h, a - b) : 0.f, y_g = y * g_j;
          sum[0][half] = fmaf(h, g_j, sum[0][half]);
          sum[1][half] = fmaf(a, y, sum[1][half]);
          sum[2][half] = fmaf(a, y_g, sum[2][half]);
          sum[3][half] = fmaf(b, y, sum[3][half]);
          sum[4][half] = fmaf(b, y_g, sum[4][half]);
        }
      }
    Base::sum_rows(sum);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = Base::row0() + Base::row_of(half);
      if (warp > 0 || lane_id() % 4 > 0 || row >= p.Nq) continue;
      const int64_t to = Base::pair_of(n) * p.Nq + row;
      const float w = reciprocal(p.Nk + p.e_sum[to]);
      const float delta = w * sum[0][half], slope = p.slope * w, by = slope / p.inv_temperature;
      p.slopes[to] = slope;
      p.deltas[to] = delta;
      p.rho[to] = by * (sum[2][half] - delta * sum[1][half]);
      p.next_rho[to] = -by * (sum[4][half] - delta * sum[3][half]);
    }
  }

  template <Growth GROWTH>
  __device__ void run() {
    Tiles A, B;
    float by[2];
    Base::load_first();
    if (!Base::active()) {
      for (int n = 0; n <= pairs; ++n) Base::skip_map(Nothing{});
      return;
    }
    for (int n = 0;; n += 2) {  // two at a time: no map is moved between registers
      Base::next_map(A, by, n, Nothing{});
      Base::scale_rows(A, by);
      if (n > 0) add_pair<GROWTH>(B, A, n - 1);
      if (n == pairs) break;
      Base::next_map(B, by, n + 1, Nothing{});
      Base::scale_rows(B, by);
      add_pair<GROWTH>(A, B, n);
      if (n + 1 == pairs) break;
    }
  }
};

template <class X, int NT, bool MEAN_MAP, Growth GROWTH>
__global__ void __launch_bounds__(block_warps(NT) * 32, 1)
    am_flow_coefficients(const __grid_constant__ Problem p, const __grid_constant__ Plan plan) {
  Coefficients<X, NT, MEAN_MAP> strip(p, plan);
  if (strip.pairs > 0) strip.template run<GROWTH>();
}

// Frames t - shift, t and t + shift, with whose maps that of t is paired: with the first if t >= n_before, with the
// last if t < n_after.
struct Side {
  Frames frames[3];
  int n_before, n_after;
};

constexpr int BEFORE = 0, NOW = 1, AFTER = 2, FRAMES = 3;
enum class Result { dq, dk, rho };

// What each query has: of the maps of three frames, and of two pairs; their place in a list.
constexpr int ROW_MAX = 0, ROW_NORM = 3, SLOPE = 6, DELTA = 9, RHO = 12, PARAMETERS = 13;
// And each key, of two pairs.
constexpr int DFLOW = 0, KEY_PARAMETERS = 3;

// A block: OWN queries (or keys, for dk) of one frame and head; the other side of the maps passes by, OTHERS at a time.
// DT x 8 columns of dq or dk.
template <class X, int DT, Result RESULT>
struct Gradient {
  static constexpr bool TURNED = RESULT == Result::dk;  // rows of tiles are keys
  static constexpr int SLICES = divide_up(DT * 8, slice_elements<X>);
  static constexpr int WARPS = SLICES > 2 ? 2 : 4, OWN = WARPS * TILE_ROWS, OTHERS = SLICES > 1 ? 16 : 32;
  static constexpr int TILES = OTHERS / TILE_KEYS, JUMP = 32 * WARPS / (SLICE / PIECE);
  static constexpr int COLUMN_PARAMETERS = TURNED ? PARAMETERS : KEY_PARAMETERS;
  static constexpr int ROW_PARAMETERS = TURNED ? KEY_PARAMETERS : PARAMETERS;
  static constexpr int OTHERS_AT = FRAMES * SLICES * OWN * PITCH;
  static constexpr int COLUMNS_AT = OTHERS_AT + FRAMES * SLICES * OTHERS * PITCH;
  static constexpr int SHARED = COLUMNS_AT + COLUMN_PARAMETERS * OTHERS * 4;
  using Tile = float[TILES][4];

  const Problem& p;
  const Side& side;
  const bool vector;
  int b, t, h, g, own0;
  float rows[ROW_PARAMETERS][2];  // of the lane's two

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
  __device__ int own_row(int half) const { return own0 + warp_id() * TILE_ROWS + half * 8 + lane_id() / 4; }
  __device__ bool has(int frame) const {
    return frame == BEFORE ? t >= side.n_before : frame == AFTER ? t < side.n_after : true;
  }
  __device__ int time(int frame) const { return t + (frame - NOW) * p.shift; }
  __device__ Shared own_slice(int frame, int slice) const {
    return shared_memory() + (frame * SLICES + slice) * OWN * PITCH;
  }
  __device__ Shared other_slice(int frame, int slice) const {
    return shared_memory() + OTHERS_AT + (frame * SLICES + slice) * OTHERS * PITCH;
  }

  // The place of a row of a frame's map in (B, T, H, G, Nq), and of a pair's row in (B, P, Z, G, N), N rows or keys.
  __device__ int64_t map_row(int frame, int head) const {
    return (((int64_t{b} * p.T + time(frame)) * p.H + head) * p.G + g) * p.Nq;
  }
  __device__ int64_t pair_row(int frame, int N) const {  // of the pair of frame t with another
    return (((int64_t{b} * p.P + min(t, time(frame))) * p.Z + (p.mean_map ? 0 : h)) * p.G + g) * N;
  }

  // A parameter of a query or a key; A = exp2(logit scale - ROW_MAX) ROW_NORM.
  __device__ float query_parameter(int which, int head, int query, float factor) const {
    if (query >= p.Nq) return 0;
    if (which < SLOPE) {
      const int frame = which % FRAMES;
      if (!has(frame)) return 0;
      const Frames& f = side.frames[frame];
      const int64_t row = map_row(frame, head) + query;
      return which < ROW_NORM ? f.row_max[row] : f.row_norm[row] * factor;
    }
    if (which < RHO) {
      const int frame = which % FRAMES;
      if (frame == NOW || !has(frame)) return 0;
      return (which < DELTA ? p.slopes : p.deltas)[pair_row(frame, p.Nq) + query];
    }
    if (RESULT == Result::rho) return 0;
    if (p.mean_map) return p.head_rho[map_row(NOW, h) + query];
    float found = 0;
    if (has(AFTER)) found += p.rho[pair_row(AFTER, p.Nq) + query];
    if (has(BEFORE)) found += p.next_rho[pair_row(BEFORE, p.Nq) + query];
    return found;
  }

  __device__ float key_parameter(int frame, int key) const {
    return frame == NOW || !has(frame) || key >= p.Nk ? 0 : p.dflow[pair_row(frame, p.Nk) + key];
  }

  __device__ float parameter(bool of_query, int which, int head, int n, float factor) const {
    return of_query ? query_parameter(which, head, n, factor) : key_parameter(which, n);
  }

  __device__ void load_rows(int head, float factor) {
#pragma unroll
    for (int i = 0; i < ROW_PARAMETERS; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) rows[i][half] = parameter(!TURNED, i, head, own_row(half), factor);
  }

  __device__ void load_columns(int head, int other0, float factor) const {
#pragma unroll 1
    for (int i = threadIdx.x; i < COLUMN_PARAMETERS * OTHERS; i += 32 * WARPS)
      store_shared(shared_memory() + COLUMNS_AT + i * 4,
                   parameter(TURNED, i / OTHERS, head, other0 + i % OTHERS, factor));
  }

  __device__ float column(int which, int n, int i) const {
    return load_shared(shared_memory() + COLUMNS_AT + (which * OTHERS + n * TILE_KEYS + lane_id() % 4 * 2 + i) * 4);
  }

  // Rows of all frames of a head, from `first` on; 0 beyond the last.
  template <bool OF_OWN>
  __device__ void load(int head, int first) const {
    constexpr bool OF_KEYS = OF_OWN == TURNED;
    constexpr int count = OF_OWN ? OWN : OTHERS;
#pragma unroll 1
    for (int frame = 0; frame < FRAMES; ++frame) {
      if (!has(frame)) continue;
      const Frames& f = side.frames[frame];
      const X* const x = OF_KEYS ? keys<X>(f, b, time(frame), head, g) : queries<X>(f, b, time(frame), head, g);
      const int64_t stride = OF_KEYS ? f.k_stride[4] : f.q_stride[4];
      const int of = OF_KEYS ? p.Nk : p.Nq;
#pragma unroll 1
      for (int slice = 0; slice < SLICES; ++slice) {
        const int d0 = slice * slice_elements<X>;
        if (d0 >= p.D) break;
        const Shared to = OF_OWN ? own_slice(frame, slice) : other_slice(frame, slice);
        if (vector)
          load_slice<X, true>(to, x, stride, first, count, JUMP, count / JUMP, of, d0, p.D);
        else
          load_elements<X, true>(to, x, stride, first, count, of, d0, p.D);
      }
    }
  }

  // A += the map of a frame, from what was loaded.
  __device__ void add_map(Tile& A, int frame) const {
    Tile s;
#pragma unroll
    for (int slice = 0; slice < SLICES; ++slice) {
      const int d0 = slice * slice_elements<X>;
      if (d0 >= p.D) break;
      const int steps = (min(p.D - d0, slice_elements<X>) * static_cast<int>(sizeof(X)) + STEP - 1) / STEP;
      const Shared own = own_slice(frame, slice) + warp_id() * TILE_ROWS * PITCH;
      add_products<X>(s, own, other_slice(frame, slice), slice == 0, steps, p.negate);
    }
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float column_max = TURNED ? column(ROW_MAX + frame, n, i) : 0;
        const float column_norm = TURNED ? column(ROW_NORM + frame, n, i) : 0;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float row_max = TURNED ? column_max : rows[ROW_MAX + frame][half];
          const float norm = TURNED ? column_norm : rows[ROW_NORM + frame][half];
          float& a = A[n][2 * half + i];
          a = fmaf(exp2_fast(fmaf(s[n][2 * half + i], p.scale, -row_max)), norm, a);
        }
      }
  }

  // What the pair with another frame's map B adds to the gradient of A.
  template <Growth GROWTH>
  __device__ void add_pair(Tile& dA, const Tile& A, const Tile& B, int frame) const {
    const Expm1<GROWTH> expm1(1.f);
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float column_slope = TURNED ? column(SLOPE + frame, n, i) : 0;
        const float column_delta = TURNED ? column(DELTA + frame, n, i) : 0;
        const float column_dflow = TURNED ? 0 : column(DFLOW + frame, n, i);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float slope = TURNED ? column_slope : rows[SLOPE + frame][half];
          const float delta = TURNED ? column_delta : rows[DELTA + frame][half];
          const float dflow = TURNED ? rows[DFLOW + frame][half] : column_dflow;
          const float change = A[n][2 * half + i] - B[n][2 * half + i], by = slope * (dflow - delta);
          dA[n][2 * half + i] += signed_by(fmaf(by, expm1(fabsf(change)), by), change);
        }
      }
  }

  __device__ static void clear(Tile& x) {
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) x[n][i] = 0;
  }

  // A of this head, and the gradient of the map whose change is measured.
  __device__ void gradient(Tile& A, Tile& dA, int other0) {
    Tile other[FRAMES];
    clear(A);
    clear(other[BEFORE]);
    clear(other[AFTER]);
    for (int i = 0; i < (p.mean_map ? p.H : 1); ++i) {
      if (p.mean_map)
        fetch(i, other0, true, p.inv_temperature / p.H);
      else
        fetch(h, other0, other0 == 0, p.inv_temperature);
      add_map(A, NOW);
      if (has(AFTER)) add_map(other[AFTER], AFTER);
      if (has(BEFORE)) add_map(other[BEFORE], BEFORE);
    }
    clear(dA);
#pragma unroll
    for (int frame = BEFORE; frame <= AFTER; frame += 2) {
      if (!has(frame)) continue;
      if (p.inv_temperature > 1)
        add_pair<Growth::large>(dA, A, other[frame], frame);
      else
        add_pair<Growth::small>(dA, A, other[frame], frame);
    }
    if (!p.mean_map) return;
    fetch(h, other0, true, p.inv_temperature);
    clear(A);
    add_map(A, NOW);
  }

  // Loads what the tile of a head needs; the block's own side only if it is not there.
  __device__ void fetch(int head, int other0, bool own, float factor) {
    sync_block();  // nobody uses what was there any more
    if (own) {
      load<true>(head, own0);
      load_rows(head, factor);
    }
    load<false>(head, other0);
    load_columns(head, other0, factor);
    wait_copies();
    sync_block();
  }

  // acc += dlogits times the other side's rows.
  __device__ void add_product(float (&acc)[DT][4], const Tile& dlogits) const {
    const int lane = lane_id();
#pragma unroll
    for (int n = 0; n < TILES; n += 2) {
      uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float (&x)[4] = dlogits[n + i];
        if constexpr (is_bf16<X>) {
          a[0][2 * i] = pack(x[0], x[1], X{});
          a[0][2 * i + 1] = pack(x[2], x[3], X{});
        } else if constexpr (sizeof(X) == 2) {  // f16 fits in tf32; gradients reach far below the range of f16
          a[i][0] = to_tf32(x[0]), a[i][1] = to_tf32(x[2]), a[i][2] = to_tf32(x[1]), a[i][3] = to_tf32(x[3]);
        } else {
          a[i][0] = bits(x[0]), a[i][1] = bits(x[2]), a[i][2] = bits(x[1]), a[i][3] = bits(x[3]);
        }
      }
#pragma unroll
      for (int d = 0; d < DT; d += 2) {
        if (d * 8 >= p.D) break;
        constexpr int per_slice = slice_elements<X> / 8, bytes = 8 * static_cast<int>(sizeof(X));
        const Shared at = other_slice(NOW, d / per_slice) + n * TILE_KEYS * PITCH + d % per_slice * bytes;
        if constexpr (sizeof(X) == 2) {
          uint32_t b[4];  // 8 of the others and 8 columns; the next 8 others; both again of the next 8 columns
          load_matrices_transposed(b, at + lane % 16 * PITCH + lane / 16 * PIECE);
#pragma unroll
          for (int i = 0; i < 2; ++i)
            if constexpr (is_bf16<X>) {
              multiply(acc[d + i], a[0], b[2 * i], b[2 * i + 1], X{});
            } else {
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                const Pair x = unpack(b[2 * i + half], X{});
                multiply_tf32(acc[d + i], a[half], bits(x.first), bits(x.second));
              }
            }
        } else {
#pragma unroll
          for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              if ((d + i) * 8 >= p.D) break;
              const Shared from = at + (half * TILE_KEYS + lane % 4 * 2) * PITCH + (i * 8 + lane / 4) * 4;
              multiply(acc[d + i], a[half], bits(load_shared(from)), bits(load_shared(from + PITCH)), X{});
            }
        }
      }
    }
  }

  __device__ void run() {
    float acc[DT][4] = {};
    float sum[2] = {};
    const float of_head = p.mean_map ? 1.f / p.H : 1.f;
    if (has(AFTER) || has(BEFORE))
      for (int other0 = 0; other0 < others(); other0 += OTHERS) {
        Tile A, dA;
        gradient(A, dA, other0);
        if (other0 + OTHERS > others()) {  // nothing beyond the last; what was computed may be NaN
#pragma unroll
          for (int n = 0; n < TILES; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
              if (other0 + n * TILE_KEYS + lane_id() % 4 * 2 + i % 2 >= others()) A[n][i] = dA[n][i] = 0;
        }
#pragma unroll
        for (int n = 0; n < TILES; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float column_rho = TURNED ? column(RHO, n, i) : 0;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              float& a = A[n][2 * half + i];
              const float da = dA[n][2 * half + i], rho = TURNED ? column_rho : rows[RHO][half];
              if constexpr (RESULT == Result::rho)
                sum[half] = fmaf(a, da, sum[half]);
              else
                a = a * (da - rho) * of_head;
            }
          }
        if constexpr (RESULT != Result::rho) add_product(acc, A);
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
        X* const to = static_cast<X*>(TURNED ? side.frames[NOW].dk : side.frames[NOW].dq) + (map * owns() + row) * p.D;
#pragma unroll
        for (int d = 0; d < DT; ++d)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int column = d * 8 + lane_id() % 4 * 2 + i;
            if (column < p.D) round_to(to[column], acc[d][2 * half + i]);
          }
      }
    }
  }
};

template <class X, int DT, Result RESULT>
__global__ void __launch_bounds__((Gradient<X, DT, RESULT>::WARPS * 32), 2)
    am_flow_gradient(const __grid_constant__ Problem p, const __grid_constant__ Side side, bool vector) {
  Gradient<X, DT, RESULT>(p, side, vector).run();
}

template <class X, int DT, Result RESULT>
const char* run_gradient(const Problem& p, const Side& side, const Device& device, void* stream) {
  using Kernel = Gradient<X, DT, RESULT>;
  const int owned = divide_up(RESULT == Result::dk ? p.Nk : p.Nq, Kernel::OWN);
  const int64_t blocks = int64_t{owned} * p.G * p.H * p.T * p.B;
  if (blocks > 0x7fffffff) return "more blocks of threads than one launch can have";
  if (Kernel::SHARED > device.shared_bytes) return "these sizes need more shared memory than a block can have";
  const auto kernel = am_flow_gradient<X, DT, RESULT>;
  return launch(device, kernel, blocks, Kernel::WARPS * 32, Kernel::SHARED, stream, p, side, vectors(p));
}

template <class X>
const char* run_side(const Problem& p, const Side& side, const Device& device, void* stream) {
  if (!side.frames[NOW].dq && !side.frames[NOW].dk) return nullptr;
  const char* wrong = nullptr;
  if (p.mean_map)
    wrong = p.D <= 64 ? run_gradient<X, 8, Result::rho>(p, side, device, stream)
                      : run_gradient<X, 16, Result::rho>(p, side, device, stream);
  if (!wrong && side.frames[NOW].dq)
    wrong = p.D <= 64 ? run_gradient<X, 8, Result::dq>(p, side, device, stream)
                      : run_gradient<X, 16, Result::dq>(p, side, device, stream);
  if (!wrong && side.frames[NOW].dk)
    wrong = p.D <= 64 ? run_gradient<X, 8, Result::dk>(p, side, device, stream)
                      : run_gradient<X, 16, Result::dk>(p, side, device, stream);
  return wrong;
}

template <class X>
struct Launch {
  static constexpr bool FORWARD = false;

  template <int NT, bool MEAN_MAP, Growth GROWTH>
  const char* run(const Problem& p, const Plan& plan, const Device& device, void* stream) const {
    const auto kernel = am_flow_coefficients<X, NT, MEAN_MAP, GROWTH>;
    return launch(device, kernel, plan.launched(p), plan.threads, plan.shared_bytes, stream, p, plan);
  }
};

}  // namespace

template <class X>
const char* run_backward(const Problem& p, const Plan& plan, const Device& device, void* stream) {
  if (const char* wrong = run_strips<X>(Launch<X>{}, p, plan, device, stream)) return wrong;
  if (p.shift > 0) return run_side<X>(p, {{p.first, p.first, p.first}, p.shift, p.P}, device, stream);
  if (const char* wrong = run_side<X>(p, {{p.second, p.first, p.second}, p.P, p.P}, device, stream)) return wrong;
  return run_side<X>(p, {{p.first, p.second, p.first}, 0, 0}, device, stream);
}

template const char* run_backward<AMFLOW_NUMBER>(const Problem&, const Plan&, const Device&, void*);

}  // namespace amflow_cuda
