// Interface of the motion operator's CPU kernels, on raw pointers: products with the change of attention maps.
#pragma once

#include "am_flow.h"

namespace amflow {

// One row per query or per key, (B, P, H, G, N, C). Strides count elements; the last dimension is contiguous.
struct Rows {
  const void* data = nullptr;
  Dtype dtype;
  int64_t stride[5] = {};
};

// Let op be M or P of a pair, u have a row per query and v a row per key. The product is op v (a row per query) or
// op^T u (a row per key). The forward multiplies x, which is u or v, into y. In the backward x and dy are u and v: the
// product is dx, with a row wherever x has one, and the gradient of op is u v^T.
struct MatmulProblem : Problem {
  bool softmax;  // P instead of M
  bool to_keys;  // the product is op^T u
  int64_t C;
  Rows u, v;  // one row per query; one row per key
  void* out;  // y, or in the backward dx or null; contiguous
  Dtype out_dtype;
};

struct MatmulKernels {
  Pass<MatmulProblem> forward, backward;
};

namespace avx2 { extern const MatmulKernels matmul; }
namespace avx512 { extern const MatmulKernels matmul; }
namespace avx512_bf16 { extern const MatmulKernels matmul; }
namespace neon { extern const MatmulKernels matmul; }
namespace neon_bf16 { extern const MatmulKernels matmul; }

}  // namespace amflow
