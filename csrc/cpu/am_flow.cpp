// AM flow on the CPU, forward and backward; the maths is derived in docs/maths.md. Compiled once per instruction set.
//
// Vector lanes are queries. A strip is up to 4 vectors of queries against all keys; the map of a strip is stored as
// [vector][key][lane], so that every sum over keys (both softmaxes, delta, rho) is a plain vertical sum, and needs no
// mask. Surplus lanes of the last strip repeat the last query with weight 0: they are NaN only where it is.
// A map is kept as p and one factor per block of keys, A = p * factor: p is taken relative to the largest logit so far,
// which is known while the block still lies in the first-level cache. The same frame gives the same bits, so identical
// frames give M = 0 exactly.

#include "am_flow.h"
#include "product.h"
#include "rows.h"
#include "vec.h"

namespace amflow::AMFLOW_ISA {
namespace {

constexpr int STRIP_VECTORS = 4;
constexpr int MAX_LANES = STRIP_VECTORS * W;
constexpr int64_t KEY_BLOCK = 96;
constexpr int64_t ROWS_AHEAD = 16;  // of a gradient, fetched before they are summed up
constexpr float LOWEST = -3.40282347e38f;

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

#ifdef __AVX512BF16__
constexpr bool NATIVE_BF16 = true;
#else
constexpr bool NATIVE_BF16 = false;
#endif

struct Map {
  float* p;       // [vector][key_rows][W]
  float* factor;  // [vector][blocks][W]
};

// What the backward knows of the change from one map, A, to the next, A': with y = S e^(|A - A'| / temperature),
// S = sign(A - A'), the pair adds y (slope g - offset) to dL/dA and takes as much from dL/dA'.
struct Change {
  float* y;  // laid out as Map::p
  float* g;  // [key_rows]: dflow less its mean
  vec slope[STRIP_VECTORS], offset[STRIP_VECTORS];
  vec rho[STRIP_VECTORS], next_rho[STRIP_VECTORS];  // its part of rowsum(A * dL/dA), and of A'
};

struct Strip {
  int64_t first_query, vectors;
  float lane_weight[MAX_LANES];  // 1 for a query, 0 for a surplus lane

  int64_t lanes() const { return vectors * W; }
  int64_t queries(int64_t Nq) const { return lanes() < Nq - first_query ? lanes() : Nq - first_query; }
};

struct Where {  // one frame of one head and window
  int64_t set, t, b, h, g;
};

struct Item {
  int64_t b, h, g, chain, group;
};

// One worker's memory.
struct Scratch {
  float* rows;     // [lane][d_cols]: queries
  float* queries;  // [d][lane]: the same, transposed
  float* keys;     // [KEY_BLOCK][d_cols]
  float* maxima;   // [vector][W]
  Map maps[2];     // the previous and the current frame's
  Map head_map;    // one head's, for mean_map
  // backward
  Change changes[2];  // from the previous frame to the current one, and the one before
  float* dlogits;  // [KEY_BLOCK][lane]
  float* dq;       // [lane][d_cols], or null if it is summed up in the result
  float* dk;       // [frame][head][Nk][d_cols], or null if it is summed up in the result
  // forward
  float* flow;     // [pair of the chain][key_rows]
};

struct Arena {  // hands out scratch; with no base it only counts
  float* base;
  int64_t used = 0;
  float* take(int64_t floats) {
    float* p = base ? base + used : nullptr;
    used += round_up(floats, 16);
    return p;
  }
};

int64_t map_size(const Plan& plan) { return STRIP_VECTORS * plan.key_rows * W; }
int64_t dk_size(const Problem& pb, const Plan& plan) {
  return plan.chain_frames * plan.map_heads * pb.Nk * plan.d_cols;
}

bool wants_dk(const Problem& pb) { return pb.frames[0].dk || pb.frames[1].dk; }

// Whether rows of D are whole vectors of floats, which products can read and write where they lie.
bool whole_rows(const Problem& pb) { return pb.dtype == Dtype::f32 && pb.D % W == 0; }

// Whether an item has its dk to itself and it can be summed up in the result: no copy, no turn.
bool dk_in_place(const Problem& pb, const Plan& plan) { return plan.groups == 1 && whole_rows(pb); }

Scratch layout(const Problem& pb, const Plan& plan, bool backward, Arena& arena) {
  const auto map = [&] { return Map{arena.take(map_size(plan)), arena.take(STRIP_VECTORS * plan.blocks * W)}; };
  Scratch s{};
  s.rows = arena.take(MAX_LANES * plan.d_cols);
  s.queries = arena.take(plan.d_cols * MAX_LANES);
  s.keys = arena.take(KEY_BLOCK * plan.d_cols);
  s.maxima = arena.take(MAX_LANES);
  s.maps[0] = map();
  s.maps[1] = map();
  if (pb.reduction == Reduction::mean_map) s.head_map = map();
  if (!backward) s.flow = arena.take((plan.chain_frames - 1) * plan.key_rows);
  if (backward) {
    for (Change& change : s.changes) {
      change.y = arena.take(map_size(plan));
      change.g = arena.take(plan.key_rows);
    }
    s.dlogits = arena.take(KEY_BLOCK * MAX_LANES);
    if (!whole_rows(pb)) s.dq = arena.take(MAX_LANES * plan.d_cols);
    if (wants_dk(pb) && !dk_in_place(pb, plan)) s.dk = arena.take(dk_size(pb, plan));
  }
  return s;
}

// ---- the cut into items

Plan plan_common(const Problem& pb) {
  Plan plan{};
  plan.map_heads = pb.reduction == Reduction::mean_map ? pb.H : 1;
  plan.heads = pb.H / plan.map_heads;
  plan.chains = pb.pair ? pb.T : min(pb.lag, pb.T);
  plan.chain_frames = pb.pair ? 2 : div_up(pb.T, pb.lag);
  plan.strip_vectors = div_up(pb.Nq, W);
  plan.strips = div_up(plan.strip_vectors, STRIP_VECTORS);
  plan.blocks = div_up(pb.Nk, KEY_BLOCK);
  plan.key_rows = round_up(pb.Nk, W);
  plan.d_cols = round_up(pb.D, W);
  return plan;
}

int64_t whole_items(const Problem& pb, const Plan& plan) { return pb.B * plan.heads * pb.G * plan.chains; }

Plan plan_forward(const Problem& pb) {
  Plan plan = plan_common(pb);
  // Enough items for many threads. It depends on neither B nor T, so that a pair has the same bits in any batch or clip.
  plan.groups = min(plan.strips, div_up(128, plan.heads * pb.G));
  plan.items = whole_items(pb, plan) * plan.groups;
  plan.summed_heads = pb.reduction == Reduction::mean ? pb.H : 1;
  plan.sums = whole_items(pb, plan) / plan.summed_heads;
  Arena arena{nullptr};
  layout(pb, plan, false, arena);
  plan.scratch = arena.used;
  return plan;
}

Plan plan_backward(const Problem& pb) {
  Plan plan = plan_common(pb);
  plan.groups = min(plan.strips, div_up(12, whole_items(pb, plan)));  // fewer: each group sums up a dk of its own
  plan.items = whole_items(pb, plan) * plan.groups;
  plan.summed_heads = 1;
  plan.sums = whole_items(pb, plan);
  plan.sum_floats = plan.groups > 1 && pb.dtype != Dtype::f32 && wants_dk(pb) ? dk_size(pb, plan) : 0;
  Arena arena{nullptr};
  layout(pb, plan, true, arena);
  plan.scratch = arena.used;
  return plan;
}

Item item_at(const Problem& pb, const Plan& plan, int64_t index) {  // ((((b, h), g), chain), group)
  Item item;
  item.group = index % plan.groups, index /= plan.groups;
  item.chain = index % plan.chains, index /= plan.chains;
  item.g = index % pb.G, index /= pb.G;
  item.h = index % plan.heads;
  item.b = index / plan.heads;
  return item;
}

Turn turn(const Problem& pb, const Plan& plan, int64_t index) {
  const Item item = item_at(pb, plan, index);
  const int64_t n = plan.summed_heads;
  return {((item.b * (plan.heads / n) + item.h / n) * pb.G + item.g) * plan.chains + item.chain,
          item.h % n * plan.groups + item.group};
}

int64_t frames_of(const Problem& pb, int64_t chain) { return pb.pair ? 2 : div_up(pb.T - chain, pb.lag); }

Where frame_at(const Problem& pb, const Item& item, int64_t frame, int64_t head) {
  const int64_t set = pb.pair ? frame : 0;
  return {set, pb.pair ? item.chain : item.chain + frame * pb.lag, item.b, item.h + head, item.g};
}

int64_t pair_of(const Problem& pb, int64_t chain, int64_t frame) {  // the pair (frame, frame + 1) of a chain
  return pb.pair ? chain : chain + frame * pb.lag;
}

// The row of flow or dflow of a pair.
int64_t flow_offset(const Problem& pb, const Item& item, int64_t pair) {
  const int64_t pairs = pb.pair ? pb.T : pb.T - pb.lag;
  const bool per_head = pb.reduction == Reduction::none;
  return (((item.b * pairs + pair) * (per_head ? pb.H : 1) + (per_head ? item.h : 0)) * pb.G + item.g) * pb.Nk;
}

Strip strip_at(const Problem& pb, const Plan& plan, int64_t index) {  // all strips as wide as any other, or one less
  const int64_t first = index * plan.strip_vectors / plan.strips;
  Strip strip{first * W, (index + 1) * plan.strip_vectors / plan.strips - first, {}};
  for (int64_t l = 0; l < strip.lanes(); ++l) strip.lane_weight[l] = strip.first_query + l < pb.Nq ? 1.f : 0.f;
  return strip;
}

// ---- reading queries and keys

const char* query_row(const Problem& pb, const Where& at, int64_t i) {
  const Frames& f = pb.frames[at.set];
  const int64_t* stride = f.q_stride;
  const int64_t offset = at.b * stride[0] + at.t * stride[1] + at.h * stride[2] + at.g * stride[3] + i * stride[4];
  return static_cast<const char*>(f.q) + offset * element_size(pb.dtype);
}

const char* key_row(const Problem& pb, const Where& at, int64_t j) {
  const Frames& f = pb.frames[at.set];
  const int64_t* stride = f.k_stride;
  const int64_t offset = at.b * stride[0] + at.t * stride[1] + at.h * stride[2] + at.g * stride[3] + j * stride[4];
  return static_cast<const char*>(f.k) + offset * element_size(pb.dtype);
}

// dq and dk are contiguous.
char* dq_row(const Problem& pb, const Where& at, int64_t i) {
  const int64_t row = (((at.b * pb.T + at.t) * pb.H + at.h) * pb.G + at.g) * pb.Nq + i;
  return static_cast<char*>(pb.frames[at.set].dq) + row * pb.D * element_size(pb.dtype);
}

char* dk_row(const Problem& pb, const Where& at, int64_t j) {
  const int64_t row = (((at.b * pb.T + at.t) * pb.H + at.h) * pb.G + at.g) * pb.Nk + j;
  return static_cast<char*>(pb.frames[at.set].dk) + row * pb.D * element_size(pb.dtype);
}

// The strip's queries as floats, [lane][d_cols].
void load_queries(const Problem& pb, const Plan& plan, const Where& at, const Strip& strip, float* rows) {
  for (int64_t l = 0; l < strip.lanes(); ++l)
    load_row(pb.dtype, query_row(pb, at, min(strip.first_query + l, pb.Nq - 1)), pb.D, rows + l * plan.d_cols);
}

// Keys for a product, in place where their layout allows.
struct Keys {
  const char* first;
  int64_t row;  // bytes
};

// As floats; `whole`: in whole vectors, padded with zeros.
Keys float_keys(const Problem& pb, const Plan& plan, const Where& at, int64_t j0, int64_t n, bool whole, float* buffer) {
  if (whole ? whole_rows(pb) : pb.dtype == Dtype::f32) return {key_row(pb, at, j0), pb.frames[at.set].k_stride[4] * 4};
  for (int64_t j = 0; j < n; ++j) load_row(pb.dtype, key_row(pb, at, j0 + j), pb.D, buffer + j * plan.d_cols);
  return {reinterpret_cast<const char*>(buffer), plan.d_cols * 4};
}

Keys bf16_keys(const Problem& pb, const Plan& plan, const Where& at, int64_t j0, int64_t n, float* buffer) {
  if (pb.D % 2 == 0) return {key_row(pb, at, j0), pb.frames[at.set].k_stride[4] * 2};
  char* copy = reinterpret_cast<char*>(buffer);  // odd D: the last pair is completed with a zero
  for (int64_t j = 0; j < n; ++j) {
    char* row = copy + j * plan.d_cols * 4;
    __builtin_memcpy(row, key_row(pb, at, j0 + j), pb.D * 2);
    __builtin_memset(row + pb.D * 2, 0, 2);
  }
  return {copy, plan.d_cols * 4};
}

// ---- A = softmax(scale * q k^T) of one strip

// The strip's queries, [d or pair of d][lane], for a product with keys. A negative scale flips their signs, so that the
// largest product is the largest logit.
void pack_queries(const Problem& pb, const Plan& plan, const Where& at, const Strip& strip, Scratch& s, bool bf16) {
  const bool negative = pb.scale < 0;
  if (!bf16) {
    load_queries(pb, plan, at, strip, s.rows);
    transpose_rows(s.rows, strip.lanes(), plan.d_cols, plan.d_cols, s.queries, strip.lanes(), negative ? 1u << 31 : 0);
    return;
  }
  const int64_t cols = round_up(div_up(pb.D, 2), W);
  for (int64_t l = 0; l < strip.lanes(); ++l) {
    char* row = reinterpret_cast<char*>(s.rows + l * cols);
    __builtin_memcpy(row, query_row(pb, at, min(strip.first_query + l, pb.Nq - 1)), pb.D * 2);
    __builtin_memset(row + pb.D * 2, 0, cols * 4 - pb.D * 2);
  }
  transpose_rows(s.rows, strip.lanes(), cols, cols, s.queries, strip.lanes(), negative ? 0x80008000u : 0);
}

// Part `step` of `steps` of the strip's queries, into the second-level cache.
void prefetch_queries(const Problem& pb, const Where& at, const Strip& strip, int64_t step, int64_t steps) {
  const int64_t n = strip.queries(pb.Nq), size = element_size(pb.dtype);
  const int64_t l0 = n * step / steps, l1 = n * (step + 1) / steps;
  prefetch_rows(query_row(pb, at, strip.first_query + l0), pb.frames[at.set].q_stride[4] * size, pb.D * size, l1 - l0);
}

// `next`, if any, is the map that will be computed after this one: its rows are fetched meanwhile.
void compute_head_map(const Problem& pb, const Plan& plan, const Where& at, const Where* next, const Strip& strip,
                      Scratch& s, Map& map) {
  const bool bf16 = NATIVE_BF16 && pb.dtype == Dtype::bf16;
  pack_queries(pb, plan, at, strip, s, bf16);
  const vec scale = set1(__builtin_fabsf(pb.scale) * 1.44269504f);
  const int64_t column = plan.key_rows * W;
  vec shift[STRIP_VECTORS], sum[STRIP_VECTORS];  // of the exponents so far; of p relative to it
  for (int64_t v = 0; v < strip.vectors; ++v) {
    shift[v] = set1(LOWEST);
    sum[v] = set1(0.f);
    store(s.maxima + v * W, set1(-__builtin_inff()));
  }
  for (int64_t block = 0; block < plan.blocks; ++block) {
    const int64_t j0 = block * KEY_BLOCK, n = min(KEY_BLOCK, pb.Nk - j0);
    const Keys keys = bf16 ? bf16_keys(pb, plan, at, j0, n, s.keys) : float_keys(pb, plan, at, j0, n, false, s.keys);
    ProductArgs args{.b = keys.first, .b_row = keys.row, .b_k = 4,
                     .x = s.queries, .x_row = strip.lanes(), .K = bf16 ? div_up(pb.D, 2) : pb.D,
                     .out = map.p + j0 * W, .out_row = W, .out_vector = column, .maxima = s.maxima};
    if (next) {
      args.ahead = key_row(pb, *next, j0);
      args.ahead_row = pb.frames[next->set].k_stride[4] * element_size(pb.dtype);
      args.ahead_bytes = pb.D * element_size(pb.dtype);
    }
#ifdef __AVX512BF16__
    if (bf16) product_and_max<Bf16Pair>(args, n, strip.vectors);
    else
#endif
      product_and_max<Float>(args, n, strip.vectors);
    for (int64_t v = 0; v < strip.vectors; ++v) {
      // -inf so far: the lowest finite number keeps exp2(-inf - shift) at 0. NaN stays NaN.
      const vec top = amflow::AMFLOW_ISA::max(set1(LOWEST), load(s.maxima + v * W) * scale);
      float* p = map.p + v * column + j0 * W;
      vec block_sum = set1(0.f);
#pragma GCC unroll 4
      for (int64_t j = 0; j < n; ++j) {
        const vec y = exp2(fma(load(p + j * W), scale, -top));
        store(p + j * W, y);
        block_sum += y;
      }
      sum[v] = fma(sum[v], exp2(shift[v] - top), block_sum);
      shift[v] = top;
      store(map.factor + (v * plan.blocks + block) * W, top);
      if (next) prefetch_queries(pb, *next, strip, block * strip.vectors + v, plan.blocks * strip.vectors);
    }
  }
  for (int64_t v = 0; v < strip.vectors; ++v) {
    const vec norm = set1(1.f / plan.map_heads) / sum[v];
    for (int64_t block = 0; block < plan.blocks; ++block) {
      float* factor = map.factor + (v * plan.blocks + block) * W;
      store(factor, exp2(load(factor) - shift[v]) * norm);
    }
  }
}

// The map whose change is measured: one head's, or (mean_map) the mean of all heads'.
void compute_map(const Problem& pb, const Plan& plan, const Item& item, int64_t frame, const Strip& strip, Scratch& s,
                 Map& map) {
  const bool last = frame + 1 == frames_of(pb, item.chain);
  const Where next_frame = frame_at(pb, item, last ? frame : frame + 1, 0);
  if (pb.reduction != Reduction::mean_map)
    return compute_head_map(pb, plan, frame_at(pb, item, frame, 0), last ? nullptr : &next_frame, strip, s, map);
  for (int64_t v = 0; v < strip.vectors; ++v)
    for (int64_t block = 0; block < plan.blocks; ++block)
      store(map.factor + (v * plan.blocks + block) * W, set1(1.f));
  for (int64_t head = 0; head < pb.H; ++head) {
    const Where next = head + 1 < pb.H ? frame_at(pb, item, frame, head + 1) : next_frame;
    compute_head_map(pb, plan, frame_at(pb, item, frame, head), &next, strip, s, s.head_map);
    for (int64_t v = 0; v < strip.vectors; ++v)
      for (int64_t j = 0; j < pb.Nk; ++j) {
        const int64_t at = (v * plan.key_rows + j) * W;
        const vec A = load(s.head_map.p + at) * load(s.head_map.factor + (v * plan.blocks + j / KEY_BLOCK) * W);
        store(map.p + at, head ? load(map.p + at) + A : A);
      }
  }
}

// ---- M = |A - A'| and e = expm1(M / temperature)

// For vector v of the strip: visit(j, offset of key j, A / temperature, A' / temperature) for every key, and end_block()
// after every block. Two products and no FMA: equal maps are equal here too.
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
      const int64_t at = (v * plan.key_rows + j) * W;
      visit(j, at, load(a.p + at) * fa, load(b.p + at) * fb);
    }
    end_block();
  }
}

template <bool sharp>
inline vec expm1(vec x) { return sharp ? expm1_wide(x) : expm1_unit(x); }

// ---- forward

// Adds sum_i w_i (e_ij - ebar_i) of the strip's queries i to flow[j]. Overwrites a.p with e.
template <bool sharp>
void forward_pair(const Problem& pb, const Plan& plan, const Strip& strip, Map& a, const Map& b, float* flow) {
  vec w[STRIP_VECTORS];
  vec lost = set1(0.f);  // per lane, sum of w_i ebar_i
  for (int64_t v = 0; v < STRIP_VECTORS; ++v) w[v] = set1(0.f);
  for (int64_t v = 0; v < strip.vectors; ++v) {
    vec sum = set1(0.f), block_sum = set1(0.f);
    for_each_change(pb, plan, v, a, b, [&](int64_t, int64_t at, vec A, vec B) __attribute__((always_inline)) {
      const vec e = expm1<sharp>(abs(A - B));
      store(a.p + at, e);
      block_sum += e;
    }, [&] {
      sum += block_sum;
      block_sum = set1(0.f);
    });
    w[v] = load(strip.lane_weight + v * W) / (set1(pb.Nk) + sum);
    lost = fma(w[v], sum * set1(1.f / pb.Nk), lost);
  }
  vec spread[W];
  for (int i = 0; i < W; ++i) spread[i] = lost;
  const vec total_lost = sum_each(spread);
  for (int64_t j = 0; j < plan.key_rows; j += W) {  // the rows after the last key hold anything, and nothing reads theirs
    vec r[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) r[i] = w[0] * load(a.p + (j + i) * W);
    for (int64_t v = 1; v < strip.vectors; ++v) {
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) r[i] = fma(w[v], load(a.p + (v * plan.key_rows + j + i) * W), r[i]);
    }
    store(flow + j, load(flow + j) + (sum_each(r) - total_lost));
  }
}

void clear(float* p, int64_t n) { __builtin_memset(p, 0, n * sizeof(float)); }

void forward(const Problem& pb, const Plan& plan, int64_t index, float* scratch) {
  Arena arena{scratch};
  Scratch s = layout(pb, plan, false, arena);
  clear(s.flow, (plan.chain_frames - 1) * plan.key_rows);
  const Item item = item_at(pb, plan, index);
  const int64_t frames = frames_of(pb, item.chain);
  if (frames < 2) return;
  for (int64_t i = item.group * plan.strips / plan.groups; i < (item.group + 1) * plan.strips / plan.groups; ++i) {
    const Strip strip = strip_at(pb, plan, i);
    for (int64_t frame = 0; frame < frames; ++frame) {
      Map &previous = s.maps[(frame + 1) % 2], &current = s.maps[frame % 2];
      compute_map(pb, plan, item, frame, strip, s, current);
      if (frame == 0) continue;
      float* flow = s.flow + (frame - 1) * plan.key_rows;
      if (pb.inv_temperature > 1) forward_pair<true>(pb, plan, strip, previous, current, flow);
      else forward_pair<false>(pb, plan, strip, previous, current, flow);
    }
  }
}

// Adds the item's flow, left in its scratch, to the result.
void finish_forward(const Problem& pb, const Plan& plan, int64_t index, float* scratch, float*) {
  Arena arena{scratch};
  const Scratch s = layout(pb, plan, false, arena);
  const Item item = item_at(pb, plan, index);
  const int64_t place = turn(pb, plan, index).place;
  const bool last = place == plan.summed_heads * plan.groups - 1;
  const double base = pb.center ? 0. : static_cast<double>(pb.Nq) / pb.Nk;
  for (int64_t frame = 0; frame + 1 < frames_of(pb, item.chain); ++frame) {
    float* flow = pb.flow + flow_offset(pb, item, pair_of(pb, item.chain, frame));
    const float* part = s.flow + frame * plan.key_rows;
    for (int64_t j = 0; j < pb.Nk; ++j) {
      const float sum = place ? flow[j] + part[j] : part[j];
      flow[j] = last ? static_cast<float>(base + sum / static_cast<double>(plan.summed_heads)) : sum;
    }
  }
}

// ---- backward

// dflow of one pair, less its mean: a constant has no effect since the rows of P sum to 1, and without it a constant
// dflow gives exactly 0.
void load_dflow(const Problem& pb, const Item& item, int64_t pair, float* g) {
  const float* dflow = pb.dflow + flow_offset(pb, item, pair);
  double sum = 0;
  for (int64_t j = 0; j < pb.Nk; ++j) sum += dflow[j];
  const double mean = sum / pb.Nk, share = 1. / (pb.reduction == Reduction::mean ? pb.H : 1);
  for (int64_t j = 0; j < pb.Nk; ++j) g[j] = static_cast<float>((dflow[j] - mean) * share);
}

// A sum over keys, made block by block: its rounding error grows with the block and the number of blocks.
struct Sum {
  vec total = set1(0.f), block = set1(0.f);
  void end_block() {
    total += block;
    block = set1(0.f);
  }
};

// Fills `change` but for g, which is there.
template <bool sharp>
void backward_pair(const Problem& pb, const Plan& plan, const Strip& strip, const Map& a, const Map& b, Change& change) {
  float g_sum = 0;
  for (int64_t j = 0; j < pb.Nk; ++j) g_sum += change.g[j];
  for (int64_t v = 0; v < strip.vectors; ++v) {
    Sum e, e_g, A_y, A_y_g, B_y, B_y_g;  // A and B come with the factor 1 / temperature
    const float* g = change.g;
    float* const y_out = change.y;
    for_each_change(pb, plan, v, a, b, [&](int64_t j, int64_t at, vec A, vec B) __attribute__((always_inline)) {
      const vec d = A - B, g_j = set1(g[j]);
      const vec e_j = expm1<sharp>(abs(d));
      const vec y = times_sign(e_j + set1(1.f), d);
      const vec Ay = A * y, By = B * y;
      store(y_out + at, y);
      e.block += e_j;
      e_g.block = fma(e_j, g_j, e_g.block);
      A_y.block += Ay;
      A_y_g.block = fma(Ay, g_j, A_y_g.block);
      B_y.block += By;
      B_y_g.block = fma(By, g_j, B_y_g.block);
    }, [&] {
      e.end_block(), e_g.end_block();
      A_y.end_block(), A_y_g.end_block();
      B_y.end_block(), B_y_g.end_block();
    });
    const vec w = load(strip.lane_weight + v * W) / (set1(pb.Nk) + e.total);
    const vec delta = w * (set1(g_sum) + e_g.total), scaled_w = set1(pb.scale) * w;
    change.slope[v] = scaled_w * set1(pb.inv_temperature);
    change.offset[v] = change.slope[v] * delta;
    change.rho[v] = scaled_w * (A_y_g.total - delta * A_y.total);
    change.next_rho[v] = -scaled_w * (B_y_g.total - delta * B_y.total);
  }
}

// rho = rowsum(A * dA)
template <class Gradient>
void row_sums(const Problem& pb, const Plan& plan, const Strip& strip, const Map& map, const Gradient& gradient,
              vec* rho) {
  for (int64_t v = 0; v < strip.vectors; ++v) {
    const auto dA = gradient(v);
    rho[v] = set1(0.f);
    for (int64_t block = 0; block < plan.blocks; ++block) {
      const int64_t j0 = block * KEY_BLOCK, j1 = min(j0 + KEY_BLOCK, pb.Nk);
      vec sum = set1(0.f);
#pragma GCC unroll 4
      for (int64_t j = j0; j < j1; ++j) {
        const int64_t at = (v * plan.key_rows + j) * W;
        sum = fma(load(map.p + at), dA(j, at), sum);
      }
      rho[v] = fma(sum, load(map.factor + (v * plan.blocks + block) * W), rho[v]);
    }
  }
}

// From dL/dA of one map and strip: dq of the strip's queries, and what dk of all keys gets from them, which is written if
// it is the item's first strip and else added.
template <class Gradient>
void backward_head_map(const Problem& pb, const Plan& plan, const Where& at, const Strip& strip, const Map& map,
                       const Gradient& gradient, const vec* rho, Scratch& s, float* dk, bool first_strip) {
  const Frames& f = pb.frames[at.set];
  const int64_t lanes = strip.lanes(), queries = strip.queries(pb.Nq), cols = plan.d_cols;
  float* const dq = s.dq ? s.dq : reinterpret_cast<float*>(dq_row(pb, at, strip.first_query));
  if (f.dk) load_queries(pb, plan, at, strip, s.rows);
  for (int64_t block = 0; block < plan.blocks; ++block) {
    const int64_t j0 = block * KEY_BLOCK, n = min(KEY_BLOCK, pb.Nk - j0);
    for (int64_t v = 0; v < strip.vectors; ++v) {
      const vec factor = load(map.factor + (v * plan.blocks + block) * W);
      const auto dA = gradient(v);
      const vec rho_v = rho[v];
      float* const dlogits = s.dlogits + v * W;
#pragma GCC unroll 4
      for (int64_t j = 0; j < n; ++j) {
        const int64_t at = (v * plan.key_rows + j0 + j) * W;
        store(dlogits + j * lanes, load(map.p + at) * factor * (dA(j0 + j, at) - rho_v));
      }
    }
    const char* const dlogits = reinterpret_cast<const char*>(s.dlogits);
    if (f.dq) {
      const Keys keys = float_keys(pb, plan, at, j0, n, true, s.keys);
      product<Float, Out::plain, true>(
          {.b = dlogits, .b_row = 4, .b_k = lanes * 4, .x = reinterpret_cast<const float*>(keys.first),
           .x_row = keys.row / 4, .K = n, .out = dq, .out_row = cols, .out_vector = W, .add = block > 0,
           .ahead = block == 0 ? reinterpret_cast<const char*>(dq + ROWS_AHEAD * cols) : nullptr, .ahead_row = cols * 4,
           .ahead_bytes = cols * 4},
          queries, cols / W);
    }
    if (f.dk) {
      float* const rows = dk + j0 * cols;
      product<Float, Out::plain, false>(
          {.b = dlogits, .b_row = lanes * 4, .b_k = 4, .x = s.rows, .x_row = cols, .K = queries, .out = rows,
           .out_row = cols, .out_vector = W, .add = !first_strip,
           .ahead = reinterpret_cast<const char*>(rows + ROWS_AHEAD * cols), .ahead_row = cols * 4,
           .ahead_bytes = cols * 4},
          n, cols / W);
    }
  }
  if (!f.dq || !s.dq) return;
  for (int64_t l = 0; l < queries; ++l)
    store_row(pb.dtype, s.dq + l * cols, pb.D, dq_row(pb, at, strip.first_query + l));
}

// gradient(v)(j, offset of key j) is dL/dA, rho = rowsum(A * dL/dA).
template <class Gradient>
void backward_map(const Problem& pb, const Plan& plan, const Item& item, int64_t frame, const Strip& strip,
                  const Map& map, const Gradient& gradient, const vec* rho, Scratch& s, bool first_strip) {
  for (int64_t head = 0; head < plan.map_heads; ++head) {
    const Where at = frame_at(pb, item, frame, head);
    float* const dk = s.dk ? s.dk + (frame * plan.map_heads + head) * pb.Nk * plan.d_cols
                           : reinterpret_cast<float*>(dk_row(pb, at, 0));
    if (pb.reduction != Reduction::mean_map) {
      backward_head_map(pb, plan, at, strip, map, gradient, rho, s, dk, first_strip);
      continue;
    }
    // The head's map comes with its factor 1 / H, and so
    // A (dA / H - rowsum(A dA / H)) = (A / H) (dA - H rowsum((A / H) dA)).
    vec head_rho[STRIP_VECTORS];
    compute_head_map(pb, plan, at, nullptr, strip, s, s.head_map);
    row_sums(pb, plan, strip, s.head_map, gradient, head_rho);
    for (int64_t v = 0; v < strip.vectors; ++v) head_rho[v] *= set1(pb.H);
    backward_head_map(pb, plan, at, strip, s.head_map, gradient, head_rho, s, dk, first_strip);
  }
}

// Of a map that is the second of the pair `before` and the first of the pair `after`; either may be missing.
void backward_map(const Problem& pb, const Plan& plan, const Item& item, int64_t frame, const Strip& strip,
                  const Map& map, const Change* before, const Change* after, Scratch& s, bool first_strip) {
  const auto first = [&](int64_t v) {
    return [y = after->y, g = after->g, slope = after->slope[v], offset = after->offset[v]](int64_t j, int64_t at) {
      return load(y + at) * fma(slope, set1(g[j]), -offset);
    };
  };
  const auto second = [&](int64_t v) {
    return [y = before->y, g = before->g, slope = -before->slope[v], offset = before->offset[v]](int64_t j, int64_t at) {
      return load(y + at) * fma(slope, set1(g[j]), offset);
    };
  };
  const auto both = [&](int64_t v) {
    return [first = first(v), second = second(v)](int64_t j, int64_t at) { return first(j, at) + second(j, at); };
  };
  if (!before) return backward_map(pb, plan, item, frame, strip, map, first, after->rho, s, first_strip);
  if (!after) return backward_map(pb, plan, item, frame, strip, map, second, before->next_rho, s, first_strip);
  vec rho[STRIP_VECTORS];
  for (int64_t v = 0; v < strip.vectors; ++v) rho[v] = before->next_rho[v] + after->rho[v];
  backward_map(pb, plan, item, frame, strip, map, both, rho, s, first_strip);
}

void backward(const Problem& pb, const Plan& plan, int64_t index, float* scratch) {
  Arena arena{scratch};
  Scratch s = layout(pb, plan, true, arena);
  const Item item = item_at(pb, plan, index);
  const int64_t frames = frames_of(pb, item.chain);
  const int64_t first = item.group * plan.strips / plan.groups, last = (item.group + 1) * plan.strips / plan.groups;
  for (int64_t i = first; i < last; ++i) {
    const Strip strip = strip_at(pb, plan, i);
    const Change* before = nullptr;
    if (frames == 1) {  // its gradient is 0
      clear(s.changes[0].y, map_size(plan));
      clear(s.changes[0].g, plan.key_rows);
      before = &s.changes[0];
    }
    for (int64_t frame = 0; frame < frames; ++frame) {
      Map &previous = s.maps[(frame + 1) % 2], &current = s.maps[frame % 2];
      compute_map(pb, plan, item, frame, strip, s, current);
      if (frame == 0) continue;
      Change& change = s.changes[frame % 2];
      load_dflow(pb, item, pair_of(pb, item.chain, frame - 1), change.g);
      if (pb.inv_temperature > 1) backward_pair<true>(pb, plan, strip, previous, current, change);
      else backward_pair<false>(pb, plan, strip, previous, current, change);
      backward_map(pb, plan, item, frame - 1, strip, previous, before, &change, s, i == first);
      before = &change;
    }
    backward_map(pb, plan, item, frames - 1, strip, s.maps[(frames - 1) % 2], before, nullptr, s, i == first);
  }
}

// Adds the item's dk, left in its scratch, to the result; called in the order of the groups. In float32 the sum is made in
// the result, else in `sums` ([frame][head][Nk][d_cols]).
void finish_backward(const Problem& pb, const Plan& plan, int64_t index, float* scratch, float* sums) {
  if (!wants_dk(pb) || dk_in_place(pb, plan)) return;
  Arena arena{scratch};
  const float* part = layout(pb, plan, true, arena).dk;
  const Item item = item_at(pb, plan, index);
  const bool first = item.group == 0, last = item.group == plan.groups - 1, in_result = pb.dtype == Dtype::f32;
  float row[256];
  for (int64_t frame = 0; frame < frames_of(pb, item.chain); ++frame)
    for (int64_t head = 0; head < plan.map_heads; ++head) {
      const Where at = frame_at(pb, item, frame, head);
      if (!pb.frames[at.set].dk) continue;
      for (int64_t j = 0; j < pb.Nk; ++j) {
        char* const dk = dk_row(pb, at, j);
        const int64_t offset = ((frame * plan.map_heads + head) * pb.Nk + j) * plan.d_cols;
        float* sum = in_result || plan.groups == 1 ? row : sums + offset;
        if (in_result && !first) load_row(Dtype::f32, dk, pb.D, sum);
        for (int64_t d = 0; d < plan.d_cols; d += W) {
          const vec x = load(part + offset + d);
          store(sum + d, first ? x : load(sum + d) + x);
        }
        if (in_result || last) store_row(pb.dtype, sum, pb.D, dk);
      }
    }
}

}  // namespace

#define AMFLOW_NAME_OF(isa) #isa
#define AMFLOW_NAME(isa) AMFLOW_NAME_OF(isa)

const Kernels kernels = {AMFLOW_NAME(AMFLOW_ISA), turn, plan_forward, forward, finish_forward, plan_backward, backward,
                         finish_backward};

}  // namespace amflow::AMFLOW_ISA
