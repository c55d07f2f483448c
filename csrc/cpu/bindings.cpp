// Registers amflow_native::*. The only file of the CPU kernels that uses torch, through the stable ABI: one binary
// loads in every torch from 2.11 on. The ops have no autograd and make no checks: amflow_kernels/problem.py makes them.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>

#include "am_flow.h"
#include "execute.h"
#include "matmul.h"
#include "select.h"

namespace {

using amflow::Frames;
using amflow::kernels;
using amflow::matmul_kernels;
using amflow::MatmulProblem;
using amflow::Pass;
using amflow::Problem;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

amflow::Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case torch::headeronly::ScalarType::Float: return amflow::Dtype::f32;
    case torch::headeronly::ScalarType::BFloat16: return amflow::Dtype::bf16;
    default: return amflow::Dtype::f16;
  }
}

// Strides of batch, frame, head, window and token. Without a window dimension there is one window.
void set_strides(const Tensor& x, int64_t* stride) {
  const bool windows = x.dim() == 6;
  const int64_t dims[5] = {0, 1, 2, 3, x.dim() - 2};
  for (int i = 0; i < 5; ++i) stride[i] = i == 3 && !windows ? 0 : x.stride(dims[i]);
}

Frames make_frames(const Tensor& q, const Tensor& k) {
  Frames frames;
  frames.q = q.data_ptr();
  frames.k = k.data_ptr();
  set_strides(q, frames.q_stride);
  set_strides(k, frames.k_stride);
  return frames;
}

Problem problem_of(const Tensor& q, const Tensor& k, const OptionalTensor& q_b, const OptionalTensor& k_b, double scale,
                   int64_t lag, double temperature) {
  Problem pb{};
  pb.frames[0] = make_frames(q, k);
  pb.pair_form = q_b.has_value();
  if (pb.pair_form) pb.frames[1] = make_frames(*q_b, *k_b);
  pb.dtype = dtype_of(q);
  pb.B = q.size(0), pb.T = q.size(1), pb.H = q.size(2), pb.G = q.dim() == 6 ? q.size(3) : 1;
  pb.Nq = q.size(q.dim() - 2), pb.Nk = k.size(k.dim() - 2), pb.D = q.size(q.dim() - 1);
  pb.lag = lag;
  pb.scale = static_cast<float>(scale);
  pb.inv_temperature = static_cast<float>(1. / temperature);
  return pb;
}

// Runs every item on torch's threads.
template <class Problem>
void execute(const Problem& pb, const Pass<Problem>& pass) {
  amflow::execute(pb, pass, torch::stable::get_num_threads(), [](int64_t workers, const auto& work) {
    torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) work(worker);
    });
  });
}

void am_flow(Tensor flow, Tensor q, Tensor k, OptionalTensor q_b, OptionalTensor k_b, double scale, int64_t lag,
             double temperature, int64_t reduction, bool center, int64_t vector_bits) {
  Problem pb = problem_of(q, k, q_b, k_b, scale, lag, temperature);
  pb.reduction = static_cast<amflow::Reduction>(reduction);
  pb.center = center;
  pb.flow = static_cast<float*>(flow.data_ptr());
  execute(pb, kernels(vector_bits).forward);
}

void* data_or_null(Tensor& x) { return x.numel() ? x.data_ptr() : nullptr; }

void set_gradients(Problem& pb, Tensor& dq, Tensor& dk, Tensor& dq_b, Tensor& dk_b) {
  pb.frames[0].dq = data_or_null(dq), pb.frames[0].dk = data_or_null(dk);
  pb.frames[1].dq = data_or_null(dq_b), pb.frames[1].dk = data_or_null(dk_b);
}

void am_flow_backward(Tensor dq, Tensor dk, Tensor dq_b, Tensor dk_b, Tensor dflow, Tensor q, Tensor k,
                      OptionalTensor q_b, OptionalTensor k_b, double scale, int64_t lag, double temperature,
                      int64_t reduction, int64_t vector_bits) {
  Problem pb = problem_of(q, k, q_b, k_b, scale, lag, temperature);
  pb.reduction = static_cast<amflow::Reduction>(reduction);
  pb.dflow = static_cast<const float*>(dflow.data_ptr());
  set_gradients(pb, dq, dk, dq_b, dk_b);
  execute(pb, kernels(vector_bits).backward);
}

amflow::Rows rows_of(const Tensor& x) {
  amflow::Rows rows{x.data_ptr(), dtype_of(x), {}};
  set_strides(x, rows.stride);
  return rows;
}

MatmulProblem matmul_problem_of(const Problem& frames, const Tensor& x, Tensor& out, bool softmax, bool to_keys) {
  MatmulProblem pb{frames};
  pb.softmax = softmax;
  pb.to_keys = to_keys;
  pb.C = x.size(x.dim() - 1);
  pb.out = data_or_null(out);
  pb.out_dtype = dtype_of(out);
  return pb;
}

void am_flow_matmul(Tensor y, Tensor q, Tensor k, OptionalTensor q_b, OptionalTensor k_b, Tensor x, double scale,
                    int64_t lag, double temperature, bool transpose, bool softmax, int64_t vector_bits) {
  const Problem frames = problem_of(q, k, q_b, k_b, scale, lag, temperature);
  MatmulProblem pb = matmul_problem_of(frames, x, y, softmax, transpose);
  (transpose ? pb.u : pb.v) = rows_of(x);
  execute(pb, matmul_kernels(vector_bits).forward);
}

void am_flow_matmul_backward(Tensor dq, Tensor dk, Tensor dq_b, Tensor dk_b, Tensor dx, Tensor dy, Tensor q, Tensor k,
                             OptionalTensor q_b, OptionalTensor k_b, Tensor x, double scale, int64_t lag,
                             double temperature, bool transpose, bool softmax, int64_t vector_bits) {
  const Problem frames = problem_of(q, k, q_b, k_b, scale, lag, temperature);
  MatmulProblem pb = matmul_problem_of(frames, x, dx, softmax, !transpose);
  (transpose ? pb.u : pb.v) = rows_of(x);
  (transpose ? pb.v : pb.u) = rows_of(dy);
  set_gradients(pb, dq, dk, dq_b, dk_b);
  execute(pb, matmul_kernels(vector_bits).backward);
}

std::string isa_name(int64_t vector_bits) { return kernels(vector_bits).name; }

}  // namespace

// The arguments of `problem_of`, as every schema has them.
#define AMFLOW_FRAMES "Tensor q, Tensor k, Tensor? q_b, Tensor? k_b"
#define AMFLOW_OPTIONS "float scale, int lag, float temperature"

STABLE_TORCH_LIBRARY(amflow_native, m) {
  m.def("am_flow(Tensor(a!) flow, " AMFLOW_FRAMES ", " AMFLOW_OPTIONS
        ", int reduction, bool center, int vector_bits) -> ()");
  m.def("am_flow_backward(Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dq_b, Tensor(d!) dk_b, Tensor dflow, " AMFLOW_FRAMES
        ", " AMFLOW_OPTIONS ", int reduction, int vector_bits) -> ()");
  m.def("am_flow_matmul(Tensor(a!) y, " AMFLOW_FRAMES ", Tensor x, " AMFLOW_OPTIONS
        ", bool transpose, bool softmax, int vector_bits) -> ()");
  m.def(
      "am_flow_matmul_backward(Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dq_b, Tensor(d!) dk_b, Tensor(e!) dx, "
      "Tensor dy, " AMFLOW_FRAMES ", Tensor x, " AMFLOW_OPTIONS
      ", bool transpose, bool softmax, int vector_bits) -> ()");
  m.def("isa(int vector_bits) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(amflow_native, CPU, m) {
  m.impl("am_flow", TORCH_BOX(&am_flow));
  m.impl("am_flow_backward", TORCH_BOX(&am_flow_backward));
  m.impl("am_flow_matmul", TORCH_BOX(&am_flow_matmul));
  m.impl("am_flow_matmul_backward", TORCH_BOX(&am_flow_matmul_backward));
}

STABLE_TORCH_LIBRARY_IMPL(amflow_native, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&isa_name)); }
