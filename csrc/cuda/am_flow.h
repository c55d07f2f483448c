// Interface of the CUDA kernels, on raw pointers and a stream. Strides count elements; the last dimension has stride 1.
#pragma once

#include <cstdint>
#include <string>

namespace amflow_cuda {

enum class Dtype : int { f32, bf16, f16 };

constexpr int MAX_TOKENS = 640;
constexpr int MAX_HEAD_DIM = 128;

// q (B, T, H, G, Nq, D) and k (B, T, H, G, Nk, D): H heads, G windows; strides of batch, frame, head, window, token.
struct Frames {
  const void* q;
  const void* k;
  int64_t q_stride[5];
  int64_t k_stride[5];
};

// Pairs of maps (first[p], second[p + shift]) for p < P. Pairs p, p + step, p + 2 step ... form a chain: the second map
// of one pair is the first map of the next. For a clip, first and second are the same frames and shift = step = lag; in
// pair form they are two sets, shift = 0 and step = P. Z is 1 for mean_map, else H.
struct Problem {
  Frames first, second;
  Dtype dtype;
  bool mean_map, mean;  // the mean over the heads' maps; over the heads' flows
  int B, H, G, Nq, Nk, D, P, shift, step, Z;
  float scale;  // |scale of the logits| * log2(e)
  bool negate;  // whether the scale is negative
  float inv_temperature;
  float base;      // the flow of identical frames: Nq / Nk, or 0 if centred
  float* partial;  // scratch memory, `partial_floats` floats
  float* flow;     // (B, P, H, G, Nk), or (B, P, G, Nk) with a head reduction
};

// The properties of a GPU that plans depend on.
struct Device {
  int multiprocessors;
  int shared_bytes;  // that one block can use
};

// Returns null, or an error message with static lifetime. Launches are asynchronous; `stream` is a cudaStream_t.
const char* forward(const Problem& problem, const Device& device, void* stream);
int64_t partial_floats(const Problem& problem, const Device& device);
std::string describe(const Problem& problem, const Device& device);  // describes the plan

}  // namespace amflow_cuda
