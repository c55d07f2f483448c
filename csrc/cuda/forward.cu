// The forward in one pass: what strips of maps add to the flows of their pairs, for q and k of AMFLOW_NUMBER.

#include "strip.h"
#include "table.h"

namespace amflow_cuda {

namespace {

// Halves of a list of sums go to either half of the lanes, until each lane has one sum.
template <int COUNT>
__device__ inline void scatter(const float (&x)[COUNT], float (&y)[COUNT / 2], int lane, int lanes) {
#pragma unroll
  for (int i = 0; i < COUNT / 2; ++i) {
    const float keep = lane & lanes ? x[i + COUNT / 2] : x[i];
    const float send = lane & lanes ? x[i] : x[i + COUNT / 2];
    y[i] = keep + shuffle_xor(send, lanes);
  }
}

// Stores the sums over eight lanes of columns of COUNT tiles, each lane's two of a tile.
template <int COUNT>
__device__ inline void store_columns(Shared to, const float (&x)[2 * COUNT], int lane) {
  if constexpr (COUNT == 4) {
    float four[4], two[2], one[1];
    scatter(x, four, lane, 16);
    scatter(four, two, lane, 8);
    scatter(two, one, lane, 4);
    const int tile = lane >> 3, last = lane >> 2 & 1;
    store_shared(to + (tile * TILE_KEYS + lane % 4 * 2 + last) * 4, one[0]);
  } else {
    float one[1];
    scatter(x, one, lane, 4);
    one[0] += shuffle_xor(one[0], 8);
    one[0] += shuffle_xor(one[0], 16);
    if (lane < 8) store_shared(to + (lane % 4 * 2 + (lane >> 2)) * 4, one[0]);
  }
}

template <class X, int MT, int NT, bool MEAN_MAP>
struct Forward : Strip<X, MT, NT, MEAN_MAP> {
  using Base = Strip<X, MT, NT, MEAN_MAP>;
  using typename Base::Tiles;
  using Base::Base, Base::p, Base::plan, Base::block, Base::pairs, Base::warp, Base::group;

  __device__ Shared columns(int n) const { return shared_memory() + plan.sums + n % 2 * plan.groups * plan.keys * 4; }

  // Pair n of the run, (A, B), where B has to be scaled; A is lost.
  template <bool SHARP>
  __device__ void add_pair(Tiles& A, Tiles& B, const float (&by)[MT][2], int n) {
    float sum[1][MT][2];
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float total = 0;
#pragma unroll
        for (int c = 0; c < NT; ++c)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            B[m][c][i] = B[m][c][i] * by[m][half];
            A[m][c][i] = expm1_of<SHARP>(fabsf(A[m][c][i] - B[m][c][i]));
            total += A[m][c][i];
          }
        sum[0][m][half] = total;
      }
    Base::sum_rows(sum);
    float w[MT][2];
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = Base::row0() + Base::row_of(m, half);
        w[m][half] = row < p.Nq ? reciprocal(p.Nk + sum[0][m][half]) : 0.f;
        if (warp == 0 && lane_id() % 4 == 0 && row < p.Nq) p.e_sum[Base::pair_of(n) * p.Nq + row] = sum[0][m][half];
      }
    const int lane = lane_id();
    const Shared to = columns(n) + (group * plan.keys + Base::key0()) * 4;
#pragma unroll
    for (int c = 0; c + 4 <= NT; c += 4) weigh<4>(to, A, w, c, lane);
#pragma unroll
    for (int c = NT / 4 * 4; c < NT; ++c) weigh<1>(to, A, w, c, lane);
  }

  // Sums of w e over rows, in COUNT tiles.
  template <int COUNT>
  __device__ static void weigh(Shared to, const Tiles& e, const float (&w)[MT][2], int first, int lane) {
    float x[2 * COUNT];
#pragma unroll
    for (int c = 0; c < COUNT; ++c)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        x[2 * c + i] = w[0][0] * e[0][first + c][i];
        x[2 * c + i] = fmaf(w[0][1], e[0][first + c][2 + i], x[2 * c + i]);
#pragma unroll
        for (int m = 1; m < MT; ++m) {
          x[2 * c + i] = fmaf(w[m][0], e[m][first + c][i], x[2 * c + i]);
          x[2 * c + i] = fmaf(w[m][1], e[m][first + c][2 + i], x[2 * c + i]);
        }
      }
    store_columns<COUNT>(to + first * TILE_KEYS * 4, x, lane);
  }

  // What the block's rows add to the flow of pair n, which a barrier is after.
  __device__ void store_part(int n) const {
    float* const to = p.part + (block * (int64_t{p.B} * p.P * p.Z * p.G) + Base::pair_of(n)) * p.Nk;
#pragma unroll 1
    for (int j = threadIdx.x; j < p.Nk; j += blockDim.x) {
      float total = 0;
      const int active = min(plan.groups, (p.Nq - block * plan.rows + MT * TILE_ROWS - 1) / (MT * TILE_ROWS));
#pragma unroll 1
      for (int r = 0; r < active; ++r) total += load_shared(columns(n) + (r * plan.keys + j) * 4);
      to[j] = total;
    }
  }

  template <bool SHARP>
  __device__ void run() {
    Tiles A, B;
    float by[MT][2];
    Base::load_first();
    if (!Base::active()) {
      for (int n = 0; n <= pairs; ++n) {
        Base::skip_map();
        if (n > 1) store_part(n - 2);
      }
      sync_block();
      return store_part(pairs - 1);
    }
    for (int n = 0;; n += 2) {  // two at a time: no map is moved between registers
      Base::next_map(A, by, n);
      if (n > 1) store_part(n - 2);
      if (n > 0)
        add_pair<SHARP>(B, A, by, n - 1);
      else
        Base::scale_rows(A, by);
      if (n == pairs) break;
      Base::next_map(B, by, n + 1);
      if (n > 0) store_part(n - 1);
      add_pair<SHARP>(A, B, by, n);
      if (n + 1 == pairs) break;
    }
    sync_block();
    store_part(pairs - 1);
  }
};

template <class X, int MT, int NT, bool MEAN_MAP, bool SHARP>
__global__ void __launch_bounds__(block_warps(NT) * 32, 1) am_flow_forward(const __grid_constant__ Problem p, const __grid_constant__ Plan plan) {
  Forward<X, MT, NT, MEAN_MAP> strip(p, plan);
  if (strip.pairs > 0) strip.template run<SHARP>();
}

template <class X>
struct Launch {
  template <int MT, int NT, bool MEAN_MAP, bool SHARP>
  const char* run(const Problem& p, const Plan& plan, const Device& device, void* stream) const {
    return launch(device, am_flow_forward<X, MT, NT, MEAN_MAP, SHARP>, plan.launched(p), plan.threads, plan.shared_bytes, stream, p,
                  plan);
  }
};

}  // namespace

template <class X>
const char* run_forward(const Problem& p, const Plan& plan, const Device& device, void* stream) {
  return run_strips<X>(Launch<X>{}, p, plan, device, stream);
}

template const char* run_forward<AMFLOW_NUMBER>(const Problem&, const Plan&, const Device&, void*);

}  // namespace amflow_cuda
