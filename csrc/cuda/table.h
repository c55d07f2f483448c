// The one table of launches: which kernel runs for what sizes.
#pragma once

#include "strip.h"

namespace amflow_cuda {

constexpr int MAX_TILES = 19;  // of a warp
constexpr int MAX_CHUNK = 16;  // pairs of one block of threads

// Of the changes of maps; a forward whose result is near 1 may be rough.
inline Growth growth_of(const Problem& p) {
  const bool backward = p.dflow != nullptr, centred = p.base == 0;
  return !backward && !centred ? Growth::rough : p.inv_temperature > 1 ? Growth::large : Growth::small;
}

// NT of the kernels that there are: few for what is rare.
inline bool has_tiles(int tiles, const Problem& p) {
  if (p.mean_map) return tiles == 8;  // one map more is kept in registers
  const bool rare = p.dtype == Dtype::f32 || growth_of(p) == Growth::large;
  return tiles == 2 || tiles == 8 || (!rare && (tiles == 5 || tiles == 13 || tiles == 17 || tiles == 19));
}

inline Plan plan_of(const Problem& p, const Device& device) {
  Plan plan{};
  // The least work: besides its tiles a warp has some that is worth two and a half of them.
  const int needed = divide_up(p.Nk, TILE_KEYS);
  int least = 0;
  for (int tiles = 1; tiles <= MAX_TILES; ++tiles) {
    const int warps = divide_up(needed, tiles), work = warps * (2 * tiles + 5);
    const bool fits = warps <= MAX_WARPS && warps <= block_warps(tiles) && warps * tiles - needed < MOST_MASKED;
    if (has_tiles(tiles, p) && fits && (least == 0 || work < least)) {
      least = work;
      plan.tiles = tiles;
      plan.warps = warps;
    }
  }
  // As many rows as there are warps for, since each block loads all keys, but no more than the map has.
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

template <class X, Growth GROWTH, class Launch>
const char* run_tiles(const Launch& launch, const Problem& p, const Plan& plan, const Device& device, void* stream) {
  if (p.mean_map) return launch.template run<8, true, GROWTH>(p, plan, device, stream);
  switch (plan.tiles) {
    case 2: return launch.template run<2, false, GROWTH>(p, plan, device, stream);
    case 8: return launch.template run<8, false, GROWTH>(p, plan, device, stream);
    default:;
  }
  if constexpr (sizeof(X) == 2 && GROWTH != Growth::large) {
    switch (plan.tiles) {
      case 5: return launch.template run<5, false, GROWTH>(p, plan, device, stream);
      case 13: return launch.template run<13, false, GROWTH>(p, plan, device, stream);
      case 17: return launch.template run<17, false, GROWTH>(p, plan, device, stream);
      case 19: return launch.template run<19, false, GROWTH>(p, plan, device, stream);
      default:;
    }
  }
  return "no kernel for this number of keys";
}

// Runs `launch.run<NT, MEAN_MAP, GROWTH>(problem, plan, device, stream)` for numbers X.
template <class X, class Launch>
const char* run_strips(const Launch& launch, const Problem& p, const Plan& plan, const Device& device, void* stream) {
  if (plan.shared_bytes > device.shared_bytes) return "these sizes need more shared memory than a block can have";
  if (plan.launched(p) > 0x7fffffff || int64_t{p.B} * p.T * p.H * p.G > 0x7fffffff)
    return "more blocks of threads than one launch can have";
  switch (growth_of(p)) {
    case Growth::small: return run_tiles<X, Growth::small>(launch, p, plan, device, stream);
    case Growth::large: return run_tiles<X, Growth::large>(launch, p, plan, device, stream);
    case Growth::rough:
      if constexpr (Launch::FORWARD) return run_tiles<X, Growth::rough>(launch, p, plan, device, stream);
  }
  return "no kernel for this temperature";
}

// forward.cu and backward.cu, compiled for each of the numbers.
template <class X>
const char* run_forward(const Problem& p, const Plan& plan, const Device& device, void* stream);
template <class X>
const char* run_backward(const Problem& p, const Plan& plan, const Device& device, void* stream);

}  // namespace amflow_cuda
