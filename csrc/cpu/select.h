// Chooses the kernels for this CPU.
#pragma once

#include "am_flow.h"
#include "matmul.h"

#ifdef __aarch64__
#ifdef __APPLE__
#include <sys/sysctl.h>
#else
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#endif

namespace amflow {

#ifdef __aarch64__

// Whether the CPU has bf16 dot products.
inline bool has_bf16() {
#ifdef __APPLE__
  int has = 0;
  size_t size = sizeof has;
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) == 0 && has;
#else
  return getauxval(AT_HWCAP2) & HWCAP2_BF16;
#endif
}

// Width of the vectors to use, in bits: always 128.
inline const Kernels& kernels(int64_t) { return has_bf16() ? neon_bf16::kernels : neon::kernels; }
inline const MatmulKernels& matmul_kernels(int64_t) { return has_bf16() ? neon_bf16::matmul : neon::matmul; }

#else

// Width of the vectors to use, in bits: 256 or 512.
inline const Kernels& kernels(int64_t vector_bits) {
  if (vector_bits == 256) return avx2::kernels;
  return __builtin_cpu_supports("avx512bf16") ? avx512_bf16::kernels : avx512::kernels;
}

inline const MatmulKernels& matmul_kernels(int64_t vector_bits) {
  if (vector_bits == 256) return avx2::matmul;
  return __builtin_cpu_supports("avx512bf16") ? avx512_bf16::matmul : avx512::matmul;
}

#endif

}  // namespace amflow
