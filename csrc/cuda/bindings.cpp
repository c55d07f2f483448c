// Registers amflow_cuda::*. The only file of the CUDA kernels that uses torch, through the stable ABI: one binary loads
// in every torch from 2.11 on. The ops have no autograd and make no checks: amflow_kernels/problem.py makes them.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "am_flow.h"

namespace {

using amflow_cuda::Device;
using amflow_cuda::Dtype;
using amflow_cuda::Frames;
using amflow_cuda::Problem;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

// The flow at a temperature above 1e30 equals that at 1e30, and the kernels' products would underflow.
float inverse(double temperature) { return static_cast<float>(1 / std::min(temperature, 1e30)); }

Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    default: return Dtype::f16;
  }
}

void* data_or_null(const Tensor& x) { return x.numel() ? x.data_ptr() : nullptr; }

// Strides of batch, frame, head, window and token. Without a window dimension there is one window.
void set_strides(const Tensor& x, int64_t* stride) {
  const bool windows = x.dim() == 6;
  const int64_t dims[5] = {0, 1, 2, 3, x.dim() - 2};
  for (int i = 0; i < 5; ++i) stride[i] = i == 3 && !windows ? 0 : x.stride(dims[i]);
}

Frames frames_of(const Tensor& q, const Tensor& k, float*& saved, int64_t rows) {
  Frames f{};
  f.q = q.data_ptr();
  f.k = k.data_ptr();
  set_strides(q, f.q_stride);
  set_strides(k, f.k_stride);
  f.row_max = saved;
  f.row_norm = saved + rows;
  saved += 2 * rows;
  return f;
}

// saved: row_max and row_norm of each set of frames, then e_sum. Reductions: 0 none, 1 mean, 2 mean_map.
Problem problem_of(const Tensor& q, const Tensor& k, const OptionalTensor& q_b, const OptionalTensor& k_b,
                   const Tensor& saved, double scale, int64_t lag, double temperature, int64_t reduction) {
  const auto size = [](int64_t n) { return static_cast<int>(n); };
  Problem p{};
  p.dtype = dtype_of(q);
  p.mean = reduction == 1;
  p.mean_map = reduction == 2;
  p.B = size(q.size(0)), p.T = size(q.size(1)), p.H = size(q.size(2)), p.G = size(q.dim() == 6 ? q.size(3) : 1);
  p.Nq = size(q.size(q.dim() - 2)), p.Nk = size(k.size(k.dim() - 2)), p.D = size(q.size(q.dim() - 1));
  p.P = size(p.T - lag);
  p.Z = p.mean_map ? 1 : p.H;
  float* next = static_cast<float*>(saved.data_ptr());
  const int64_t rows = int64_t{p.B} * p.T * p.H * p.G * p.Nq;
  p.first = p.second = frames_of(q, k, next, rows);
  p.shift = p.step = size(lag);
  if (q_b) {
    p.second = frames_of(*q_b, *k_b, next, rows);
    p.step = p.P;
  }
  p.e_sum = next;
  // A scale of 0 would turn logits of -inf into NaN.
  p.scale = std::fmax(static_cast<float>(std::fabs(scale) * 1.4426950408889634), 1.17549435e-38f);
  p.negate = scale < 0;
  p.slope = static_cast<float>(scale);
  p.inv_temperature = inverse(temperature);
  return p;
}

void throw_on_error(const char* error) {
  if (error) throw std::runtime_error(std::string("amflow_kernels: impl='cuda': ") + error);
}

Tensor scratch(const Tensor& like, int64_t floats) {
  const int64_t sizes[1] = {floats};
  Tensor x = torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes, 1), ScalarType::Float);
#ifdef AMFLOW_SIMT
  torch::stable::fill_(x, NAN);  // reading what was not written gives NaN
#endif
  return x;
}

std::string describe(int64_t Nq, int64_t Nk, int64_t D, int64_t bytes, bool mean_map, double temperature,
                     int64_t shared_bytes) {
  Problem p{};
  p.dtype = bytes == 4 ? Dtype::f32 : Dtype::bf16;
  p.mean_map = mean_map;
  p.B = p.T = p.H = p.G = p.Z = p.P = p.step = 1;
  p.Nq = static_cast<int>(Nq), p.Nk = static_cast<int>(Nk), p.D = static_cast<int>(D);
  p.base = 1;
  p.inv_temperature = inverse(temperature);
  return amflow_cuda::describe(p, {1, static_cast<int>(shared_bytes)});
}

void forward(Tensor flow, Tensor saved, Tensor q, Tensor k, OptionalTensor q_b, OptionalTensor k_b, double scale,
             int64_t lag, double temperature, int64_t reduction, bool center, int64_t multiprocessors,
             int64_t shared_bytes, int64_t stream) {
  Problem p = problem_of(q, k, q_b, k_b, saved, scale, lag, temperature, reduction);
  p.base = center ? 0.f : static_cast<float>(static_cast<double>(p.Nq) / p.Nk);
  const Device device{static_cast<int>(multiprocessors), static_cast<int>(shared_bytes)};
  const Tensor partial = scratch(q, amflow_cuda::partial_floats(p, device));
  p.partial = static_cast<float*>(partial.data_ptr());
  p.flow = static_cast<float*>(flow.data_ptr());
  throw_on_error(amflow_cuda::forward(p, device, reinterpret_cast<void*>(stream)));
}

void backward(Tensor dq, Tensor dk, Tensor dq_b, Tensor dk_b, Tensor dflow, Tensor saved, Tensor q, Tensor k,
              OptionalTensor q_b, OptionalTensor k_b, double scale, int64_t lag, double temperature, int64_t reduction,
              int64_t multiprocessors, int64_t shared_bytes, int64_t stream) {
  Problem p = problem_of(q, k, q_b, k_b, saved, scale, lag, temperature, reduction);
  const Device device{static_cast<int>(multiprocessors), static_cast<int>(shared_bytes)};
  p.first.dq = data_or_null(dq), p.first.dk = data_or_null(dk);
  p.second.dq = data_or_null(q_b ? dq_b : dq), p.second.dk = data_or_null(q_b ? dk_b : dk);
  p.dflow = static_cast<const float*>(dflow.data_ptr());
  const int64_t pairs = int64_t{p.B} * p.P * p.Z * p.G * p.Nq;
  const int64_t heads = int64_t{p.B} * p.T * p.H * p.G * p.Nq;
  const Tensor rows = scratch(q, 4 * pairs + (p.mean_map ? heads : 0));
  p.slopes = static_cast<float*>(rows.data_ptr());
  p.deltas = p.slopes + pairs;
  p.rho = p.deltas + pairs;
  p.next_rho = p.rho + pairs;
  p.head_rho = p.next_rho + pairs;
  throw_on_error(amflow_cuda::backward(p, device, reinterpret_cast<void*>(stream)));
}

}  // namespace

#ifdef AMFLOW_SIMT
#define AMFLOW_LIBRARY amflow_simt
#define AMFLOW_KEY CPU
#else
#define AMFLOW_LIBRARY amflow_cuda
#define AMFLOW_KEY CUDA
#endif

// A second macro, so that AMFLOW_LIBRARY is expanded before STABLE_TORCH_LIBRARY makes a string of it.
#define AMFLOW_DEFINE(library, m) STABLE_TORCH_LIBRARY(library, m)
#define AMFLOW_IMPLEMENT(library, key, m) STABLE_TORCH_LIBRARY_IMPL(library, key, m)

// The arguments of `problem_of` after `saved`, as both schemas have them.
#define AMFLOW_PROBLEM \
  "Tensor q, Tensor k, Tensor? q_b, Tensor? k_b, float scale, int lag, float temperature, int reduction"
#define AMFLOW_DEVICE "int multiprocessors, int shared_bytes, int stream"

AMFLOW_DEFINE(AMFLOW_LIBRARY, m) {
  m.def("forward(Tensor(a!) flow, Tensor(b!) saved, " AMFLOW_PROBLEM ", bool center, " AMFLOW_DEVICE ") -> ()");
  m.def(
      "backward(Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dq_b, Tensor(d!) dk_b, Tensor dflow, Tensor "
      "saved, " AMFLOW_PROBLEM ", " AMFLOW_DEVICE ") -> ()");
  m.def("describe(int Nq, int Nk, int D, int bytes, bool mean_map, float temperature, int shared_bytes) -> str");
}

AMFLOW_IMPLEMENT(AMFLOW_LIBRARY, CompositeExplicitAutograd, m) { m.impl("describe", TORCH_BOX(&describe)); }

AMFLOW_IMPLEMENT(AMFLOW_LIBRARY, AMFLOW_KEY, m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward", TORCH_BOX(&backward));
}
