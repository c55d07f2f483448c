// The CPU kernels in a process of their own, for another kind of CPU: executed.py says what goes in and out.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "execute.h"
#include "select.h"

namespace {

// Everything is written as numbers of 8 bytes, and tensors after these as their own memory.
struct Request {
  int64_t operation;  // see `answer`
  int64_t threads, pair_form, reduction, center, lag, transpose, softmax;
  int64_t B, T, H, G, Nq, Nk, D, C;
  double scale, temperature;
  int64_t dtype, x_dtype;
  int64_t result_bytes[5];  // of every result, 0 for a gradient that is not needed
};

struct TensorHeader {
  int64_t dtype, bytes, offset, stride[5];
};

struct Tensor {
  TensorHeader header;
  std::unique_ptr<char[]> memory;
  const void* data() const { return memory.get() + header.offset * (header.dtype == 0 ? 4 : 2); }
};

bool read(void* to, size_t bytes) { return std::fread(to, 1, bytes, stdin) == bytes; }

Tensor read_tensor() {
  Tensor x;
  if (!read(&x.header, sizeof x.header)) std::exit(1);
  x.memory.reset(new char[x.header.bytes]);
  if (!read(x.memory.get(), x.header.bytes)) std::exit(1);
  return x;
}

amflow::Rows rows_of(const Tensor& x) {
  amflow::Rows rows{x.data(), static_cast<amflow::Dtype>(x.header.dtype), {}};
  std::memcpy(rows.stride, x.header.stride, sizeof rows.stride);
  return rows;
}

amflow::Frames frames_of(const Tensor& q, const Tensor& k) {
  amflow::Frames frames;
  frames.q = q.data(), frames.k = k.data();
  std::memcpy(frames.q_stride, q.header.stride, sizeof frames.q_stride);
  std::memcpy(frames.k_stride, k.header.stride, sizeof frames.k_stride);
  return frames;
}

template <class Problem>
void execute(const Problem& pb, const amflow::Pass<Problem>& pass, int64_t threads) {
  amflow::execute(pb, pass, threads, [](int64_t workers, const auto& work) {
    std::vector<std::thread> running;
    for (int64_t worker = 1; worker < workers; ++worker) running.emplace_back(work, worker);
    if (workers) work(0);
    for (std::thread& thread : running) thread.join();
  });
}

void answer(const Request& r) {
  std::vector<Tensor> tensors;  // q, k, in pair form q_b, k_b; for products x; for gradients that of the result
  const bool product = r.operation >= 2, backward = r.operation % 2;
  for (int n = 2 + 2 * r.pair_form + product + backward; n > 0; --n) tensors.push_back(read_tensor());
  std::unique_ptr<char[]> memory[5];
  void* results[5];
  for (int i = 0; i < 5; ++i) {
    memory[i].reset(new char[r.result_bytes[i]]);
    std::memset(memory[i].get(), 0xff, r.result_bytes[i]);  // NaN, which shows what a kernel does not write
    results[i] = r.result_bytes[i] ? memory[i].get() : nullptr;
  }
  amflow::MatmulProblem pb{};
  pb.frames[0] = frames_of(tensors[0], tensors[1]);
  if (r.pair_form) pb.frames[1] = frames_of(tensors[2], tensors[3]);
  pb.pair_form = r.pair_form, pb.center = r.center;
  pb.dtype = static_cast<amflow::Dtype>(r.dtype);
  pb.reduction = static_cast<amflow::Reduction>(r.reduction);
  pb.B = r.B, pb.T = r.T, pb.H = r.H, pb.G = r.G, pb.Nq = r.Nq, pb.Nk = r.Nk, pb.D = r.D, pb.C = r.C, pb.lag = r.lag;
  pb.scale = static_cast<float>(r.scale), pb.inv_temperature = static_cast<float>(1. / r.temperature);
  if (backward) {
    pb.frames[0].dq = results[0], pb.frames[0].dk = results[1];
    pb.frames[1].dq = results[2], pb.frames[1].dk = results[3];
  }
  if (!product) {
    const amflow::Kernels& kernels = amflow::kernels(128);
    pb.flow = static_cast<float*>(results[0]);
    if (backward) pb.dflow = static_cast<const float*>(tensors.back().data());
    execute<amflow::Problem>(pb, backward ? kernels.backward : kernels.forward, r.threads);
  } else {
    const amflow::MatmulKernels& kernels = amflow::matmul_kernels(128);
    const Tensor& x = tensors[2 + 2 * r.pair_form];
    pb.softmax = r.softmax;
    pb.to_keys = backward ? !r.transpose : r.transpose;
    (r.transpose ? pb.u : pb.v) = rows_of(x);
    if (backward) (r.transpose ? pb.v : pb.u) = rows_of(tensors.back());
    pb.out = results[backward ? 4 : 0];
    pb.out_dtype = static_cast<amflow::Dtype>(backward ? r.x_dtype : 0);
    execute<amflow::MatmulProblem>(pb, backward ? kernels.backward : kernels.forward, r.threads);
  }
  for (int i = 0; i < 5; ++i) std::fwrite(memory[i].get(), 1, r.result_bytes[i], stdout);
  std::fflush(stdout);
}

}  // namespace

int main() {
  std::puts(amflow::kernels(128).name);
  std::fflush(stdout);
  for (Request request; read(&request, sizeof request);) answer(request);
}
