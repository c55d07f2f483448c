// The motion operator on the CPU, forward and backward: M x, M^T x, P x and P^T x without M or P; docs/maths.md.
// Compiled once per instruction set.
//
// A strip's M, or e with P = w (1 + e), is made where its map was, as long as that is in the second-level cache, and
// multiplied a block of keys at a time. Products to the queries have queries in the lanes, so that x is read where it
// lies; a strip owns their rows. Products to the keys are summed up over an item's strips, as dk is; those of a few
// columns are sums over lanes.

#include "matmul.h"

#include "maps.h"

namespace amflow::AMFLOW_ISA {
namespace {

constexpr int64_t FEW = 4;  // columns: a row of a product to the keys would be a vector that is mostly padding

// The gradient that the change from one map, A, to the next, A', sends to them: y to dL/dA and -y to dL/dA'.
struct Change {
  float* y;  // laid out as Map::p
  vec rho[STRIP_VECTORS], next_rho[STRIP_VECTORS];  // its part of rowsum(A * dL/dA), and of A'
};

// One worker's memory. c_cols is C, padded.
struct Scratch : MapScratch {
  float* block;    // [KEY_BLOCK][lane]: M or e of a block of keys
  float* values;   // [KEY_BLOCK][c_cols]: v of a block of keys
  float* u;        // [lane][c_cols]
  float* turned;   // [c_cols][lane]: u, or a product to the queries
  float* rows_out; // [lane][c_cols]: the same product
  float* part;     // [pair of the chain][Nk][c_cols]: a product to the keys, or null if it is summed up in the result
  float* columns;  // [pair of the chain][C][key_rows]: the same, of few columns, before it is turned
  double* v_sum;   // [pair of the chain][c_cols]: sum of v over the keys; for P alone, as is the next
  double* wu_sum;  // [pair of the chain][c_cols]: sum of w u over the item's queries
  // backward
  float* change;      // laid out as Map::p: M or e
  Change changes[2];  // from the previous frame to the current one, and the one before
};

int64_t c_cols(const MatmulProblem& pb) { return round_up(pb.C, W); }

int64_t part_size(const MatmulProblem& pb, const Plan& plan) { return (plan.chain_frames - 1) * pb.Nk * c_cols(pb); }

// Whether a product is summed up over strips.
bool out_is_summed(const MatmulProblem& pb) { return pb.out && pb.to_keys; }

// Whether an item has its product to the keys to itself and it can be summed up in the result.
bool out_in_place(const MatmulProblem& pb, const Plan& plan) {
  return plan.groups == 1 && pb.out_dtype == Dtype::f32 && pb.C % W == 0;
}

bool few_columns(const MatmulProblem& pb) { return pb.C <= FEW; }

bool wants_frame(const Frames& f) { return f.dq || f.dk; }
bool wants_frames(const MatmulProblem& pb) { return wants_frame(pb.frames[0]) || wants_frame(pb.frames[1]); }

Scratch layout(const MatmulProblem& pb, const Plan& plan, bool backward, Arena& arena) {
  Scratch s{};
  const int64_t cols = c_cols(pb), pairs = plan.chain_frames - 1;
  const auto take_doubles = [&](int64_t n) { return reinterpret_cast<double*>(arena.take(2 * n)); };
  take_maps(plan, arena, s);
  s.block = arena.take(KEY_BLOCK * MAX_LANES);
  s.values = arena.take(KEY_BLOCK * cols);
  s.u = arena.take(MAX_LANES * cols);
  s.turned = arena.take(cols * MAX_LANES);
  s.rows_out = arena.take(MAX_LANES * cols);
  if (out_is_summed(pb) && !out_in_place(pb, plan)) s.part = arena.take(part_size(pb, plan));
  if (out_is_summed(pb) && few_columns(pb)) s.columns = arena.take(pairs * pb.C * plan.key_rows);
  s.v_sum = take_doubles(pairs * cols);
  s.wu_sum = take_doubles(pairs * cols);
  if (backward && wants_frames(pb)) {
    s.change = arena.take(map_size(plan));
    for (Change& change : s.changes) change.y = arena.take(map_size(plan));
    take_gradient(pb, plan, arena, s);
  }
  return s;
}

// ---- the cut into items

int64_t dk_sum_size(const MatmulProblem& pb, const Plan& plan) {  // where it can't be summed up in the result
  return plan.groups > 1 && wants_dk(pb) && pb.dtype != Dtype::f32 ? dk_size(pb, plan) : 0;
}

Plan plan_with(const MatmulProblem& pb, Plan plan, bool backward) {
  plan.items = whole_items(pb, plan) * plan.groups;
  plan.summed_heads = 1;
  const bool summed = out_is_summed(pb) || wants_dk(pb);
  plan.sums = summed ? whole_items(pb, plan) : plan.items;
  plan.sum_floats = dk_sum_size(pb, plan);
  if (plan.groups > 1 && out_is_summed(pb) && pb.out_dtype != Dtype::f32) plan.sum_floats += part_size(pb, plan);
  Arena arena{nullptr};
  layout(pb, plan, backward, arena);
  plan.scratch = arena.used;
  return plan;
}

Plan plan_forward(const MatmulProblem& pb) {
  Plan plan = plan_common(pb);
  // It depends on neither B nor T, so that a pair has the same bits in any batch or clip. To the keys there are fewer:
  // each group sums up a product of its own.
  plan.groups = min(plan.strips, div_up(pb.to_keys ? 48 : 128, plan.heads * pb.G));
  return plan_with(pb, plan, false);
}

Plan plan_backward(const MatmulProblem& pb) {
  Plan plan = plan_common(pb);
  plan.groups = min(plan.strips, div_up(12, whole_items(pb, plan)));
  return plan_with(pb, plan, true);
}

Turn turn_of(const MatmulProblem& pb, const Plan& plan, int64_t index) {
  return plan.sums == plan.items ? Turn{index, 0} : turn(pb, plan, index);
}

// ---- reading u and v

Where pair_at(const MatmulProblem& pb, const Item& item, int64_t frame) {  // of the frames `frame` and `frame` + 1
  return {0, pair_of(pb, item.chain, frame), item.b, item.h, item.g};
}

const char* row_at(const Rows& rows, const Where& pair, int64_t i) {
  const int64_t* stride = rows.stride;
  const int64_t offset =
      pair.b * stride[0] + pair.t * stride[1] + pair.h * stride[2] + pair.g * stride[3] + i * stride[4];
  return static_cast<const char*>(rows.data) + offset * element_size(rows.dtype);
}

char* out_row(const MatmulProblem& pb, const Where& pair, int64_t i) {
  const int64_t pairs = pb.pair ? pb.T : pb.T - pb.lag;
  const int64_t row = (((pair.b * pairs + pair.t) * pb.H + pair.h) * pb.G + pair.g) * (pb.to_keys ? pb.Nk : pb.Nq) + i;
  return static_cast<char*>(pb.out) + row * pb.C * element_size(pb.out_dtype);
}

void load_u(const MatmulProblem& pb, const Where& pair, const Strip& strip, float* u) {
  for (int64_t l = 0; l < strip.lanes(); ++l)
    load_row(pb.u.dtype, row_at(pb.u, pair, min(strip.first_query + l, pb.Nq - 1)), pb.C, u + l * c_cols(pb));
}

// v of n keys as floats: in place if they are, and nothing is to be taken off.
Keys load_v(const MatmulProblem& pb, const Where& pair, int64_t j0, int64_t n, const float* less, float* buffer) {
  if (pb.v.dtype == Dtype::f32 && !less) return {row_at(pb.v, pair, j0), pb.v.stride[4] * 4};
  const int64_t cols = c_cols(pb);
  for (int64_t j = 0; j < n; ++j) {
    float* const row = buffer + j * cols;
    load_row(pb.v.dtype, row_at(pb.v, pair, j0 + j), pb.C, row);
    for (int64_t c = 0; less && c < cols; c += W) store(row + c, load(row + c) - load(less + c));
  }
  return {reinterpret_cast<const char*>(buffer), cols * 4};
}

void sum_v(const MatmulProblem& pb, const Where& pair, double* sum) {
  alignas(64) float buffer[256];
  for (int64_t c = 0; c < c_cols(pb); ++c) sum[c] = 0;
  for (int64_t j = 0; j < pb.Nk; ++j) {
    const char* const v = row_at(pb.v, pair, j);
    if (pb.v.dtype != Dtype::f32) load_row(pb.v.dtype, v, pb.C, buffer);
    const float* const row = pb.v.dtype == Dtype::f32 ? reinterpret_cast<const float*>(v) : buffer;
    for (int64_t c = 0; c < pb.C; ++c) sum[c] += row[c];
  }
}

// ---- M or e of a strip, and its products

// Fills m, laid out as Map::p, with M, or with e and w. m may be the first map.
template <bool softmax, bool sharp>
void measure(const MatmulProblem& pb, const Plan& plan, const Strip& strip, const Map& a, const Map& b, float* m,
             vec* w) {
  for (int64_t v = 0; v < strip.vectors; ++v) {
    Sum e;
    for_each_change(pb, plan, v, a, b, [&](int64_t, int64_t at, vec A, vec B) __attribute__((always_inline)) {
      const vec change = abs(A - B);
      const vec x = softmax ? expm1<sharp>(change) : change;
      store(m + at, x);
      if (softmax) e.block += x;
    }, [&] { e.end_block(); });
    if (softmax) w[v] = load(strip.lane_weight + v * W) / (set1(pb.Nk) + e.total);
  }
}

void measure(const MatmulProblem& pb, const Plan& plan, const Strip& strip, const Map& a, const Map& b, float* m,
             vec* w) {
  if (!pb.softmax) measure<false, false>(pb, plan, strip, a, b, m, w);
  else if (pb.inv_temperature > 1) measure<true, true>(pb, plan, strip, a, b, m, w);
  else measure<true, false>(pb, plan, strip, a, b, m, w);
}

// n keys of m from j0 on, [key][lane].
void gather_block(const Plan& plan, const Strip& strip, const float* m, int64_t j0, int64_t n, float* block) {
  const int64_t lanes = strip.lanes();
  for (int64_t v = 0; v < strip.vectors; ++v)
#pragma GCC unroll 4
    for (int64_t j = 0; j < n; ++j) store(block + j * lanes + v * W, load(m + (v * plan.key_rows + j0 + j) * W));
}

// The strip's rows of op v, to the result. With e: P v = w (sum of v + e v).
void multiply_to_queries(const MatmulProblem& pb, const Plan& plan, const Where& pair, const Strip& strip,
                         const float* m, const vec* w, const double* v_sum, Scratch& s) {
  const int64_t lanes = strip.lanes(), cols = c_cols(pb);
  for (int64_t block = 0; block < plan.blocks; ++block) {
    const int64_t j0 = block * KEY_BLOCK, n = min(KEY_BLOCK, pb.Nk - j0);
    gather_block(plan, strip, m, j0, n, s.block);
    const Keys values = load_v(pb, pair, j0, n, nullptr, s.values);
    product<Float, Out::plain, true>({.b = values.first, .b_row = 4, .b_k = values.row, .x = s.block, .x_row = lanes,
                                      .K = n, .out = s.turned, .out_row = lanes, .out_vector = W, .add = block > 0},
                                     pb.C, strip.vectors);
  }
  if (pb.softmax)
    for (int64_t c = 0; c < pb.C; ++c)
      for (int64_t v = 0; v < strip.vectors; ++v) {
        float* const x = s.turned + c * lanes + v * W;
        store(x, w[v] * (set1(static_cast<float>(v_sum[c])) + load(x)));
      }
  transpose_rows(s.turned, cols, lanes, lanes, s.rows_out, cols, 0);  // the rows after the last of C hold anything
  for (int64_t l = 0; l < strip.queries(pb.Nq); ++l)
    store_row(pb.out_dtype, s.rows_out + l * cols, pb.C, out_row(pb, pair, strip.first_query + l));
}

// w u of the strip in place of u, and its sum over the queries to wu_sum: P^T u = e^T w u + sum of w u, the same for
// every key.
void weigh_u(const MatmulProblem& pb, const Strip& strip, const vec* w, double* wu_sum, bool first_strip, float* u) {
  const int64_t cols = c_cols(pb);
  float weight[MAX_LANES];
  for (int64_t v = 0; v < strip.vectors; ++v) store(weight + v * W, w[v]);
  for (int64_t c = 0; first_strip && c < cols; ++c) wu_sum[c] = 0;
  for (int64_t l = 0; l < strip.queries(pb.Nq); ++l)
    for (int64_t c = 0; c < cols; ++c) {
      u[l * cols + c] *= weight[l];
      wu_sum[c] += u[l * cols + c];
    }
}

// What the strip gives to M^T u or e^T w u, from s.u: written to `out` if it is the item's first strip and else added.
void multiply_to_keys(const MatmulProblem& pb, const Plan& plan, const Strip& strip, const float* m, float* out,
                      bool first_strip, Scratch& s) {
  const int64_t lanes = strip.lanes(), cols = c_cols(pb);
  for (int64_t block = 0; block < plan.blocks; ++block) {
    const int64_t j0 = block * KEY_BLOCK, n = min(KEY_BLOCK, pb.Nk - j0);
    gather_block(plan, strip, m, j0, n, s.block);
    float* const rows = out + j0 * cols;
    product<Float, Out::plain, false>(
        {.b = reinterpret_cast<const char*>(s.block), .b_row = lanes * 4, .b_k = 4, .x = s.u, .x_row = cols,
         .K = strip.queries(pb.Nq), .out = rows, .out_row = cols, .out_vector = W, .add = !first_strip,
         .ahead = reinterpret_cast<const char*>(rows + ROWS_AHEAD * cols), .ahead_row = cols * 4,
         .ahead_bytes = cols * 4},
        n, cols / W);
  }
}

// The same for few columns, out [C][key_rows].
void multiply_to_keys_by_lanes(const MatmulProblem& pb, const Plan& plan, const Strip& strip, const float* m,
                               float* out, bool first_strip, Scratch& s) {
  const int64_t lanes = strip.lanes(), queries = strip.queries(pb.Nq), cols = c_cols(pb);
  clear(s.u + queries * cols, (lanes - queries) * cols);
  transpose_rows(s.u, lanes, cols, cols, s.turned, lanes, 0);
  for (int64_t c = 0; c < pb.C; ++c) {
    const float* const u = s.turned + c * lanes;
    for (int64_t j = 0; j < plan.key_rows; j += W) {  // rows after the last key hold anything, nothing reads theirs
      vec r[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) r[i] = load(u) * load(m + (j + i) * W);
      for (int64_t v = 1; v < strip.vectors; ++v) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) r[i] = fma(load(u + v * W), load(m + (v * plan.key_rows + j + i) * W), r[i]);
      }
      const vec sum = sum_each(r);
      float* const to = out + c * plan.key_rows + j;
      store(to, first_strip ? sum : load(to) + sum);
    }
  }
}

// Where the item's product of a pair to the keys is summed up.
float* key_rows_out(const MatmulProblem& pb, const Where& pair, int64_t frame, const Scratch& s) {
  return s.part ? s.part + frame * pb.Nk * c_cols(pb) : reinterpret_cast<float*>(out_row(pb, pair, 0));
}

// The product of one pair and strip. `u_loaded`: s.u holds u. It does not afterwards.
void multiply(const MatmulProblem& pb, const Plan& plan, const Item& item, int64_t frame, const Strip& strip,
              const float* m, const vec* w, bool first_strip, bool u_loaded, Scratch& s) {
  const Where pair = pair_at(pb, item, frame);
  if (!pb.to_keys) return multiply_to_queries(pb, plan, pair, strip, m, w, s.v_sum + frame * c_cols(pb), s);
  if (!u_loaded) load_u(pb, pair, strip, s.u);
  if (pb.softmax) weigh_u(pb, strip, w, s.wu_sum + frame * c_cols(pb), first_strip, s.u);
  if (few_columns(pb))
    multiply_to_keys_by_lanes(pb, plan, strip, m, s.columns + frame * pb.C * plan.key_rows, first_strip, s);
  else
    multiply_to_keys(pb, plan, strip, m, key_rows_out(pb, pair, frame, s), first_strip, s);
}

// After an item's last strip: turns few columns into rows, and adds the sum of w u to every row.
void complete_to_keys(const MatmulProblem& pb, const Plan& plan, const Item& item, const Scratch& s) {
  if (!out_is_summed(pb)) return;
  const int64_t cols = c_cols(pb);
  alignas(64) float sum[256];
  for (int64_t frame = 0; frame + 1 < frames_of(pb, item.chain); ++frame) {
    float* const out = key_rows_out(pb, pair_at(pb, item, frame), frame, s);
    for (int64_t c = 0; few_columns(pb) && c < pb.C; ++c)
      for (int64_t j = 0; j < pb.Nk; ++j) out[j * cols + c] = s.columns[(frame * pb.C + c) * plan.key_rows + j];
    if (!pb.softmax) continue;
    for (int64_t c = 0; c < cols; ++c) sum[c] = static_cast<float>(s.wu_sum[frame * cols + c]);
    for (int64_t j = 0; j < pb.Nk; ++j)
      for (int64_t c = 0; c < cols; c += W) store(out + j * cols + c, load(out + j * cols + c) + load(sum + c));
  }
}

// ---- forward

void compute_map(const MatmulProblem& pb, const Plan& plan, const Item& item, int64_t frame, const Strip& strip,
                 Scratch& s) {
  const bool last = frame + 1 == frames_of(pb, item.chain);
  const Where next = frame_at(pb, item, last ? frame : frame + 1, 0);
  compute_head_map(pb, plan, frame_at(pb, item, frame, 0), last ? nullptr : &next, strip, s, s.maps[frame % 2]);
}

int64_t first_strip(const Plan& plan, int64_t group) { return group * plan.strips / plan.groups; }

void forward(const MatmulProblem& pb, const Plan& plan, int64_t index, float* scratch) {
  Arena arena{scratch};
  Scratch s = layout(pb, plan, false, arena);
  const Item item = item_at(pb, plan, index);
  const int64_t frames = frames_of(pb, item.chain), first = first_strip(plan, item.group);
  if (frames < 2) return;
  for (int64_t frame = 0; pb.softmax && !pb.to_keys && frame + 1 < frames; ++frame)
    sum_v(pb, pair_at(pb, item, frame), s.v_sum + frame * c_cols(pb));
  for (int64_t i = first; i < first_strip(plan, item.group + 1); ++i) {
    const Strip strip = strip_at(pb, plan, i);
    compute_map(pb, plan, item, 0, strip, s);
    for (int64_t frame = 1; frame < frames; ++frame) {
      const Map &previous = s.maps[(frame + 1) % 2], &current = s.maps[frame % 2];
      compute_map(pb, plan, item, frame, strip, s);
      vec w[STRIP_VECTORS];
      measure(pb, plan, strip, previous, current, previous.p, w);
      multiply(pb, plan, item, frame - 1, strip, previous.p, w, i == first, false, s);
    }
  }
  complete_to_keys(pb, plan, item, s);
}

// Adds the item's products to the keys, left in its scratch, to the result; called in the order of the groups.
void finish_part(const MatmulProblem& pb, const Plan& plan, const Item& item, const float* part, float* sums) {
  if (!part) return;
  for (int64_t frame = 0; frame + 1 < frames_of(pb, item.chain); ++frame) {
    const int64_t offset = frame * pb.Nk * c_cols(pb);
    add_rows(pb.out_dtype, pb.Nk, pb.C, c_cols(pb), part + offset, sums + offset, item.group == 0,
             item.group == plan.groups - 1, out_row(pb, pair_at(pb, item, frame), 0));
  }
}

void finish_forward(const MatmulProblem& pb, const Plan& plan, int64_t index, float* scratch, float* sums) {
  Arena arena{scratch};
  finish_part(pb, plan, item_at(pb, plan, index), layout(pb, plan, false, arena).part, sums);
}

// ---- backward

// u v^T of the strip, laid out as Map::p. Of P's a constant in a column of v has no effect, as the rows of P sum to 1:
// taken off, v that are equal for all keys give exactly 0.
void multiply_sides(const MatmulProblem& pb, const Plan& plan, const Where& pair, const Strip& strip,
                    const double* v_sum, Scratch& s, float* out) {
  const int64_t lanes = strip.lanes(), cols = c_cols(pb);
  alignas(64) float mean[256];
  for (int64_t c = 0; pb.softmax && c < cols; ++c) mean[c] = static_cast<float>(v_sum[c] / pb.Nk);
  transpose_rows(s.u, lanes, cols, cols, s.turned, lanes, 0);
  for (int64_t j0 = 0; j0 < pb.Nk; j0 += KEY_BLOCK) {
    const int64_t n = min(KEY_BLOCK, pb.Nk - j0);
    const Keys values = load_v(pb, pair, j0, n, pb.softmax ? mean : nullptr, s.values);
    product<Float, Out::plain, false>({.b = values.first, .b_row = values.row, .b_k = 4, .x = s.turned, .x_row = lanes,
                                       .K = pb.C, .out = out + j0 * W, .out_row = W, .out_vector = plan.key_rows * W},
                                      n, strip.vectors);
  }
}

// Makes change.y, which holds dL/d(op), the gradient with respect to scale A. m is e, if there is one.
template <bool softmax>
void backward_pair(const MatmulProblem& pb, const Plan& plan, const Strip& strip, const Map& a, const Map& b,
                   const float* m, const vec* w, Change& change) {
  const vec temperature = set1(1.f / pb.inv_temperature);  // a factor that A and B come without
  for (int64_t v = 0; v < strip.vectors; ++v) {
    float* const y = change.y;
    vec slope = set1(pb.scale), offset = set1(0.f);
    if (softmax) {
      Sum g, e_g;
      for (int64_t block = 0; block < plan.blocks; ++block) {
        const int64_t j0 = block * KEY_BLOCK, j1 = min(j0 + KEY_BLOCK, pb.Nk);
#pragma GCC unroll 4
        for (int64_t j = j0; j < j1; ++j) {
          const int64_t at = (v * plan.key_rows + j) * W;
          const vec g_j = load(y + at);
          g.block += g_j;
          e_g.block = fma(load(m + at), g_j, e_g.block);
        }
        g.end_block(), e_g.end_block();
      }
      slope = slope * w[v] * set1(pb.inv_temperature);
      offset = slope * w[v] * (g.total + e_g.total);
    }
    Sum A_y, B_y;
    for_each_change(pb, plan, v, a, b, [&](int64_t, int64_t at, vec A, vec B) __attribute__((always_inline)) {
      const vec g = load(y + at);
      const vec x = softmax ? (load(m + at) + set1(1.f)) * fma(slope, g, -offset) : slope * g;
      const vec y_j = times_sign(x, A - B);
      store(y + at, y_j);
      A_y.block = fma(A, y_j, A_y.block);
      B_y.block = fma(B, y_j, B_y.block);
    }, [&] { A_y.end_block(), B_y.end_block(); });
    change.rho[v] = temperature * A_y.total;
    change.next_rho[v] = -temperature * B_y.total;
  }
}

// Of a map that is the second of the pair `before` and the first of the pair `after`; either may be missing.
void backward_map(const MatmulProblem& pb, const Plan& plan, const Item& item, int64_t frame, const Strip& strip,
                  const Map& map, const Change* before, const Change* after, Scratch& s, bool first_strip) {
  const Where at = frame_at(pb, item, frame, 0);
  if (!wants_frame(pb.frames[at.set])) return;
  float* const dk = s.dk ? s.dk + frame * pb.Nk * plan.d_cols : reinterpret_cast<float*>(dk_row(pb, at, 0));
  const auto run = [&](const auto& gradient, const vec* rho) {
    backward_head_map(pb, plan, at, strip, map, gradient, rho, s, dk, first_strip);
  };
  if (!before) {
    run([&](int64_t) { return [y = after->y](int64_t, int64_t at) { return load(y + at); }; }, after->rho);
  } else if (!after) {
    run([&](int64_t) { return [y = before->y](int64_t, int64_t at) { return -load(y + at); }; }, before->next_rho);
  } else {
    vec rho[STRIP_VECTORS];
    for (int64_t v = 0; v < strip.vectors; ++v) rho[v] = before->next_rho[v] + after->rho[v];
    run([&](int64_t) {
      return [y = after->y, less = before->y](int64_t, int64_t at) { return load(y + at) - load(less + at); };
    }, rho);
  }
}

// dx alone needs no more than the forward does.
void backward(const MatmulProblem& pb, const Plan& plan, int64_t index, float* scratch) {
  if (!wants_frames(pb)) return forward(pb, plan, index, scratch);
  Arena arena{scratch};
  Scratch s = layout(pb, plan, true, arena);
  const Item item = item_at(pb, plan, index);
  const int64_t frames = frames_of(pb, item.chain), first = first_strip(plan, item.group);
  for (int64_t frame = 0; pb.softmax && frame + 1 < frames; ++frame)
    sum_v(pb, pair_at(pb, item, frame), s.v_sum + frame * c_cols(pb));
  for (int64_t i = first; i < first_strip(plan, item.group + 1); ++i) {
    const Strip strip = strip_at(pb, plan, i);
    const Change* before = nullptr;
    if (frames == 1) {  // its gradient is 0
      s.changes[0] = {s.changes[0].y, {}, {}};
      clear(s.changes[0].y, map_size(plan));
      before = &s.changes[0];
    }
    compute_map(pb, plan, item, 0, strip, s);
    for (int64_t frame = 1; frame < frames; ++frame) {
      const Map &previous = s.maps[(frame + 1) % 2], &current = s.maps[frame % 2];
      Change& change = s.changes[frame % 2];
      const Where pair = pair_at(pb, item, frame - 1);
      compute_map(pb, plan, item, frame, strip, s);
      vec w[STRIP_VECTORS];
      if (pb.out || pb.softmax) measure(pb, plan, strip, previous, current, s.change, w);
      load_u(pb, pair, strip, s.u);
      multiply_sides(pb, plan, pair, strip, s.v_sum + (frame - 1) * c_cols(pb), s, change.y);
      if (pb.softmax) backward_pair<true>(pb, plan, strip, previous, current, s.change, w, change);
      else backward_pair<false>(pb, plan, strip, previous, current, nullptr, nullptr, change);
      if (pb.out) multiply(pb, plan, item, frame - 1, strip, s.change, w, i == first, true, s);
      backward_map(pb, plan, item, frame - 1, strip, previous, before, &change, s, i == first);
      before = &change;
    }
    backward_map(pb, plan, item, frames - 1, strip, s.maps[(frames - 1) % 2], before, nullptr, s, i == first);
  }
  complete_to_keys(pb, plan, item, s);
}

void finish_backward(const MatmulProblem& pb, const Plan& plan, int64_t index, float* scratch, float* sums) {
  Arena arena{scratch};
  const Scratch s = layout(pb, plan, true, arena);
  const Item item = item_at(pb, plan, index);
  if (s.dk) finish_dk(pb, plan, item, s.dk, sums);
  finish_part(pb, plan, item, s.part, sums + dk_sum_size(pb, plan));
}

}  // namespace

const MatmulKernels matmul = {{plan_forward, turn_of, forward, finish_forward},
                              {plan_backward, turn_of, backward, finish_backward}};

}  // namespace amflow::AMFLOW_ISA
