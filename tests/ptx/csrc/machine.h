// The machine: a block of warps of 32 lanes, their registers, and the table of instructions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i16 = int16_t;
using i32 = int32_t;
using i64 = int64_t;

constexpr int LANES = 32;
constexpr int ALL = 255;         // in place of a lane: several, or the warp together
constexpr u32 LANE_CODES = 256;  // a clock times this, and a lane, make one number
constexpr u32 LAST_TIME = (1u << 24) - (1u << 20);

// Numbered as FAULTS in machine.py.
enum class Kind : i32 { race, uninitialised, bounds, misaligned, barrier, async_copy };

struct Fault {
  Kind kind;
  int lane;  // -1 or ALL: the whole warp
  std::string message;
};

[[noreturn]] void fail(Kind kind, int lane, const char* format, ...) __attribute__((format(printf, 3, 4)));

// A register (where it lies in the register file, and its number; 0 for constants), with the displacement of an address
// in `value`; or an immediate, a label or a parameter's offset in `value`.
struct Operand {
  u32 offset, number;
  i64 value;
};

struct Instruction {
  u32 opcode, first;        // its first operand
  u16 targets, operands;    // it writes the first `targets` of its operands
  u32 guard, guard_offset;  // the register of its predicate, NO_GUARD if it has none
  u32 negated;
};

constexpr u32 NO_GUARD = ~0u;

// Lanes of a warp that are at the same instruction.
struct Path {
  u32 pc, lanes;
  u32 caller;  // where to go on when the function returns; 0 in the kernel
};

struct Block;

struct Copy {  // one lane's cp.async
  u32 to, bytes, group;
  int lane;
  u8 data[16];
};

struct Range {  // of shared memory
  u32 address, bytes;
};

struct Product {  // a wgmma that has not been waited for
  u32 group;
  std::vector<Range> reads;
  std::vector<u32> accumulators;  // numbers of registers
};

struct Warp {
  Block* block;
  int index;
  u32 started;              // the lanes that it has
  std::vector<Path> paths;  // with ascending `pc` from the last to the first: the last one runs
  u8* file;                 // registers: 4 bytes of a predicate, 32 lanes of the others
  std::vector<u32> ready;   // by register: the lanes in which it has been written, and not with garbage
  u32 garbage;              // the lanes in which this instruction's result is that of a register never written
  std::vector<u8> busy;     // by register: an asynchronous wgmma uses it
  std::vector<u32> clock;   // by warp: how much of its past this warp knows, by barriers
  std::vector<Copy> copies;
  u32 groups[LANES];        // by lane: how many groups of copies it has committed
  int barrier;              // at which it waits, or -1
  u32 expected;             // warps that it waits for
  std::vector<u32> fenced;  // what of that was there when a fence.proxy.async in its past was executed
  std::vector<Product> products;
  u32 product_groups;     // how many groups of products it has committed
  bool registers_fenced;  // by wgmma.fence since the last wait for products

  template <class T>
  const T* get(const Operand& o) const {
    return reinterpret_cast<const T*>(file + o.offset);
  }

  template <class T>
  void set(const Operand& o, const T* values, u32 lanes) {
    T* to = reinterpret_cast<T*>(file + o.offset);
    if (lanes == ~0u) {
      std::memcpy(to, values, LANES * sizeof(T));
    } else {
      for (int l = 0; l < LANES; ++l) to[l] = lanes >> l & 1 ? values[l] : to[l];
    }
  }

  void set_predicate(const Operand& o, u32 values, u32 lanes) {
    u32* to = reinterpret_cast<u32*>(file + o.offset);
    *to = (values & lanes) | (*to & ~lanes);
  }

  // For instructions that all lanes execute together.
  void require_all(u32 lanes, const char* what) const {
    if (lanes != started)
      fail(Kind::barrier, -1, "%s by lanes %08x of a warp whose lanes are %08x", what, lanes, started);
  }

  void tick() { ++clock[index]; }

  // Whether what a thread did at its warp's `time` comes before what a lane of this warp does now: it is the same
  // thread, or there was a barrier between.
  bool knows(u32 time, int other_warp, int other_lane, int lane) const {
    return other_warp == index ? (other_lane == lane && lane != ALL) || time < clock[index] : time <= clock[other_warp];
  }
};

// Shared memory is watched in units of two bytes.
struct Unit {
  u32 time;  // the writer's own clock when it wrote
  u8 warp, lane;
  bool written, pending;
};

struct SharedMemory {
  u32 size;
  int warps;
  std::vector<u8> bytes;
  std::vector<Unit> units;
  std::vector<u32> reads;  // by unit and warp: that warp's own clock when it last read it, and the lane, by LANE_CODES

  void check(u32 address, u32 size, u32 alignment, int lane) const;
  const u8* read(const Warp& warp, int lane, u32 address, u32 size);
  const u8* read_products(const Warp& warp, u32 address, u32 size);  // by wgmma
  void write(const Warp& warp, int lane, u32 address, u32 size, const void* from);
  void check_reads(const Warp& warp, int lane, u32 unit, bool changes) const;
  void begin_copy(const Warp& warp, int lane, u32 address, u32 size);
  void end_copy(const Warp& warp, const Copy& copy);
};

constexpr u32 SHARED_BASE = 1024;  // the address of a block's shared memory

// Global memory is watched in units of two bytes. Blocks are numbered from 1; 0: none; SEVERAL: more than one.
struct GlobalUnit {
  u32 write_block, read_block;
  u32 write_time, read_time;      // the own clock of the warp that did so last
  u16 write_thread, read_thread;  // in their block
};

constexpr u32 SEVERAL = ~0u;

// A tensor.
struct Region {
  u64 address, size;
  u8* shadow;  // by byte: whether it has been written; null: all has
  const char* name;
  GlobalUnit* units;
};

struct GlobalMemory {
  std::vector<Region> regions;
  size_t last = 0;

  Region& find(u64 address, u32 size, u32 alignment, int lane);
  const u8* read(const Warp& warp, int lane, u64 address, u32 size, u32 alignment);
  void write(const Warp& warp, int lane, u64 address, u32 size, u32 alignment, const void* from);
};

// Numbered as COUNTERS in machine.py.
enum Counter { SHARED_WAVEFRONTS, SHARED_CONFLICTS, GLOBAL_SECTORS_READ, GLOBAL_SECTORS_WRITTEN, COUNTERS };

struct Block {
  u32 number;  // from 0
  u32 index[3], threads[3], grid[3];
  const u8* parameters;
  u32 parameter_bytes;
  u64 seed;
  SharedMemory shared;
  GlobalMemory* global;
  std::vector<Warp> warps;
  u64* counters;
};

using Handler = void (*)(Warp& warp, const Operand* o, u32 lanes);

// What an instruction does with registers that were never written. Reductions of Triton shuffle and add such registers
// in lanes whose results nothing uses.
enum class Unwritten : u8 {
  fault,
  spread,   // its result counts as never written in these lanes
  handled,  // its first source: the handler says in which lanes, by `Warp::garbage`
};

// The signature has a letter for each operand, those that are written before the "=":
// p: predicate; h, w, d: register of 16, 32, 64 bits; s, g: address in shared, global memory; P: in the parameters;
// i: immediate; L: label; a: a register of 32 bits that the handler checks itself, with its number in `value`.
struct Opcode {
  std::string name, signature;
  Handler handler;
  Unwritten unwritten = Unwritten::fault;
};

std::vector<Opcode>& opcodes();

void set_error_seed(u64 seed);  // of the approximations in the run that begins

void add_arithmetic();
void add_memory();
void add_control();
void add_products();

// An instruction that computes each lane by itself. Its signature is that of the function.
template <class T>
constexpr char letter() {
  return std::is_same_v<T, bool> ? 'p' : sizeof(T) == 2 ? 'h' : sizeof(T) == 4 ? 'w' : 'd';
}

template <class T>
T lane_of(const u8* from, int lane) {
  if constexpr (std::is_same_v<T, bool>) return *reinterpret_cast<const u32*>(from) >> lane & 1;
  else return reinterpret_cast<const T*>(from)[lane];
}

template <class F, class D, class... S, size_t... N>
void run_lanes(Warp& warp, const Operand* o, u32 lanes, std::index_sequence<N...>) {
  const u8* from[] = {warp.file + o[1 + N].offset...};
  const F f;
  if constexpr (std::is_same_v<D, bool>) {
    u32 result = 0;
    for (int l = 0; l < LANES; ++l) result |= u32{f(lane_of<S>(from[N], l)...)} << l;
    warp.set_predicate(o[0], result, lanes);
  } else {
    D result[LANES];
    for (int l = 0; l < LANES; ++l) result[l] = f(lane_of<S>(from[N], l)...);
    warp.set(o[0], result, lanes);
  }
}

template <class F, class D, class... S>
void add_lanes(const std::string& name, F, D (F::*)(S...) const) {
  const Handler handler = [](Warp& warp, const Operand* o, u32 lanes) {
    run_lanes<F, D, S...>(warp, o, lanes, std::index_sequence_for<S...>());
  };
  opcodes().push_back({name, std::string{letter<D>(), '='} + std::string{letter<S>()...}, handler});
}

template <class F>
void each(const std::string& name, F f) {
  add_lanes(name, f, &F::operator());
}

template <class F>
void each_spreading(const std::string& name, F f) {
  each(name, f);
  opcodes().back().unwritten = Unwritten::spread;
}

inline void whole(const std::string& name, const std::string& signature, Handler handler,
                  Unwritten unwritten = Unwritten::fault) {
  opcodes().push_back({name, signature, handler, unwritten});
}

// Calls f(lane) for each of the lanes.
template <class F>
void for_lanes(u32 lanes, F f) {
  for (; lanes; lanes &= lanes - 1) f(__builtin_ctz(lanes));
}

template <class To, class From>
To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

// A number that looks random, the same for the same arguments.
inline u64 mix(u64 seed, u64 x) {
  x += seed * 0x9e3779b97f4a7c15 + 0x632be59bd9b4e019;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return x ^ x >> 31;
}

}  // namespace ptx
