// Whole rows of maps, frame after frame: what the forward and the first pass of the backward have in common.
//
// A block has `groups` x MT x 16 rows and all keys; a group of `warps` warps has MT x 16 of the rows, each of its warps
// NT x 8 of the keys. Rows of the maps of two frames are in registers, and each map is made once per chain of pairs.
#pragma once

#include "maps.h"

namespace amflow_cuda {

constexpr int MAX_WARPS = 10;  // that share rows
constexpr int MOST_MASKED = 8;  // of a warp's tiles, the last ones, that may have keys beyond the last
constexpr int SUMS = 5;        // of rows, that they exchange at once

struct Plan {
  int warps, groups, tiles;  // tiles: NT
  int row_tiles;             // MT
  int stages;                // of slices in shared memory
  int blocks;                // of rows of a map
  int chunk, chunks;         // pairs of a chain in one block of threads, and such chunks in a chain
  bool vector;

  __host__ __device__ int threads() const { return 32 * warps * groups; }
  __host__ __device__ int rows() const { return groups * row_tiles * TILE_ROWS; }
  __host__ __device__ int keys() const { return warps * tiles * TILE_KEYS; }
  int64_t launched(const Problem& p) const {
    return int64_t{blocks} * chunks * (p.step < p.P ? p.step : p.P) * p.G * p.Z * p.B;
  }
  __host__ __device__ int stage_bytes() const { return (keys() + rows()) * PITCH; }
  __host__ __device__ int sums_bytes() const { return 2 * groups * keys() * 4; }        // of columns: two pairs' at a time
  __host__ __device__ int exchange_bytes() const { return rows() * warps * (2 * 8 + SUMS * 4); }  // of rows: two maps' maxima and sums, sums
  __host__ __device__ int shared_bytes() const { return stages * stage_bytes() + sums_bytes() + exchange_bytes(); }
};

// Which rows and pairs a block of threads has.
struct Owner {
  int block, first_pair, pairs, b, z, g;
};

__device__ inline Owner owner_of(const Problem& p, const Plan& plan) {
  unsigned at = blockIdx.x;
  Owner o;
  const auto next = [&at](unsigned n) {
    const unsigned found = at % n;
    at /= n;
    return static_cast<int>(found);
  };
  o.block = next(plan.blocks);
  const int chunk = next(plan.chunks);
  const int chain = next(min(p.step, p.P));
  o.g = next(p.G);
  o.z = next(p.Z);
  o.b = static_cast<int>(at);
  o.first_pair = chain + chunk * plan.chunk * p.step;
  o.pairs = min(plan.chunk, (p.P - o.first_pair + p.step - 1) / p.step);
  return o;
}

template <class X, int MT, int NT, bool MEAN_MAP>
struct Strip {
  using Tiles = float[MT][NT][4];
  static constexpr int MASKED = NT < MOST_MASKED ? NT : MOST_MASKED;

  const Problem& p;
  const Plan& plan;
  const Owner o;
  Shared stages, sums, exchange;
  int group, warp;
  int row0;      // of the group
  int key0;      // of the warp
  float scale;   // of logits, times log2(e), without its sign, which q takes
  // Slices are loaded in the order in which they are used; the next one is:
  int frame = 0, head = 0, d0 = 0;
  int stage = 0, loading = 0;  // the one in use, and the one to be loaded
  int round = 0;  // which of the buffers for maxima and sums is next

  __device__ Strip(const Problem& p, const Plan& plan)
      : p(p), plan(plan), o(owner_of(p, plan)) {
    stages = shared_memory();
    sums = stages + plan.stages * plan.stage_bytes();
    exchange = sums + plan.sums_bytes();
    group = threadIdx.x / 32 / plan.warps;
    warp = threadIdx.x / 32 % plan.warps;
    row0 = o.block * plan.rows() + group * MT * TILE_ROWS;
    key0 = warp * NT * TILE_KEYS;
    scale = fmaxf(fabsf(p.scale) * 1.44269504f, 1.17549435e-38f);  // a scale of 0 would make NaN of -inf
  }

  // The n-th frame of the run: the second map of pair n - 1.
  __device__ int frame_of(int n) const { return n == 0 ? o.first_pair : o.first_pair + (n - 1) * p.step + p.shift; }

  __device__ void load_next() {
    if (frame > o.pairs) return;
    const Frames& f = frame == 0 ? p.first : p.second;
    const int t = frame_of(frame), h = MEAN_MAP ? head : o.z;
    const Shared to = stages + loading * plan.stage_bytes();
    if (plan.stages > 1) loading ^= 1;
    const X* const k = keys<X>(f, o.b, t, h, o.g);
    const X* const q = queries<X>(f, o.b, t, h, o.g);
    const Shared rows = to + plan.keys() * PITCH;
    const int row = o.block * plan.rows();
    if (plan.vector) {
      load_slice<X, true>(to, k, f.k_stride[4], 0, plan.keys(), p.Nk, d0, p.D);
      load_slice<X, false>(rows, q, f.q_stride[4], row, plan.rows(), p.Nq, d0, p.D);
    } else {
      load_elements<X, true>(to, k, f.k_stride[4], 0, plan.keys(), p.Nk, d0, p.D);
      load_elements<X, false>(rows, q, f.q_stride[4], row, plan.rows(), p.Nq, d0, p.D);
    }
    commit_copies();
    d0 += slice_elements<X>;
    if (d0 < p.D) return;
    d0 = 0;
    if (MEAN_MAP && ++head < p.H) return;
    head = 0;
    ++frame;
  }

  // Logits of the next map, without their scale.
  __device__ void logits(Tiles& s) {
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[m][n][i] = 0;
    for (int d = 0; d < p.D; d += slice_elements<X>) {
      const bool ahead = plan.stages > 1;  // the slice is there already, and the one after it is loaded meanwhile
      if (ahead) wait_copies();
      sync_block();  // nobody uses the slice before any more
      load_next();
      if (!ahead) {
        wait_copies();
        sync_block();
      }
      const Shared here = stages + stage * plan.stage_bytes();
      const int steps = (min(p.D - d, slice_elements<X>) * static_cast<int>(sizeof(X)) + STEP - 1) / STEP;
      add_products<X>(s, here + (plan.keys() + group * MT * TILE_ROWS) * PITCH, here + key0 * PITCH, steps, p.scale < 0);
      if (ahead) stage ^= 1;
    }
  }

  __device__ int row_of(int m, int half) const { return m * TILE_ROWS + half * 8 + lane_id() / 4; }

  // Among the four lanes of a row.
  __device__ static float row_max(float x) {
    x = fmaxf(x, shuffle_xor(x, 1));
    return fmaxf(x, shuffle_xor(x, 2));
  }

  __device__ static float row_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
  }

  __device__ void sync_group() const { sync_some(1 + group, 32 * plan.warps); }

  // What the warps of a group have of each row, as sums over the warps; W values for each row.
  template <int COUNT>
  __device__ void sum_rows(float (&x)[COUNT][MT][2], Shared buffer) const {
    const int lane = lane_id();
#pragma unroll
    for (int c = 0; c < COUNT; ++c)
#pragma unroll
      for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) x[c][m][half] = row_sum(x[c][m][half]);
    if (plan.warps == 1) return;
    const int size = plan.rows() * plan.warps * 4;
    const Shared rows = buffer + group * MT * TILE_ROWS * plan.warps * 4;
#pragma unroll
    for (int c = 0; c < COUNT; ++c)
#pragma unroll
      for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (lane % 4 == 0) store_shared(rows + c * size + (row_of(m, half) * plan.warps + warp) * 4, x[c][m][half]);
    sync_group();
#pragma unroll
    for (int c = 0; c < COUNT; ++c)
#pragma unroll
      for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Shared row = rows + c * size + row_of(m, half) * plan.warps * 4;
          float total = 0;
#pragma unroll
          for (int w = 0; w < MAX_WARPS; w += 4)  // the lanes of a row share the work
            if (w + lane % 4 < plan.warps) total += load_shared(row + (w + lane % 4) * 4);
          x[c][m][half] = row_sum(total);
        }
  }

  // A times a factor, of logits; leaves the row statistics.
  __device__ void softmax(Tiles& s, const Frames& f, int t, int h, float factor) {
    const int lane = lane_id();
    const int left = p.Nk - key0 - lane % 4 * 2;  // keys from this lane's first on
    if (key0 + NT * TILE_KEYS > p.Nk)
#pragma unroll
      for (int n = NT - MASKED; n < NT; ++n)
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (n * TILE_KEYS + i % 2 >= left) s[m][n][i] = -INFINITY;
    float top[MT][2], sum[MT][2];
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float high = s[m][0][2 * half];
#pragma unroll
        for (int n = 0; n < NT; ++n) high = fmaxf(fmaxf(high, s[m][n][2 * half]), s[m][n][2 * half + 1]);
        top[m][half] = fmaxf(row_max(high) * scale, LOWEST);  // finite: exp2(-inf - top) has to be 0
        float total = 0;
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            s[m][n][i] = exp2_fast(fmaf(s[m][n][i], scale, -top[m][half]));
            total += s[m][n][i];
          }
        sum[m][half] = row_sum(total);
      }
    float own[MT][2];  // what brings a warp's maximum to that of the row
    if (plan.warps > 1) {
      // Two buffers in turn: some may still read the last map's.
      const Shared rows = exchange + (round * plan.rows() + group * MT * TILE_ROWS) * plan.warps * 8;
      round ^= 1;
#pragma unroll
      for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (lane % 4 == 0)
            store_shared(rows + (row_of(m, half) * plan.warps + warp) * 8, top[m][half], sum[m][half]);
      sync_group();
#pragma unroll
      for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Shared row = rows + row_of(m, half) * plan.warps * 8;
          float tops[(MAX_WARPS + 3) / 4], sums[(MAX_WARPS + 3) / 4];
#pragma unroll
          for (int w = 0; w < MAX_WARPS; w += 4) {  // the lanes of a row share the work
            tops[w / 4] = LOWEST;
            sums[w / 4] = 0;
            if (w + lane % 4 < plan.warps) load_shared(row + (w + lane % 4) * 8, tops[w / 4], sums[w / 4]);
          }
          float high = tops[0], total = 0;
#pragma unroll
          for (int w = 4; w < MAX_WARPS; w += 4) high = fmaxf(high, tops[w / 4]);
          high = row_max(high);
#pragma unroll
          for (int w = 0; w < MAX_WARPS; w += 4)
            if (w < plan.warps) total = fmaf(sums[w / 4], exp2_fast(tops[w / 4] - high), total);
          own[m][half] = exp2_fast(top[m][half] - high);
          top[m][half] = high;
          sum[m][half] = row_sum(total);
        }
    } else {
#pragma unroll
      for (int m = 0; m < MT; ++m) own[m][0] = own[m][1] = 1;
    }
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float norm = reciprocal(sum[m][half]);
        const int row = row0 + row_of(m, half);
        if (warp == 0 && lane % 4 == 0 && row < p.Nq) {
          const int64_t to = (((o.b * frames() + t) * p.H + h) * p.G + o.g) * p.Nq + row;
          f.row_max[to] = top[m][half];
          f.row_norm[to] = norm;
        }
        const float by = norm * factor * own[m][half];
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) s[m][n][i] = s[m][n][i] * by;
      }
  }

  __device__ int64_t frames() const { return int64_t{p.P} + p.shift; }

  // The next map divided by the temperature, of the n-th frame.
  __device__ void next_map(Tiles& A, int n) {
    const Frames& f = n == 0 ? p.first : p.second;
    if constexpr (MEAN_MAP) {
      logits(A);
      softmax(A, f, frame_of(n), 0, p.inv_temperature / p.H);
      for (int h = 1; h < p.H; ++h) {
        Tiles x;
        logits(x);
        softmax(x, f, frame_of(n), h, p.inv_temperature / p.H);
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
          for (int c = 0; c < NT; ++c)
#pragma unroll
            for (int i = 0; i < 4; ++i) A[m][c][i] += x[m][c][i];
      }
    } else {
      logits(A);
      softmax(A, f, frame_of(n), o.z, p.inv_temperature);
    }
  }

  // Where what belongs to pair n of the run begins, in units of a row of (B, P, Z, G).
  __device__ int64_t pair_of(int n) const {
    return ((int64_t{o.b} * p.P + o.first_pair + n * p.step) * p.Z + o.z) * p.G + o.g;
  }
};

}  // namespace amflow_cuda
