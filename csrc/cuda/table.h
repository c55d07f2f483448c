// The one table of launches: which kernel runs for what sizes.
#pragma once

#include "strip.h"

namespace amflow_cuda {

constexpr int MAX_BLOCK_WARPS = 12;
constexpr int MAX_CHUNK = 16;  // pairs of one block of threads

inline int divide_up(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// NT of the kernels that there are: few for what is rare.
inline bool has_tiles(int tiles, const Problem& p) {
  if (p.mean_map) return tiles == 8;  // one map more is kept in registers
  const bool rare = p.dtype == Dtype::f32 || p.inv_temperature > 1;
  return tiles == 2 || tiles == 8 || (!rare && (tiles == 5 || tiles == 9 || tiles == 11));
}

inline Plan plan_of(const Problem& p, const Device& device) {
  Plan plan{};
  plan.row_tiles = 1;
  // The fewest tiles beyond the last key, and of those the fewest warps, since warps that share rows wait for each other.
  const int needed = divide_up(p.Nk, TILE_KEYS);
  for (int tiles = 11; tiles > 0; --tiles) {
    if (!has_tiles(tiles, p)) continue;
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

// Runs `launch.run<MT, NT, MEAN_MAP, SHARP>(problem, plan, stream)` for numbers X.
template <class X, class Launch>
const char* run_strips(const Launch& launch, const Problem& p, const Plan& plan, const Device& device, void* stream) {
  if (plan.shared_bytes() > device.shared_bytes) return "these sizes need more shared memory than a block can have";
  if (plan.launched(p) > 0x7fffffff) return "more blocks of threads than one launch can have";
  const bool sharp = p.inv_temperature > 1;
  if (p.mean_map)
    return sharp ? launch.template run<1, 8, true, true>(p, plan, stream)
                 : launch.template run<1, 8, true, false>(p, plan, stream);
  switch (plan.tiles) {
    case 2:
      return sharp ? launch.template run<1, 2, false, true>(p, plan, stream)
                   : launch.template run<1, 2, false, false>(p, plan, stream);
    case 8:
      return sharp ? launch.template run<1, 8, false, true>(p, plan, stream)
                   : launch.template run<1, 8, false, false>(p, plan, stream);
    default:;
  }
  if constexpr (sizeof(X) == 2) {
    switch (plan.tiles) {
      case 5: return launch.template run<1, 5, false, false>(p, plan, stream);
      case 9: return launch.template run<1, 9, false, false>(p, plan, stream);
      case 11: return launch.template run<1, 11, false, false>(p, plan, stream);
      default:;
    }
  }
  return "no kernel for this number of keys";
}

// forward.cu and backward.cu, compiled for each of the numbers.
template <class X>
const char* run_forward(const Problem& p, const Plan& plan, const Device& device, void* stream);
template <class X>
const char* run_backward(const Problem& p, const Plan& plan, const Device& device, void* stream);

}  // namespace amflow_cuda
