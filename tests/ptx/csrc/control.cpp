// Branches, barriers and fences, and exchange between the lanes of a warp.

#include "machine.h"

namespace ptx {

namespace {

void bra(Warp& warp, const Operand* o, u32 lanes) {
  Path& path = warp.paths.back();
  const u32 target = static_cast<u32>(o[0].value);
  if (path.lanes == lanes) {
    path.pc = target;
  } else {
    path.lanes &= ~lanes;
    warp.paths.push_back({target, lanes, path.caller});
  }
}

void call(Warp& warp, const Operand* o, u32 lanes) {
  Path& path = warp.paths.back();
  if (path.lanes != lanes) fail(Kind::barrier, -1, "call.uni by lanes %08x of %08x", lanes, path.lanes);
  path.caller = path.pc;
  path.pc = static_cast<u32>(o[0].value);
}

void ret(Warp& warp, const Operand*, u32 lanes) {
  Path& path = warp.paths.back();
  if (path.caller && path.lanes == lanes) {
    path.pc = path.caller;
    path.caller = 0;
    return;
  }
  if (path.caller) fail(Kind::barrier, -1, "a function returns by lanes %08x of %08x", lanes, path.lanes);
  path.lanes &= ~lanes;
  if (!path.lanes) warp.paths.pop_back();
}

void wait_at_barrier(Warp& warp, u32 lanes, u32 barrier, u32 threads) {
  warp.require_all(lanes, "bar.sync");
  if (barrier > 15) fail(Kind::barrier, -1, "there is no barrier %u", barrier);
  if (threads % LANES) fail(Kind::barrier, -1, "bar.sync for %u threads, not a multiple of 32", threads);
  warp.barrier = static_cast<int>(barrier);
  warp.expected = threads / LANES;
}

// The lane that each lane reads: `CHOOSE(lane, b, first, last)` within its segment, or itself if that lies outside.
// With PREDICATE, a second result says which of the two.
template <u32 CHOOSE(u32, u32, u32), bool PREDICATE>
void shfl(Warp& warp, const Operand* to, u32 lanes) {
  const Operand* o = to + PREDICATE;
  const u32 *a = warp.get<u32>(o[1]), *b = warp.get<u32>(o[2]), *c = warp.get<u32>(o[3]),
            *members = warp.get<u32>(o[4]);
  u32 values[LANES], within = 0;
  for_lanes(lanes, [&](int l) {
    if ((members[l] & warp.started) != lanes)
      fail(Kind::barrier, l, "shfl.sync of lanes %08x by lanes %08x", members[l], lanes);
    const u32 segment = c[l] >> 8 & 31, first = l & segment, last = first | (c[l] & 31 & ~segment);
    u32 from = CHOOSE(l, b[l] & 31, first | (b[l] & 31 & ~segment));
    if (from > last) from = l;
    else within |= 1u << l;
    if (!(lanes >> from & 1)) fail(Kind::uninitialised, l, "shfl.sync reads lane %u, which doesn't take part", from);
    if (!(warp.ready[o[1].number] >> from & 1)) warp.garbage |= 1u << l;
    values[l] = a[from];
  });
  warp.set(to[0], values, lanes);
  if (PREDICATE) warp.set_predicate(to[1], within, lanes);
}

u32 butterfly(u32 lane, u32 b, u32) { return lane ^ b; }
u32 indexed(u32, u32, u32 within) { return within; }

template <u32 CHOOSE(u32, u32, u32)>
void add_shfl(const std::string& mode) {
  whole("shfl.sync." + mode + ".b32", "w=wwww", shfl<CHOOSE, false>, Unwritten::handled);
  whole("shfl.sync." + mode + ".b32", "wp=wwww", shfl<CHOOSE, true>, Unwritten::handled);
}

}  // namespace

void add_control() {
  whole("bra", "=L", bra);
  whole("bra.uni", "=L", bra);
  whole("call.uni", "=L", call);
  whole("ret", "=", ret);
  whole("bar.sync", "=w", [](Warp& warp, const Operand* o, u32 lanes) {
    wait_at_barrier(warp, lanes, *warp.get<u32>(o[0]), warp.block->warps.size() * LANES);
  });
  whole("bar.sync", "=ww", [](Warp& warp, const Operand* o, u32 lanes) {
    wait_at_barrier(warp, lanes, *warp.get<u32>(o[0]), *warp.get<u32>(o[1]));
  });
  whole("bar.warp.sync", "=w", [](Warp& warp, const Operand* o, u32 lanes) {
    const u32 members = warp.get<u32>(o[0])[__builtin_ctz(lanes)] & warp.started;
    if (members != lanes) fail(Kind::barrier, -1, "bar.warp.sync of lanes %08x by lanes %08x", members, lanes);
    warp.tick();
  });
  // What was written to shared memory before may be read by wgmma after.
  whole("fence.proxy.async.shared::cta", "=", [](Warp& warp, const Operand*, u32 lanes) {
    warp.require_all(lanes, "fence.proxy.async");
    warp.fenced = warp.clock;
    warp.tick();
  });
  add_shfl<butterfly>("bfly");
  add_shfl<indexed>("idx");
}

}  // namespace ptx
