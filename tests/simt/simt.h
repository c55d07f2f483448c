// A GPU for a host compiler, for tests alone: runs the kernels of csrc/cuda lane by lane, on names as in its device.h.
//
// Every thread of a block is a fiber. It runs until a shuffle, a matrix product or a barrier, where it waits for the
// others of its warp or barrier. Errors, which abort the launch with a text: warps whose lanes meet in different
// operations or not at all, barriers that not all reach, addresses beyond shared memory, misaligned ones, and reads of
// shared memory that nothing was written to, or that an asynchronous copy has not arrived in. Copies arrive when they
// are waited for, and not before.
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

// 16-bit numbers, by what they are as float32.
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

enum class Byte : uint8_t { unwritten, on_its_way, written };

struct Copy {
  Shared to;
  const void* from;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  std::string waits;        // the operation and what it was given, empty if it can go on
  std::vector<uint32_t> given, taken;
  int members = 0;          // that a barrier is for
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

// Suspends this thread until `operation` was done for all who take part. `members` is 0 for those of its warp.
inline const std::vector<uint32_t>& wait_for(const std::string& operation, std::vector<uint32_t> given, int members = 0) {
  Fiber& fiber = block->fibers[block->current];
  fiber.waits = operation;
  fiber.given = std::move(given);
  fiber.members = members;
  swapcontext(&fiber.context, &block->scheduler);
  return fiber.taken;
}

inline char* at(Shared address, int bytes, bool read) {
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

// What the lanes of a warp get, of what they gave.
using Operation = void (*)(std::vector<Fiber*>& lanes, int argument);

inline std::map<std::string, Operation>& operations() {
  static std::map<std::string, Operation> found;
  return found;
}

// Lets those go on whose warp or barrier is complete. Returns whether there were any.
inline bool release() {
  Block& b = *block;
  bool any = false;
  const int threads = static_cast<int>(b.fibers.size());
  for (int first = 0; first < threads; first += WARP) {
    std::vector<Fiber*> lanes;
    for (int i = first; i < first + WARP; ++i) lanes.push_back(&b.fibers[i]);
    const std::string& operation = lanes[0]->waits;
    if (operation.empty() || lanes[0]->members) continue;
    if (!std::all_of(lanes.begin(), lanes.end(), [&](Fiber* x) { return x->waits == operation; })) continue;
    const size_t space = operation.find(' ');
    operations().at(operation.substr(0, space))(lanes, std::atoi(operation.c_str() + space + 1));
    for (Fiber* x : lanes) x->waits.clear();
    any = true;
  }
  std::map<std::string, std::vector<Fiber*>> barriers;
  for (Fiber& x : b.fibers)
    if (x.members) barriers[x.waits].push_back(&x);
  for (auto& [name, members] : barriers) {
    const int expected = members[0]->members;
    for (Fiber* x : members)
      if (x->members != expected) throw Error(name + ": its threads do not agree on how many they are");
    if (static_cast<int>(members.size()) == expected) {
      for (Fiber* x : members) {
        x->waits.clear();
        x->members = 0;
      }
      any = true;
    }
  }
  return any;
}

inline void run_block(int threads, int shared, const std::function<void()>& body) {
  static Block kept;  // stacks are made once
  Block& b = kept;
  block = &b;
  b.memory.assign(shared, '\xff');
  b.state.assign(shared, Byte::unwritten);
  b.body = body;
  b.failure = nullptr;
  b.fibers.resize(threads);
  for (Fiber& x : b.fibers) {
    if (!x.stack) x.stack.reset(new char[STACK]);
    x.done = false;
    x.waits.clear();
    x.members = 0;
    x.copies.clear();
    getcontext(&x.context);
    x.context.uc_stack.ss_sp = x.stack.get();
    x.context.uc_stack.ss_size = STACK;
    x.context.uc_link = nullptr;
    makecontext(&x.context, run_fiber, 0);
  }
  for (bool forwards = blockIdx.x % 2;; forwards = !forwards) {
    bool ran = false, all = true;
    // In turn the first and the last warp first: what is wrong for want of a barrier shows in one of the orders.
    for (int n = 0; n < threads; ++n) {
      const int i = forwards ? n : threads - 1 - n;
      Fiber& x = b.fibers[i];
      all = all && x.done;
      if (x.done || !x.waits.empty()) continue;
      b.current = i;
      threadIdx.x = static_cast<unsigned>(i);
      swapcontext(&b.scheduler, &x.context);
      ran = true;
      if (b.failure) std::rethrow_exception(b.failure);
    }
    if (all) return;
    if (!release() && !ran) {
      std::string told = "threads wait for others that do not come:";
      std::map<std::string, int> waiting;
      for (Fiber& x : b.fibers) ++waiting[x.done ? "finished" : x.waits];
      for (const auto& [what, count] : waiting) told += " " + std::to_string(count) + " at '" + what + "'";
      throw Error(told + " (block " + std::to_string(blockIdx.x) + ")");
    }
  }
}

// Numbers as the tensor cores take them: what is in the operands' bits.
inline float tf32(uint32_t raw) { return std::bit_cast<float>(raw & 0xffffe000u); }

// acc (16, 8) += a (16, K) b (8, K)^T, where a register holds `per` numbers; `value` is one of them.
template <class Value>
void multiply(std::vector<Fiber*>& lanes, int per, const Value& value) {
  const int K = 8 * per;
  float a[16][16], b[8][16];
  for (int lane = 0; lane < WARP; ++lane) {
    const auto& x = lanes[lane]->given;
    for (int i = 0; i < 4; ++i)
      for (int n = 0; n < per; ++n)
        a[lane / 4 + i % 2 * 8][(lane % 4 + i / 2 * 4) * per + n] = value(x[4 + i], n);
    for (int i = 0; i < 2; ++i)
      for (int n = 0; n < per; ++n) b[lane / 4][(lane % 4 + i * 4) * per + n] = value(x[8 + i], n);
  }
  for (int lane = 0; lane < WARP; ++lane) {
    lanes[lane]->taken.resize(4);
    for (int i = 0; i < 4; ++i) {
      float sum = std::bit_cast<float>(lanes[lane]->given[i]);
      for (int k = 0; k < K; k += 4 * per) {  // so many at once, and rounded toward 0
        double exact = sum;
        for (int n = k; n < k + 4 * per; ++n)
          exact += static_cast<double>(a[lane / 4 + i / 2 * 8][n]) * b[lane % 4 * 2 + i % 2][n];
        sum = static_cast<float>(exact);
        if (std::abs(sum) > std::abs(exact)) sum = std::nextafter(sum, 0.f);
      }
      lanes[lane]->taken[i] = std::bit_cast<uint32_t>(sum);
    }
  }
}

inline const bool registered = [] {
  operations()["shuffle"] = [](std::vector<Fiber*>& lanes, int mask) {
    for (int i = 0; i < WARP; ++i) lanes[i]->taken = lanes[i ^ mask]->given;
  };
  operations()["ldmatrix"] = [](std::vector<Fiber*>& lanes, int) {
    for (int i = 0; i < WARP; ++i) {
      lanes[i]->taken.resize(4);
      for (int matrix = 0; matrix < 4; ++matrix) {
        const Shared row = lanes[matrix * 8 + i / 4]->given[0];
        if (row % 16 != 0) throw Error("ldmatrix: a row at " + std::to_string(row));
        std::memcpy(&lanes[i]->taken[matrix], at(row + i % 4 * 4, 4, true), 4);
      }
    }
  };
  operations()["ldmatrix.trans"] = [](std::vector<Fiber*>& lanes, int) {
    for (int i = 0; i < WARP; ++i) {
      lanes[i]->taken.resize(4);
      for (int matrix = 0; matrix < 4; ++matrix)
        for (int n = 0; n < 2; ++n) {
          const Shared row = lanes[matrix * 8 + i % 4 * 2 + n]->given[0];
          if (row % 16 != 0) throw Error("ldmatrix.trans: a row at " + std::to_string(row));
          std::memcpy(reinterpret_cast<char*>(&lanes[i]->taken[matrix]) + 2 * n, at(row + i / 4 * 2, 2, true), 2);
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
  std::vector<uint32_t> given;
  for (float x : acc) given.push_back(std::bit_cast<uint32_t>(x));
  given.insert(given.end(), {a[0], a[1], a[2], a[3], b0, b1});
  const auto& taken = wait_for(name, std::move(given));
  for (int i = 0; i < 4; ++i) acc[i] = std::bit_cast<float>(taken[i]);
}

}  // namespace simt

inline Shared shared_memory() { return 0; }
inline int warp_id() { return static_cast<int>(threadIdx.x / simt::WARP); }
inline int lane_id() { return static_cast<int>(threadIdx.x % simt::WARP); }

inline void store_shared(Shared to, float x) { std::memcpy(simt::at(to, 4, false), &x, 4); }

inline void store_shared(Shared to, float x, float y) {
  const float both[2] = {x, y};
  std::memcpy(simt::at(to, 8, false), both, 8);
}

inline void store_shared(Shared to, const uint32_t (&x)[4]) { std::memcpy(simt::at(to, 16, false), x, 16); }

inline void store_shared(Shared to, const void* x) { std::memcpy(simt::at(to, 8, false), &x, 8); }

inline void* load_pointer(Shared from) {
  void* x;
  std::memcpy(&x, simt::at(from, 8, true), 8);
  return x;
}

inline float load_shared(Shared from) {
  float x;
  std::memcpy(&x, simt::at(from, 4, true), 4);
  return x;
}

inline void load_shared(Shared from, float& x, float& y) {
  float both[2];
  std::memcpy(both, simt::at(from, 8, true), 8);
  x = both[0], y = both[1];
}

inline void load_shared(Shared from, float (&x)[4]) { std::memcpy(x, simt::at(from, 16, true), 16); }

inline void copy_async(Shared to, const void* from) {
  simt::at(to, 16, false);
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) simt::fail("cp.async: a misaligned source");
  std::fill_n(simt::block->state.begin() + to, 16, simt::Byte::on_its_way);
  simt::block->fibers[simt::block->current].copies.push_back({to, from});
}

inline void wait_copies() {
  for (const simt::Copy& copy : simt::block->fibers[simt::block->current].copies) {
    std::memcpy(simt::at(copy.to, 16, false), copy.from, 16);
  }
  simt::block->fibers[simt::block->current].copies.clear();
}

inline void sync_block() { simt::wait_for("barrier 0", {}, static_cast<int>(blockDim.x)); }
inline void sync_some(int barrier, int threads) { simt::wait_for("barrier " + std::to_string(barrier), {}, threads); }

inline float shuffle_xor(float x, int lanes) {
  return std::bit_cast<float>(simt::wait_for("shuffle " + std::to_string(lanes), {std::bit_cast<uint32_t>(x)})[0]);
}

inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.f, x) : x; }

// Off by up to `most` units in the last place, always the same for the same x, as a GPU's are; not where y is a power of
// 2 or no number.
inline float rough(float y, float x, int most) {
  const auto raw = std::bit_cast<uint32_t>(y), hash = std::bit_cast<uint32_t>(x) * 0x9e3779b1u >> 16;
  if ((raw & 0x7fffffu) == 0) return y;
  return flushed(std::bit_cast<float>(raw + hash % (2 * most + 1) - most));
}

// They take subnormal numbers for 0.
inline float exp2_fast(float x) { return rough(flushed(std::exp2(flushed(x))), x, 2); }
inline float reciprocal(float x) { return rough(flushed(1.f / flushed(x)), x, 1); }

inline void load_matrices(uint32_t (&x)[4], Shared from) {
  const auto& taken = simt::wait_for("ldmatrix 0", {from});
  for (int i = 0; i < 4; ++i) x[i] = taken[i];
}

inline void load_matrices_transposed(uint32_t (&x)[4], Shared from) {
  const auto& taken = simt::wait_for("ldmatrix.trans 0", {from});
  for (int i = 0; i < 4; ++i) x[i] = taken[i];
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

inline void round_to(float& to, float x) { to = x; }

inline void round_to(f16& to, float x) {
  const auto half = static_cast<_Float16>(x);
  std::memcpy(&to, &half, 2);
}

// To the nearest, halves to even.
inline void round_to(bf16& to, float x) {
  const uint32_t raw = std::bit_cast<uint32_t>(x);
  to.raw = static_cast<uint16_t>(std::isnan(x) ? 0x7fff : (raw + 0x7fff + (raw >> 16 & 1)) >> 16);
}

inline uint32_t pack(float first, float second, bf16) {
  bf16 both[2];
  round_to(both[0], first);
  round_to(both[1], second);
  return both[0].raw | static_cast<uint32_t>(both[1].raw) << 16;
}

struct Pair {
  float first, second;
};

inline Pair unpack(uint32_t x, f16) {
  return {static_cast<float>(f16{static_cast<uint16_t>(x)}), static_cast<float>(f16{static_cast<uint16_t>(x >> 16)})};
}

inline uint32_t bits(float x) { return std::bit_cast<uint32_t>(x); }
inline float number(uint32_t x) { return std::bit_cast<float>(x); }

// Rounded to 10 bits, halves away from 0.
inline uint32_t to_tf32(float x) {
  const uint32_t raw = bits(x);
  return (raw & 0x7f800000u) == 0x7f800000u ? raw : (raw + 0x1000u) & 0xffffe000u;
}

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
  } catch (const std::exception& found) {
    error = found.what();
    return error.c_str();
  }
  return nullptr;
}

}  // namespace amflow_cuda
