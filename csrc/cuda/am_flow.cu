// Dispatches a problem to the kernels for its dtype, and sums the partial flows of a map's blocks of rows.

#include "table.h"

namespace amflow_cuda {

namespace {

constexpr int FINISH_THREADS = 256;

// flow = sum of the partial flows, corrected so that the flow of a pair sums to exactly Nq. One warp per row of flow.
__global__ void __launch_bounds__(FINISH_THREADS) am_flow_finish(const __grid_constant__ Problem p, int blocks) {
  const int heads = p.mean ? p.H : 1, lane = threadIdx.x % 32;
  const int64_t rows = int64_t{p.B} * p.P * p.Z * p.G, results = rows / heads;
  const int64_t result = int64_t{blockIdx.x} * (FINISH_THREADS / 32) + threadIdx.x / 32;
  if (result >= results) return;
  const int64_t first = (result / p.G * heads) * p.G + result % p.G;
  float x[MAX_TOKENS / 32], total = 0;
#pragma unroll
  for (int i = 0; i < MAX_TOKENS / 32; ++i) {
    const int j = i * 32 + lane;
    x[i] = 0;
    if (j < p.Nk)
      for (int h = 0; h < heads; ++h)
        for (int block = 0; block < blocks; ++block)
          x[i] += p.partial[(block * rows + first + int64_t{h} * p.G) * p.Nk + j];
    total += x[i];
  }
  for (int lanes = 1; lanes < 32; lanes *= 2) total += shuffle_xor(total, lanes);
  const float mean = total / p.Nk;
#pragma unroll
  for (int i = 0; i < MAX_TOKENS / 32; ++i) {
    const int j = i * 32 + lane;
    if (j < p.Nk) p.flow[result * p.Nk + j] = (x[i] - mean) / heads + p.base;
  }
}

const char* finish(const Problem& p, const Plan& plan, const Device& device, void* stream) {
  const int64_t results = int64_t{p.B} * p.P * p.Z * p.G / (p.mean ? p.H : 1);
  const int64_t blocks = (results + FINISH_THREADS / 32 - 1) / (FINISH_THREADS / 32);
  return launch(device, am_flow_finish, blocks, FINISH_THREADS, 0, stream, p, plan.blocks);
}

template <class Run>
const char* for_dtype(Dtype dtype, const Run& run) {
  switch (dtype) {
    case Dtype::f32: return run(float{});
    case Dtype::bf16: return run(bf16{});
    default: return run(f16{});
  }
}

}  // namespace

int64_t partial_floats(const Problem& p, const Device& device) {
  return plan_of(p, device).blocks * (int64_t{p.B} * p.P * p.Z * p.G * p.Nk);
}

std::string describe(const Problem& p, const Device& device) {
  const Plan plan = plan_of(p, device);
  const auto number = [](int n) { return std::to_string(n); };
  return number(plan.blocks) + " blocks of " + number(plan.groups) + " x " + number(TILE_ROWS) + " rows, " +
         number(plan.warps) + " x " + number(plan.tiles * TILE_KEYS) + " keys, " + number(plan.stages) + " stages, " +
         number(plan.buffers) + " buffers, " + number(plan.shared_bytes) + " bytes of shared memory";
}

const char* forward(const Problem& p, const Device& device, void* stream) {
  const Plan plan = plan_of(p, device);
  const auto run = [&]<class X>(X) { return run_forward<X>(p, plan, device, stream); };
  if (const char* error = for_dtype(p.dtype, run)) return error;
  return finish(p, plan, device, stream);
}

}  // namespace amflow_cuda
