// AM flow on the CPU, forward and backward; the maths is derived in docs/maths.md. Compiled once per instruction set.

#include "maps.h"

namespace amflow::AMFLOW_ISA {
namespace {

// The gradient of one pair of maps, A and A'. With y = S e^(|A - A'| / temperature) and S = sign(A - A'), the pair adds
// y (slope g - intercept) to dL/dA and subtracts it from dL/dA'. y is in the unit of the temperature, see `unit`.
struct PairGradient {
  float* y;  // laid out as Map::p
  float* g;  // [key_rows]: dflow minus its mean
  vec slope[STRIP_VECTORS], intercept[STRIP_VECTORS];
  vec rho[STRIP_VECTORS], next_rho[STRIP_VECTORS];  // the pair's part of rowsum(A * dL/dA) and rowsum(A' * dL/dA')
};

// One worker's memory.
struct Scratch : MapScratch {
  Map head_map;           // the map of one head, for mean_map
  PairGradient pairs[2];  // backward: the two latest pairs of the item
  float* flow;            // forward: [pair of the item][2][key_rows], see `add_exactly`
};

int64_t flow_size(const Plan& plan) { return (plan.item_frames - 1) * 2 * plan.key_rows; }

Scratch layout(const Problem& pb, const Plan& plan, bool backward, Arena& arena) {
  Scratch s{};
  take_map_scratch(plan, arena, s);
  if (pb.reduction == Reduction::mean_map) s.head_map = take_map(plan, arena);
  if (!backward) s.flow = arena.take(flow_size(plan));
  if (backward) {
    for (PairGradient& pair : s.pairs) {
      pair.y = arena.take(map_size(plan));
      pair.g = arena.take(plan.key_rows);
    }
    take_gradient_scratch(pb, plan, arena, s);
  }
  return s;
}

// ---- work items

Plan plan_forward(const Problem& pb, int64_t threads) {
  Plan plan = plan_common(pb);
  // Enough items for many threads. The number of groups depends on neither B nor T: a pair has the same bits in any
  // batch or clip.
  plan.groups = min(plan.strips, div_up(128, plan.heads * pb.G));
  divide(pb, plan, threads);
  plan.summed_heads = pb.reduction == Reduction::mean ? pb.H : 1;
  plan.sums = num_chains(pb, plan) * plan.parts / plan.summed_heads;
  plan.sum_floats = plan.summed_heads * plan.groups > 1 ? flow_size(plan) : 0;
  Arena arena{nullptr};
  layout(pb, plan, false, arena);
  plan.scratch = arena.used;
  return plan;
}

Plan plan_backward(const Problem& pb, int64_t threads) {
  Plan plan = plan_common(pb);
  plan.groups =
      min(plan.strips, div_up(12, num_chains(pb, plan)));  // fewer than in the forward: each group has its own dk
  plan.owns_frames = true;
  divide(pb, plan, threads);
  plan.summed_heads = 1;
  plan.sums = num_chains(pb, plan) * plan.parts;
  plan.sum_floats = plan.groups > 1 && pb.dtype != Dtype::f32 && wants_dk(pb) ? dk_size(pb, plan) : 0;
  Arena arena{nullptr};
  layout(pb, plan, true, arena);
  plan.scratch = arena.used;
  return plan;
}

// Offset of a pair's row in flow or dflow.
int64_t flow_offset(const Problem& pb, const WorkItem& item, int64_t pair) {
  const int64_t pairs = pb.pair_form ? pb.T : pb.T - pb.lag;
  const bool per_head = pb.reduction == Reduction::none;
  return (((item.b * pairs + pair) * (per_head ? pb.H : 1) + (per_head ? item.h : 0)) * pb.G + item.g) * pb.Nk;
}

// The map whose change is measured: that of one head, or (mean_map) the mean over all heads.
void compute_map(const Problem& pb, const Plan& plan, const WorkItem& item, int64_t frame, const Strip& strip,
                 Scratch& s, Map& map) {
  const bool last = frame + 1 == item.frames;
  const MapIndex next_frame = map_index(pb, item, last ? frame : frame + 1, 0);
  if (pb.reduction != Reduction::mean_map)
    return compute_head_map(pb, plan, map_index(pb, item, frame, 0), last ? nullptr : &next_frame, strip, s, map);
  for (int64_t v = 0; v < strip.vectors; ++v)
    for (int64_t block = 0; block < plan.blocks; ++block) store(map.factor + (v * plan.blocks + block) * W, set1(1.f));
  for (int64_t head = 0; head < pb.H; ++head) {
    const MapIndex next = head + 1 < pb.H ? map_index(pb, item, frame, head + 1) : next_frame;
    compute_head_map(pb, plan, map_index(pb, item, frame, head), &next, strip, s, s.head_map);
    for (int64_t v = 0; v < strip.vectors; ++v)
      for (int64_t j = 0; j < pb.Nk; ++j) {
        const int64_t offset = (v * plan.key_rows + j) * W;
        const vec A = load(s.head_map.p + offset) * load(s.head_map.factor + (v * plan.blocks + j / KEY_BLOCK) * W);
        store(map.p + offset, head ? load(map.p + offset) + A : A);
      }
  }
}

// ---- forward

// Adds sum_i w_i (e_ij - ebar_i) of the strip's queries i to flow [2][key_rows]. Overwrites a.p with e. Strips whose
// queries are all alike add the same number again and again, which would round the same way every time.
// Hence the exact sum.
template <bool low_temperature>
void forward_pair(const Problem& pb, const Plan& plan, const Strip& strip, Map& a, const Map& b, float* flow) {
  vec w[STRIP_VECTORS];
  vec mean_sum = set1(0.f);  // in each lane, its queries' sum of w_i ebar_i
  for (int64_t v = 0; v < STRIP_VECTORS; ++v) w[v] = set1(0.f);
  for (int64_t v = 0; v < strip.vectors; ++v) {
    vec sum = set1(0.f), block_sum = set1(0.f);
    for_each_change(
        pb, plan, v, a, b,
        [&](int64_t, int64_t offset, vec A, vec B) __attribute__((always_inline)) {
          const vec e = expm1<low_temperature>(abs(A - B));
          store(a.p + offset, e);
          block_sum += e;
        },
        [&] {
          sum += block_sum;
          block_sum = set1(0.f);
        });
    w[v] = load(strip.lane_weight + v * W) / (set1(unit(pb) * pb.Nk) + sum);
    mean_sum = fma(w[v], sum * set1(1.f / pb.Nk), mean_sum);
  }
  vec copies[W];
  for (int i = 0; i < W; ++i) copies[i] = mean_sum;
  const vec total_mean = sum_lanes(copies);
  // Rows after the last key have undefined values, and their results are never read.
  for (int64_t j = 0; j < plan.key_rows; j += W) {
    vec r[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) r[i] = w[0] * load(a.p + (j + i) * W);
    for (int64_t v = 1; v < strip.vectors; ++v) {
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) r[i] = fma(w[v], load(a.p + (v * plan.key_rows + j + i) * W), r[i]);
    }
    add_exactly(flow + j, flow + plan.key_rows + j, sum_lanes(r) - total_mean);
  }
}

void forward(const Problem& pb, const Plan& plan, int64_t index, float* scratch) {
  Arena arena{scratch};
  Scratch s = layout(pb, plan, false, arena);
  fill_zeros(s.flow, flow_size(plan));
  const WorkItem item = work_item_at(pb, plan, index);
  for (int64_t i = first_strip(plan, item.group); i < first_strip(plan, item.group + 1); ++i) {
    const Strip strip = strip_at(pb, plan, item, i);
    for (int64_t frame = 0; frame < item.frames; ++frame) {
      Map &previous = s.maps[(frame + 1) % 2], &current = s.maps[frame % 2];
      compute_map(pb, plan, item, frame, strip, s, current);
      if (frame == 0) continue;
      float* flow = s.flow + (frame - 1) * 2 * plan.key_rows;
      if (pb.inv_temperature > 1) forward_pair<true>(pb, plan, strip, previous, current, flow);
      else forward_pair<false>(pb, plan, strip, previous, current, flow);
    }
  }
}

// Adds the item's flow, which is in its scratch, to `sums`; the last item of a sum writes the result.
void finish_forward(const Problem& pb, const Plan& plan, int64_t index, float* scratch, float* sums) {
  Arena arena{scratch};
  const Scratch s = layout(pb, plan, false, arena);
  const WorkItem item = work_item_at(pb, plan, index);
  const int64_t position = reduction_slot(pb, plan, index).position;
  const bool last = position == plan.summed_heads * plan.groups - 1;
  const double base = pb.center ? 0. : static_cast<double>(pb.Nq) / pb.Nk;
  for (int64_t frame = 0; frame + 1 < item.frames; ++frame) {
    float* flow = pb.flow + flow_offset(pb, item, pair_index(pb, item, frame));
    const float *part = s.flow + frame * 2 * plan.key_rows, *part_low = part + plan.key_rows;
    if (position || !last) {
      float *const sum = sums + frame * 2 * plan.key_rows, *const low = sum + plan.key_rows;
      if (!position) fill_zeros(sum, 2 * plan.key_rows);
      for (int64_t j = 0; j < plan.key_rows; j += W) {
        add_exactly(sum + j, low + j, load(part + j));
        store(low + j, load(low + j) + load(part_low + j));
      }
      part = sum, part_low = low;
    }
    for (int64_t j = 0; last && j < pb.Nk; ++j)
      flow[j] = static_cast<float>(base + (static_cast<double>(part[j]) + part_low[j]) / plan.summed_heads);
  }
}

// ---- backward

// dflow of one pair minus its mean. A constant in dflow has no effect, since the rows of P sum to 1; with the mean
// subtracted, a constant dflow gives a gradient of exactly 0.
void load_dflow(const Problem& pb, const WorkItem& item, int64_t pair, float* g) {
  const float* dflow = pb.dflow + flow_offset(pb, item, pair);
  double sum = 0;
  for (int64_t j = 0; j < pb.Nk; ++j) sum += dflow[j];
  const double mean = sum / pb.Nk, share = 1. / (pb.reduction == Reduction::mean ? pb.H : 1);
  for (int64_t j = 0; j < pb.Nk; ++j) g[j] = static_cast<float>((dflow[j] - mean) * share);
}

// Computes all of `pair` from its g.
template <bool low_temperature>
void backward_pair(const Problem& pb, const Plan& plan, const Strip& strip, const Map& a, const Map& b,
                   PairGradient& pair) {
  const vec one = set1(unit(pb));
  float g_sum = 0;
  for (int64_t j = 0; j < pb.Nk; ++j) g_sum += pair.g[j];
  for (int64_t v = 0; v < strip.vectors; ++v) {
    BlockedSum e, e_g, A_y, A_y_g, B_y, B_y_g;  // A and B include the factor 1 / temperature
    const float* g = pair.g;
    float* const y_out = pair.y;
    for_each_change(
        pb, plan, v, a, b,
        [&](int64_t j, int64_t offset, vec A, vec B) __attribute__((always_inline)) {
          const vec d = A - B, g_j = set1(g[j]);
          const vec e_j = expm1<low_temperature>(abs(d));
          const vec y = multiply_by_sign(e_j + one, d);
          const vec Ay = A * y, By = B * y;
          store(y_out + offset, y);
          e.block += e_j;
          e_g.block = fma(e_j, g_j, e_g.block);
          A_y.block += Ay;
          A_y_g.block = fma(Ay, g_j, A_y_g.block);
          B_y.block += By;
          B_y_g.block = fma(By, g_j, B_y_g.block);
        },
        [&] {
          e.end_block(), e_g.end_block();
          A_y.end_block(), A_y_g.end_block();
          B_y.end_block(), B_y_g.end_block();
        });
    const vec w = load(strip.lane_weight + v * W) / (one * set1(pb.Nk) + e.total);
    const vec delta = w * (one * set1(g_sum) + e_g.total), scaled_w = set1(pb.scale) * w;
    pair.slope[v] = scaled_w * set1(pb.inv_temperature);
    pair.intercept[v] = pair.slope[v] * delta;
    pair.rho[v] = scaled_w * (A_y_g.total - delta * A_y.total);
    pair.next_rho[v] = -scaled_w * (B_y_g.total - delta * B_y.total);
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
        const int64_t offset = (v * plan.key_rows + j) * W;
        sum = fma(load(map.p + offset), dA(j, offset), sum);
      }
      rho[v] = fma(sum, load(map.factor + (v * plan.blocks + block) * W), rho[v]);
    }
  }
}

// From dL/dA = gradient(v)(j, offset of key j) of a map and rho = rowsum(A * dL/dA) to dq and dk of its frame.
template <class Gradient>
void backward_map(const Problem& pb, const Plan& plan, const WorkItem& item, int64_t frame, const Strip& strip,
                  const Map& map, const Gradient& gradient, const vec* rho, Scratch& s) {
  for (int64_t head = 0; head < plan.map_heads; ++head) {
    const MapIndex index = map_index(pb, item, frame, head);
    float* const dk = s.dk ? s.dk + ((frame - item.own_begin) * plan.map_heads + head) * pb.Nk * plan.d_cols
                           : reinterpret_cast<float*>(dk_row(pb, index, 0));
    if (pb.reduction != Reduction::mean_map) {
      backward_logits(pb, plan, index, strip, map, gradient, rho, s, dk);
      continue;
    }
    // The map of the head includes the factor 1 / H:
    // A (dA / H - rowsum(A dA / H)) = (A / H) (dA - H rowsum((A / H) dA)).
    vec head_rho[STRIP_VECTORS];
    compute_head_map(pb, plan, index, nullptr, strip, s, s.head_map);
    row_sums(pb, plan, strip, s.head_map, gradient, head_rho);
    for (int64_t v = 0; v < strip.vectors; ++v) head_rho[v] *= set1(pb.H);
    backward_logits(pb, plan, index, strip, s.head_map, gradient, head_rho, s, dk);
  }
}

// The map is the second of the pair `before` and the first of the pair `after`; either may be missing.
void backward_map(const Problem& pb, const Plan& plan, const WorkItem& item, int64_t frame, const Strip& strip,
                  const Map& map, const PairGradient* before, const PairGradient* after, Scratch& s) {
  if (!item.owns(frame)) return;
  const auto first = [&](int64_t v) {
    return [y = after->y, g = after->g, slope = after->slope[v], intercept = after->intercept[v]](
               int64_t j, int64_t offset) { return load(y + offset) * fma(slope, set1(g[j]), -intercept); };
  };
  const auto second = [&](int64_t v) {
    return [y = before->y, g = before->g, slope = -before->slope[v], intercept = before->intercept[v]](
               int64_t j, int64_t offset) { return load(y + offset) * fma(slope, set1(g[j]), intercept); };
  };
  const auto both = [&](int64_t v) {
    return [first = first(v), second = second(v)](int64_t j, int64_t offset) {
      return first(j, offset) + second(j, offset);
    };
  };
  if (!before) return backward_map(pb, plan, item, frame, strip, map, first, after->rho, s);
  if (!after) return backward_map(pb, plan, item, frame, strip, map, second, before->next_rho, s);
  vec rho[STRIP_VECTORS];
  for (int64_t v = 0; v < strip.vectors; ++v) rho[v] = before->next_rho[v] + after->rho[v];
  backward_map(pb, plan, item, frame, strip, map, both, rho, s);
}

void backward(const Problem& pb, const Plan& plan, int64_t index, float* scratch) {
  Arena arena{scratch};
  Scratch s = layout(pb, plan, true, arena);
  const WorkItem item = work_item_at(pb, plan, index);
  const int64_t frames = item.frames;
  if (frames == 0) return;
  for (int64_t i = first_strip(plan, item.group); i < first_strip(plan, item.group + 1); ++i) {
    const Strip strip = strip_at(pb, plan, item, i);
    const PairGradient* before = nullptr;
    if (frames == 1) {  // the frame is in no pair: its gradient is 0
      fill_zeros(s.pairs[0].y, map_size(plan));
      fill_zeros(s.pairs[0].g, plan.key_rows);
      before = &s.pairs[0];
    }
    for (int64_t frame = 0; frame < frames; ++frame) {
      Map &previous = s.maps[(frame + 1) % 2], &current = s.maps[frame % 2];
      compute_map(pb, plan, item, frame, strip, s, current);
      if (frame == 0) continue;
      PairGradient& pair = s.pairs[frame % 2];
      load_dflow(pb, item, pair_index(pb, item, frame - 1), pair.g);
      if (pb.inv_temperature > 1) backward_pair<true>(pb, plan, strip, previous, current, pair);
      else backward_pair<false>(pb, plan, strip, previous, current, pair);
      backward_map(pb, plan, item, frame - 1, strip, previous, before, &pair, s);
      before = &pair;
    }
    backward_map(pb, plan, item, frames - 1, strip, s.maps[(frames - 1) % 2], before, nullptr, s);
  }
}

void finish_backward(const Problem& pb, const Plan& plan, int64_t index, float* scratch, float* sums) {
  if (!wants_dk(pb) || dk_in_place(pb, plan)) return;
  Arena arena{scratch};
  finish_dk(pb, plan, work_item_at(pb, plan, index), layout(pb, plan, true, arena).dk, sums);
}

}  // namespace

#define AMFLOW_NAME_OF(isa) #isa
#define AMFLOW_NAME(isa) AMFLOW_NAME_OF(isa)

const Kernels kernels = {AMFLOW_NAME(AMFLOW_ISA),
                         {plan_forward, reduction_slot, forward, finish_forward},
                         {plan_backward, reduction_slot, backward, finish_backward}};

}  // namespace amflow::AMFLOW_ISA
