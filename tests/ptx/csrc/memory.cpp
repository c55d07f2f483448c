// Shared and global memory with the watch over them, and the instructions that move data.

#include <algorithm>

#include "machine.h"

namespace ptx {

void SharedMemory::check(u32 address, u32 count, u32 alignment, int lane) const {
  if (address % alignment) fail(Kind::misaligned, lane, "shared address %u, not a multiple of %u", address, alignment);
  if (address < SHARED_BASE || u64{address} + count > u64{SHARED_BASE} + size)
    fail(Kind::bounds, lane, "bytes %lld to %lld of %u bytes of shared memory",
         static_cast<long long>(address) - SHARED_BASE, static_cast<long long>(address) - SHARED_BASE + count - 1,
         size);
}

// The bytes at an address that has been checked.
const u8* SharedMemory::read(const Warp& warp, int lane, u32 address, u32 count) {
  const u32 at = address - SHARED_BASE;
  for (u32 n = at / 2; n < (at + count + 1) / 2; ++n) {
    const Unit& u = units[n];
    if (u.pending)
      fail(Kind::async_copy, lane, "shared byte %u is read before its cp.async has been waited for", 2 * n);
    if (!u.written) fail(Kind::uninitialised, lane, "shared byte %u has never been written", 2 * n);
    if (!warp.knows(u.time, u.warp, u.lane, lane))
      fail(Kind::race, lane, "shared byte %u is read, and warp %d lane %d wrote it, without a barrier between", 2 * n,
           u.warp, u.lane);
    u32& last = reads[size_t{n} * warps + warp.index];
    const u32 time = warp.clock[warp.index];
    const bool also = last / LANE_CODES == time && last % LANE_CODES != static_cast<u32>(lane);
    last = time * LANE_CODES + (also ? ALL : lane);
  }
  return bytes.data() + at;
}

// Wgmma sees only what was written before a fence.
const u8* SharedMemory::read_products(const Warp& warp, u32 address, u32 count) {
  const u8* from = read(warp, ALL, address, count);
  for (u32 n = (address - SHARED_BASE) / 2; n < (address - SHARED_BASE + count) / 2; ++n)
    if (units[n].time > warp.fenced[units[n].warp])
      fail(Kind::async_copy, -1,
           "shared byte %u is read by wgmma, and warp %d wrote it, without a fence.proxy.async between", 2 * n,
           units[n].warp);
  return from;
}

// Before a write to unit n that changes it or not.
void SharedMemory::check_reads(const Warp& warp, int lane, u32 n, bool changes) const {
  for (int w = 0; w < warps; ++w) {
    const u32 last = reads[size_t{n} * warps + w];
    if ((changes || w != warp.index) && !warp.knows(last / LANE_CODES, w, last % LANE_CODES, lane))
      fail(Kind::race, lane, "shared byte %u is written, and warp %d read it, without a barrier between", 2 * n, w);
  }
}

void SharedMemory::write(const Warp& warp, int lane, u32 address, u32 count, const void* from) {
  const u32 at = address - SHARED_BASE;
  for (u32 n = at / 2; n < (at + count + 1) / 2; ++n) {
    Unit& u = units[n];
    const u32 begin = std::max(2 * n, at), end = std::min(2 * n + 2, at + count);
    if (u.pending)
      fail(Kind::async_copy, lane, "shared byte %u is written before its cp.async has been waited for", 2 * n);
    const bool other = !warp.knows(u.time, u.warp, u.lane, lane);
    if (u.written && other && std::memcmp(&bytes[begin], static_cast<const u8*>(from) + (begin - at), end - begin))
      fail(Kind::race, lane, "shared byte %u gets other bits than warp %d lane %d wrote, without a barrier between",
           2 * n, u.warp, u.lane);
    const void* now = static_cast<const u8*>(from) + (begin - at);
    check_reads(warp, lane, n, u.written && std::memcmp(&bytes[begin], now, end - begin));
    u = {warp.clock[warp.index], static_cast<u8>(warp.index), static_cast<u8>(lane), true, false};
  }
  std::memcpy(bytes.data() + at, from, count);
}

void SharedMemory::begin_copy(const Warp& warp, int lane, u32 address, u32 count) {
  const u32 at = address - SHARED_BASE;
  for (u32 n = at / 2; n < (at + count + 1) / 2; ++n) {
    Unit& u = units[n];
    if (u.pending) fail(Kind::async_copy, lane, "shared byte %u has a cp.async that has not been waited for", 2 * n);
    check_reads(warp, lane, n, true);
    u.pending = true;
  }
}

void SharedMemory::end_copy(const Warp& warp, const Copy& copy) {
  for (u32 n = (copy.to - SHARED_BASE) / 2; n < (copy.to - SHARED_BASE + copy.bytes + 1) / 2; ++n)
    units[n].pending = false;
  write(warp, copy.lane, copy.to, copy.bytes, copy.data);
}

Region& GlobalMemory::find(u64 address, u32 size, u32 alignment, int lane) {
  if (address % alignment)
    fail(Kind::misaligned, lane, "global address %#lx, not a multiple of %u", address, alignment);
  const auto holds = [&](const Region& r) { return address >= r.address && address + size <= r.address + r.size; };
  if (last < regions.size() && holds(regions[last])) return regions[last];
  const Region* near = nullptr;
  for (size_t n = 0; n < regions.size(); ++n) {
    if (holds(regions[n])) return regions[last = n];
    const auto distance = [&](const Region& r) {
      return address < r.address ? r.address - address : address - r.address;
    };
    if (!near || distance(regions[n]) < distance(*near)) near = &regions[n];
  }
  if (!near) fail(Kind::bounds, lane, "global address %#lx: there are no tensors", address);
  fail(Kind::bounds, lane, "%u bytes at global address %#lx, which is byte %ld of %s (%lu bytes)", size, address,
       static_cast<i64>(address - near->address), near->name, near->size);
}

const u8* GlobalMemory::read(const Warp& warp, int lane, u64 address, u32 size, u32 alignment) {
  Region& r = find(address, size, alignment, lane);
  const u64 at = address - r.address, base = r.address / 2;
  const u32 block = warp.block->number + 1;
  if (r.shadow)
    for (u32 n = 0; n < size; ++n)
      if (!r.shadow[at + n]) fail(Kind::uninitialised, lane, "byte %lu of %s has never been written", at + n, r.name);
  for (u64 n = address / 2 - base; n <= (address + size - 1) / 2 - base; ++n) {
    GlobalUnit& u = r.units[n];
    if (u.write_block && u.write_block != block)
      fail(Kind::race, lane, "byte %lu of %s is read, and block %u wrote it", at, r.name, u.write_block - 1);
    if (u.write_block && !warp.knows(u.write_time, u.write_thread / LANES, u.write_thread % LANES, lane))
      fail(Kind::race, lane, "byte %lu of %s is read, and warp %d lane %d wrote it, without a barrier between", at,
           r.name, u.write_thread / LANES, u.write_thread % LANES);
    u.read_block = u.read_block && u.read_block != block ? SEVERAL : block;
    u.read_time = warp.clock[warp.index];
    u.read_thread = static_cast<u16>(warp.index * LANES + lane);
  }
  return reinterpret_cast<const u8*>(address);
}

void GlobalMemory::write(const Warp& warp, int lane, u64 address, u32 size, u32 alignment, const void* from) {
  Region& r = find(address, size, alignment, lane);
  const u64 at = address - r.address, base = r.address / 2;
  const u32 block = warp.block->number + 1;
  for (u64 n = address / 2 - base; n <= (address + size - 1) / 2 - base; ++n) {
    GlobalUnit& u = r.units[n];
    const u64 begin = std::max(2 * (n + base), address), end = std::min(2 * (n + base) + 2, address + size);
    const bool changes =
        std::memcmp(reinterpret_cast<u8*>(begin), static_cast<const u8*>(from) + (begin - address), end - begin);
    if (u.read_block && u.read_block != block) {
      const std::string reader = u.read_block == SEVERAL ? "several read" : std::to_string(u.read_block - 1) + " read";
      fail(Kind::race, lane, "byte %lu of %s is written, and block %s it", at, r.name, reader.c_str());
    }
    if (u.write_block && u.write_block != block && changes)
      fail(Kind::race, lane, "byte %lu of %s gets other bits than block %u wrote", at, r.name, u.write_block - 1);
    if (u.write_block == block && changes &&
        !warp.knows(u.write_time, u.write_thread / LANES, u.write_thread % LANES, lane))
      fail(Kind::race, lane, "byte %lu of %s gets other bits than warp %d lane %d wrote, without a barrier between", at,
           r.name, u.write_thread / LANES, u.write_thread % LANES);
    if (u.read_block == block && changes &&
        !warp.knows(u.read_time, u.read_thread / LANES, u.read_thread % LANES, lane))
      fail(Kind::race, lane, "byte %lu of %s is written, and warp %d lane %d read it, without a barrier between", at,
           r.name, u.read_thread / LANES, u.read_thread % LANES);
    u.write_block = block;
    u.write_time = warp.clock[warp.index];
    u.write_thread = static_cast<u16>(warp.index * LANES + lane);
  }
  if (r.shadow) std::memset(r.shadow + at, 1, size);
  std::memcpy(reinterpret_cast<void*>(address), from, size);
}

namespace {

struct Addresses {
  u64 at[LANES];
};

template <class T>
Addresses addresses(const Warp& warp, const Operand& o) {
  Addresses result;
  const T* base = warp.get<T>(o);
  for (int l = 0; l < LANES; ++l) result.at[l] = static_cast<T>(base[l] + o.value);
  return result;
}

// One wavefront serves the lanes of 128 bytes, if no two of them want different words of one bank.
void count_wavefronts(const Warp& warp, const Addresses& a, u32 lanes, u32 size) {
  const int together = size > 4 ? LANES * 4 / size : LANES;
  for (int first = 0; first < LANES; first += together) {
    u64 words[32][32];
    u32 used[32] = {}, most = 0;
    const u32 phase = together == LANES ? lanes : lanes & ((1u << together) - 1) << first;
    for_lanes(phase, [&](int l) {
      for (u64 word = a.at[l] / 4; word <= (a.at[l] + size - 1) / 4; ++word) {
        const u32 bank = word % 32;
        if (std::find(words[bank], words[bank] + used[bank], word) != words[bank] + used[bank]) continue;
        words[bank][used[bank]++] = word;
        most = std::max(most, used[bank]);
      }
    });
    if (!most) continue;
    warp.block->counters[SHARED_WAVEFRONTS] += most;
    warp.block->counters[SHARED_CONFLICTS] += most - 1;
  }
}

void count_sectors(const Warp& warp, const Addresses& a, u32 lanes, Counter counter) {
  u64 seen[LANES];
  int count = 0;
  for_lanes(lanes, [&](int l) {
    const u64 sector = a.at[l] / 32;
    if (count && seen[count - 1] == sector) return;
    if (std::find(seen, seen + count, sector) == seen + count) seen[count++] = sector;
  });
  warp.block->counters[counter] += count;
}

struct Shared {
  using Address = u32;
  static constexpr char LETTER = 's';

  static const u8* read(Warp& warp, int lane, u64 address, u32 size) {
    warp.block->shared.check(address, size, size, lane);
    return warp.block->shared.read(warp, lane, address, size);
  }
  static void write(Warp& warp, int lane, u64 address, u32 size, const void* from) {
    warp.block->shared.check(address, size, size, lane);
    warp.block->shared.write(warp, lane, address, size, from);
  }
  static void count(const Warp& warp, const Addresses& a, u32 lanes, u32 size, bool) {
    count_wavefronts(warp, a, lanes, size);
  }
};

struct Global {
  using Address = u64;
  static constexpr char LETTER = 'g';

  static const u8* read(Warp& warp, int lane, u64 address, u32 size) {
    return warp.block->global->read(warp, lane, address, size, size);
  }
  static void write(Warp& warp, int lane, u64 address, u32 size, const void* from) {
    warp.block->global->write(warp, lane, address, size, size, from);
  }
  static void count(const Warp& warp, const Addresses& a, u32 lanes, u32, bool writes) {
    count_sectors(warp, a, lanes, writes ? GLOBAL_SECTORS_WRITTEN : GLOBAL_SECTORS_READ);
  }
};

template <class Space, class T, int N>
void load(Warp& warp, const Operand* o, u32 lanes) {
  const Addresses a = addresses<typename Space::Address>(warp, o[N]);
  T values[N][LANES];
  for_lanes(lanes, [&](int l) {
    T one[N];
    std::memcpy(one, Space::read(warp, l, a.at[l], sizeof one), sizeof one);
    for (int n = 0; n < N; ++n) values[n][l] = one[n];
  });
  for (int n = 0; n < N; ++n) warp.set(o[n], values[n], lanes);
  Space::count(warp, a, lanes, sizeof(T) * N, false);
}

template <class Space, class T, int N>
void store(Warp& warp, const Operand* o, u32 lanes) {
  const Addresses a = addresses<typename Space::Address>(warp, o[0]);
  for_lanes(lanes, [&](int l) {
    T one[N];
    for (int n = 0; n < N; ++n) one[n] = warp.get<T>(o[1 + n])[l];
    Space::write(warp, l, a.at[l], sizeof one, one);
  });
  Space::count(warp, a, lanes, sizeof(T) * N, true);
}

template <class Space, class T, int N>
void add_moves(const std::string& space, const std::string& vector) {
  const std::string registers(N, letter<T>()), address(1, Space::LETTER), width = std::to_string(sizeof(T) * 8);
  for (const char* type : {"b", "u", "s", "f"}) {
    if (*type == 'f' && sizeof(T) == 2) continue;
    whole("ld" + space + vector + "." + type + width, registers + "=" + address, load<Space, T, N>);
    whole("st" + space + vector + "." + type + width, "=" + address + registers, store<Space, T, N>);
  }
}

template <class Space, class T>
void add_moves(const std::string& space) {
  add_moves<Space, T, 1>(space, "");
  add_moves<Space, T, 2>(space, ".v2");
  if constexpr (sizeof(T) < 8) add_moves<Space, T, 4>(space, ".v4");
}

// Parameters of T, into registers of R.
template <class T, class R, int N>
void load_parameter(Warp& warp, const Operand* o, u32 lanes) {
  const Addresses a = addresses<u64>(warp, o[N]);
  R values[N][LANES];
  for_lanes(lanes, [&](int l) {
    if (a.at[l] % (sizeof(T) * N)) fail(Kind::misaligned, l, "byte %lu of the parameters", a.at[l]);
    if (a.at[l] + sizeof(T) * N > warp.block->parameter_bytes)
      fail(Kind::bounds, l, "byte %lu of %u bytes of parameters", a.at[l], warp.block->parameter_bytes);
    T one[N];
    std::memcpy(one, warp.block->parameters + a.at[l], sizeof one);
    for (int n = 0; n < N; ++n) values[n][l] = one[n];
  });
  for (int n = 0; n < N; ++n) warp.set(o[n], values[n], lanes);
}

template <class T>
void add_parameters() {
  for (const char* type : {"b", "u", "s", "f"}) {
    const std::string width = std::to_string(sizeof(T) * 8);
    whole("ld.param." + (type + width), std::string(1, letter<T>()) + "=P", load_parameter<T, T, 1>);
    whole("ld.param.v2." + (type + width), std::string(2, letter<T>()) + "=P", load_parameter<T, T, 2>);
  }
}

// cp.async of `bytes` bytes, of which the last operand's number are read and the others are zero. It happens when it is
// waited for: until then nothing else may touch the memory that it writes.
void copy_async(Warp& warp, const Operand* o, u32 lanes, u32 bytes, const u32* given) {
  const Addresses to = addresses<u32>(warp, o[0]), from = addresses<u64>(warp, o[1]);
  u32 reading = 0;
  for_lanes(lanes, [&](int l) {
    Copy copy{static_cast<u32>(to.at[l]), bytes, warp.groups[l], l, {}};
    warp.block->shared.check(copy.to, bytes, bytes, l);
    const u32 count = given ? given[l] : bytes;
    if (count > bytes) fail(Kind::bounds, l, "cp.async of %u bytes is to read %u", bytes, count);
    if (count) {
      std::memcpy(copy.data, warp.block->global->read(warp, l, from.at[l], count, 1), count);
      if (from.at[l] % bytes) fail(Kind::misaligned, l, "global address %#lx, not a multiple of %u", from.at[l], bytes);
      reading |= 1u << l;
    }
    warp.block->shared.begin_copy(warp, l, copy.to, bytes);
    warp.copies.push_back(copy);
  });
  count_sectors(warp, from, reading, GLOBAL_SECTORS_READ);
  count_wavefronts(warp, to, lanes, bytes);
}

// Ends the copies of these lanes, except for those of their `kept` last groups, and of none that are yet uncommitted.
void wait_copies(Warp& warp, u32 lanes, u32 kept, bool uncommitted) {
  const auto ends = [&](const Copy& c) {
    return (lanes >> c.lane & 1) && (uncommitted || c.group + kept < warp.groups[c.lane]);
  };
  for (const Copy& c : warp.copies)
    if (ends(c)) warp.block->shared.end_copy(warp, c);
  warp.copies.erase(std::remove_if(warp.copies.begin(), warp.copies.end(), ends), warp.copies.end());
}

void add_copies() {
  for (const char* cache : {"ca", "cg"}) {
    const std::string name = std::string("cp.async.") + cache + ".shared.global";
    whole(name, "=sgi",
          [](Warp& warp, const Operand* o, u32 lanes) { copy_async(warp, o, lanes, o[2].value, nullptr); });
    whole(name, "=sgiw",
          [](Warp& warp, const Operand* o, u32 lanes) { copy_async(warp, o, lanes, o[2].value, warp.get<u32>(o[3])); });
  }
  whole("cp.async.commit_group", "=",
        [](Warp& warp, const Operand*, u32 lanes) { for_lanes(lanes, [&](int l) { ++warp.groups[l]; }); });
  whole("cp.async.wait_group", "=i",
        [](Warp& warp, const Operand* o, u32 lanes) { wait_copies(warp, lanes, o[0].value, false); });
  whole("cp.async.wait_all", "=", [](Warp& warp, const Operand*, u32 lanes) { wait_copies(warp, lanes, 0, true); });
}

// Lane l passes the address of row l % 8 of matrix l / 8, and holds two elements of row l / 4 of each matrix:
// elements 2 (l % 4) and the next one; of the transposed matrix with `TRANSPOSED`.
template <int N, bool TRANSPOSED>
void ldmatrix(Warp& warp, const Operand* o, u32 lanes) {
  warp.require_all(lanes, "ldmatrix");
  const Addresses a = addresses<u32>(warp, o[N]);
  for (int n = 0; n < N; ++n) {
    u16 rows[8][8], values[LANES][2];
    for (int row = 0; row < 8; ++row) std::memcpy(rows[row], Shared::read(warp, ALL, a.at[8 * n + row], 16), 16);
    for (int l = 0; l < LANES; ++l)
      for (int i = 0; i < 2; ++i) {
        const int row = l / 4, column = l % 4 * 2 + i;
        values[l][i] = TRANSPOSED ? rows[column][row] : rows[row][column];
      }
    warp.set(o[n], reinterpret_cast<const u32*>(values), lanes);
  }
  count_wavefronts(warp, a, N == 4 ? lanes : (1u << 8 * N) - 1, 16);
}

template <int N, bool TRANSPOSED>
void stmatrix(Warp& warp, const Operand* o, u32 lanes) {
  warp.require_all(lanes, "stmatrix");
  const Addresses a = addresses<u32>(warp, o[0]);
  for (int n = 0; n < N; ++n) {
    u16 held[8][8];  // 16 bytes of each row are in four lanes
    std::memcpy(held, warp.get<u32>(o[1 + n]), sizeof(held));
    for (int row = 0; row < 8; ++row) {
      u16 values[8];
      for (int column = 0; column < 8; ++column) values[column] = TRANSPOSED ? held[column][row] : held[row][column];
      Shared::write(warp, ALL, a.at[8 * n + row], 16, values);
    }
  }
  count_wavefronts(warp, a, N == 4 ? lanes : (1u << 8 * N) - 1, 16);
}

template <int N>
void add_matrices() {
  const std::string shape = "sync.aligned.m8n8.x" + std::to_string(N), registers(N, 'w');
  whole("ldmatrix." + shape + ".shared.b16", registers + "=s", ldmatrix<N, false>);
  whole("ldmatrix." + shape + ".trans.shared.b16", registers + "=s", ldmatrix<N, true>);
  whole("stmatrix." + shape + ".shared.b16", "=s" + registers, stmatrix<N, false>);
  whole("stmatrix." + shape + ".trans.shared.b16", "=s" + registers, stmatrix<N, true>);
}

}  // namespace

void add_memory() {
  for (const char* space : {".shared", ".shared::cta"}) {
    add_moves<Shared, u16>(space);
    add_moves<Shared, u32>(space);
    add_moves<Shared, u64>(space);
  }
  for (const char* space : {".global", ""}) {  // generic addresses, of which only those of global memory are used
    add_moves<Global, u16>(space);
    add_moves<Global, u32>(space);
    add_moves<Global, u64>(space);
  }
  add_parameters<u16>();
  add_parameters<u32>();
  add_parameters<u64>();
  whole("ld.param.u8", "h=P", load_parameter<u8, u16, 1>);
  whole("ld.param.s32", "d=P", load_parameter<i32, i64, 1>);
  add_copies();
  add_matrices<1>();
  add_matrices<2>();
  add_matrices<4>();
}

}  // namespace ptx
