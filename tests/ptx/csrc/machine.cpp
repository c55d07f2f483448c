// Runs the blocks of a grid one after the other, each warp up to the next barrier.

#include "machine.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>

namespace ptx {

void fail(Kind kind, int lane, const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw Fault{kind, lane, text};
}

std::vector<Opcode>& opcodes() {
  static std::vector<Opcode> table;
  if (table.empty()) {
    table.reserve(1024);
    table.push_back({"", "=", nullptr});  // so that the table isn't empty while it is being filled
    add_arithmetic();
    add_memory();
    add_control();
    add_products();
  }
  return table;
}

namespace {

// Mirrors `_Special` in machine.py: the register that has the value for each lane.
struct Special {
  u32 code, offset;
};

struct Constant {
  u32 offset, letter;
  u64 value;
};

struct Program {
  const Instruction* code;
  const Operand* operands;
  const Special* specials;
  const Constant* constants;
  u32 instructions, special_count, constant_count, registers, file_bytes;
};

struct Tensor {
  u64 address, size;
  u8* shadow;
  const char* name;
};

struct Launch {
  u32 grid[3], threads[3];
  u32 shared_bytes, parameter_bytes, region_count, padding;
  const u8* parameters;
  const Tensor* regions;
  u64 seed;
};

struct Result {
  i32 kind;  // -1: no fault
  u32 pc, block[3], warp;
  i32 lane;
  u32 padding;
  char message[512];
  u64 counters[COUNTERS];
};

// A source of numbers for shuffles.
struct Random {
  u64 seed, n = 0;
  u64 below(u64 limit) { return mix(seed, n++) % limit; }

  template <class T>
  void shuffle(std::vector<T>& items) {
    for (size_t n = items.size(); n > 1; --n) std::swap(items[n - 1], items[below(n)]);
  }
};

void set_specials(Warp& warp, const Program& program) {
  const Block& block = *warp.block;
  for (u32 n = 0; n < program.special_count; ++n) {
    u32* to = reinterpret_cast<u32*>(warp.file + program.specials[n].offset);
    const u32 kind = program.specials[n].code / 3, axis = program.specials[n].code % 3;
    for (u32 l = 0; l < LANES; ++l) {
      const u32 thread = warp.index * LANES + l, *size = block.threads;
      const u32 tid[3] = {thread % size[0], thread / size[0] % size[1], thread / size[0] / size[1]};
      const u32 of_warp[3] = {l, static_cast<u32>(warp.index), 0};
      const u32* values[] = {tid, block.threads, block.index, block.grid, of_warp};
      to[l] = values[kind][axis];
    }
  }
}

void set_constants(Warp& warp, const Program& program) {
  for (u32 n = 0; n < program.constant_count; ++n) {
    const Constant& c = program.constants[n];
    u8* to = warp.file + c.offset;
    for (int l = 0; l < LANES; ++l) {
      if (c.letter == 'h') reinterpret_cast<u16*>(to)[l] = c.value;
      if (c.letter == 'w') reinterpret_cast<u32*>(to)[l] = c.value;
      if (c.letter == 'd') reinterpret_cast<u64*>(to)[l] = c.value;
    }
    if (c.letter == 'p') *reinterpret_cast<u32*>(to) = c.value ? ~0u : 0;
  }
}

struct Machine {
  const Program& program;
  const Launch& launch;
  u64* counts;
  u32 pc = 0;            // where a fault happened
  Warp* warp = nullptr;  // and in which warp
  std::vector<Handler> handlers;
  std::vector<Unwritten> rules;
  std::vector<u32> ends;  // by warp: clocks at the end of the last block

  void run_warp(Warp& w) {
    warp = &w;
    while (!w.paths.empty() && w.barrier < 0) {
      const Path path = w.paths.back();
      pc = path.pc;
      const Instruction& i = program.code[pc];
      const Operand* o = program.operands + i.first;
      u32 lanes = path.lanes;
      if (i.guard != NO_GUARD) {
        if (lanes & ~w.ready[i.guard]) unwritten(w, i.guard, lanes, -1);
        const u32 predicate = *reinterpret_cast<const u32*>(w.file + i.guard_offset);
        lanes &= i.negated ? ~predicate : predicate;
      }
      if (lanes) {
        w.garbage = 0;
        for (int n = i.targets; n < i.operands; ++n) {
          const u32 missing = lanes & ~w.ready[o[n].number];
          if (!missing || (rules[pc] == Unwritten::handled && n == i.targets && !w.busy[o[n].number])) continue;
          if (rules[pc] != Unwritten::spread || w.busy[o[n].number]) unwritten(w, o[n].number, lanes, n);
          w.garbage |= missing;
        }
        if (!w.products.empty())
          for (int n = 0; n < i.targets; ++n)
            if (w.busy[o[n].number]) fail(Kind::async_copy, -1, "operand %d is written while a wgmma uses it", n);
        ++counts[pc];
        ++w.paths.back().pc;
        handlers[pc](w, o, lanes);
        for (int n = 0; n < i.targets; ++n) {
          u32& ready = w.ready[o[n].number];
          ready = (ready | lanes) & ~w.garbage;
        }
      } else {
        ++w.paths.back().pc;
      }
      if (w.paths.size() > 1) reconverge(w.paths);
    }
  }

  [[noreturn]] void unwritten(const Warp& w, u32 number, u32 lanes, int operand) const {
    const std::string name = operand < 0 ? "the predicate" : "operand " + std::to_string(operand);
    if (w.busy[number]) fail(Kind::async_copy, -1, "%s is read while a wgmma uses it", name.c_str());
    fail(Kind::uninitialised, __builtin_ctz(lanes & ~w.ready[number]), "%s is a register never written", name.c_str());
  }

  // The path with the lowest address comes last. Paths at one address become one.
  static void reconverge(std::vector<Path>& paths) {
    std::sort(paths.begin(), paths.end(), [](const Path& a, const Path& b) { return a.pc > b.pc; });
    for (size_t n = paths.size() - 1; n > 0; --n) {
      if (paths[n].pc == paths[n - 1].pc && paths[n].caller == paths[n - 1].caller) {
        paths[n - 1].lanes |= paths[n].lanes;
        paths.erase(paths.begin() + n);
      }
    }
  }

  void start(Block& block) {
    const u32 threads = launch.threads[0] * launch.threads[1] * launch.threads[2];
    std::fill(block.shared.units.begin(), block.shared.units.end(), Unit{});
    if (*std::max_element(ends.begin(), ends.end()) > LAST_TIME) {  // clocks begin anew
      std::fill(ends.begin(), ends.end(), 0);
      std::fill(block.shared.reads.begin(), block.shared.reads.end(), 0);
    }
    for (Warp& w : block.warps) {
      const u32 left = threads - w.index * LANES;
      w.started = left >= LANES ? ~0u : (1u << left) - 1;
      w.paths = {{0, w.started, 0}};
      std::fill(w.ready.begin(), w.ready.end(), 0);
      w.ready[0] = ~0u;
      std::fill(w.busy.begin(), w.busy.end(), 0);
      w.clock = ends;
      w.copies.clear();
      std::fill(w.groups, w.groups + LANES, 0);
      w.barrier = -1;
      w.fenced = ends;
      w.products.clear();
      w.product_groups = 0;
      w.registers_fenced = false;
      set_specials(w, program);
    }
    for (Warp& w : block.warps) w.tick();
  }

  // Whether all warps that the barrier waits for have come; then they know of each other's past.
  static bool release(std::vector<Warp>& warps, int barrier) {
    u32 waiting = 0, expected = 0;
    for (const Warp& w : warps)
      if (w.barrier == barrier) ++waiting, expected = w.expected;
    if (waiting != expected) return false;
    std::vector<u32> known(warps.size()), fenced(warps.size());
    for (const Warp& w : warps) {
      if (w.barrier != barrier) continue;
      for (size_t n = 0; n < warps.size(); ++n) {
        known[n] = std::max(known[n], w.clock[n]);
        fenced[n] = std::max(fenced[n], w.fenced[n]);
      }
    }
    for (Warp& w : warps) {
      if (w.barrier != barrier) continue;
      w.clock = known;
      w.fenced = fenced;
      w.tick();
      w.barrier = -1;
    }
    return true;
  }

  void run_block(Block& block, Random& random) {
    start(block);
    std::vector<Warp*> order;
    for (Warp& w : block.warps) order.push_back(&w);
    for (;;) {
      random.shuffle(order);
      bool ran = false;
      for (Warp* w : order) {
        if (w->barrier >= 0 || w->paths.empty()) continue;
        run_warp(*w);
        ran = true;
        if (w->barrier >= 0) release(block.warps, w->barrier);
      }
      if (!ran) break;
    }
    std::string states;
    for (const Warp& w : block.warps) {
      warp = const_cast<Warp*>(&w);
      const bool waits = w.barrier >= 0;
      states += " warp " + std::to_string(w.index) + (waits ? " waits at " + std::to_string(w.barrier) : " has ended");
      if (waits) pc = w.paths.back().pc - 1;
      ends[w.index] = w.clock[w.index];
      if (!waits && !w.copies.empty()) fail(Kind::async_copy, w.copies[0].lane, "the block ends before its cp.async");
      if (!waits && !w.products.empty()) fail(Kind::async_copy, -1, "the block ends before its wgmma");
    }
    for (const Warp& w : block.warps)
      if (w.barrier >= 0) fail(Kind::barrier, -1, "no warp can go on:%s", states.c_str());
  }

  void run(Block& block, Random random) {
    const u32 blocks = launch.grid[0] * launch.grid[1] * launch.grid[2];
    std::vector<u32> order(blocks);
    for (u32 n = 0; n < blocks; ++n) order[n] = n;
    random.shuffle(order);
    for (u32 number : order) {
      block.number = number;
      block.index[0] = number % launch.grid[0];
      block.index[1] = number / launch.grid[0] % launch.grid[1];
      block.index[2] = number / launch.grid[0] / launch.grid[1];
      run_block(block, random);
    }
  }
};

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

}  // namespace

extern "C" {

// The table of instructions: "name signature" in lines.
const char* ptx_opcodes() {
  static std::string text;
  if (text.empty())
    for (const Opcode& each : opcodes()) text += each.name + " " + each.signature + "\n";
  return text.c_str();
}

void ptx_run(const Program* program, const Launch* launch, u64* counts, Result* result) {
  std::vector<std::unique_ptr<void, Free>> memory;
  const auto zeros = [&](size_t bytes) {
    memory.emplace_back(std::calloc(bytes + 64, 1));
    return reinterpret_cast<u8*>((reinterpret_cast<u64>(memory.back().get()) + 63) & ~u64{63});
  };

  GlobalMemory global;
  for (u32 n = 0; n < launch->region_count; ++n) {
    const Tensor& t = launch->regions[n];
    GlobalUnit* units = reinterpret_cast<GlobalUnit*>(zeros((t.size / 2 + 2) * sizeof(GlobalUnit)));
    global.regions.push_back({t.address, t.size, t.shadow, t.name, units});
  }

  const u32 threads = launch->threads[0] * launch->threads[1] * launch->threads[2];
  const int warps = (threads + LANES - 1) / LANES;
  Block block{};
  std::copy_n(launch->threads, 3, block.threads);
  std::copy_n(launch->grid, 3, block.grid);
  block.parameters = launch->parameters;
  block.parameter_bytes = launch->parameter_bytes;
  block.seed = launch->seed;
  block.global = &global;
  block.counters = result->counters;
  const u32 units = (launch->shared_bytes + 1) / 2;
  block.shared = {launch->shared_bytes, warps, std::vector<u8>(launch->shared_bytes), std::vector<Unit>(units),
                  std::vector<u32>(size_t{units} * warps)};
  block.warps.resize(warps);
  for (int n = 0; n < warps; ++n) {
    Warp& w = block.warps[n];
    w.block = &block;
    w.index = n;
    w.file = zeros(program->file_bytes);
    w.ready.resize(program->registers + 2);  // constants, the registers, dropped results
    w.busy.resize(program->registers + 2);
    set_constants(w, *program);
  }

  Machine machine{*program, *launch, counts, 0, nullptr, {}, {}, std::vector<u32>(warps)};
  for (u32 n = 0; n < program->instructions; ++n) {
    const Opcode& opcode = opcodes()[program->code[n].opcode];
    machine.handlers.push_back(opcode.handler);
    machine.rules.push_back(opcode.unwritten);
  }
  set_error_seed(launch->seed);
  result->kind = -1;
  try {
    machine.run(block, Random{launch->seed});
  } catch (const Fault& fault) {
    result->kind = static_cast<i32>(fault.kind);
    result->pc = machine.pc;
    std::copy_n(block.index, 3, result->block);
    result->warp = machine.warp->index;
    result->lane = fault.lane;
    std::snprintf(result->message, sizeof result->message, "%s", fault.message.c_str());
  }
}
}

}  // namespace ptx
