// Whole rows of maps, frame after frame: what the forward and the first pass of the backward have in common.
//
// A block has `groups` x 16 rows and all keys; a group of `warps` warps has 16 of the rows, each of its warps NT x 8 of the
// keys. Rows of the maps of two frames are in registers, and each map is made once per chain of pairs.
#pragma once

#include "maps.h"

namespace amflow_cuda {

constexpr int MAX_WARPS = 10;  // that share rows
constexpr int MOST_MASKED = 8;  // of a warp's tiles, the last ones, that may have keys beyond the last
constexpr int MAX_GROUPS = 4;
constexpr int LANE_ROWS = 8;   // of a warp's lanes, whose sums of columns are apart
constexpr float LEAST_OWN = 1.f / 256;  // see `softmax`
constexpr int SUMS = 5;  // of rows, that they exchange at once

constexpr int divide_up(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// Of those sums, in numbers: four rows lie in different banks.
constexpr int sums_pitch(int tiles) { return (tiles | 1) * TILE_KEYS; }

// Warps of a block, by what each lane needs: 255 registers, or 168.
constexpr int block_warps(int tiles) { return tiles > 8 ? 8 : 12; }

struct Plan {
  int warps, groups, tiles;  // tiles: NT
  int stages, buffers;       // of slices, and of sums of columns, in shared memory
  int blocks;                // of rows of a map
  int chunk, chunks;         // pairs of a chain in one block of threads, and such chunks in a chain
  bool vector;
  // What follows from these, by `complete`.
  int threads, rows, keys;           // of a block
  int jump, row_rounds, key_rounds;  // how its threads share the copying of rows
  int stage_bytes, shared_bytes;
  int bases, stage0, sums, exchange;  // where in shared memory: pointers, slices, sums of columns, what rows exchange
  int sum_bytes;                      // of the sums of one pair's columns

  void complete() {
    threads = 32 * warps * groups;
    jump = threads / (SLICE / PIECE);
    rows = groups * TILE_ROWS;
    keys = warps * tiles * TILE_KEYS;
    row_rounds = rows / jump;
    key_rounds = keys / jump;
    stage_bytes = (keys + rows) * PITCH;
    bases = 0;
    stage0 = bases + 6 * 8;
    sums = stage0 + stages * stage_bytes;
    sum_bytes = groups * warps * LANE_ROWS * sums_pitch(tiles) * 4;
    exchange = sums + buffers * sum_bytes;
    shared_bytes = exchange + rows * warps * (2 * 4 + SUMS * 4);  // maxima and sums of a map, and sums
  }

  int64_t launched(const Problem& p) const {
    return int64_t{blocks} * chunks * (p.step < p.P ? p.step : p.P) * p.G * p.Z * p.B;
  }
};

struct Nothing {
  __device__ void operator()() const {}
};

template <class X, int NT, bool MEAN_MAP>
struct Strip {
  static constexpr int NEEDED = divide_up(MAX_TOKENS, NT * TILE_KEYS), WARPS = NEEDED < MAX_WARPS ? NEEDED : MAX_WARPS;
  using Tiles = float[NT][4];
  static constexpr int MASKED = NT < MOST_MASKED ? NT : MOST_MASKED;

  const Problem& p;
  const Plan& plan;
  int group, warp;
  int block, first_pair, pairs;  // of rows; what the block of threads has
  int pair0, map0;               // the first pair in (B, P, Z, G), and its first map in (B, T, H, G)
  // Slices are loaded in the order in which they are used; the next one is:
  int frame = 0, head = 0, d0 = 0;
  int stage = 0;  // the one in use

  __device__ Strip(const Problem& p, const Plan& plan) : p(p), plan(plan) {
    group = warp_id() / plan.warps;
    warp = warp_id() % plan.warps;
    unsigned at = blockIdx.x;
    const auto next = [&at](unsigned n) {
      const unsigned found = at % n;
      at /= n;
      return static_cast<int>(found);
    };
    block = next(plan.blocks);
    const int chunk = next(plan.chunks);
    const int chain = next(min(p.step, p.P));
    const int g = next(p.G), z = next(p.Z), b = static_cast<int>(at);
    first_pair = chain + chunk * plan.chunk * p.step;
    pairs = min(plan.chunk, (p.P - first_pair + p.step - 1) / p.step);
    pair0 = ((b * p.P + first_pair) * p.Z + z) * p.G + g;
    map0 = ((b * p.T + first_pair) * p.H + z) * p.G + g;
    if (threadIdx.x == 0) {  // kept there: registers are for maps
      const int64_t second = int64_t{first_pair} + p.shift;
      store_shared(bases(), keys<X>(p.first, b, first_pair, z, g));
      store_shared(bases() + 8, queries<X>(p.first, b, first_pair, z, g));
      store_shared(bases() + 16, keys<X>(p.second, b, second, z, g));
      store_shared(bases() + 24, queries<X>(p.second, b, second, z, g));
      store_shared(bases() + 32, p.part + (block * (int64_t{p.B} * p.P * p.Z * p.G) + pair0) * p.Nk);
    }
    sync_block();
  }

  __device__ Shared bases() const { return shared_memory() + plan.bases; }
  __device__ int row0() const { return block * plan.rows + group * TILE_ROWS; }  // of the group
  __device__ int key0() const { return warp * NT * TILE_KEYS; }                  // of the warp
  __device__ bool active() const { return row0() < p.Nq; }  // whether the group has rows of the map

  // The map of the n-th frame, the second of pair n - 1.
  __device__ int map_of(int n) const { return n == 0 ? map0 : map0 + ((n - 1) * p.step + p.shift) * p.H * p.G; }

  // The place of pair n of the run in (B, P, Z, G).
  __device__ int64_t pair_of(int n) const { return pair0 + n * p.step * p.Z * p.G; }

  __device__ void load_next(int stage) {
    if (frame > pairs) return;
    const Frames& f = frame == 0 ? p.first : p.second;
    const Shared base = bases() + (frame == 0 ? 0 : 16), to = shared_memory() + plan.stage0 + stage * plan.stage_bytes;
    const int64_t later = frame == 0 ? 0 : int64_t{frame - 1} * p.step;
    const X* k = static_cast<const X*>(load_pointer(base)) + later * f.k_stride[1];
    const X* q = static_cast<const X*>(load_pointer(base + 8)) + later * f.q_stride[1];
    if (MEAN_MAP) {
      k += head * f.k_stride[2];
      q += head * f.q_stride[2];
    }
    const Shared rows = to + plan.keys * PITCH;
    if (plan.vector) {
      load_slice<X, false>(to, k, f.k_stride[4], 0, plan.keys, plan.jump, plan.key_rounds, p.Nk, d0, p.D);
      load_slice<X, false>(rows, q, f.q_stride[4], block * plan.rows, plan.rows, plan.jump, plan.row_rounds, p.Nq, d0,
                           p.D);
    } else {
      load_elements<X, false>(to, k, f.k_stride[4], 0, plan.keys, p.Nk, d0, p.D);
      load_elements<X, false>(rows, q, f.q_stride[4], block * plan.rows, plan.rows, p.Nq, d0, p.D);
    }
    d0 += slice_elements<X>;
    if (d0 < p.D) return;
    d0 = 0;
    if (MEAN_MAP && ++head < p.H) return;
    head = 0;
    ++frame;
  }

  __device__ void load_first() {
    if (plan.stages > 1) load_next(0);
  }

  // Where the slice that is next in turn lies; the whole block comes here together, and does `meanwhile` while a slice
  // is on its way. With one stage nobody goes on before all have done it.
  template <class Meanwhile>
  __device__ Shared next_slice(const Meanwhile& meanwhile) {
    const bool ahead = plan.stages > 1;  // the slice is there already, and the one after it is loaded meanwhile
    if (ahead) wait_copies();
    sync_block();  // nobody uses the slice before any more
    load_next(ahead ? stage ^ 1 : 0);
    meanwhile();
    if (!ahead) {
      wait_copies();
      sync_block();
    }
    const Shared here = shared_memory() + plan.stage0 + stage * plan.stage_bytes;
    if (ahead) stage ^= 1;
    return here;
  }

  // Logits of the next map, without their scale but with its sign.
  template <class Meanwhile>
  __device__ void logits(Tiles& s, const Meanwhile& meanwhile) {
    for (int d = 0; d < p.D; d += slice_elements<X>) {
      const Shared here = next_slice([&] {
        if (d == 0) meanwhile();
      });
      const int steps = (min(p.D - d, slice_elements<X>) * static_cast<int>(sizeof(X)) + STEP - 1) / STEP;
      const Shared q = here + (plan.keys + group * TILE_ROWS) * PITCH;
      add_products<X>(s, q, here + key0() * PITCH, d == 0, steps, p.negate);
    }
  }

  // What a group that has no rows of the map does while others make it.
  template <class Meanwhile>
  __device__ void skip_map(const Meanwhile& meanwhile) {
    for (int h = 0; h < (MEAN_MAP ? p.H : 1); ++h)
      for (int d = 0; d < p.D; d += slice_elements<X>)
        next_slice([&] {
          if (h == 0 && d == 0) meanwhile();
        });
  }

  __device__ int row_of(int half) const { return half * 8 + lane_id() / 4; }

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

  // What the lanes and warps of a group have of each row, summed up.
  template <int COUNT>
  __device__ void sum_rows(float (&x)[COUNT][2]) const {
    const int lane = lane_id();
#pragma unroll
    for (int c = 0; c < COUNT; ++c)
#pragma unroll
      for (int half = 0; half < 2; ++half) x[c][half] = row_sum(x[c][half]);
    if (plan.warps == 1) return;
    const int size = plan.rows * plan.warps * 4;
    const Shared rows = shared_memory() + plan.exchange + (plan.rows * 2 + group * TILE_ROWS) * plan.warps * 4;
#pragma unroll
    for (int c = 0; c < COUNT; ++c)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (lane % 4 == 0) store_shared(rows + c * size + (row_of(half) * plan.warps + warp) * 4, x[c][half]);
    sync_group();
#pragma unroll
    for (int c = 0; c < COUNT; ++c)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Shared row = rows + c * size + row_of(half) * plan.warps * 4;
        float total = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w += 4)  // the lanes of a row share the work
          if (w + lane % 4 < plan.warps) total += load_shared(row + (w + lane % 4) * 4);
        x[c][half] = row_sum(total);
      }
  }

  // Exponentials of logits, and what makes A times a factor of them; leaves the row statistics.
  __device__ void softmax(Tiles& s, float (&by)[2], const Frames& f, int map, float factor) {
    const int lane = lane_id();
    const int left = p.Nk - key0() - lane % 4 * 2;  // keys from this lane's first on
    if (key0() + NT * TILE_KEYS > p.Nk)
#pragma unroll
      for (int n = NT - MASKED; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (n * TILE_KEYS + i % 2 >= left) s[n][i] = -INFINITY;
    float top[2], sum[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float high = s[0][2 * half];
#pragma unroll
      for (int n = 0; n < NT; ++n) high = fmaxf(fmaxf(high, s[n][2 * half]), s[n][2 * half + 1]);
      top[half] = fmaxf(row_max(high) * p.scale, LOWEST);  // finite: exp2(-inf - top) has to be 0
      float total = 0;
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          s[n][i] = exp2_fast(fmaf(s[n][i], p.scale, -top[half]));
          total += s[n][i];
        }
      sum[half] = row_sum(total);
    }
    float own[2];  // what brings a warp's maximum to that of the row
    if (plan.warps > 1) {
      const Shared rows = shared_memory() + plan.exchange + group * TILE_ROWS * plan.warps * 8;
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (lane % 4 == 0) store_shared(rows + (row_of(half) * plan.warps + warp) * 8, top[half], sum[half]);
      sync_group();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Shared row = rows + row_of(half) * plan.warps * 8;
        float tops[(WARPS + 3) / 4], sums[(WARPS + 3) / 4];
#pragma unroll
        for (int w = 0; w < WARPS; w += 4) {  // the lanes of a row share the work
          tops[w / 4] = LOWEST;
          sums[w / 4] = 0;
          if (w + lane % 4 < plan.warps) load_shared(row + (w + lane % 4) * 8, tops[w / 4], sums[w / 4]);
        }
        float high = tops[0], total = 0;
#pragma unroll
        for (int w = 4; w < WARPS; w += 4) high = fmaxf(high, tops[w / 4]);
        high = row_max(high);
#pragma unroll
        for (int w = 0; w < WARPS; w += 4)
          if (w < plan.warps) total = fmaf(sums[w / 4], exp2_fast(tops[w / 4] - high), total);
        own[half] = exp2_fast(top[half] - high);
        top[half] = high;
        sum[half] = row_sum(total);
      }
      // So that factors of rows are not too small for `Expm1`; a row must not depend on others.
      float by_now[2];
      bool any = false;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool small = own[half] < LEAST_OWN;
        by_now[half] = small ? own[half] : 1;
        own[half] = small ? 1 : own[half];
        any = any || small;
      }
      if (any) scale_rows(s, by_now);
    } else {
      own[0] = own[1] = 1;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float norm = reciprocal(sum[half]);
      const int row = row0() + row_of(half);
      if (warp == 0 && lane % 4 == 0 && row < p.Nq && p.dflow == nullptr) {  // the backward has them
        const int64_t to = int64_t{map} * p.Nq + row;
        f.row_max[to] = top[half];
        f.row_norm[to] = norm;
      }
      by[half] = norm * factor * own[half];
    }
  }

  __device__ static void scale_rows(Tiles& s, const float (&by)[2]) {
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] = s[n][i] * by[i / 2];
  }

  // The next map divided by the temperature, of the n-th frame, but for a factor of its rows.
  template <class Meanwhile>
  __device__ void next_map(Tiles& A, float (&by)[2], int n, const Meanwhile& meanwhile) {
    const Frames& f = n == 0 ? p.first : p.second;
    logits(A, meanwhile);
    softmax(A, by, f, map_of(n), MEAN_MAP ? p.inv_temperature / p.H : p.inv_temperature);
    if constexpr (MEAN_MAP) {
      scale_rows(A, by);
      for (int h = 1; h < p.H; ++h) {
        Tiles x;
        logits(x, Nothing{});
        softmax(x, by, f, map_of(n) + h * p.G, p.inv_temperature / p.H);
        scale_rows(x, by);
#pragma unroll
        for (int c = 0; c < NT; ++c)
#pragma unroll
          for (int i = 0; i < 4; ++i) A[c][i] += x[c][i];
      }
      by[0] = by[1] = 1;
    }
  }
};

}  // namespace amflow_cuda
