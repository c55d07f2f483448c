// The backward for q and k of type AMFLOW_DTYPE; docs/maths.md derives it. The first kernel computes coefficients for
// the rows of every pair, from strips of the maps as in the forward. The second computes dq and dk of every frame, from
// tiles of its map and of the maps it is paired with.
//
// Maps in this file are A / temperature, and their gradients are scale * temperature * dL/dA. With y = S e^|A - A'|, a
// pair adds y slope (g - delta) to the gradient of A, and subtracts it from that of A'.

#include "strip.h"
#include "table.h"

namespace amflow_cuda {

namespace {

template <class X, int NT, bool MEAN_MAP>
struct Coefficients : Strip<X, NT, MEAN_MAP> {
  using Base = Strip<X, NT, MEAN_MAP>;
  using Base::Base, Base::p, Base::plan, Base::pairs, Base::warp;
  using typename Base::Tiles;

  // The n-th pair of the block's chunk, (A, B).
  template <Growth GROWTH>
  __device__ void add_pair(const Tiles& A, const Tiles& B, int n) {
    const float* const g = p.dflow + Base::pair_index(n) * p.Nk + Base::key0() + lane_id() % 4 * 2;
    const int remaining = p.Nk - Base::key0() - lane_id() % 4 * 2;
    const Expm1<GROWTH> expm1(1.f);
    float sum[5][2] = {};  // h g, A y, A y g, B y, B y g
#pragma unroll
    for (int c = 0; c < NT; ++c)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool inside = c * TILE_KEYS + i < remaining;
        const float g_j = inside ? g[c * TILE_KEYS + i] : 0.f;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float a = A[c][2 * half + i], b = B[c][2 * half + i];
          const float h = 1 + expm1(fabsf(a - b));
          const float y = inside ? multiply_by_sign(h, a - b) : 0.f, y_g = y * g_j;
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
      const int64_t to = Base::pair_index(n) * p.Nq + row;
      const float w = reciprocal(p.Nk + p.e_sum[to]);
      const float delta = w * sum[0][half], slope = p.slope * w, factor = slope / p.inv_temperature;
      p.slopes[to] = slope;
      p.deltas[to] = delta;
      p.rho[to] = factor * (sum[2][half] - delta * sum[1][half]);
      p.next_rho[to] = -factor * (sum[4][half] - delta * sum[3][half]);
    }
  }

  template <Growth GROWTH>
  __device__ void run() {
    Tiles A, B;
    float row_factor[2];
    Base::load_first();
    if (!Base::active()) {
      for (int n = 0; n <= pairs; ++n) Base::skip_map(NoWork{});
      return;
    }
    for (int n = 0;; n += 2) {  // two maps per iteration, so that none is moved between registers
      Base::next_map(A, row_factor, n, NoWork{});
      Base::scale_rows(A, row_factor);
      if (n > 0) add_pair<GROWTH>(B, A, n - 1);
      if (n == pairs) break;
      Base::next_map(B, row_factor, n + 1, NoWork{});
      Base::scale_rows(B, row_factor);
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

// The frames t - shift, t and t + shift. The map of t is paired with that of the first if t >= previous_from, and with
// that of the last if t < next_until.
struct FrameTriple {
  Frames frames[3];
  int previous_from, next_until;
};

constexpr int PREVIOUS = 0, CURRENT = 1, NEXT = 2, FRAMES = 3;
enum class Result { dq, dk, rho };

// The parameters of a query, as indices into a list: for each of the three frames its map's ROW_MAX and ROW_NORM, and
// the SLOPE and DELTA of its pair with the current frame (CURRENT is unused); then RHO.
constexpr int ROW_MAX = 0, ROW_NORM = 3, SLOPE = 6, DELTA = 9, RHO = 12, PARAMETERS = 13;
// The parameters of a key: for each frame dflow of the same pair.
constexpr int DFLOW = 0, KEY_PARAMETERS = 3;

// A block computes the gradient of ROWS queries (or keys, for dk) of one frame and head, DT x 8 columns of it. It
// iterates over the keys (or queries), COLUMNS at a time.
template <class X, int DT, Result RESULT>
struct Gradient {
  static constexpr bool TRANSPOSED = RESULT == Result::dk;  // the rows of tiles are keys
  static constexpr int SLICES = divide_up(DT * 8, slice_elements<X>);
  static constexpr int WARPS = SLICES > 2 ? 2 : 4, ROWS = WARPS * TILE_ROWS, COLUMNS = SLICES > 1 ? 16 : 32;
  static constexpr int TILES = COLUMNS / TILE_KEYS, COPY_ROWS = 32 * WARPS / (SLICE_BYTES / COPY_BYTES);
  static constexpr int COLUMN_PARAMETERS = TRANSPOSED ? PARAMETERS : KEY_PARAMETERS;
  static constexpr int ROW_PARAMETERS = TRANSPOSED ? KEY_PARAMETERS : PARAMETERS;
  static constexpr int COLUMNS_AT = FRAMES * SLICES * ROWS * PITCH;
  static constexpr int COLUMN_PARAMETERS_AT = COLUMNS_AT + FRAMES * SLICES * COLUMNS * PITCH;
  static constexpr int SHARED = COLUMN_PARAMETERS_AT + COLUMN_PARAMETERS * COLUMNS * 4;
  using Tile = float[TILES][4];

  const Problem& p;
  const FrameTriple& triple;
  const bool aligned;
  int b, t, h, g, row0;
  float row_parameters[ROW_PARAMETERS][2];  // of the lane's two rows

  __device__ Gradient(const Problem& p, const FrameTriple& triple, bool aligned)
      : p(p), triple(triple), aligned(aligned) {
    unsigned rest = blockIdx.x;
    const auto next = [&rest](unsigned n) {
      const unsigned index = rest % n;
      rest /= n;
      return static_cast<int>(index);
    };
    row0 = next((num_rows() + ROWS - 1) / ROWS) * ROWS;
    g = next(p.G);
    h = next(p.H);
    t = next(p.T);
    b = static_cast<int>(rest);
  }

  __device__ int num_rows() const { return TRANSPOSED ? p.Nk : p.Nq; }
  __device__ int num_columns() const { return TRANSPOSED ? p.Nq : p.Nk; }
  __device__ int row_of(int half) const { return row0 + warp_id() * TILE_ROWS + half * 8 + lane_id() / 4; }
  __device__ bool has_frame(int frame) const {
    return frame == PREVIOUS ? t >= triple.previous_from : frame == NEXT ? t < triple.next_until : true;
  }
  __device__ int frame_index(int frame) const { return t + (frame - CURRENT) * p.shift; }
  __device__ Shared row_slice(int frame, int slice) const {
    return shared_memory() + (frame * SLICES + slice) * ROWS * PITCH;
  }
  __device__ Shared column_slice(int frame, int slice) const {
    return shared_memory() + COLUMNS_AT + (frame * SLICES + slice) * COLUMNS * PITCH;
  }

  // The first row of a frame's map in (B, T, H, G, Nq).
  __device__ int64_t map_row(int frame, int head) const {
    return (((int64_t{b} * p.T + frame_index(frame)) * p.H + head) * p.G + g) * p.Nq;
  }
  // The first of N queries or keys in (B, P, Z, G, N), of the pair of frame t and another.
  __device__ int64_t pair_row(int frame, int N) const {
    return (((int64_t{b} * p.P + min(t, frame_index(frame))) * p.Z + (p.mean_map ? 0 : h)) * p.G + g) * N;
  }

  // A value of a query, or 0 beyond the last; A = exp2(logit scale - ROW_MAX) ROW_NORM.
  __device__ float query_parameter(int which, int head, int query, float factor) const {
    if (query >= p.Nq) return 0;
    if (which < SLOPE) {
      const int frame = which % FRAMES;
      if (!has_frame(frame)) return 0;
      const Frames& f = triple.frames[frame];
      const int64_t row = map_row(frame, head) + query;
      return which < ROW_NORM ? f.row_max[row] : f.row_norm[row] * factor;
    }
    if (which < RHO) {
      const int frame = which % FRAMES;
      if (frame == CURRENT || !has_frame(frame)) return 0;
      return (which < DELTA ? p.slopes : p.deltas)[pair_row(frame, p.Nq) + query];
    }
    if (RESULT == Result::rho) return 0;
    if (p.mean_map) return p.head_rho[map_row(CURRENT, h) + query];
    float rho = 0;
    if (has_frame(NEXT)) rho += p.rho[pair_row(NEXT, p.Nq) + query];
    if (has_frame(PREVIOUS)) rho += p.next_rho[pair_row(PREVIOUS, p.Nq) + query];
    return rho;
  }

  __device__ float key_parameter(int frame, int key) const {
    return frame == CURRENT || !has_frame(frame) || key >= p.Nk ? 0 : p.dflow[pair_row(frame, p.Nk) + key];
  }

  __device__ float parameter(bool of_query, int which, int head, int n, float factor) const {
    return of_query ? query_parameter(which, head, n, factor) : key_parameter(which, n);
  }

  __device__ void load_rows(int head, float factor) {
#pragma unroll
    for (int i = 0; i < ROW_PARAMETERS; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        row_parameters[i][half] = parameter(!TRANSPOSED, i, head, row_of(half), factor);
  }

  __device__ void load_columns(int head, int column0, float factor) const {
#pragma unroll 1
    for (int i = threadIdx.x; i < COLUMN_PARAMETERS * COLUMNS; i += 32 * WARPS)
      store_shared(shared_memory() + COLUMN_PARAMETERS_AT + i * 4,
                   parameter(TRANSPOSED, i / COLUMNS, head, column0 + i % COLUMNS, factor));
  }

  __device__ float column_value(int which, int n, int i) const {
    return load_shared(shared_memory() + COLUMN_PARAMETERS_AT +
                       (which * COLUMNS + n * TILE_KEYS + lane_id() % 4 * 2 + i) * 4);
  }

  // Loads the rows of all frames of a head from `first` on, and 0 beyond the last.
  template <bool OF_ROWS>
  __device__ void load(int head, int first) const {
    constexpr bool OF_KEYS = OF_ROWS == TRANSPOSED;
    constexpr int count = OF_ROWS ? ROWS : COLUMNS;
#pragma unroll 1
    for (int frame = 0; frame < FRAMES; ++frame) {
      if (!has_frame(frame)) continue;
      const Frames& f = triple.frames[frame];
      const X* const x =
          OF_KEYS ? keys<X>(f, b, frame_index(frame), head, g) : queries<X>(f, b, frame_index(frame), head, g);
      const int64_t stride = OF_KEYS ? f.k_stride[4] : f.q_stride[4];
      const int rows = OF_KEYS ? p.Nk : p.Nq;
#pragma unroll 1
      for (int slice = 0; slice < SLICES; ++slice) {
        const int d0 = slice * slice_elements<X>;
        if (d0 >= p.D) break;
        const Shared to = OF_ROWS ? row_slice(frame, slice) : column_slice(frame, slice);
        if (aligned) load_slice<X, true>(to, x, stride, first, count, {COPY_ROWS, count / COPY_ROWS}, rows, d0, p.D);
        else load_elements<X, true>(to, x, stride, first, count, rows, d0, p.D);
      }
    }
  }

  // A += the map of a frame, from the rows in shared memory.
  __device__ void add_map(Tile& A, int frame) const {
    Tile s;
#pragma unroll
    for (int slice = 0; slice < SLICES; ++slice) {
      const int d0 = slice * slice_elements<X>;
      if (d0 >= p.D) break;
      const int steps = (min(p.D - d0, slice_elements<X>) * static_cast<int>(sizeof(X)) + MMA_BYTES - 1) / MMA_BYTES;
      const Shared own = row_slice(frame, slice) + warp_id() * TILE_ROWS * PITCH;
      add_products<X>(s, own, column_slice(frame, slice), slice == 0, steps, p.negate);
    }
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float column_max = TRANSPOSED ? column_value(ROW_MAX + frame, n, i) : 0;
        const float column_norm = TRANSPOSED ? column_value(ROW_NORM + frame, n, i) : 0;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float row_max = TRANSPOSED ? column_max : row_parameters[ROW_MAX + frame][half];
          const float norm = TRANSPOSED ? column_norm : row_parameters[ROW_NORM + frame][half];
          float& a = A[n][2 * half + i];
          a = fmaf(exp2_fast(fmaf(s[n][2 * half + i], p.scale, -row_max)), norm, a);
        }
      }
  }

  // Adds to dA the gradient of the pair of A with another frame's map B.
  template <Growth GROWTH>
  __device__ void add_pair(Tile& dA, const Tile& A, const Tile& B, int frame) const {
    const Expm1<GROWTH> expm1(1.f);
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float column_slope = TRANSPOSED ? column_value(SLOPE + frame, n, i) : 0;
        const float column_delta = TRANSPOSED ? column_value(DELTA + frame, n, i) : 0;
        const float column_dflow = TRANSPOSED ? 0 : column_value(DFLOW + frame, n, i);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float slope = TRANSPOSED ? column_slope : row_parameters[SLOPE + frame][half];
          const float delta = TRANSPOSED ? column_delta : row_parameters[DELTA + frame][half];
          const float dflow = TRANSPOSED ? row_parameters[DFLOW + frame][half] : column_dflow;
          // slope includes w, which can be 1e-31 at low temperatures: it multiplies e first, or it could underflow.
          const float change = A[n][2 * half + i] - B[n][2 * half + i];
          const float weight = fmaf(slope, expm1(fabsf(change)), slope);
          dA[n][2 * half + i] += multiply_by_sign(weight * (dflow - delta), change);
        }
      }
  }

  __device__ static void clear(Tile& x) {
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) x[n][i] = 0;
  }

  // Computes A of this head, and the gradient dA of the map whose change is measured.
  __device__ void gradient(Tile& A, Tile& dA, int column0) {
    Tile neighbor[FRAMES];
    clear(A);
    clear(neighbor[PREVIOUS]);
    clear(neighbor[NEXT]);
    for (int i = 0; i < (p.mean_map ? p.H : 1); ++i) {
      if (p.mean_map) fetch(i, column0, true, p.inv_temperature / p.H);
      else fetch(h, column0, column0 == 0, p.inv_temperature);
      add_map(A, CURRENT);
      if (has_frame(NEXT)) add_map(neighbor[NEXT], NEXT);
      if (has_frame(PREVIOUS)) add_map(neighbor[PREVIOUS], PREVIOUS);
    }
    clear(dA);
#pragma unroll
    for (int frame = PREVIOUS; frame <= NEXT; frame += 2) {
      if (!has_frame(frame)) continue;
      if (p.inv_temperature > 1) add_pair<Growth::large>(dA, A, neighbor[frame], frame);
      else add_pair<Growth::small>(dA, A, neighbor[frame], frame);
    }
    if (!p.mean_map) return;
    fetch(h, column0, true, p.inv_temperature);
    clear(A);
    add_map(A, CURRENT);
  }

  // Loads the operands for a tile of a head; the block's own rows only if `rows` says so.
  __device__ void fetch(int head, int column0, bool rows, float factor) {
    sync_block();  // no thread still reads the previous tile
    if (rows) {
      load<true>(head, row0);
      load_rows(head, factor);
    }
    load<false>(head, column0);
    load_columns(head, column0, factor);
    wait_copies();
    sync_block();
  }

  // acc += dlogits times the current frame's keys (or queries, for dk).
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
        } else if constexpr (sizeof(X) == 2) {  // gradients can underflow f16; f16 operands are exact in tf32
          a[i][0] = to_tf32(x[0]), a[i][1] = to_tf32(x[2]), a[i][2] = to_tf32(x[1]), a[i][3] = to_tf32(x[3]);
        } else {
          a[i][0] = as_bits(x[0]), a[i][1] = as_bits(x[2]), a[i][2] = as_bits(x[1]), a[i][3] = as_bits(x[3]);
        }
      }
#pragma unroll
      for (int d = 0; d < DT; d += 2) {
        if (d * 8 >= p.D) break;
        constexpr int per_slice = slice_elements<X> / 8, bytes = 8 * static_cast<int>(sizeof(X));
        const Shared at = column_slice(CURRENT, d / per_slice) + n * TILE_KEYS * PITCH + d % per_slice * bytes;
        if constexpr (sizeof(X) == 2) {
          uint32_t b[4];  // (8 rows, 8 columns), the next 8 rows, and both again for the next 8 columns
          load_matrices_transposed(b, at + lane % 16 * PITCH + lane / 16 * COPY_BYTES);
#pragma unroll
          for (int i = 0; i < 2; ++i)
            if constexpr (is_bf16<X>) {
              multiply(acc[d + i], a[0], b[2 * i], b[2 * i + 1], X{});
            } else {
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                const FloatPair x = unpack(b[2 * i + half], X{});
                multiply_tf32(acc[d + i], a[half], as_bits(x.first), as_bits(x.second));
              }
            }
        } else {
#pragma unroll
          for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              if ((d + i) * 8 >= p.D) break;
              const Shared from = at + (half * TILE_KEYS + lane % 4 * 2) * PITCH + (i * 8 + lane / 4) * 4;
              multiply(acc[d + i], a[half], as_bits(load_shared(from)), as_bits(load_shared(from + PITCH)), X{});
            }
        }
      }
    }
  }

  __device__ void run() {
    float acc[DT][4] = {};
    float sum[2] = {};
    const float head_weight = p.mean_map ? 1.f / p.H : 1.f;
    if (has_frame(NEXT) || has_frame(PREVIOUS))
      for (int column0 = 0; column0 < num_columns(); column0 += COLUMNS) {
        Tile A, dA;
        gradient(A, dA, column0);
        if (column0 + COLUMNS > num_columns()) {  // 0 beyond the last, where the computed values may be NaN
#pragma unroll
          for (int n = 0; n < TILES; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
              if (column0 + n * TILE_KEYS + lane_id() % 4 * 2 + i % 2 >= num_columns()) A[n][i] = dA[n][i] = 0;
        }
#pragma unroll
        for (int n = 0; n < TILES; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float column_rho = TRANSPOSED ? column_value(RHO, n, i) : 0;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              float& a = A[n][2 * half + i];
              const float da = dA[n][2 * half + i], rho = TRANSPOSED ? column_rho : row_parameters[RHO][half];
              if constexpr (RESULT == Result::rho) sum[half] = fmaf(a, da, sum[half]);
              else a = a * (da - rho) * head_weight;
            }
          }
        if constexpr (RESULT != Result::rho) add_product(acc, A);
      }
    const int64_t map = ((int64_t{b} * p.T + t) * p.H + h) * p.G + g;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of(half);
      float total = sum[half];
      total += shuffle_xor(total, 1);
      total += shuffle_xor(total, 2);
      if (row >= num_rows()) continue;
      if constexpr (RESULT == Result::rho) {
        if (lane_id() % 4 == 0) p.head_rho[map * p.Nq + row] = total / p.inv_temperature;
      } else {
        X* const to = static_cast<X*>(TRANSPOSED ? triple.frames[CURRENT].dk : triple.frames[CURRENT].dq) +
                      (map * num_rows() + row) * p.D;
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
    am_flow_gradient(const __grid_constant__ Problem p, const __grid_constant__ FrameTriple triple, bool aligned) {
  Gradient<X, DT, RESULT>(p, triple, aligned).run();
}

template <class X, int DT, Result RESULT>
const char* run_gradient(const Problem& p, const FrameTriple& triple, const Device& device, void* stream) {
  using Kernel = Gradient<X, DT, RESULT>;
  const int row_blocks = divide_up(RESULT == Result::dk ? p.Nk : p.Nq, Kernel::ROWS);
  const int64_t blocks = int64_t{row_blocks} * p.G * p.H * p.T * p.B;
  if (blocks > 0x7fffffff) return "more blocks of threads than one launch can have";
  if (Kernel::SHARED > device.shared_bytes) return "these sizes need more shared memory than a block can have";
  const auto kernel = am_flow_gradient<X, DT, RESULT>;
  return launch(device, kernel, blocks, Kernel::WARPS * 32, Kernel::SHARED, stream, p, triple, rows_aligned(p));
}

template <class X>
const char* run_triple(const Problem& p, const FrameTriple& triple, const Device& device, void* stream) {
  if (!triple.frames[CURRENT].dq && !triple.frames[CURRENT].dk) return nullptr;
  const char* error = nullptr;
  if (p.mean_map)
    error = p.D <= 64 ? run_gradient<X, 8, Result::rho>(p, triple, device, stream)
                      : run_gradient<X, 16, Result::rho>(p, triple, device, stream);
  if (!error && triple.frames[CURRENT].dq)
    error = p.D <= 64 ? run_gradient<X, 8, Result::dq>(p, triple, device, stream)
                      : run_gradient<X, 16, Result::dq>(p, triple, device, stream);
  if (!error && triple.frames[CURRENT].dk)
    error = p.D <= 64 ? run_gradient<X, 8, Result::dk>(p, triple, device, stream)
                      : run_gradient<X, 16, Result::dk>(p, triple, device, stream);
  return error;
}

template <class X>
struct Launch {
  static constexpr bool FORWARD = false;

  template <int NT, bool MEAN_MAP, Growth GROWTH>
  const char* run(const Problem& p, const Plan& plan, const Device& device, void* stream) const {
    const auto kernel = am_flow_coefficients<X, NT, MEAN_MAP, GROWTH>;
    return launch(device, kernel, plan.num_blocks(p), plan.threads, plan.shared_bytes, stream, p, plan);
  }
};

}  // namespace

template <class X>
const char* run_backward(const Problem& p, const Plan& plan, const Device& device, void* stream) {
  if (const char* error = run_strips<X>(Launch<X>{}, p, plan, device, stream)) return error;
  if (p.shift > 0) return run_triple<X>(p, {{p.first, p.first, p.first}, p.shift, p.P}, device, stream);
  if (const char* error = run_triple<X>(p, {{p.second, p.first, p.second}, p.P, p.P}, device, stream)) return error;
  return run_triple<X>(p, {{p.first, p.second, p.first}, 0, 0}, device, stream);
}

template const char* run_backward<AMFLOW_DTYPE>(const Problem&, const Plan&, const Device&, void*);

}  // namespace amflow_cuda
