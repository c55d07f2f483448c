// The one table of launches: which kernel runs for what sizes.
#pragma once

#include "strip.h"

namespace amflow_cuda {

constexpr int MAX_BLOCK_WARPS = 12;
constexpr int MAX_CHUNK = 16;  // pairs of one block of threads

inline int divide_up(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// NT of the kernels that there are, by what fits in registers. More maps are kept with a mean over the heads' maps.
inline bool has_tiles(int tiles, bool mean_map, Dtype dtype) {
  if (mean_map || dtype == Dtype::f32) return tiles == 2 || tiles == 8;
  return tiles == 2 || tiles == 5 || tiles == 8 || tiles == 9 || tiles == 11 || tiles == 13;
}

inline Plan plan_of(const Problem& p, const Device& device) {
  Plan plan{};
  plan.row_tiles = 1;
  // The fewest tiles beyond the last key, and of those the fewest warps, since warps that share rows wait for each other.
  const int needed = divide_up(p.Nk, TILE_KEYS);
  for (int tiles = 13; tiles > 0; --tiles) {
    if (!has_tiles(tiles, p.mean_map, p.dtype)) continue;
    const int warps = divide_up(needed, tiles);
    if (warps <= MAX_WARPS && warps * tiles - needed < MOST_MASKED && (plan.tiles == 0 || warps * tiles < plan.warps * plan.tiles)) {
      plan.tiles = tiles;
      plan.warps = warps;
    }
  }
  // As many rows as there are warps for, since each block loads all keys, but no more than the map has.
  const int row_tiles = divide_up(p.Nq, TILE_ROWS);
  plan.groups = MAX_BLOCK_WARPS / plan.warps;
  plan.groups = plan.groups < 4 ? plan.groups : 4;
  while (plan.groups > 1 && plan.groups > row_tiles) --plan.groups;
  for (plan.stages = 2;; --plan.stages) {
    while (plan.shared_bytes() > device.shared_bytes && plan.groups > 1 && plan.stages == 1) --plan.groups;
    if (plan.shared_bytes() <= device.shared_bytes || plan.stages == 1) break;
  }
  plan.blocks = divide_up(row_tiles, plan.groups);
  plan.vector = vectors(p);
  // Long runs of pairs, since each makes a map that the run before it made too, but two blocks for each multiprocessor.
  const int longest = divide_up(p.P, p.step);
  const int64_t chains = plan.blocks * int64_t{p.step < p.P ? p.step : p.P} * p.B * p.Z * p.G;
  plan.chunk = 1;
  while (plan.chunk < longest && plan.chunk < MAX_CHUNK) plan.chunk *= 2;
  while (plan.chunk > 1 && chains * divide_up(longest, plan.chunk) < 2 * device.multiprocessors) plan.chunk /= 2;
  plan.chunks = divide_up(longest, plan.chunk);
  return plan;
}

// Runs `launch.run<X, MT, NT, MEAN_MAP>(problem, plan, stream)`.
template <class Launch>
const char* run_strips(const Launch& launch, const Problem& p, const Plan& plan, const Device& device, void* stream) {
  if (plan.shared_bytes() > device.shared_bytes) return "these sizes need more shared memory than a block can have";
  if (plan.launched(p) > 0x7fffffff) return "more blocks of threads than one launch can have";
  const auto run = [&]<class X>(X) -> const char* {
    if (p.mean_map) {
      switch (plan.tiles) {
        case 2: return launch.template run<X, 1, 2, true>(p, plan, stream);
        default: return launch.template run<X, 1, 8, true>(p, plan, stream);
      }
    }
    switch (plan.tiles) {
      case 2: return launch.template run<X, 1, 2, false>(p, plan, stream);
      case 8: return launch.template run<X, 1, 8, false>(p, plan, stream);
      default:;
    }
    if constexpr (sizeof(X) == 2) {
      switch (plan.tiles) {
        case 5: return launch.template run<X, 1, 5, false>(p, plan, stream);
        case 9: return launch.template run<X, 1, 9, false>(p, plan, stream);
        case 11: return launch.template run<X, 1, 11, false>(p, plan, stream);
        case 13: return launch.template run<X, 1, 13, false>(p, plan, stream);
        default:;
      }
    }
    return "no kernel for this number of keys";
  };
  switch (p.dtype) {
    case Dtype::f32: return run(float{});
    case Dtype::bf16: return run(bf16{});
    default: return run(f16{});
  }
}

}  // namespace amflow_cuda
