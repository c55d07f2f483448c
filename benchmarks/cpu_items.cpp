// The work items of the CPU kernels' plans, for benchmarks/many_threads.py. Each line of input is a problem: the pass
// (forward, backward, Mx, MTx, Mx_backward), B, T, H, N, D, C and the number of threads. Each line of output has its
// items in the order in which threads take them: cost of running and of finishing it, and the sum that it adds to.
#include <iostream>
#include <string>

#include "maps.h"
#include "matmul.h"

using namespace amflow;
using namespace amflow::AMFLOW_ISA;

template <class P>
void print_items(const P& pb, const Pass<P>& pass, int64_t threads) {
  const Plan plan = pass.plan(pb, threads);
  for (int64_t index = 0; index < plan.items; ++index) {
    const WorkItem item = work_item_at(pb, plan, index);
    int64_t vectors = 0;
    for (int64_t i = first_strip(plan, item.group); i < first_strip(plan, item.group + 1); ++i)
      vectors += strip_at(pb, plan, item, i).vectors;
    const ReductionSlot slot = pass.slot(pb, plan, index);
    const int64_t owned = item.own_end - item.own_begin;
    std::cout << run_cost(plan, vectors, item.frames, owned) << ':' << finish_cost(plan, owned) << ':' << slot.sum
              << ' ';
  }
  std::cout << '\n';
}

int main() {
  static float memory;  // plans only look at which pointers there are
  std::string name;
  for (int64_t threads; std::cin >> name;) {
    MatmulProblem pb{};
    std::cin >> pb.B >> pb.T >> pb.H >> pb.Nq >> pb.D >> pb.C >> threads;
    pb.Nk = pb.Nq, pb.G = 1, pb.lag = 1, pb.inv_temperature = 1;
    pb.flow = &memory, pb.out = &memory;
    const bool backward = name == "backward" || name == "Mx_backward";
    pb.to_keys = name == "MTx" || backward;
    if (backward) pb.frames[0].dq = pb.frames[0].dk = &memory;
    if (name == "forward") print_items<Problem>(pb, kernels.forward, threads);
    else if (name == "backward") print_items<Problem>(pb, kernels.backward, threads);
    else print_items(pb, backward ? matmul.backward : matmul.forward, threads);
  }
}
