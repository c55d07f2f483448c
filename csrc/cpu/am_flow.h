// Interface of the CPU kernels, on raw pointers. Strides count elements; the last dimension is contiguous.
#pragma once

#include <cstdint>

namespace amflow {

enum class Dtype : int { f32, bf16, f16 };
enum class Reduction : int { none, mean, mean_map };

// q (B, T, H, G, Nq, D) and k (B, T, H, G, Nk, D): H heads, G windows. dq and dk are contiguous, null if not needed.
struct Frames {
  const void* q = nullptr;
  const void* k = nullptr;
  int64_t q_stride[5] = {};
  int64_t k_stride[5] = {};
  void* dq = nullptr;
  void* dk = nullptr;
};

// Pairs of maps: ((q, k)[t], (q, k)[t + lag]) of frames[0], or, in pair form, (frames[0][p], frames[1][p]).
struct Problem {
  Frames frames[2];
  bool pair_form, center;
  Dtype dtype;
  Reduction reduction;
  int64_t B, T, H, G, Nq, Nk, D, lag;
  float scale, inv_temperature;
  float* flow;         // (B, P, H, G, Nk), or (B, P, G, Nk) with a head reduction; contiguous
  const float* dflow;  // same shape; backward only
};

// How a problem is divided into work items: results have the same bits for any number of threads.
//
// A chain is a sequence of frames in which every two neighbours form a pair: each map is computed once per chain. A
// strip is a few vectors of queries against all keys. A work item is one (batch, head, window, chain), a group of its
// strips and a part of its frames.
//
// Partial sums are added in the order of strips and groups, which depend only on the problem. Parts add nothing to each
// other: a forward's part owns pairs, and a backward's part owns frames, whose gradients it computes from the pairs on
// both sides. Where parts meet, both compute the same maps, so there are no more parts than the threads need.
struct Plan {
  int64_t heads;                    // heads that are separate items (1 for mean_map)
  int64_t map_heads;                // heads that are averaged in one map (H for mean_map)
  int64_t chains, chain_frames;     // frames of the longest chain
  int64_t parts;                    // of a chain
  bool owns_frames;                 // parts own frames, not pairs
  int64_t item_frames, own_frames;  // of the longest item: frames that it reads, frames that it may own
  int64_t strips, strip_vectors;    // strips of one map; vectors in all of them together
  int64_t groups;                   // of strips
  int64_t items;
  int64_t blocks, key_rows, d_cols;  // key blocks; Nk and D, padded
  int64_t scratch;                   // floats that each worker needs
  int64_t summed_heads;              // heads that are added into one result (H for the forward of `mean`)
  int64_t sums;                      // results that items are added into
  int64_t sum_floats;                // memory of one sum that can't be accumulated in the result itself
};

// The part that an item adds to a sum: parts are added in the order of their positions.
struct ReductionSlot {
  int64_t sum, position;
};

// A pass over a problem. `run` may be called for the items in any order and on any thread. `finish` follows with the
// same scratch, once all items with a lower position in the same sum have finished.
template <class Problem>
struct Pass {
  Plan (*plan)(const Problem&, int64_t threads);
  ReductionSlot (*slot)(const Problem&, const Plan&, int64_t item);
  void (*run)(const Problem&, const Plan&, int64_t item, float* scratch);
  void (*finish)(const Problem&, const Plan&, int64_t item, float* scratch, float* sum);
};

// The kernels for one instruction set.
struct Kernels {
  const char* name;
  Pass<Problem> forward, backward;
};

namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx512_bf16 { extern const Kernels kernels; }
namespace neon { extern const Kernels kernels; }
namespace neon_bf16 { extern const Kernels kernels; }

}  // namespace amflow
