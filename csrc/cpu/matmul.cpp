// The motion operator on the CPU, forward and backward: M x, M^T x, P x and P^T x without storing M or P
// (docs/maths.md). Compiled once per instruction set.
//
// A strip's M, or e with P = w (1 + e), overwrites its map while that is in the second-level cache, and is multiplied
// one block of keys at a time. Op v is computed with queries in the lanes, so that v is read in place; each strip
// computes its own rows. Op^T u is accumulated over the strips of an item, as dk is;
// if u has few columns, by sums over lanes.

#include "matmul.h"

#include "maps.h"

namespace amflow::AMFLOW_ISA {
namespace {

constexpr int64_t FEW_COLUMNS = 4;  // up to this C, a row of op^T u would be a vector of mostly padding

// The gradient of one pair of maps, A and A', which adds y to dL/dA and -y to dL/dA'.
struct PairGradient {
  float* y;                                         // laid out as Map::p
  vec rho[STRIP_VECTORS], next_rho[STRIP_VECTORS];  // the pair's part of rowsum(A * dL/dA) and rowsum(A' * dL/dA')
};

// One worker's memory. c_cols is C, padded to whole vectors.
struct Scratch : MapScratch {
  float* block;         // [KEY_BLOCK][lane]: M or e of a block of keys
  float* values;        // [KEY_BLOCK][c_cols]: v of a block of keys
  float* u;             // [lane][c_cols]
  float* transposed;    // [c_cols][lane]: u, or op v
  float* product_rows;  // [lane][c_cols]: op v
  float* partial;       // [pair of the item][Nk][c_cols]: op^T u, or null if it is accumulated in the result
  float* columns;       // [pair of the item][C][key_rows]: op^T u transposed, for few columns
  double* v_sum;        // [pair of the item][c_cols]: sum of v over the keys, for P only
  double* wu_sum;       // [pair of the item][c_cols]: sum of w u over the item's queries, for P only
  // Backward.
  float* change;          // laid out as Map::p: M or e
  PairGradient pairs[2];  // the two latest pairs of the item
};

int64_t c_cols(const MatmulProblem& pb) { return round_up(pb.C, W); }

int64_t partial_size(const MatmulProblem& pb, const Plan& plan) { return (plan.item_frames - 1) * pb.Nk * c_cols(pb); }

// Whether op^T u is computed, which is accumulated over strips.
bool has_key_product(const MatmulProblem& pb) { return pb.out && pb.to_keys; }

// Whether one item computes all of an op^T u, in a layout that it can accumulate in the result.
bool key_product_in_place(const MatmulProblem& pb, const Plan& plan) {
  return plan.groups == 1 && pb.out_dtype == Dtype::f32 && pb.C % W == 0;
}

bool has_few_columns(const MatmulProblem& pb) { return pb.C <= FEW_COLUMNS; }

bool wants_frame(const Frames& f) { return f.dq || f.dk; }
bool wants_frames(const MatmulProblem& pb) { return wants_frame(pb.frames[0]) || wants_frame(pb.frames[1]); }

Scratch layout(const MatmulProblem& pb, const Plan& plan, bool backward, Arena& arena) {
  Scratch s{};
  const int64_t cols = c_cols(pb), pairs = plan.item_frames - 1;
  const auto take_doubles = [&](int64_t n) { return reinterpret_cast<double*>(arena.take(2 * n)); };
  take_map_scratch(plan, arena, s);
  s.block = arena.take(KEY_BLOCK * MAX_LANES);
  s.values = arena.take(KEY_BLOCK * cols);
  s.u = arena.take(MAX_LANES * cols);
  s.transposed = arena.take(cols * MAX_LANES);
  s.product_rows = arena.take(MAX_LANES * cols);
  if (has_key_product(pb) && !key_product_in_place(pb, plan)) s.partial = arena.take(partial_size(pb, plan));
  if (has_key_product(pb) && has_few_columns(pb)) s.columns = arena.take(pairs * pb.C * plan.key_rows);
  s.v_sum = take_doubles(pairs * cols);
  s.wu_sum = take_doubles(pairs * cols);
  if (backward && wants_frames(pb)) {
    s.change = arena.take(map_size(plan));
    for (PairGradient& pair : s.pairs) pair.y = arena.take(map_size(plan));
    take_gradient_scratch(pb, plan, arena, s);
  }
  return s;
}

// ---- work items

int64_t dk_sums_size(const MatmulProblem& pb, const Plan& plan) {  // 0 if it is accumulated in the result
  return plan.groups > 1 && wants_dk(pb) && pb.dtype != Dtype::f32 ? dk_size(pb, plan) : 0;
}

Plan plan_with(const MatmulProblem& pb, int64_t groups, bool backward, int64_t threads) {
  Plan plan = plan_common(pb);
  plan.owns_frames = backward && wants_frames(pb);
  plan.groups = min(plan.strips, groups);
  divide(pb, plan, threads);
  plan.summed_heads = 1;
  const bool reduced = has_key_product(pb) || wants_dk(pb);
  plan.sums = reduced ? num_chains(pb, plan) * plan.parts : plan.items;
  plan.sum_floats = dk_sums_size(pb, plan);
  if (plan.groups > 1 && has_key_product(pb) && pb.out_dtype != Dtype::f32) plan.sum_floats += partial_size(pb, plan);
  Arena arena{nullptr};
  layout(pb, plan, backward, arena);
  plan.scratch = arena.used;
  return plan;
}

Plan plan_forward(const MatmulProblem& pb, int64_t threads) {
  // The number of groups depends on neither B nor T, so that a pair has the same bits in any batch or clip. There are
  // fewer for op^T u, since each group has its own.
  return plan_with(pb, div_up(pb.to_keys ? 48 : 128, pb.H * pb.G), false, threads);
}

Plan plan_backward(const MatmulProblem& pb, int64_t threads) {
  return plan_with(pb, div_up(12, num_chains(pb, plan_common(pb))), true, threads);
}

ReductionSlot product_slot(const MatmulProblem& pb, const Plan& plan, int64_t index) {
  return plan.sums == plan.items ? ReductionSlot{index, 0} : reduction_slot(pb, plan, index);
}

// ---- reading u and v

// The item's pair (frame, frame + 1), as an index into u, v and the result.
MapIndex pair_map_index(const MatmulProblem& pb, const WorkItem& item, int64_t frame) {
  return {0, pair_index(pb, item, frame), item.b, item.h, item.g};
}

const char* row_at(const Rows& rows, const MapIndex& pair, int64_t i) {
  const int64_t* stride = rows.stride;
  const int64_t offset =
      pair.b * stride[0] + pair.t * stride[1] + pair.h * stride[2] + pair.g * stride[3] + i * stride[4];
  return static_cast<const char*>(rows.data) + offset * element_size(rows.dtype);
}

char* out_row(const MatmulProblem& pb, const MapIndex& pair, int64_t i) {
  const int64_t pairs = pb.pair_form ? pb.T : pb.T - pb.lag;
  const int64_t row = (((pair.b * pairs + pair.t) * pb.H + pair.h) * pb.G + pair.g) * (pb.to_keys ? pb.Nk : pb.Nq) + i;
  return static_cast<char*>(pb.out) + row * pb.C * element_size(pb.out_dtype);
}

void load_u(const MatmulProblem& pb, const MapIndex& pair, const Strip& strip, float* u) {
  load_lanes(pb.u.dtype, row_at(pb.u, pair, strip.first_query), pb.u.stride[4], strip, pb.Nq, pb.C, u, c_cols(pb));
}

// v of n keys as floats, minus `subtract` unless it is null. Without it, floats are used in place.
RowView load_v(const MatmulProblem& pb, const MapIndex& pair, int64_t j0, int64_t n, const float* subtract,
               float* buffer) {
  const char* const first = row_at(pb.v, pair, j0);
  const int64_t pitch = pb.v.stride[4] * element_size(pb.v.dtype);
  if (pb.v.dtype == Dtype::f32 && !subtract) return {first, pitch};
  const int64_t cols = c_cols(pb);
  load_rows(pb.v.dtype, first, pitch, n, pb.C, buffer, cols);
  for (int64_t j = 0; subtract && j < n; ++j)
    for (int64_t c = 0; c < cols; c += W)
      store(buffer + j * cols + c, load(buffer + j * cols + c) - load(subtract + c));
  return {reinterpret_cast<const char*>(buffer), cols * 4};
}

void sum_v(const MatmulProblem& pb, const MapIndex& pair, double* sum) {
  alignas(64) float buffer[MAX_COLS];
  for (int64_t c = 0; c < c_cols(pb); ++c) sum[c] = 0;
  for (int64_t j = 0; j < pb.Nk; ++j) {
    const char* const v = row_at(pb.v, pair, j);
    if (pb.v.dtype != Dtype::f32) load_rows(pb.v.dtype, v, 0, 1, pb.C, buffer, 0);
    const float* const row = pb.v.dtype == Dtype::f32 ? reinterpret_cast<const float*>(v) : buffer;
    for (int64_t c = 0; c < pb.C; ++c) sum[c] += row[c];
  }
}

// ---- M or e of a strip, and its products

// Fills m, laid out as Map::p, with M, or with e and also computes w, both in the unit of the temperature (see `unit`).
// m may be the first map.
template <bool softmax, bool low_temperature>
void compute_change(const MatmulProblem& pb, const Plan& plan, const Strip& strip, const Map& a, const Map& b, float* m,
                    vec* w) {
  for (int64_t v = 0; v < strip.vectors; ++v) {
    BlockedSum e;
    for_each_change(
        pb, plan, v, a, b,
        [&](int64_t, int64_t offset, vec A, vec B) __attribute__((always_inline)) {
          const vec change = abs(A - B);
          const vec x = softmax ? expm1<low_temperature>(change) : change;
          store(m + offset, x);
          if (softmax) e.block += x;
        },
        [&] { e.end_block(); });
    if (softmax) w[v] = load(strip.lane_weight + v * W) / (set1(unit(pb) * pb.Nk) + e.total);
  }
}

void compute_change(const MatmulProblem& pb, const Plan& plan, const Strip& strip, const Map& a, const Map& b, float* m,
                    vec* w) {
  if (!pb.softmax) compute_change<false, false>(pb, plan, strip, a, b, m, w);
  else if (pb.inv_temperature > 1) compute_change<true, true>(pb, plan, strip, a, b, m, w);
  else compute_change<true, false>(pb, plan, strip, a, b, m, w);
}

// Copies n keys of m from j0 on to [key][lane].
void gather_block(const Plan& plan, const Strip& strip, const float* m, int64_t j0, int64_t n, float* block) {
  const int64_t lanes = strip.lanes();
  for (int64_t v = 0; v < strip.vectors; ++v)
#pragma GCC unroll 4
    for (int64_t j = 0; j < n; ++j) store(block + j * lanes + v * W, load(m + (v * plan.key_rows + j0 + j) * W));
}

// Writes the strip's rows of op v to the result. P v = w (sum of v + e v).
void multiply_to_queries(const MatmulProblem& pb, const Plan& plan, const MapIndex& pair, const Strip& strip,
                         const float* m, const vec* w, const double* v_sum, Scratch& s) {
  const int64_t lanes = strip.lanes(), cols = c_cols(pb);
  for (int64_t block = 0; block < plan.blocks; ++block) {
    const int64_t j0 = block * KEY_BLOCK, n = min(KEY_BLOCK, pb.Nk - j0);
    gather_block(plan, strip, m, j0, n, s.block);
    const RowView values = load_v(pb, pair, j0, n, nullptr, s.values);
    product<Float, Epilogue::none, true>({.b = values.first,
                                          .b_row = 4,
                                          .b_k = values.pitch,
                                          .x = s.block,
                                          .x_row = lanes,
                                          .K = n,
                                          .out = s.transposed,
                                          .out_row = lanes,
                                          .out_vector = W,
                                          .add = block > 0},
                                         pb.C, strip.vectors);
  }
  if (pb.softmax)
    for (int64_t c = 0; c < pb.C; ++c)
      for (int64_t v = 0; v < strip.vectors; ++v) {
        float* const x = s.transposed + c * lanes + v * W;
        store(x, w[v] * (set1(static_cast<float>(unit(pb) * v_sum[c])) + load(x)));
      }
  transpose_rows(s.transposed, cols, lanes, lanes, s.product_rows, cols, 0);  // rows after the first C are undefined
  for (int64_t l = 0; l < strip.queries(pb.Nq); ++l)
    store_row(pb.out_dtype, s.product_rows + l * cols, pb.C, out_row(pb, pair, strip.first_query + l));
}

// Replaces the strip's u with w u, and adds its sum over the queries to wu_sum: P^T u = e^T w u + sum of w u, where the
// sum is the same for every key.
void weight_u(const MatmulProblem& pb, const Strip& strip, const vec* w, double* wu_sum, float* u) {
  const int64_t cols = c_cols(pb);
  float weight[MAX_LANES];
  for (int64_t v = 0; v < strip.vectors; ++v) store(weight + v * W, w[v]);
  for (int64_t c = 0; strip.first_of_item && c < cols; ++c) wu_sum[c] = 0;
  for (int64_t l = 0; l < strip.queries(pb.Nq); ++l)
    for (int64_t c = 0; c < cols; ++c) {
      u[l * cols + c] *= weight[l];
      wu_sum[c] += u[l * cols + c];
    }
}

// The strip's part of M^T u or e^T w u, from s.u: written to `out` for the item's first strip, added for later ones.
void multiply_to_keys(const MatmulProblem& pb, const Plan& plan, const Strip& strip, const float* m, float* out,
                      Scratch& s) {
  const int64_t cols = c_cols(pb);
  for (int64_t block = 0; block < plan.blocks; ++block) {
    const int64_t j0 = block * KEY_BLOCK, n = min(KEY_BLOCK, pb.Nk - j0);
    gather_block(plan, strip, m, j0, n, s.block);
    add_to_keys<Float>(strip, s.block, 4, s.u, strip.queries(pb.Nq), n, cols, out + j0 * cols);
  }
}

// The same for few columns; out is [C][key_rows].
void multiply_to_keys_by_lanes(const MatmulProblem& pb, const Plan& plan, const Strip& strip, const float* m,
                               float* out, Scratch& s) {
  const int64_t lanes = strip.lanes(), queries = strip.queries(pb.Nq), cols = c_cols(pb);
  fill_zeros(s.u + queries * cols, (lanes - queries) * cols);
  transpose_rows(s.u, lanes, cols, cols, s.transposed, lanes, 0);
  for (int64_t c = 0; c < pb.C; ++c) {
    const float* const u = s.transposed + c * lanes;
    // Rows after the last key have undefined values, and their results are never read.
    for (int64_t j = 0; j < plan.key_rows; j += W) {
      vec r[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) r[i] = load(u) * load(m + (j + i) * W);
      for (int64_t v = 1; v < strip.vectors; ++v) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) r[i] = fma(load(u + v * W), load(m + (v * plan.key_rows + j + i) * W), r[i]);
      }
      const vec sum = sum_lanes(r);
      float* const to = out + c * plan.key_rows + j;
      store(to, strip.first_of_item ? sum : load(to) + sum);
    }
  }
}

// Where the item accumulates op^T u of a pair.
float* key_product(const MatmulProblem& pb, const MapIndex& pair, int64_t frame, const Scratch& s) {
  return s.partial ? s.partial + frame * pb.Nk * c_cols(pb) : reinterpret_cast<float*>(out_row(pb, pair, 0));
}

// The product of one pair and strip. `u_loaded`: s.u already holds u. The call may overwrite s.u.
void multiply(const MatmulProblem& pb, const Plan& plan, const WorkItem& item, int64_t frame, const Strip& strip,
              const float* m, const vec* w, bool u_loaded, Scratch& s) {
  const MapIndex pair = pair_map_index(pb, item, frame);
  if (!pb.to_keys) return multiply_to_queries(pb, plan, pair, strip, m, w, s.v_sum + frame * c_cols(pb), s);
  if (!u_loaded) load_u(pb, pair, strip, s.u);
  if (pb.softmax) weight_u(pb, strip, w, s.wu_sum + frame * c_cols(pb), s.u);
  if (has_few_columns(pb)) multiply_to_keys_by_lanes(pb, plan, strip, m, s.columns + frame * pb.C * plan.key_rows, s);
  else multiply_to_keys(pb, plan, strip, m, key_product(pb, pair, frame, s), s);
}

// After an item's last strip: transposes few columns to rows, and adds the sum of w u to every row.
void complete_key_product(const MatmulProblem& pb, const Plan& plan, const WorkItem& item, const Scratch& s) {
  if (!has_key_product(pb)) return;
  const int64_t cols = c_cols(pb);
  alignas(64) float sum[MAX_COLS];
  for (int64_t frame = 0; frame + 1 < item.frames; ++frame) {
    if (!item.owns(frame)) continue;
    float* const out = key_product(pb, pair_map_index(pb, item, frame), frame, s);
    for (int64_t c = 0; has_few_columns(pb) && c < pb.C; ++c)
      for (int64_t j = 0; j < pb.Nk; ++j) out[j * cols + c] = s.columns[(frame * pb.C + c) * plan.key_rows + j];
    if (!pb.softmax) continue;
    for (int64_t c = 0; c < cols; ++c) sum[c] = static_cast<float>(unit(pb) * s.wu_sum[frame * cols + c]);
    for (int64_t j = 0; j < pb.Nk; ++j)
      for (int64_t c = 0; c < cols; c += W) store(out + j * cols + c, load(out + j * cols + c) + load(sum + c));
  }
}

// ---- forward

void compute_map(const MatmulProblem& pb, const Plan& plan, const WorkItem& item, int64_t frame, const Strip& strip,
                 Scratch& s) {
  const bool last = frame + 1 == item.frames;
  const MapIndex next = map_index(pb, item, last ? frame : frame + 1, 0);
  compute_head_map(pb, plan, map_index(pb, item, frame, 0), last ? nullptr : &next, strip, s, s.maps[frame % 2]);
}

void forward(const MatmulProblem& pb, const Plan& plan, int64_t index, float* scratch) {
  Arena arena{scratch};
  Scratch s = layout(pb, plan, false, arena);
  const WorkItem item = work_item_at(pb, plan, index);
  const int64_t frames = item.frames;
  if (frames < 2) return;
  for (int64_t frame = 0; pb.softmax && !pb.to_keys && frame + 1 < frames; ++frame)
    sum_v(pb, pair_map_index(pb, item, frame), s.v_sum + frame * c_cols(pb));
  for (int64_t i = first_strip(plan, item.group); i < first_strip(plan, item.group + 1); ++i) {
    const Strip strip = strip_at(pb, plan, item, i);
    compute_map(pb, plan, item, 0, strip, s);
    for (int64_t frame = 1; frame < frames; ++frame) {
      const Map &previous = s.maps[(frame + 1) % 2], &current = s.maps[frame % 2];
      compute_map(pb, plan, item, frame, strip, s);
      vec w[STRIP_VECTORS];
      compute_change(pb, plan, strip, previous, current, previous.p, w);
      multiply(pb, plan, item, frame - 1, strip, previous.p, w, false, s);
    }
  }
  complete_key_product(pb, plan, item, s);
}

// Adds the item's op^T u, which is in its scratch, to the result; called in the order of the groups.
void finish_key_product(const MatmulProblem& pb, const Plan& plan, const WorkItem& item, const float* partial,
                        float* sums) {
  if (!partial) return;
  for (int64_t frame = 0; frame + 1 < item.frames; ++frame) {
    if (!item.owns(frame)) continue;
    const int64_t offset = frame * pb.Nk * c_cols(pb);
    add_rows(pb.out_dtype, pb.Nk, pb.C, c_cols(pb), partial + offset, sums + offset, item.group == 0,
             item.group == plan.groups - 1, out_row(pb, pair_map_index(pb, item, frame), 0));
  }
}

void finish_forward(const MatmulProblem& pb, const Plan& plan, int64_t index, float* scratch, float* sums) {
  Arena arena{scratch};
  finish_key_product(pb, plan, work_item_at(pb, plan, index), layout(pb, plan, false, arena).partial, sums);
}

// ---- backward

// u v^T of the strip, laid out as Map::p. For P a constant in a column of v has no effect, as the rows of P sum to 1.
// The mean over the keys is subtracted, so that a v that is equal for all keys gives exactly 0.
void outer_product(const MatmulProblem& pb, const Plan& plan, const MapIndex& pair, const Strip& strip,
                   const double* v_sum, Scratch& s, float* out) {
  const int64_t lanes = strip.lanes(), cols = c_cols(pb);
  alignas(64) float mean[MAX_COLS];
  for (int64_t c = 0; pb.softmax && c < cols; ++c) mean[c] = static_cast<float>(v_sum[c] / pb.Nk);
  transpose_rows(s.u, lanes, cols, cols, s.transposed, lanes, 0);
  for (int64_t j0 = 0; j0 < pb.Nk; j0 += KEY_BLOCK) {
    const int64_t n = min(KEY_BLOCK, pb.Nk - j0);
    const RowView values = load_v(pb, pair, j0, n, pb.softmax ? mean : nullptr, s.values);
    product<Float, Epilogue::none, false>({.b = values.first,
                                           .b_row = values.pitch,
                                           .b_k = 4,
                                           .x = s.transposed,
                                           .x_row = lanes,
                                           .K = pb.C,
                                           .out = out + j0 * W,
                                           .out_row = W,
                                           .out_vector = plan.key_rows * W},
                                          n, strip.vectors);
  }
}

// Replaces dL/d(op) in pair.y with the gradient with respect to scale * A. m is e, for P only.
template <bool softmax>
void backward_pair(const MatmulProblem& pb, const Plan& plan, const Strip& strip, const Map& a, const Map& b,
                   const float* m, const vec* w, PairGradient& pair) {
  const vec temperature = set1(1.f / pb.inv_temperature);  // cancels the factor 1 / temperature in A and B
  const vec one = set1(unit(pb));
  for (int64_t v = 0; v < strip.vectors; ++v) {
    float* const y = pair.y;
    vec slope = set1(pb.scale), delta = set1(0.f);  // y is slope S (1 + e) (g - delta), or slope S g for M
    if (softmax) {
      BlockedSum g, e_g;
      for (int64_t block = 0; block < plan.blocks; ++block) {
        const int64_t j0 = block * KEY_BLOCK, j1 = min(j0 + KEY_BLOCK, pb.Nk);
#pragma GCC unroll 4
        for (int64_t j = j0; j < j1; ++j) {
          const int64_t offset = (v * plan.key_rows + j) * W;
          const vec g_j = load(y + offset);
          g.block += g_j;
          e_g.block = fma(load(m + offset), g_j, e_g.block);
        }
        g.end_block(), e_g.end_block();
      }
      slope = slope * w[v] * set1(pb.inv_temperature);
      delta = w[v] * (one * g.total + e_g.total);
    } else {
      // M and with it the result are NaN where the row of either map is; so is then the gradient of both.
      const int64_t first = v * plan.key_rows * W, factor = v * plan.blocks * W;
      const vec change = load(a.p + first) * load(a.factor + factor) - load(b.p + first) * load(b.factor + factor);
      slope = fma(change, set1(0.f), slope);
    }
    const vec slope_one = slope * one;
    BlockedSum A_y, B_y;
    for_each_change(
        pb, plan, v, a, b,
        [&](int64_t, int64_t offset, vec A, vec B) __attribute__((always_inline)) {
          const vec g = load(y + offset);
          const vec x = softmax ? fma(slope, load(m + offset), slope_one) * (g - delta) : slope * g;
          const vec y_j = multiply_by_sign(x, A - B);
          store(y + offset, y_j);
          A_y.block = fma(A, y_j, A_y.block);
          B_y.block = fma(B, y_j, B_y.block);
        },
        [&] { A_y.end_block(), B_y.end_block(); });
    pair.rho[v] = temperature * A_y.total;
    pair.next_rho[v] = -temperature * B_y.total;
  }
}

// The map is the second of the pair `before` and the first of the pair `after`; either may be missing.
void backward_map(const MatmulProblem& pb, const Plan& plan, const WorkItem& item, int64_t frame, const Strip& strip,
                  const Map& map, const PairGradient* before, const PairGradient* after, Scratch& s) {
  const MapIndex index = map_index(pb, item, frame, 0);
  if (!item.owns(frame) || !wants_frame(pb.frames[index.set])) return;
  float* const dk =
      s.dk ? s.dk + (frame - item.own_begin) * pb.Nk * plan.d_cols : reinterpret_cast<float*>(dk_row(pb, index, 0));
  const auto run = [&](const auto& gradient, const vec* rho) {
    backward_logits(pb, plan, index, strip, map, gradient, rho, s, dk);
  };
  if (!before) {
    run([&](int64_t) { return [y = after->y](int64_t, int64_t offset) { return load(y + offset); }; }, after->rho);
  } else if (!after) {
    run([&](int64_t) { return [y = before->y](int64_t, int64_t offset) { return -load(y + offset); }; },
        before->next_rho);
  } else {
    vec rho[STRIP_VECTORS];
    for (int64_t v = 0; v < strip.vectors; ++v) rho[v] = before->next_rho[v] + after->rho[v];
    run(
        [&](int64_t) {
          return [y = after->y, y_before = before->y](int64_t, int64_t offset) {
            return load(y + offset) - load(y_before + offset);
          };
        },
        rho);
  }
}

// If only dx is needed, it is a product as in the forward.
void backward(const MatmulProblem& pb, const Plan& plan, int64_t index, float* scratch) {
  if (!wants_frames(pb)) return forward(pb, plan, index, scratch);
  Arena arena{scratch};
  Scratch s = layout(pb, plan, true, arena);
  const WorkItem item = work_item_at(pb, plan, index);
  const int64_t frames = item.frames;
  if (frames == 0) return;
  for (int64_t frame = 0; pb.softmax && frame + 1 < frames; ++frame)
    sum_v(pb, pair_map_index(pb, item, frame), s.v_sum + frame * c_cols(pb));
  for (int64_t i = first_strip(plan, item.group); i < first_strip(plan, item.group + 1); ++i) {
    const Strip strip = strip_at(pb, plan, item, i);
    const PairGradient* before = nullptr;
    if (frames == 1) {  // the frame is in no pair: its gradient is 0
      s.pairs[0] = {s.pairs[0].y, {}, {}};
      fill_zeros(s.pairs[0].y, map_size(plan));
      before = &s.pairs[0];
    }
    compute_map(pb, plan, item, 0, strip, s);
    for (int64_t frame = 1; frame < frames; ++frame) {
      const Map &previous = s.maps[(frame + 1) % 2], &current = s.maps[frame % 2];
      PairGradient& pair = s.pairs[frame % 2];
      const MapIndex pair_at = pair_map_index(pb, item, frame - 1);
      compute_map(pb, plan, item, frame, strip, s);
      vec w[STRIP_VECTORS];
      if (pb.out || pb.softmax) compute_change(pb, plan, strip, previous, current, s.change, w);
      load_u(pb, pair_at, strip, s.u);
      outer_product(pb, plan, pair_at, strip, s.v_sum + (frame - 1) * c_cols(pb), s, pair.y);
      if (pb.softmax) backward_pair<true>(pb, plan, strip, previous, current, s.change, w, pair);
      else backward_pair<false>(pb, plan, strip, previous, current, nullptr, nullptr, pair);
      if (pb.out && item.owns(frame - 1)) multiply(pb, plan, item, frame - 1, strip, s.change, w, true, s);
      backward_map(pb, plan, item, frame - 1, strip, previous, before, &pair, s);
      before = &pair;
    }
    backward_map(pb, plan, item, frames - 1, strip, s.maps[(frames - 1) % 2], before, nullptr, s);
  }
  complete_key_product(pb, plan, item, s);
}

void finish_backward(const MatmulProblem& pb, const Plan& plan, int64_t index, float* scratch, float* sums) {
  Arena arena{scratch};
  const Scratch s = layout(pb, plan, true, arena);
  const WorkItem item = work_item_at(pb, plan, index);
  if (s.dk) finish_dk(pb, plan, item, s.dk, sums);
  finish_key_product(pb, plan, item, s.partial, sums + dk_sums_size(pb, plan));
}

}  // namespace

const MatmulKernels matmul = {{plan_forward, product_slot, forward, finish_forward},
                              {plan_backward, product_slot, backward, finish_backward}};

}  // namespace amflow::AMFLOW_ISA
