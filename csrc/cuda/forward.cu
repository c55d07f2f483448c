// The forward in one pass: what strips of maps add to the flow of each pair, for q and k of type AMFLOW_DTYPE.

#include "strip.h"
#include "table.h"

namespace amflow_cuda {

namespace {

template <class X, int NT, bool MEAN_MAP>
struct Forward : Strip<X, NT, MEAN_MAP> {
  using Base = Strip<X, NT, MEAN_MAP>;
  using Base::Base, Base::p, Base::plan, Base::block, Base::pairs, Base::warp, Base::group;
  using typename Base::Tiles;

  // With one buffer, a pair's sums overwrite those of the previous pair, which other threads may still be reading.
  __device__ void sync_sums() const {
    if (plan.buffers == 1 && plan.stages > 1) sync_block();
  }

  static constexpr int PITCH = sums_pitch(NT);

  // The column sums of pair n over the two rows that each lane holds: (groups, warps, LANE_ROWS, PITCH).
  __device__ Shared columns(int n) const {
    return shared_memory() + plan.sums + (plan.buffers > 1 ? n % 2 * plan.sum_bytes : 0);
  }

  // The n-th pair of the block's chunk, (a A, b B), with a and b for each row. Overwrites A.
  template <Growth GROWTH>
  __device__ void add_pair(Tiles& A, const float (&a)[2], const Tiles& B, const float (&b)[2], int n) {
    constexpr float excess = GROWTH == Growth::rough ? 1 : 0;  // that the rough `Expm1` adds to its result
    float sum[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // a |A - (b / a) B| takes one product, and equal maps differ by exactly 0.
      const float ratio = a[half] == b[half] ? 1.f : quotient(b[half], a[half]);
      const Expm1<GROWTH> expm1(a[half]);
      float total = -2 * NT * excess;
#pragma unroll
      for (int c = 0; c < NT; ++c)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          A[c][i] = expm1(fabsf(fmaf(-ratio, B[c][i], A[c][i])));
          total += A[c][i];
        }
      sum[half] = total;
    }
    Base::sum_rows(sum);
    float w[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = Base::row0() + Base::row_of(half);
      w[half] = row < p.Nq ? reciprocal(p.Nk + sum[half]) : 0.f;
    }
    sync_sums();
    const int lane = lane_id();
    const int line = (group * plan.warps + warp) * LANE_ROWS + lane / 4;
    const Shared to = columns(n) + (line * PITCH + lane % 4 * 2) * 4;
    const float rest = -excess * (w[0] + w[1]);
#pragma unroll
    for (int c = 0; c < NT; ++c) {
      float x[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        x[i] = fmaf(w[0], A[c][i], rest);
        x[i] = fmaf(w[1], A[c][2 + i], x[i]);
      }
      store_shared(to + c * TILE_KEYS * 4, x[0], x[1]);
    }
  }

  // Writes what the block's rows add to the flow of pair n, four columns at a time.
  __device__ void store_part(int n) const {
    const int active = min(plan.groups, (p.Nq - block * plan.rows + TILE_ROWS - 1) / TILE_ROWS);
    float* const to = static_cast<float*>(load_pointer(Base::pointers() + 32)) + int64_t{n} * p.step * p.Z * p.G * p.Nk;
#pragma unroll 1
    for (int j = 4 * threadIdx.x; j < p.Nk; j += 4 * blockDim.x) {
      const int owner = j / (NT * TILE_KEYS);  // the warp that has these columns
      Shared from = columns(n) + (owner * LANE_ROWS * PITCH + j - owner * (NT * TILE_KEYS)) * 4;
      float total[4] = {0, 0, 0, 0};
#pragma unroll 1
      for (int group = 0; group < active; ++group, from += plan.warps * LANE_ROWS * PITCH * 4)
#pragma unroll
        for (int r = 0; r < LANE_ROWS; ++r) {
          float x[4];
          load_shared(from + r * PITCH * 4, x);
#pragma unroll
          for (int i = 0; i < 4; ++i) total[i] += x[i];
        }
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (j + i < p.Nk) to[j + i] = total[i];
    }
  }

  template <Growth GROWTH>
  __device__ void run() {
    Tiles A, B;
    float a[2], b[2];
    Base::load_first();
    const auto store_before = [&](int n) {  // called after a barrier
      return [this, n] {
        if (n > 1) store_part(n - 2);
      };
    };
    if (!Base::active()) {
      for (int n = 0; n <= pairs; ++n) {
        Base::skip_map(store_before(n));
        if (n > 0) sync_sums();
      }
    } else {
      for (int n = 0;; n += 2) {  // two maps per iteration, so that none is moved between registers
        Base::next_map(A, a, store_before(n));
        if (n > 0) add_pair<GROWTH>(B, b, A, a, n - 1);
        if (n == pairs) break;
        Base::next_map(B, b, store_before(n + 1));
        add_pair<GROWTH>(A, a, B, b, n);
        if (n + 1 == pairs) break;
      }
    }
    sync_block();
    store_part(pairs - 1);
  }
};

template <class X, int NT, bool MEAN_MAP, Growth GROWTH>
__global__ void __launch_bounds__(block_warps(NT) * 32, 1)
    am_flow_forward(const __grid_constant__ Problem p, const __grid_constant__ Plan plan) {
  Forward<X, NT, MEAN_MAP> strip(p, plan);
  if (strip.pairs > 0) strip.template run<GROWTH>();
}

template <class X, int NT, bool MEAN_MAP, Growth GROWTH>
const char* run(const Problem& p, const Plan& plan, const Device& device, void* stream) {
  const auto kernel = am_flow_forward<X, NT, MEAN_MAP, GROWTH>;
  return launch(device, kernel, plan.num_blocks(p), plan.threads, plan.shared_bytes, stream, p, plan);
}

template <class X, Growth GROWTH>
const char* run_tiles(const Problem& p, const Plan& plan, const Device& device, void* stream) {
  if (p.mean_map) return run<X, 8, true, GROWTH>(p, plan, device, stream);
  switch (plan.tiles) {
    case 2: return run<X, 2, false, GROWTH>(p, plan, device, stream);
    case 8: return run<X, 8, false, GROWTH>(p, plan, device, stream);
    default:;
  }
  if constexpr (sizeof(X) == 2 && GROWTH != Growth::large) {
    switch (plan.tiles) {
      case 5: return run<X, 5, false, GROWTH>(p, plan, device, stream);
      case 13: return run<X, 13, false, GROWTH>(p, plan, device, stream);
      case 17: return run<X, 17, false, GROWTH>(p, plan, device, stream);
      case 19: return run<X, 19, false, GROWTH>(p, plan, device, stream);
      default:;
    }
  }
  return "no kernel for this number of keys";
}

}  // namespace

template <class X>
const char* run_forward(const Problem& p, const Plan& plan, const Device& device, void* stream) {
  if (plan.shared_bytes > device.shared_bytes) return "these sizes need more shared memory than a block can have";
  if (plan.num_blocks(p) > 0x7fffffff) return "more blocks of threads than one launch can have";
  switch (growth_of(p)) {
    case Growth::small: return run_tiles<X, Growth::small>(p, plan, device, stream);
    case Growth::large: return run_tiles<X, Growth::large>(p, plan, device, stream);
    case Growth::rough: return run_tiles<X, Growth::rough>(p, plan, device, stream);
  }
  return "no kernel for this temperature";
}

template const char* run_forward<AMFLOW_DTYPE>(const Problem&, const Plan&, const Device&, void*);

}  // namespace amflow_cuda
