// The motion operator on raw pointers: products with the change of attention maps.
#pragma once

#include "am_flow.h"

namespace amflow {

// Rows of the queries' or of the keys' side, (B, P, H, G, N, C). Strides count elements; the last dimension is
// contiguous.
struct Rows {
  const void* data = nullptr;
  Dtype dtype;
  int64_t stride[5] = {};
};

// With the operator op, M or P of every pair, the product is op v (to the queries) or op^T u (to the keys). The forward
// has x on one side and makes y on the other. The backward has x on one and dy on the other side: dx is the product
// that goes to the side of x, and u v^T is the gradient of op.
struct MatmulProblem : Problem {
  bool softmax;  // P instead of M
  bool to_keys;
  int64_t C;
  Rows u, v;  // of the queries, of the keys
  void* out;  // y, or in the backward dx or null; contiguous
  Dtype out_dtype;
};

struct MatmulKernels {
  Pass<MatmulProblem> forward, backward;
};

namespace avx2 { extern const MatmulKernels matmul; }
namespace avx512 { extern const MatmulKernels matmul; }
namespace avx512_bf16 { extern const MatmulKernels matmul; }

}  // namespace amflow
