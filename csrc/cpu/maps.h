// Shared by am_flow.cpp and matmul.cpp: the attention maps of strips, their change between two frames, and the gradient
// of queries and keys from that of a map.
//
// Vector lanes are queries. A strip is up to STRIP_VECTORS vectors of queries against all keys; the map of a strip is
// stored as [vector][key][lane], so that every sum over keys (both softmaxes, delta, rho) is a plain vertical sum and
// needs no mask. Surplus lanes of the last strip repeat the last query with weight 0: they are NaN only if that query
// is.
//
// A map is stored as p and one factor per block of keys, A = p * factor: p is relative to the largest logit so far,
// which is known while the block is still in the first-level cache. The same frame gives the same bits, so identical
// frames give M = 0 exactly.
#pragma once

#include "am_flow.h"
#include "product.h"
#include "rows.h"
#include "vec.h"

namespace amflow::AMFLOW_ISA {
namespace {

// Queries of a strip. With more, keys are converted, and their gradients read and written, fewer times, but two maps of
// a strip should fit the second-level cache: 32 took 1 to 4 % more time (AVX2), 128 up to 4 % more (AVX-512, 4096
// tokens).
constexpr int MAX_LANES = 64;
constexpr int STRIP_VECTORS = MAX_LANES / W;
constexpr int64_t KEY_BLOCK = 96;
constexpr int64_t NORM_BLOCK = 16;  // keys that are summed one by one for a row's normaliser, see compute_head_map
constexpr int64_t MAX_COLS = 256;   // MAX_HEAD_DIM and MAX_FEATURES in amflow_kernels/problem.py
constexpr int64_t PREFETCH_DISTANCE = 16;  // rows of a gradient that are prefetched before they are added to
constexpr float LOWEST = -3.40282347e38f;

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

#ifdef AMFLOW_DOT_BF16
constexpr bool NATIVE_BF16 = true;
#else
constexpr bool NATIVE_BF16 = false;
#endif

struct Map {
  float* p;       // [vector][key_rows][W]
  float* factor;  // [vector][blocks][W]
};

struct Strip {
  int64_t first_query, vectors;
  bool first_of_item;            // its sums over queries are written, those of later strips added
  float lane_weight[MAX_LANES];  // 1 for a query, 0 for a surplus lane

  int64_t lanes() const { return vectors * W; }
  int64_t queries(int64_t Nq) const { return lanes() < Nq - first_query ? lanes() : Nq - first_query; }
};

// One map: the frame t of frames[set] in one batch, head and window.
struct MapIndex {
  int64_t set, t, b, h, g;
};

struct WorkItem {
  int64_t b, h, g, chain, part, group;
  int64_t first, frames;       // the frames of the chain that it reads; other indices count from the first of them
  int64_t own_begin, own_end;  // the frames, or the first frames of the pairs, whose results are its own

  bool owns(int64_t frame) const { return own_begin <= frame && frame < own_end; }
};

// One worker's memory for maps and their gradients.
struct MapScratch {
  float* rows;     // [lane][d_cols]: queries
  float* queries;  // [d][lane]: the same, transposed
  float* keys;     // [KEY_BLOCK][d_cols]
  float* maxima;   // [vector][W]
  Map maps[2];     // the previous and the current frame's
  // For the gradient.
  float* dlogits;  // [KEY_BLOCK][lane], or for dot products see `backward_dots`
  float* dq;       // [lane][d_cols], or null if it is accumulated in the result
  float* dk;       // [own frame][head][Nk][d_cols], or null if it is accumulated in the result
};

// Hands out scratch memory; without a base it only counts.
struct Arena {
  float* base;
  int64_t used = 0;
  float* take(int64_t floats) {
    float* p = base ? base + used : nullptr;
    used += round_up(floats, 16);
    return p;
  }
};

int64_t map_size(const Plan& plan) { return STRIP_VECTORS * plan.key_rows * W; }
int64_t dk_size(const Problem& pb, const Plan& plan) { return plan.own_frames * plan.map_heads * pb.Nk * plan.d_cols; }

bool wants_dk(const Problem& pb) { return pb.frames[0].dk || pb.frames[1].dk; }

// Whether rows of D are whole vectors of floats, which products can read and write in place.
bool whole_rows(const Problem& pb) { return pb.dtype == Dtype::f32 && pb.D % W == 0; }

// Whether one item computes all of a dk, in a layout that it can accumulate in the result.
bool dk_in_place(const Problem& pb, const Plan& plan) { return plan.groups == 1 && whole_rows(pb); }

Map take_map(const Plan& plan, Arena& arena) {
  return {arena.take(map_size(plan)), arena.take(STRIP_VECTORS * plan.blocks * W)};
}

void take_map_scratch(const Plan& plan, Arena& arena, MapScratch& s) {
  s.rows = arena.take(MAX_LANES * plan.d_cols);
  s.queries = arena.take(plan.d_cols * MAX_LANES);
  s.keys = arena.take(KEY_BLOCK * plan.d_cols);
  s.maxima = arena.take(MAX_LANES);
  s.maps[0] = take_map(plan, arena);
  s.maps[1] = take_map(plan, arena);
}

void take_gradient_scratch(const Problem& pb, const Plan& plan, Arena& arena, MapScratch& s) {
  s.dlogits = arena.take((KEY_BLOCK + 1) * MAX_LANES);
  if (!whole_rows(pb)) s.dq = arena.take(MAX_LANES * plan.d_cols);
  if (wants_dk(pb) && !dk_in_place(pb, plan)) s.dk = arena.take(dk_size(pb, plan));
}

// ---- work items

Plan plan_common(const Problem& pb) {
  Plan plan{};
  plan.map_heads = pb.reduction == Reduction::mean_map ? pb.H : 1;
  plan.heads = pb.H / plan.map_heads;
  plan.chains = pb.pair_form ? pb.T : min(pb.lag, pb.T);
  plan.chain_frames = pb.pair_form ? 2 : div_up(pb.T, pb.lag);
  plan.strip_vectors = div_up(pb.Nq, W);
  plan.strips = div_up(plan.strip_vectors, STRIP_VECTORS);
  plan.blocks = div_up(pb.Nk, KEY_BLOCK);
  plan.key_rows = round_up(pb.Nk, W);
  plan.d_cols = round_up(pb.D, W);
  return plan;
}

// Chains of all batches, heads and windows.
int64_t num_chains(const Problem& pb, const Plan& plan) { return pb.B * plan.heads * pb.G * plan.chains; }

// Frames of a chain.
int64_t chain_length(const Problem& pb, int64_t chain) { return pb.pair_form ? 2 : div_up(pb.T - chain, pb.lag); }

// Time of an item, in units that only compare plans of one pass. Roughly, a map takes 3 units for each vector of
// queries, and its gradient 5: two products and what they multiply.
int64_t run_cost(const Plan& plan, int64_t vectors, int64_t frames, int64_t owned) {
  return vectors * (plan.owns_frames ? 3 * frames + 5 * owned : frames);
}

// The same for adding the item's dk to the result: reading one and writing the other takes as long as a product of two
// to four vectors.
int64_t finish_cost(const Plan& plan, int64_t owned) { return plan.owns_frames && plan.groups > 1 ? 8 * owned : 0; }

// Chooses the number of parts with which the last thread ends first, and completes what follows from it. Threads take
// items one after the other; groups finish in turn.
void divide(const Problem& pb, Plan& plan, int64_t threads) {
  const int64_t whole = num_chains(pb, plan) * plan.groups;
  const int64_t owned = max(1, plan.owns_frames ? plan.chain_frames : plan.chain_frames - 1);
  int64_t best = INT64_MAX;
  for (int64_t parts = 1; parts <= owned; ++parts) {
    const int64_t own = div_up(owned, parts);
    const int64_t frames = plan.owns_frames ? min(plan.chain_frames, own + min(2, parts - 1)) : own + 1;
    const int64_t run = run_cost(plan, div_up(plan.strip_vectors, plan.groups), frames, own);
    const int64_t finish = finish_cost(plan, own);
    const int64_t time = div_up(whole * parts, threads) * (run + finish) + (plan.groups - 1) * finish;
    if (time >= best) continue;
    best = time;
    plan.parts = parts;
    plan.item_frames = frames;
    plan.own_frames = own;
  }
  plan.items = whole * plan.parts;
}

// Items are numbered in row-major order of (b, h, g, chain, part, group).
WorkItem work_item_at(const Problem& pb, const Plan& plan, int64_t index) {
  WorkItem item;
  item.group = index % plan.groups, index /= plan.groups;
  item.part = index % plan.parts, index /= plan.parts;
  item.chain = index % plan.chains, index /= plan.chains;
  item.g = index % pb.G, index /= pb.G;
  item.h = index % plan.heads;
  item.b = index / plan.heads;
  const int64_t length = chain_length(pb, item.chain), owned = plan.owns_frames ? length : length - 1;
  const int64_t begin = item.part * owned / plan.parts, end = (item.part + 1) * owned / plan.parts;
  item.first = plan.owns_frames ? max(0, begin - 1) : begin;
  item.frames = begin == end ? 0 : min(length, end + 1) - item.first;  // a short chain may have empty parts
  item.own_begin = begin - item.first, item.own_end = end - item.first;
  return item;
}

ReductionSlot reduction_slot(const Problem& pb, const Plan& plan, int64_t index) {
  const WorkItem item = work_item_at(pb, plan, index);
  const int64_t n = plan.summed_heads;
  const int64_t chain = ((item.b * (plan.heads / n) + item.h / n) * pb.G + item.g) * plan.chains + item.chain;
  return {chain * plan.parts + item.part, item.h % n * plan.groups + item.group};
}

// The frame t of the item's `frame`, or in pair form the pair, which is also the index of the pair (frame, frame + 1).
int64_t pair_index(const Problem& pb, const WorkItem& item, int64_t frame) {
  return pb.pair_form ? item.chain : item.chain + (item.first + frame) * pb.lag;
}

MapIndex map_index(const Problem& pb, const WorkItem& item, int64_t frame, int64_t head) {
  return {pb.pair_form ? item.first + frame : 0, pair_index(pb, item, frame), item.b, item.h + head, item.g};
}

// The first strip of a group.
int64_t first_strip(const Plan& plan, int64_t group) { return group * plan.strips / plan.groups; }

// All strips have the same number of vectors, or one less.
Strip strip_at(const Problem& pb, const Plan& plan, const WorkItem& item, int64_t index) {
  const int64_t first = index * plan.strip_vectors / plan.strips;
  Strip strip{
      first * W, (index + 1) * plan.strip_vectors / plan.strips - first, index == first_strip(plan, item.group), {}};
  for (int64_t l = 0; l < strip.lanes(); ++l) strip.lane_weight[l] = strip.first_query + l < pb.Nq ? 1.f : 0.f;
  return strip;
}

// ---- reading queries and keys

const char* query_row(const Problem& pb, const MapIndex& index, int64_t i) {
  const Frames& f = pb.frames[index.set];
  const int64_t* stride = f.q_stride;
  const int64_t offset =
      index.b * stride[0] + index.t * stride[1] + index.h * stride[2] + index.g * stride[3] + i * stride[4];
  return static_cast<const char*>(f.q) + offset * element_size(pb.dtype);
}

const char* key_row(const Problem& pb, const MapIndex& index, int64_t j) {
  const Frames& f = pb.frames[index.set];
  const int64_t* stride = f.k_stride;
  const int64_t offset =
      index.b * stride[0] + index.t * stride[1] + index.h * stride[2] + index.g * stride[3] + j * stride[4];
  return static_cast<const char*>(f.k) + offset * element_size(pb.dtype);
}

// dq and dk are contiguous.
char* dq_row(const Problem& pb, const MapIndex& index, int64_t i) {
  const int64_t row = (((index.b * pb.T + index.t) * pb.H + index.h) * pb.G + index.g) * pb.Nq + i;
  return static_cast<char*>(pb.frames[index.set].dq) + row * pb.D * element_size(pb.dtype);
}

char* dk_row(const Problem& pb, const MapIndex& index, int64_t j) {
  const int64_t row = (((index.b * pb.T + index.t) * pb.H + index.h) * pb.G + index.g) * pb.Nk + j;
  return static_cast<char*>(pb.frames[index.set].dk) + row * pb.D * element_size(pb.dtype);
}

// The rows of the strip's queries as floats, [lane][cols]; `pitch` elements from row to row.
void load_lanes(Dtype dtype, const char* first, int64_t pitch, const Strip& strip, int64_t Nq, int64_t width,
                float* rows, int64_t cols) {
  const int64_t queries = strip.queries(Nq);
  load_rows(dtype, first, pitch * element_size(dtype), queries, width, rows, cols);
  for (int64_t l = queries; l < strip.lanes(); ++l)
    __builtin_memcpy(rows + l * cols, rows + (queries - 1) * cols, 4 * cols);
}

// The strip's queries as floats, [lane][d_cols].
void load_queries(const Problem& pb, const Plan& plan, const MapIndex& index, const Strip& strip, float* rows) {
  load_lanes(pb.dtype, query_row(pb, index, strip.first_query), pb.frames[index.set].q_stride[4], strip, pb.Nq, pb.D,
             rows, plan.d_cols);
}

// Rows that a product reads: the tensor's own memory where its layout allows, else a copy.
struct RowView {
  const char* first;
  int64_t pitch;  // bytes from row to row
};

// n keys from j0 on as floats; `whole`: in whole vectors, padded with zeros.
RowView float_keys(const Problem& pb, const Plan& plan, const MapIndex& index, int64_t j0, int64_t n, bool whole,
                   float* buffer) {
  const char* const first = key_row(pb, index, j0);
  const int64_t pitch = pb.frames[index.set].k_stride[4] * element_size(pb.dtype);
  if (whole ? whole_rows(pb) : pb.dtype == Dtype::f32) return {first, pitch};
  load_rows(pb.dtype, first, pitch, n, pb.D, buffer, plan.d_cols);
  return {reinterpret_cast<const char*>(buffer), plan.d_cols * 4};
}

RowView bf16_keys(const Problem& pb, const Plan& plan, const MapIndex& index, int64_t j0, int64_t n, float* buffer) {
  if (pb.D % 2 == 0) return {key_row(pb, index, j0), pb.frames[index.set].k_stride[4] * 2};
  char* copy = reinterpret_cast<char*>(buffer);  // odd D: the last pair is padded with a zero
  for (int64_t j = 0; j < n; ++j) {
    char* row = copy + j * plan.d_cols * 4;
    __builtin_memcpy(row, key_row(pb, index, j0 + j), pb.D * 2);
    __builtin_memset(row + pb.D * 2, 0, 2);
  }
  return {copy, plan.d_cols * 4};
}

// Adds x to the sum of `high` and `low`, which holds what rounding takes from `high`.
inline void add_exactly(vec& high, vec& low, vec x) {
  const vec sum = high + x, rounded = sum - high;
  low += (high - (sum - rounded)) + (x - rounded);
  high = sum;
}

inline void add_exactly(float* high, float* low, vec x) {
  vec h = load(high), l = load(low);
  add_exactly(h, l, x);
  store(high, h), store(low, l);
}

// ---- A = softmax(scale * q k^T) of one strip

// The strip's queries, [d or pair of d][lane], for a product with keys. With a negative scale their signs are flipped,
// so that the largest product is the largest logit.
void pack_queries(const Problem& pb, const Plan& plan, const MapIndex& index, const Strip& strip, MapScratch& s,
                  bool bf16) {
  const bool negative = pb.scale < 0;
  if (!bf16) {
    load_queries(pb, plan, index, strip, s.rows);
    transpose_rows(s.rows, strip.lanes(), plan.d_cols, plan.d_cols, s.queries, strip.lanes(), negative ? 1u << 31 : 0);
    return;
  }
  const int64_t cols = round_up(div_up(pb.D, 2), W);
  for (int64_t l = 0; l < strip.lanes(); ++l) {
    char* row = reinterpret_cast<char*>(s.rows + l * cols);
    __builtin_memcpy(row, query_row(pb, index, min(strip.first_query + l, pb.Nq - 1)), pb.D * 2);
    __builtin_memset(row + pb.D * 2, 0, cols * 4 - pb.D * 2);
  }
  transpose_rows(s.rows, strip.lanes(), cols, cols, s.queries, strip.lanes(), negative ? 0x80008000u : 0);
}

// Prefetches part `step` of `steps` of the strip's queries into the second-level cache.
void prefetch_queries(const Problem& pb, const MapIndex& index, const Strip& strip, int64_t step, int64_t steps) {
  const int64_t n = strip.queries(pb.Nq), size = element_size(pb.dtype);
  const int64_t l0 = n * step / steps, l1 = n * (step + 1) / steps;
  prefetch_rows(query_row(pb, index, strip.first_query + l0), pb.frames[index.set].q_stride[4] * size, pb.D * size,
                l1 - l0);
}

// `next`, if any, is the map that will be computed after this one: its rows are prefetched.
void compute_head_map(const Problem& pb, const Plan& plan, const MapIndex& index, const MapIndex* next,
                      const Strip& strip, MapScratch& s, Map& map) {
  const bool bf16 = NATIVE_BF16 && pb.dtype == Dtype::bf16;
  pack_queries(pb, plan, index, strip, s, bf16);
  const vec scale = set1(__builtin_fabsf(pb.scale) * 1.44269504f);
  const int64_t column = plan.key_rows * W;
  // The largest scaled logit so far; the sum of p relative to it, and what rounding took from that.
  vec shift[STRIP_VECTORS], sum[STRIP_VECTORS], low[STRIP_VECTORS];
  for (int64_t v = 0; v < strip.vectors; ++v) {
    shift[v] = set1(LOWEST);
    sum[v] = low[v] = set1(0.f);
    store(s.maxima + v * W, set1(-__builtin_inff()));
  }
  for (int64_t block = 0; block < plan.blocks; ++block) {
    const int64_t j0 = block * KEY_BLOCK, n = min(KEY_BLOCK, pb.Nk - j0);
    const RowView keys =
        bf16 ? bf16_keys(pb, plan, index, j0, n, s.keys) : float_keys(pb, plan, index, j0, n, false, s.keys);
    ProductArgs args{.b = keys.first,
                     .b_row = keys.pitch,
                     .b_k = 4,
                     .x = s.queries,
                     .x_row = strip.lanes(),
                     .K = bf16 ? div_up(pb.D, 2) : pb.D,
                     .out = map.p + j0 * W,
                     .out_row = W,
                     .out_vector = column,
                     .maxima = s.maxima};
    if (next) {
      args.prefetch = key_row(pb, *next, j0);
      args.prefetch_row = pb.frames[next->set].k_stride[4] * element_size(pb.dtype);
      args.prefetch_bytes = pb.D * element_size(pb.dtype);
    }
#ifdef AMFLOW_DOT_BF16
    if (bf16) product_and_max<Bf16Pair>(args, n, strip.vectors);
    else
#endif
      product_and_max<Float>(args, n, strip.vectors);
    for (int64_t v = 0; v < strip.vectors; ++v) {
      // If all logits are -inf, the lowest finite number keeps exp2(-inf - shift) at 0. NaN stays NaN.
      const vec top = amflow::AMFLOW_ISA::max(set1(LOWEST), load(s.maxima + v * W) * scale);
      float* p = map.p + v * column + j0 * W;
      vec block_sum = set1(0.f);
      // If rows are equal, so are the errors of their normalisers, and they add up in the flow: hence short sums.
      for (int64_t j0 = 0; j0 < n; j0 += NORM_BLOCK) {
        vec part = set1(0.f);
#pragma GCC unroll 4
        for (int64_t j = j0; j < min(j0 + NORM_BLOCK, n); ++j) {
          const vec y = exp2(fma(load(p + j * W), scale, -top));
          store(p + j * W, y);
          part += y;
        }
        block_sum += part;
      }
      const vec rescale = exp2(shift[v] - top);
      sum[v] *= rescale, low[v] *= rescale;
      add_exactly(sum[v], low[v], block_sum);
      shift[v] = top;
      store(map.factor + (v * plan.blocks + block) * W, top);
      if (next) prefetch_queries(pb, *next, strip, block * strip.vectors + v, plan.blocks * strip.vectors);
    }
  }
  for (int64_t v = 0; v < strip.vectors; ++v) {
    const vec norm = set1(1.f / plan.map_heads) / (sum[v] + low[v]);
    for (int64_t block = 0; block < plan.blocks; ++block) {
      float* factor = map.factor + (v * plan.blocks + block) * W;
      store(factor, exp2(load(factor) - shift[v]) * norm);
    }
  }
}

// ---- M = |A - A'| and e = expm1(M / temperature)

// For vector v of the strip: visit(j, offset of key j, A / temperature, A' / temperature) for every key, and
// end_block() after every block. Products without FMA keep equal maps equal.
template <class Visit, class EndBlock>
inline void for_each_change(const Problem& pb, const Plan& plan, int64_t v, const Map& a, const Map& b, Visit visit,
                            EndBlock end_block) {
  const vec inv_temperature = set1(pb.inv_temperature);
  for (int64_t block = 0; block < plan.blocks; ++block) {
    const int64_t j0 = block * KEY_BLOCK, j1 = min(j0 + KEY_BLOCK, pb.Nk);
    const vec fa = load(a.factor + (v * plan.blocks + block) * W) * inv_temperature;
    const vec fb = load(b.factor + (v * plan.blocks + block) * W) * inv_temperature;
#pragma GCC unroll 4
    for (int64_t j = j0; j < j1; ++j) {
      const int64_t offset = (v * plan.key_rows + j) * W;
      visit(j, offset, load(a.p + offset) * fa, load(b.p + offset) * fb);
    }
    end_block();
  }
}

// At temperatures below 1, e reaches 2^92 and w = 1 / (Nk + sum of e) falls to 2^-104, and the product of either with a
// feature or a gradient could leave the range of float32. There e is stored in units of 2^46, as e' = UNIT e, and
// w' = 1 / (UNIT Nk + sum of e') = w / UNIT, so that P = w (1 + e) = w' (UNIT + e').
constexpr float LOW_TEMPERATURE_UNIT = 0x1p-46f;

inline float unit(const Problem& pb) { return pb.inv_temperature > 1 ? LOW_TEMPERATURE_UNIT : 1.f; }

// e^x - 1 in the unit of the temperature.
template <bool low_temperature>
inline vec expm1(vec x) {
  return low_temperature ? expm1_wide(x, LOW_TEMPERATURE_UNIT) : expm1_unit(x);
}

// A sum over keys block by block, so that its rounding error grows with the size of a block plus the number of blocks,
// not with the number of keys.
struct BlockedSum {
  vec total = set1(0.f), block = set1(0.f);
  void end_block() {
    total += block;
    block = set1(0.f);
  }
};

void fill_zeros(float* p, int64_t n) { __builtin_memset(p, 0, n * sizeof(float)); }

// ---- from dL/dA to dq and dk

// out[j][:] (+)= sum over K lanes, or pairs of lanes, of b[j][lane] x[lane][:], for n keys: a strip's part of a sum
// over queries, which is written for the item's first strip and added for later ones. b has `lane_bytes` for each lane.
template <class E>
void add_to_keys(const Strip& strip, const void* b, int64_t lane_bytes, const float* x, int64_t K, int64_t n,
                 int64_t cols, float* out) {
  product<E, Epilogue::none, false>({.b = static_cast<const char*>(b),
                                     .b_row = strip.lanes() * lane_bytes,
                                     .b_k = 4,
                                     .x = x,
                                     .x_row = cols,
                                     .K = K,
                                     .out = out,
                                     .out_row = cols,
                                     .out_vector = W,
                                     .add = !strip.first_of_item,
                                     .prefetch = reinterpret_cast<const char*>(out + PREFETCH_DISTANCE * cols),
                                     .prefetch_row = cols * 4,
                                     .prefetch_bytes = cols * 4},
                                    n, cols / W);
}

#ifdef AMFLOW_DOT_BF16
// Whether dL/dlogits may be rounded to bf16: with fewer tokens or columns, too few errors are summed to average out
// within the budget of bf16 gradients.
constexpr int64_t LEAST_DOT = 32;
bool dots_average(const Problem& pb) { return min(min(pb.Nq, pb.Nk), pb.D) >= LEAST_DOT; }

// n rows of bf16 numbers as [pair of rows][cols], two numbers of one column in a lane. An odd last row is paired with
// zeros, and columns from D on are zero.
void pair_rows(const char* first, int64_t pitch, int64_t n, int64_t D, float* out, int64_t cols) {
  for (int64_t r = 0; r < n; r += 2, out += cols) {
    const auto* a = reinterpret_cast<const uint16_t*>(first + r * pitch);
    const auto* b = r + 1 < n ? reinterpret_cast<const uint16_t*>(first + (r + 1) * pitch) : nullptr;
    int64_t d = 0;
    for (; b && d + W <= D; d += W) store(out + d, load_pairs(a + d, b + d));
    for (; d < D; d += W) {
      uint16_t tails[2][W] = {};
      const int64_t left = 2 * min(W, D - d);
      __builtin_memcpy(tails[0], a + d, left);
      if (b) __builtin_memcpy(tails[1], b + d, left);
      store(out + d, load_pairs(tails[0], tails[1]));
    }
  }
}

// The mean of n rows from `pair_rows`, as one more pair: itself and zero.
void pair_mean(float* pairs, int64_t n, int64_t cols) {
  constexpr uint16_t ones[2] = {0x3f80, 0x3f80};
  const bf16_pair one = load_pair(reinterpret_cast<const char*>(ones));
  for (int64_t d = 0; d < cols; d += W) {
    vec sum = set1(0.f);
    for (int64_t r = 0; r < div_up(n, 2); ++r) sum = dot_bf16(one, load(pairs + r * cols + d), sum);
    store(pairs + div_up(n, 2) * cols + d, pair_bf16(sum * set1(1.f / n), set1(0.f)));
  }
}

// backward_logits with both products on bf16 dot products: dL/dlogits is rounded to bf16. Its sum over the keys is 0,
// and keys often have a large mean, by which the errors would be multiplied: so what rounding takes from that sum is
// multiplied by the mean of the block's keys and added.
template <class Gradient>
void backward_dots(const Problem& pb, const Plan& plan, const MapIndex& index, const Strip& strip, const Map& map,
                   const Gradient& gradient, const vec* rho, MapScratch& s, float* dk) {
  const Frames& f = pb.frames[index.set];
  const int64_t lanes = strip.lanes(), queries = strip.queries(pb.Nq), cols = plan.d_cols;
  float* const key_pairs = s.dlogits;  // [pair of keys][lane]
  auto* const lane_pairs = reinterpret_cast<uint16_t*>(key_pairs + (KEY_BLOCK / 2 + 1) * lanes);  // [key][lane]
  if (f.dk) pair_rows(query_row(pb, index, strip.first_query), f.q_stride[4] * 2, queries, pb.D, s.rows, cols);
  for (int64_t block = 0; block < plan.blocks; ++block) {
    const int64_t j0 = block * KEY_BLOCK, n = min(KEY_BLOCK, pb.Nk - j0), pairs = div_up(n, 2);
    for (int64_t v = 0; v < strip.vectors; ++v) {
      const vec factor = load(map.factor + (v * plan.blocks + block) * W);
      const auto dA = gradient(v);
      const vec rho_v = rho[v];
      const auto dlogit = [&](int64_t j) __attribute__((always_inline)) {
        const int64_t offset = (v * plan.key_rows + j0 + j) * W;
        return load(map.p + offset) * factor * (dA(j0 + j, offset) - rho_v);
      };
      vec lost = set1(0.f);
      const auto round_pair = [&](int64_t j, vec a, vec b) __attribute__((always_inline)) {
        const vec pair = pair_bf16(a, b);
        store(key_pairs + j / 2 * lanes + v * W, pair);
        store_bf16(lane_pairs + j * lanes + v * W, a);
        lost += (a - lower_bf16(pair)) + (b - upper_bf16(pair));
      };
#pragma GCC unroll 2
      for (int64_t j = 0; j + 1 < n; j += 2) {
        const vec b = dlogit(j + 1);
        round_pair(j, dlogit(j), b);
        store_bf16(lane_pairs + (j + 1) * lanes + v * W, b);
      }
      if (n % 2) round_pair(n - 1, dlogit(n - 1), set1(0.f));
      store(key_pairs + pairs * lanes + v * W, pair_bf16(lost, set1(0.f)));
    }
    if (f.dq) {
      pair_rows(key_row(pb, index, j0), f.k_stride[4] * 2, n, pb.D, s.keys, cols);
      pair_mean(s.keys, n, cols);
      product<Bf16Pair, Epilogue::none, true>({.b = reinterpret_cast<const char*>(key_pairs),
                                               .b_row = 4,
                                               .b_k = lanes * 4,
                                               .x = s.keys,
                                               .x_row = cols,
                                               .K = pairs + 1,
                                               .out = s.dq,
                                               .out_row = cols,
                                               .out_vector = W,
                                               .add = block > 0},
                                              queries, cols / W);
    }
    if (f.dk) add_to_keys<Bf16Pair>(strip, lane_pairs, 2, s.rows, div_up(queries, 2), n, cols, dk + j0 * cols);
  }
  for (int64_t l = 0; f.dq && l < queries; ++l)
    store_row(pb.dtype, s.dq + l * cols, pb.D, dq_row(pb, index, strip.first_query + l));
}
#endif

// From dL/dA of one map and strip: dq of the strip's queries, and their contribution to dk of all keys, which is
// written for the item's first strip and added for later ones.
template <class Gradient>
void backward_logits(const Problem& pb, const Plan& plan, const MapIndex& index, const Strip& strip, const Map& map,
                     const Gradient& gradient, const vec* rho, MapScratch& s, float* dk) {
#ifdef AMFLOW_DOT_BF16
  if (pb.dtype == Dtype::bf16 && dots_average(pb))
    return backward_dots(pb, plan, index, strip, map, gradient, rho, s, dk);
#endif
  const Frames& f = pb.frames[index.set];
  const int64_t lanes = strip.lanes(), queries = strip.queries(pb.Nq), cols = plan.d_cols;
  float* const dq = s.dq ? s.dq : reinterpret_cast<float*>(dq_row(pb, index, strip.first_query));
  if (f.dk) load_queries(pb, plan, index, strip, s.rows);
  for (int64_t block = 0; block < plan.blocks; ++block) {
    const int64_t j0 = block * KEY_BLOCK, n = min(KEY_BLOCK, pb.Nk - j0);
    for (int64_t v = 0; v < strip.vectors; ++v) {
      const vec factor = load(map.factor + (v * plan.blocks + block) * W);
      const auto dA = gradient(v);
      const vec rho_v = rho[v];
      float* const dlogits = s.dlogits + v * W;
#pragma GCC unroll 4
      for (int64_t j = 0; j < n; ++j) {
        const int64_t offset = (v * plan.key_rows + j0 + j) * W;
        store(dlogits + j * lanes, load(map.p + offset) * factor * (dA(j0 + j, offset) - rho_v));
      }
    }
    const char* const dlogits = reinterpret_cast<const char*>(s.dlogits);
    if (f.dq) {
      const RowView keys = float_keys(pb, plan, index, j0, n, true, s.keys);
      product<Float, Epilogue::none, true>(
          {.b = dlogits,
           .b_row = 4,
           .b_k = lanes * 4,
           .x = reinterpret_cast<const float*>(keys.first),
           .x_row = keys.pitch / 4,
           .K = n,
           .out = dq,
           .out_row = cols,
           .out_vector = W,
           .add = block > 0,
           .prefetch = block == 0 ? reinterpret_cast<const char*>(dq + PREFETCH_DISTANCE * cols) : nullptr,
           .prefetch_row = cols * 4,
           .prefetch_bytes = cols * 4},
          queries, cols / W);
    }
    if (f.dk) add_to_keys<Float>(strip, s.dlogits, 4, s.rows, queries, n, cols, dk + j0 * cols);
  }
  if (!f.dq || !s.dq) return;
  for (int64_t l = 0; l < queries; ++l)
    store_row(pb.dtype, s.dq + l * cols, pb.D, dq_row(pb, index, strip.first_query + l));
}

// Adds an item's part of a sum, n rows of `width` floats at a pitch of `cols`, to the result. A float32 result is
// itself the accumulator; for other dtypes `sums` is, which has the layout of the part.
void add_rows(Dtype dtype, int64_t n, int64_t width, int64_t cols, const float* part, float* sums, bool first,
              bool last, char* result) {
  const bool in_result = dtype == Dtype::f32;
  float row[MAX_COLS];
  for (int64_t j = 0; j < n; ++j) {
    char* const out = result + j * width * element_size(dtype);
    float* sum = in_result || (first && last) ? row : sums + j * cols;
    if (in_result && !first) load_row<Dtype::f32>(out, width, sum);
    for (int64_t d = 0; d < cols; d += W) {
      const vec x = load(part + j * cols + d);
      store(sum + d, first ? x : load(sum + d) + x);
    }
    if (in_result || last) store_row(dtype, sum, width, out);
  }
}

// Adds the item's dk, which is in its scratch, to the result; called in the order of the groups.
void finish_dk(const Problem& pb, const Plan& plan, const WorkItem& item, const float* part, float* sums) {
  for (int64_t frame = item.own_begin; frame < item.own_end; ++frame)
    for (int64_t head = 0; head < plan.map_heads; ++head) {
      const MapIndex index = map_index(pb, item, frame, head);
      if (!pb.frames[index.set].dk) continue;
      const int64_t offset = ((frame - item.own_begin) * plan.map_heads + head) * pb.Nk * plan.d_cols;
      add_rows(pb.dtype, pb.Nk, pb.D, plan.d_cols, part + offset, sums + offset, item.group == 0,
               item.group == plan.groups - 1, dk_row(pb, index, 0));
    }
}

}  // namespace
}  // namespace amflow::AMFLOW_ISA
