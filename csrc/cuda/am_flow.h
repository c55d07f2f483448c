// What the CUDA kernels compute, on raw pointers and a stream. Strides count elements; the last dimension is contiguous.
#pragma once

#include <cstdint>
#include <string>

namespace amflow_cuda {

enum class Dtype : int { f32, bf16, f16 };

constexpr int MAX_TOKENS = 640;
constexpr int MAX_HEAD_DIM = 128;

// q (B, T, H, G, Nq, D) and k (B, T, H, G, Nk, D): H heads, G windows; strides of batch, frame, head, window, token.
// Row statistics (B, T, H, G, Nq): A = exp2(logit scale log2(e) - row_max) row_norm.
// dq, dk: contiguous, null if not wanted.
struct Frames {
  const void* q;
  const void* k;
  int64_t q_stride[5];
  int64_t k_stride[5];
  float* row_max;
  float* row_norm;
  void* dq;
  void* dk;
};

// Pairs of maps ((first)[p], (second)[p + shift]), p < P. Pairs p, p + step, p + 2 step ... are a chain: the second map
// of one is the first of the next. For a clip first and second are the same frames, and shift = step = lag; in pair form
// they are two sets, shift = 0 and step = P. Z is 1 with a mean over the heads' maps (mean_map), else H.
struct Problem {
  Frames first, second;
  Dtype dtype;
  bool mean_map, mean;  // of heads' maps; of heads' flows
  int B, T, H, G, Nq, Nk, D, P, shift, step, Z;
  float scale;            // of logits, by its size, times log2(e)
  bool negate;            // its sign
  float slope;            // of gradients: the scale itself
  float inv_temperature;
  float base;             // what a flow without motion is: Nq / Nk, or 0 if centred
  float* e_sum;           // (B, P, Z, G, Nq): sum_j expm1(|A_ij - A'_ij| / temperature)
  float* part;            // scratch of the forward, `part_floats` of them
  float* flow;            // (B, P, H, G, Nk), or (B, P, G, Nk) with a head reduction
  // Backward only.
  const float* dflow;     // less its mean over Nk, (B, P, Z, G, Nk), of each head's flow
  float* slopes;          // rows of coefficients, (B, P, Z, G, Nq) each: see backward.cu
  float* deltas;
  float* rho;
  float* next_rho;
  float* head_rho;        // (B, T, H, G, Nq), with a mean over the heads' maps
};

// What a GPU has room for.
struct Device {
  int multiprocessors;
  int shared_bytes;  // of one block
};

// Null, or what is wrong: a text that stays. The launches are asynchronous, on a cudaStream_t.
const char* forward(const Problem& problem, const Device& device, void* stream);
const char* backward(const Problem& problem, const Device& device, void* stream);
int64_t part_floats(const Problem& problem, const Device& device);
std::string describe(const Problem& problem, const Device& device);  // of the strips that it is cut into

}  // namespace amflow_cuda
