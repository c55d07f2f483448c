// Interface of the CUDA kernels, on raw pointers and a stream. Strides count elements; the last dimension has stride 1.
#pragma once

#include <cstdint>
#include <string>

namespace amflow_cuda {

enum class Dtype : int { f32, bf16, f16 };

constexpr int MAX_TOKENS = 640;
constexpr int MAX_HEAD_DIM = 128;

// q (B, T, H, G, Nq, D) and k (B, T, H, G, Nk, D): H heads, G windows; strides of batch, frame, head, window, token.
// Row statistics (B, T, H, G, Nq): A = exp2(logit scale log2(e) - row_max) row_norm.
// dq and dk are contiguous, null if not needed.
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

// Pairs of maps (first[p], second[p + shift]) for p < P. Pairs p, p + step, p + 2 step ... form a chain: the second map
// of one pair is the first map of the next. For a clip, first and second are the same frames and shift = step = lag; in
// pair form they are two sets, shift = 0 and step = P. Z is 1 for mean_map, else H.
struct Problem {
  Frames first, second;
  Dtype dtype;
  bool mean_map, mean;  // the mean over the heads' maps; over the heads' flows
  int B, T, H, G, Nq, Nk, D, P, shift, step, Z;
  float scale;  // |scale of the logits| * log2(e)
  bool negate;  // whether the scale is negative
  float slope;  // the scale of the logits, for gradients
  float inv_temperature;
  float base;      // the flow of identical frames: Nq / Nk, or 0 if centred
  float* e_sum;    // (B, P, Z, G, Nq): sum_j expm1(|A_ij - A'_ij| / temperature)
  float* partial;  // scratch memory of the forward, `partial_floats` floats
  float* flow;     // (B, P, H, G, Nk), or (B, P, G, Nk) with a head reduction
  // Backward only.
  const float* dflow;  // minus its mean over Nk, for the flow of every head, (B, P, Z, G, Nk)
  float* slopes;       // coefficients of every row, (B, P, Z, G, Nq) each: see backward.cu
  float* deltas;
  float* rho;
  float* next_rho;
  float* head_rho;  // (B, T, H, G, Nq), for mean_map
};

// The properties of a GPU that plans depend on.
struct Device {
  int multiprocessors;
  int shared_bytes;  // that one block can use
};

// Return null, or an error message with static lifetime. Launches are asynchronous; `stream` is a cudaStream_t.
const char* forward(const Problem& problem, const Device& device, void* stream);
const char* backward(const Problem& problem, const Device& device, void* stream);
int64_t partial_floats(const Problem& problem, const Device& device);
std::string describe(const Problem& problem, const Device& device);  // describes the plan

}  // namespace amflow_cuda
