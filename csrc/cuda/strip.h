// Whole rows of maps, frame after frame.
//
// A block has `groups` x 16 rows and all keys. A group of `warps` warps has 16 of the rows, and each of its warps has
// NT x 8 of the keys. The rows of two frames' maps are in registers, and each map is computed once per chunk.
#pragma once

#include "maps.h"

namespace amflow_cuda {

constexpr int MAX_WARPS = 10;        // of a group
constexpr int MAX_MASKED_TILES = 8;  // the last tiles of a warp, which may extend beyond the last key
constexpr int MAX_GROUPS = 4;
constexpr int LANE_ROWS = 8;                  // rows of lanes in a warp, each with its own column sums
constexpr float MIN_WARP_FACTOR = 1.f / 256;  // see `softmax`

constexpr int divide_up(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// Floats from one lane row's column sums to the next: four rows are in different banks.
constexpr int sums_pitch(int tiles) { return (tiles | 1) * TILE_KEYS; }

// Warps of a block, whose lanes need 255 registers, or 168.
constexpr int block_warps(int tiles) { return tiles > 8 ? 8 : 12; }

struct Plan {
  int warps, groups, tiles;  // tiles: NT
  int stages, buffers;       // in shared memory: stages of slices, buffers of column sums
  int blocks;                // blocks of rows in a map
  int chunk_pairs, chunks;   // pairs of a chain that one block of threads handles; chunks in a chain
  bool aligned;              // see `rows_aligned`
  // `complete` computes the rest.
  int threads, rows, keys;                        // of a block
  int copy_rows, row_iterations, key_iterations;  // rows that all threads copy at once; such copies
  int stage_bytes, shared_bytes;
  int pointers, stage0, sums,
      exchange;   // offsets in shared memory: pointers, slices, column sums, values that the warps of a row exchange
  int sum_bytes;  // of one pair's column sums

  void complete() {
    threads = 32 * warps * groups;
    copy_rows = threads / (SLICE_BYTES / COPY_BYTES);
    rows = groups * TILE_ROWS;
    keys = warps * tiles * TILE_KEYS;
    row_iterations = rows / copy_rows;
    key_iterations = keys / copy_rows;
    stage_bytes = (keys + rows) * PITCH;
    pointers = 0;
    stage0 = pointers + 6 * 8;
    sums = stage0 + stages * stage_bytes;
    sum_bytes = groups * warps * LANE_ROWS * sums_pitch(tiles) * 4;
    exchange = sums + buffers * sum_bytes;
    shared_bytes = exchange + rows * warps * 3 * 4;  // a map's maximum and sum per row and warp, and a pair's sum
  }

  int64_t num_blocks(const Problem& p) const {
    return int64_t{blocks} * chunks * (p.step < p.P ? p.step : p.P) * p.G * p.Z * p.B;
  }
};

// Does nothing in place of work that overlaps a copy.
struct NoWork {
  __device__ void operator()() const {}
};

template <class X, int NT, bool MEAN_MAP>
struct Strip {
  static constexpr int NEEDED = divide_up(MAX_TOKENS, NT* TILE_KEYS), WARPS = NEEDED < MAX_WARPS ? NEEDED : MAX_WARPS;
  using Tiles = float[NT][4];
  static constexpr int MASKED_TILES = NT < MAX_MASKED_TILES ? NT : MAX_MASKED_TILES;

  const Problem& p;
  const Plan& plan;
  int group, warp;
  int block, pairs;  // the block of rows; pairs of this block of threads
  // The next slice to load; slices are used in the order in which they are loaded.
  int frame = 0, head = 0, d0 = 0;
  int stage = 0;  // that is in use

  __device__ Strip(const Problem& p, const Plan& plan) : p(p), plan(plan) {
    group = warp_id() / plan.warps;
    warp = warp_id() % plan.warps;
    unsigned rest = blockIdx.x;
    const auto next = [&rest](unsigned n) {
      const unsigned index = rest % n;
      rest /= n;
      return static_cast<int>(index);
    };
    block = next(plan.blocks);
    const int chunk = next(plan.chunks);
    const int chain = next(min(p.step, p.P));
    const int g = next(p.G), z = next(p.Z), b = static_cast<int>(rest);
    const int first_pair = chain + chunk * plan.chunk_pairs * p.step;
    pairs = min(plan.chunk_pairs, (p.P - first_pair + p.step - 1) / p.step);
    if (threadIdx.x == 0) {  // in shared memory, since the maps need the registers
      const int64_t second = int64_t{first_pair} + p.shift;
      store_shared(pointers(), head_of<X>(p.first.k, p.first.k_stride, b, first_pair, z, g));
      store_shared(pointers() + 8, head_of<X>(p.first.q, p.first.q_stride, b, first_pair, z, g));
      store_shared(pointers() + 16, head_of<X>(p.second.k, p.second.k_stride, b, second, z, g));
      store_shared(pointers() + 24, head_of<X>(p.second.q, p.second.q_stride, b, second, z, g));
      const int64_t pair = ((int64_t{b} * p.P + first_pair) * p.Z + z) * p.G + g;
      store_shared(pointers() + 32, p.partial + (block * (int64_t{p.B} * p.P * p.Z * p.G) + pair) * p.Nk);
    }
    sync_block();
  }

  __device__ Shared pointers() const { return shared_memory() + plan.pointers; }
  __device__ int row0() const { return block * plan.rows + group * TILE_ROWS; }  // of the group
  __device__ int key0() const { return warp * NT * TILE_KEYS; }                  // of the warp
  __device__ bool active() const { return row0() < p.Nq; }  // whether the group has rows of the map

  __device__ void load_next(int stage) {
    if (frame > pairs) return;
    const Frames& f = frame == 0 ? p.first : p.second;
    const Shared base = pointers() + (frame == 0 ? 0 : 16),
                 to = shared_memory() + plan.stage0 + stage * plan.stage_bytes;
    const int64_t later = frame == 0 ? 0 : int64_t{frame - 1} * p.step;
    const X* k = static_cast<const X*>(load_pointer(base)) + later * f.k_stride[1];
    const X* q = static_cast<const X*>(load_pointer(base + 8)) + later * f.q_stride[1];
    if (MEAN_MAP) {
      k += head * f.k_stride[2];
      q += head * f.q_stride[2];
    }
    const Shared rows = to + plan.keys * PITCH;
    if (plan.aligned) {
      load_slice<X>(to, k, f.k_stride[4], 0, plan.keys, {plan.copy_rows, plan.key_iterations}, p.Nk, d0, p.D);
      load_slice<X>(rows, q, f.q_stride[4], block * plan.rows, plan.rows, {plan.copy_rows, plan.row_iterations}, p.Nq,
                    d0, p.D);
    } else {
      load_elements<X>(to, k, f.k_stride[4], 0, plan.keys, p.Nk, d0, p.D);
      load_elements<X>(rows, q, f.q_stride[4], block * plan.rows, plan.rows, p.Nq, d0, p.D);
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

  // The address of the next slice. All threads of the block call this together, and run `overlap` while a slice is
  // being copied. With one stage, no thread continues before all have run it.
  template <class Overlap>
  __device__ Shared next_slice(const Overlap& overlap) {
    const bool ahead =
        plan.stages > 1;  // this slice was requested in the previous call, and the following one is requested now
    if (ahead) wait_copies();
    sync_block();  // no thread still reads the previous slice
    load_next(ahead ? stage ^ 1 : 0);
    overlap();
    if (!ahead) {
      wait_copies();
      sync_block();
    }
    const Shared here = shared_memory() + plan.stage0 + stage * plan.stage_bytes;
    if (ahead) stage ^= 1;
    return here;
  }

  // Logits of the next map, without the absolute value of their scale but with its sign.
  template <class Overlap>
  __device__ void logits(Tiles& s, const Overlap& overlap) {
    for (int d = 0; d < p.D; d += slice_elements<X>) {
      const Shared here = next_slice([&] {
        if (d == 0) overlap();
      });
      const int steps = (min(p.D - d, slice_elements<X>) * static_cast<int>(sizeof(X)) + MMA_BYTES - 1) / MMA_BYTES;
      const Shared q = here + (plan.keys + group * TILE_ROWS) * PITCH;
      add_products<X>(s, q, here + key0() * PITCH, d == 0, steps, p.negate);
    }
  }

  // For a group without rows of the map, while the other groups compute it.
  template <class Overlap>
  __device__ void skip_map(const Overlap& overlap) {
    for (int h = 0; h < (MEAN_MAP ? p.H : 1); ++h)
      for (int d = 0; d < p.D; d += slice_elements<X>)
        next_slice([&] {
          if (h == 0 && d == 0) overlap();
        });
  }

  __device__ int row_of(int half) const { return half * 8 + lane_id() / 4; }

  // Over the four lanes of a row.
  __device__ static float row_max(float x) {
    x = fmaxf(x, shuffle_xor(x, 1));
    return fmaxf(x, shuffle_xor(x, 2));
  }

  __device__ static float row_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
  }

  __device__ void sync_group() const { sync_some(1 + group, 32 * plan.warps); }

  // Sums over the lanes and warps that share a row.
  __device__ void sum_rows(float (&x)[2]) const {
    const int lane = lane_id();
#pragma unroll
    for (int half = 0; half < 2; ++half) x[half] = row_sum(x[half]);
    if (plan.warps == 1) return;
    const Shared rows = shared_memory() + plan.exchange + (plan.rows * 2 + group * TILE_ROWS) * plan.warps * 4;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (lane % 4 == 0) store_shared(rows + (row_of(half) * plan.warps + warp) * 4, x[half]);
    sync_group();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Shared row = rows + row_of(half) * plan.warps * 4;
      float total = 0;
#pragma unroll
      for (int w = 0; w < WARPS; w += 4)  // the lanes of a row share the work
        if (w + lane % 4 < plan.warps) total += load_shared(row + (w + lane % 4) * 4);
      x[half] = row_sum(total);
    }
  }

  // Replaces logits by exponentials, which times row_factor are a head's share of the map divided by the temperature.
  __device__ void softmax(Tiles& s, float (&row_factor)[2]) {
    const int lane = lane_id();
    const int remaining = p.Nk - key0() - lane % 4 * 2;  // keys from this lane's first key on
    if (key0() + NT * TILE_KEYS > p.Nk)
#pragma unroll
      for (int n = NT - MASKED_TILES; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (n * TILE_KEYS + i % 2 >= remaining) s[n][i] = -INFINITY;
    float row_top[2], sum[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float high = s[0][2 * half];
#pragma unroll
      for (int n = 0; n < NT; ++n) high = fmaxf(fmaxf(high, s[n][2 * half]), s[n][2 * half + 1]);
      row_top[half] = fmaxf(row_max(high) * p.scale, LOWEST);  // finite: exp2(-inf - row_top) has to be 0
      float total = 0;
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          s[n][i] = exp2_fast(fmaf(s[n][i], p.scale, -row_top[half]));
          total += s[n][i];
        }
      sum[half] = row_sum(total);
    }
    float warp_factor[2];  // rescales from the warp's maximum to that of the row
    if (plan.warps > 1) {
      const Shared rows = shared_memory() + plan.exchange + group * TILE_ROWS * plan.warps * 8;
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (lane % 4 == 0) store_shared(rows + (row_of(half) * plan.warps + warp) * 8, row_top[half], sum[half]);
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
        warp_factor[half] = exp2_fast(row_top[half] - high);
        row_top[half] = high;
        sum[half] = row_sum(total);
      }
      // Applied to the row here if small, so that row factors are not too small for `Expm1`. Decided for each row, so
      // that no row depends on others.
      float applied[2];
      bool any = false;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool small = warp_factor[half] < MIN_WARP_FACTOR;
        applied[half] = small ? warp_factor[half] : 1;
        warp_factor[half] = small ? 1 : warp_factor[half];
        any = any || small;
      }
      if (any) scale_rows(s, applied);
    } else {
      warp_factor[0] = warp_factor[1] = 1;
    }
    const float factor = MEAN_MAP ? p.inv_temperature / p.H : p.inv_temperature;
#pragma unroll
    for (int half = 0; half < 2; ++half) row_factor[half] = reciprocal(sum[half]) * factor * warp_factor[half];
  }

  __device__ static void scale_rows(Tiles& s, const float (&row_factor)[2]) {
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] = s[n][i] * row_factor[i / 2];
  }

  // The next frame's map: A times row_factor is the map divided by the temperature.
  template <class Overlap>
  __device__ void next_map(Tiles& A, float (&row_factor)[2], const Overlap& overlap) {
    logits(A, overlap);
    softmax(A, row_factor);
    if constexpr (MEAN_MAP) {
      scale_rows(A, row_factor);
      for (int h = 1; h < p.H; ++h) {
        Tiles x;
        logits(x, NoWork{});
        softmax(x, row_factor);
        scale_rows(x, row_factor);
#pragma unroll
        for (int c = 0; c < NT; ++c)
#pragma unroll
          for (int i = 0; i < 4; ++i) A[c][i] += x[c][i];
      }
      row_factor[0] = row_factor[1] = 1;
    }
  }
};

}  // namespace amflow_cuda
