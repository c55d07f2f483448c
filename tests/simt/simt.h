// Emulates a GPU on the host, for tests: runs the kernels of csrc/cuda lane by lane. Implements device.h.
//
// Every thread of a block is a fiber, which runs until a shuffle, a matrix product or a barrier and waits there for the
// other threads of its warp or barrier. These errors abort the launch with a message: lanes of a warp that wait at
// different operations, or never reach one; barriers that not all threads reach; addresses in shared memory that are
// misaligned or out of range; and reads of shared memory that was never written, or before an asynchronous copy to it
// has been waited for. Copies arrive when they are waited for, not before.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, blockDim;

namespace amflow_cuda {

using std::max;
using std::min;
using Shared = uint32_t;

// 16-bit floats, which convert to float32.
struct bf16 {
  uint16_t raw;
  explicit operator float() const { return std::bit_cast<float>(uint32_t{raw} << 16); }
};

struct f16 {
  uint16_t raw;
  explicit operator float() const {
    _Float16 x;
    std::memcpy(&x, &raw, 2);
    return static_cast<float>(x);
  }
};

namespace simt {

constexpr int WARP = 32;
constexpr size_t STACK = 256 << 10;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Byte : uint8_t { unwritten, in_flight, written };

struct Copy {
  Shared to;
  const void* from;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  std::string waiting_at;  // the operation and its argument, empty if the fiber can run
  std::vector<uint32_t> inputs, outputs;
  int participants = 0;  // threads that take part in the barrier
  std::vector<Copy> copies;
};

struct Block {
  std::vector<char> memory;
  std::vector<Byte> state;
  std::vector<Fiber> fibers;
  ucontext_t scheduler;
  int current = 0;
  std::exception_ptr failure;
  std::function<void()> body;
};

inline Block* block = nullptr;

inline void fail(const std::string& what) {
  throw Error(what + " (block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(threadIdx.x) + ")");
}

// Suspends this thread until all participants have reached `operation`; `participants` is 0 for a whole warp.
inline const std::vector<uint32_t>& wait_for(const std::string& operation, std::vector<uint32_t> inputs,
                                             int participants = 0) {
  Fiber& fiber = block->fibers[block->current];
  fiber.waiting_at = operation;
  fiber.inputs = std::move(inputs);
  fiber.participants = participants;
  swapcontext(&fiber.context, &block->scheduler);
  return fiber.outputs;
}

inline char* access(Shared address, int bytes, bool read) {
  if (address % bytes != 0) fail("shared memory: " + std::to_string(bytes) + " bytes at " + std::to_string(address));
  if (address + bytes > block->memory.size())
    fail("shared memory: address " + std::to_string(address) + " of " + std::to_string(block->memory.size()));
  for (int i = 0; i < bytes; ++i) {
    Byte& state = block->state[address + i];
    if (read && state != Byte::written)
      fail("shared memory: address " + std::to_string(address + i) +
           (state == Byte::unwritten ? " is read before it was written" : " is read before its copy was waited for"));
    if (!read) state = Byte::written;
  }
  return block->memory.data() + address;
}

inline void run_fiber() {
  try {
    block->body();
  } catch (...) {
    block->failure = std::current_exception();
  }
  block->fibers[block->current].done = true;
  swapcontext(&block->fibers[block->current].context, &block->scheduler);
}

// Computes the outputs of a warp's lanes from their inputs.
using Operation = void (*)(std::vector<Fiber*>& lanes, int argument);

inline std::map<std::string, Operation>& operations() {
  static std::map<std::string, Operation> table;
  return table;
}

// Resumes the threads whose warp or barrier is complete. Returns whether there were any.
inline bool resume_complete() {
  Block& b = *block;
  bool any = false;
  const int threads = static_cast<int>(b.fibers.size());
  for (int first = 0; first < threads; first += WARP) {
    std::vector<Fiber*> lanes;
    for (int i = first; i < first + WARP; ++i) lanes.push_back(&b.fibers[i]);
    const std::string& operation = lanes[0]->waiting_at;
    if (operation.empty() || lanes[0]->participants) continue;
    if (!std::all_of(lanes.begin(), lanes.end(), [&](Fiber* x) { return x->waiting_at == operation; })) continue;
    const size_t space = operation.find(' ');
    operations().at(operation.substr(0, space))(lanes, std::atoi(operation.c_str() + space + 1));
    for (Fiber* x : lanes) x->waiting_at.clear();
    any = true;
  }
  std::map<std::string, std::vector<Fiber*>> barriers;
  for (Fiber& x : b.fibers)
    if (x.participants) barriers[x.waiting_at].push_back(&x);
  for (auto& [name, participants] : barriers) {
    const int expected = participants[0]->participants;
    for (Fiber* x : participants)
      if (x->participants != expected) throw Error(name + ": its threads do not agree on how many they are");
    if (static_cast<int>(participants.size()) == expected) {
      for (Fiber* x : participants) {
        x->waiting_at.clear();
        x->participants = 0;
      }
      any = true;
    }
  }
  return any;
}

inline void run_block(int threads, int shared, const std::function<void()>& body) {
  static Block reused;  // allocates stacks only once
  Block& b = reused;
  block = &b;
  b.memory.assign(shared, '\xff');
  b.state.assign(shared, Byte::unwritten);
  b.body = body;
  b.failure = nullptr;
  b.fibers.resize(threads);
  for (Fiber& x : b.fibers) {
    if (!x.stack) x.stack.reset(new char[STACK]);
    x.done = false;
    x.waiting_at.clear();
    x.participants = 0;
    x.copies.clear();
    getcontext(&x.context);
    x.context.uc_stack.ss_sp = x.stack.get();
    x.context.uc_stack.ss_size = STACK;
    x.context.uc_link = nullptr;
    makecontext(&x.context, run_fiber, 0);
  }
  for (bool forwards = blockIdx.x % 2;; forwards = !forwards) {
    bool ran = false, all = true;
    // Alternate between forward and reverse order: a missing barrier causes an error in one of them.
    for (int n = 0; n < threads; ++n) {
      const int i = forwards ? n : threads - 1 - n;
      Fiber& x = b.fibers[i];
      all = all && x.done;
      if (x.done || !x.waiting_at.empty()) continue;
      b.current = i;
      threadIdx.x = static_cast<unsigned>(i);
      swapcontext(&b.scheduler, &x.context);
      ran = true;
      if (b.failure) std::rethrow_exception(b.failure);
    }
    if (all) return;
    if (!resume_complete() && !ran) {
      std::string message = "threads wait for others that do not come:";
      std::map<std::string, int> waiting;
      for (Fiber& x : b.fibers) ++waiting[x.done ? "finished" : x.waiting_at];
      for (const auto& [what, count] : waiting) message += " " + std::to_string(count) + " at '" + what + "'";
      throw Error(message + " (block " + std::to_string(blockIdx.x) + ")");
    }
  }
}

// The value that tensor cores read from 32 bits of a tf32 operand.
inline float tf32(uint32_t raw) { return std::bit_cast<float>(raw & 0xffffe000u); }

// acc (16, 8) += a (16, K) b (8, K)^T, where a register holds `per` elements and value(register, n) is the n-th.
template <class Value>
void multiply(std::vector<Fiber*>& lanes, int per, const Value& value) {
  const int K = 8 * per;
  float a[16][16], b[8][16];
  for (int lane = 0; lane < WARP; ++lane) {
    const auto& x = lanes[lane]->inputs;
    for (int i = 0; i < 4; ++i)
      for (int n = 0; n < per; ++n) a[lane / 4 + i % 2 * 8][(lane % 4 + i / 2 * 4) * per + n] = value(x[4 + i], n);
    for (int i = 0; i < 2; ++i)
      for (int n = 0; n < per; ++n) b[lane / 4][(lane % 4 + i * 4) * per + n] = value(x[8 + i], n);
  }
  for (int lane = 0; lane < WARP; ++lane) {
    lanes[lane]->outputs.resize(4);
    for (int i = 0; i < 4; ++i) {
      float sum = std::bit_cast<float>(lanes[lane]->inputs[i]);
      for (int k = 0; k < K; k += 4 * per) {  // 4 * per products are added at once, and the sum is rounded toward 0
        double exact = sum;
        for (int n = k; n < k + 4 * per; ++n)
          exact += static_cast<double>(a[lane / 4 + i / 2 * 8][n]) * b[lane % 4 * 2 + i % 2][n];
        sum = static_cast<float>(exact);
        if (std::abs(sum) > std::abs(exact)) sum = std::nextafter(sum, 0.f);
      }
      lanes[lane]->outputs[i] = std::bit_cast<uint32_t>(sum);
    }
  }
}

inline const bool registered = [] {
  operations()["shuffle"] = [](std::vector<Fiber*>& lanes, int mask) {
    for (int i = 0; i < WARP; ++i) lanes[i]->outputs = lanes[i ^ mask]->inputs;
  };
  operations()["ldmatrix"] = [](std::vector<Fiber*>& lanes, int) {
    for (int i = 0; i < WARP; ++i) {
      lanes[i]->outputs.resize(4);
      for (int matrix = 0; matrix < 4; ++matrix) {
        const Shared row = lanes[matrix * 8 + i / 4]->inputs[0];
        if (row % 16 != 0) throw Error("ldmatrix: a row at " + std::to_string(row));
        std::memcpy(&lanes[i]->outputs[matrix], access(row + i % 4 * 4, 4, true), 4);
      }
    }
  };
  operations()["mma.bf16"] = [](std::vector<Fiber*>& lanes, int) {
    multiply(lanes, 2, [](uint32_t x, int n) { return static_cast<float>(bf16{static_cast<uint16_t>(x >> 16 * n)}); });
  };
  operations()["mma.f16"] = [](std::vector<Fiber*>& lanes, int) {
    multiply(lanes, 2, [](uint32_t x, int n) { return static_cast<float>(f16{static_cast<uint16_t>(x >> 16 * n)}); });
  };
  operations()["mma.tf32"] = [](std::vector<Fiber*>& lanes, int) {
    multiply(lanes, 1, [](uint32_t x, int) { return tf32(x); });
  };
  return true;
}();

inline void matrix_product(const char* name, float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  std::vector<uint32_t> inputs;
  for (float x : acc) inputs.push_back(std::bit_cast<uint32_t>(x));
  inputs.insert(inputs.end(), {a[0], a[1], a[2], a[3], b0, b1});
  const auto& outputs = wait_for(name, std::move(inputs));
  for (int i = 0; i < 4; ++i) acc[i] = std::bit_cast<float>(outputs[i]);
}

}  // namespace simt

inline Shared shared_memory() { return 0; }
inline int warp_id() { return static_cast<int>(threadIdx.x / simt::WARP); }
inline int lane_id() { return static_cast<int>(threadIdx.x % simt::WARP); }

inline void store_shared(Shared to, float x) { std::memcpy(simt::access(to, 4, false), &x, 4); }

inline void store_shared(Shared to, float x, float y) {
  const float both[2] = {x, y};
  std::memcpy(simt::access(to, 8, false), both, 8);
}

inline void store_shared(Shared to, const uint32_t (&x)[4]) { std::memcpy(simt::access(to, 16, false), x, 16); }

inline void store_shared(Shared to, const void* x) { std::memcpy(simt::access(to, 8, false), &x, 8); }

inline void* load_pointer(Shared from) {
  void* x;
  std::memcpy(&x, simt::access(from, 8, true), 8);
  return x;
}

inline float load_shared(Shared from) {
  float x;
  std::memcpy(&x, simt::access(from, 4, true), 4);
  return x;
}

inline void load_shared(Shared from, float& x, float& y) {
  float both[2];
  std::memcpy(both, simt::access(from, 8, true), 8);
  x = both[0], y = both[1];
}

inline void load_shared(Shared from, float (&x)[4]) { std::memcpy(x, simt::access(from, 16, true), 16); }

inline void copy_async(Shared to, const void* from) {
  simt::access(to, 16, false);
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) simt::fail("cp.async: a misaligned source");
  std::fill_n(simt::block->state.begin() + to, 16, simt::Byte::in_flight);
  simt::block->fibers[simt::block->current].copies.push_back({to, from});
}

inline void wait_copies() {
  for (const simt::Copy& copy : simt::block->fibers[simt::block->current].copies) {
    std::memcpy(simt::access(copy.to, 16, false), copy.from, 16);
  }
  simt::block->fibers[simt::block->current].copies.clear();
}

inline void sync_block() { simt::wait_for("barrier 0", {}, static_cast<int>(blockDim.x)); }
inline void sync_some(int barrier, int threads) { simt::wait_for("barrier " + std::to_string(barrier), {}, threads); }

inline float shuffle_xor(float x, int lanes) {
  return std::bit_cast<float>(simt::wait_for("shuffle " + std::to_string(lanes), {std::bit_cast<uint32_t>(x)})[0]);
}

inline float flush_subnormal(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.f, x) : x; }

// y with an error of up to `most` units in the last place, like the approximations of a GPU. The error is a function of
// x. Powers of 2, infinities and NaN stay exact.
inline float perturbed(float y, float x, int most) {
  const auto raw = std::bit_cast<uint32_t>(y), hash = std::bit_cast<uint32_t>(x) * 0x9e3779b1u >> 16;
  if ((raw & 0x7fffffu) == 0) return y;
  return flush_subnormal(std::bit_cast<float>(raw + hash % (2 * most + 1) - most));
}

// Subnormal inputs and results are flushed to 0.
inline float exp2_fast(float x) { return perturbed(flush_subnormal(std::exp2(flush_subnormal(x))), x, 2); }
inline float reciprocal(float x) { return perturbed(flush_subnormal(1.f / flush_subnormal(x)), x, 1); }

inline void load_matrices(uint32_t (&x)[4], Shared from) {
  const auto& outputs = simt::wait_for("ldmatrix 0", {from});
  for (int i = 0; i < 4; ++i) x[i] = outputs[i];
}

inline void multiply(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bf16) {
  simt::matrix_product("mma.bf16 0", acc, a, b0, b1);
}

inline void multiply(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, f16) {
  simt::matrix_product("mma.f16 0", acc, a, b0, b1);
}

template <class X>
void multiply_first(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, X) {
  for (float& x : acc) x = 0;
  multiply(acc, a, b0, b1, X{});
}

inline void multiply_tf32(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  simt::matrix_product("mma.tf32 0", acc, a, b0, b1);
}

inline uint32_t as_bits(float x) { return std::bit_cast<uint32_t>(x); }
inline float as_float(uint32_t x) { return std::bit_cast<float>(x); }

template <class Device, class Kernel, class... Arguments>
const char* launch(const Device&, Kernel* kernel, int64_t blocks, int threads, int shared, void*,
                   const Arguments&... arguments) {
  static std::string error;
  try {
    blockDim.x = static_cast<unsigned>(threads);
    for (int64_t i = 0; i < blocks; ++i) {
      blockIdx.x = static_cast<unsigned>(i);
      simt::run_block(threads, shared, [&] { kernel(arguments...); });
    }
  } catch (const std::exception& failure) {
    error = failure.what();
    return error.c_str();
  }
  return nullptr;
}

}  // namespace amflow_cuda
