// Runs the items of a pass over a problem on several threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "am_flow.h"

namespace amflow {

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float, Free>;

inline Buffer allocate(int64_t floats) {
  const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
  if (bytes == 0) return nullptr;
  auto* p = static_cast<float*>(std::aligned_alloc(64, bytes));
  if (!p) throw std::bad_alloc();
  return Buffer(p);
}

// Runs every item, and finishes it after all items with a lower position in the same sum. parallel(workers, work) calls
// work(worker) for every worker, on as many threads as it likes; a worker that is idle takes the next item.
template <class Problem, class Parallel>
void execute(const Problem& pb, const Pass<Problem>& pass, int64_t threads, const Parallel& parallel) {
  const Plan plan = pass.plan(pb, threads);
  const int64_t workers = plan.items < threads ? plan.items : threads;
  const int64_t stride = (plan.scratch + 15) / 16 * 16;  // no two workers share a cache line
  const Buffer scratch = allocate(workers * stride), sums = allocate(plan.sums * plan.sum_floats);
  const std::unique_ptr<std::atomic<int64_t>[]> finished(new std::atomic<int64_t>[plan.sums]());
  std::atomic<int64_t> next{0};
  parallel(workers, [&](int64_t worker) {
    float* const memory = scratch.get() + worker * stride;
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < plan.items;) {
      pass.run(pb, plan, item, memory);
      // Items start in order, so the items that this one waits for are already running.
      const ReductionSlot slot = pass.slot(pb, plan, item);
      std::atomic<int64_t>& count = finished[slot.sum];
      for (int64_t n; (n = count.load(std::memory_order_acquire)) != slot.position;) count.wait(n);
      pass.finish(pb, plan, item, memory, sums.get() + slot.sum * plan.sum_floats);
      count.store(slot.position + 1, std::memory_order_release);
      count.notify_all();
    }
  });
}

}  // namespace amflow
