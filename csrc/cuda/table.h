// Selects the plan for a problem's sizes.
#pragma once

#include "strip.h"

namespace amflow_cuda {

constexpr int MAX_TILES = 19;        // of a warp
constexpr int MAX_CHUNK_PAIRS = 16;  // that one block of threads handles

// How e^|change| - 1 is computed. rough is sufficient for a flow that is not centred.
inline Growth growth_of(const Problem& p) {
  return p.base != 0 ? Growth::rough : p.inv_temperature > 1 ? Growth::large : Growth::small;
}

// Whether there are kernels with this NT: few are compiled for rare problems.
inline bool has_tiles(int tiles, const Problem& p) {
  if (p.mean_map) return tiles == 8;  // registers hold one more map
  const bool rare = p.dtype == Dtype::f32 || growth_of(p) == Growth::large;
  return tiles == 2 || tiles == 8 || (!rare && (tiles == 5 || tiles == 13 || tiles == 17 || tiles == 19));
}

inline Plan plan_of(const Problem& p, const Device& device) {
  Plan plan{};
  // The lowest cost: a warp's overhead costs as much as two and a half tiles.
  const int needed = divide_up(p.Nk, TILE_KEYS);
  int lowest = 0;
  for (int tiles = 1; tiles <= MAX_TILES; ++tiles) {
    const int warps = divide_up(needed, tiles), cost = warps * (2 * tiles + 5);
    const bool fits = warps <= MAX_WARPS && warps <= block_warps(tiles) && warps * tiles - needed < MAX_MASKED_TILES;
    if (has_tiles(tiles, p) && fits && (lowest == 0 || cost < lowest)) {
      lowest = cost;
      plan.tiles = tiles;
      plan.warps = warps;
    }
  }
  // As many rows as the warps can hold, since each block loads all keys, but no more than the map has.
  const int row_tiles = divide_up(p.Nq, TILE_ROWS);
  plan.groups = block_warps(plan.tiles) / plan.warps;
  plan.groups = plan.groups < MAX_GROUPS ? plan.groups : MAX_GROUPS;
  while (plan.groups > 1 && plan.groups > row_tiles) --plan.groups;
  const auto fits = [&](int stages, int buffers) {
    plan.stages = stages;
    plan.buffers = buffers;
    plan.complete();
    return plan.shared_bytes <= device.shared_bytes;
  };
  if (!fits(2, 2) && !fits(2, 1))
    while (!fits(1, 1) && plan.groups > 1) --plan.groups;
  plan.blocks = divide_up(row_tiles, plan.groups);
  plan.aligned = rows_aligned(p);
  // Long chunks, since each computes one map that the previous chunk computes too, but at least two blocks per
  // multiprocessor.
  const int longest = divide_up(p.P, p.step);
  const int64_t chains = plan.blocks * int64_t{p.step < p.P ? p.step : p.P} * p.B * p.Z * p.G;
  plan.chunk_pairs = 1;
  while (plan.chunk_pairs < longest && plan.chunk_pairs < MAX_CHUNK_PAIRS) plan.chunk_pairs *= 2;
  while (plan.chunk_pairs > 1 && chains * divide_up(longest, plan.chunk_pairs) < 2 * device.multiprocessors)
    plan.chunk_pairs /= 2;
  plan.chunks = divide_up(longest, plan.chunk_pairs);
  return plan;
}

// Defined in forward.cu, which is compiled once per dtype.
template <class X>
const char* run_forward(const Problem& p, const Plan& plan, const Device& device, void* stream);

}  // namespace amflow_cuda
