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

// Strides of batch, frame, head, window and token. Without a window dimension there is one window.
void set_strides(const Tensor& x, int64_t* stride) {
  const bool windows = x.dim() == 6;
  const int64_t dims[5] = {0, 1, 2, 3, x.dim() - 2};
  for (int i = 0; i < 5; ++i) stride[i] = i == 3 && !windows ? 0 : x.stride(dims[i]);
}

Frames frames_of(const Tensor& q, const Tensor& k) {
  Frames f{q.data_ptr(), k.data_ptr(), {}, {}};
  set_strides(q, f.q_stride);
  set_strides(k, f.k_stride);
  return f;
}

void throw_on_error(const char* error) {
  if (error) throw std::runtime_error(std::string("amflow_kernels: impl='cuda': ") + error);
}

Tensor scratch(const Tensor& like, int64_t floats) {
  const int64_t sizes[1] = {floats};
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes, 1), ScalarType::Float);
}

std::string describe(int64_t Nq, int64_t Nk, int64_t D, int64_t bytes, bool mean_map, double temperature,
                     int64_t shared_bytes) {
  Problem p{};
  p.dtype = bytes == 4 ? Dtype::f32 : Dtype::bf16;
  p.mean_map = mean_map;
  p.B = p.H = p.G = p.Z = p.P = p.step = 1;
  p.Nq = static_cast<int>(Nq), p.Nk = static_cast<int>(Nk), p.D = static_cast<int>(D);
  p.base = 1;
  p.inv_temperature = inverse(temperature);
  return amflow_cuda::describe(p, {1, static_cast<int>(shared_bytes)});
}

// Reductions: 0 none, 1 mean, 2 mean_map.
void forward(Tensor flow, Tensor q, Tensor k, OptionalTensor q_b, OptionalTensor k_b, double scale, int64_t lag,
             double temperature, int64_t reduction, bool center, int64_t multiprocessors, int64_t shared_bytes,
             int64_t stream) {
  const auto size = [](int64_t n) { return static_cast<int>(n); };
  Problem p{};
  p.dtype = dtype_of(q);
  p.mean = reduction == 1;
  p.mean_map = reduction == 2;
  p.B = size(q.size(0)), p.H = size(q.size(2)), p.G = size(q.dim() == 6 ? q.size(3) : 1);
  p.Nq = size(q.size(q.dim() - 2)), p.Nk = size(k.size(k.dim() - 2)), p.D = size(q.size(q.dim() - 1));
  p.P = size(q.size(1) - lag);
  p.Z = p.mean_map ? 1 : p.H;
  p.first = frames_of(q, k);
  p.second = q_b ? frames_of(*q_b, *k_b) : p.first;
  p.shift = size(lag);
  p.step = q_b ? p.P : p.shift;
  // A scale of 0 would turn logits of -inf into NaN.
  p.scale = std::fmax(static_cast<float>(std::fabs(scale) * 1.4426950408889634), 1.17549435e-38f);
  p.negate = scale < 0;
  p.inv_temperature = inverse(temperature);
  p.base = center ? 0.f : static_cast<float>(static_cast<double>(p.Nq) / p.Nk);
  const Device device{size(multiprocessors), size(shared_bytes)};
  const Tensor partial = scratch(q, amflow_cuda::partial_floats(p, device));
  p.partial = static_cast<float*>(partial.data_ptr());
  p.flow = static_cast<float*>(flow.data_ptr());
  throw_on_error(amflow_cuda::forward(p, device, reinterpret_cast<void*>(stream)));
}

}  // namespace

STABLE_TORCH_LIBRARY(amflow_cuda, m) {
  m.def(
      "forward(Tensor(a!) flow, Tensor q, Tensor k, Tensor? q_b, Tensor? k_b, float scale, int lag, float temperature, "
      "int reduction, bool center, int multiprocessors, int shared_bytes, int stream) -> ()");
  m.def("describe(int Nq, int Nk, int D, int bytes, bool mean_map, float temperature, int shared_bytes) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(amflow_cuda, CompositeExplicitAutograd, m) { m.impl("describe", TORCH_BOX(&describe)); }

STABLE_TORCH_LIBRARY_IMPL(amflow_cuda, CUDA, m) { m.impl("forward", TORCH_BOX(&forward)); }
