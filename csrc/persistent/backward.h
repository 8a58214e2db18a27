// The backward time loop of a span of steps as one kernel: what step_backward.h does between dL/dy and dG, for cells
// with one product a step, without projection, masks, zoneout, norms and limits on a norm.
//
// A step: dL/dh and dL/dc of a lane's pairs are in its registers; the cell; dG into the buffer of every block of the
// cluster; dG to memory, on the way to the barrier; then each block multiplies its own columns of W_hh, so that no sum
// goes over blocks and every run has the same bits.
#pragma once

#include "../stepwise/step_backward.h"
#include "products.h"
#include "span.h"

namespace fusedrnn::persistent {

template <class Cell, class Products, class Shape>
FUSEDRNN_INLINE constexpr Layout<Shape> backward_layout(const Shape& s) {
  return Layout<Shape>(s, Cell::kGates, Cell::kGates, Place::pairs(s));
}

template <class Cell, class Products, class Shape, class M>
FUSEDRNN_KERNEL void backward_loop(M& m, const Shape& s, const BackwardSpan<typename Products::T>& p) {
  using T = typename Products::T;
  using V = typename Products::Value;
  constexpr int G = Cell::kGates, kSplit = Cell::kSplit, kSaved = Cell::kSaved;
  constexpr int kParameters = Cell::kParameters, kBlocks = G + kSplit + kParameters;
  constexpr bool kTwoStates = Cell::kStates == 2;
  const auto layout = backward_layout<Cell, Products>(s);
  const Place at(s, m.thread());
  const int pairs = Place::pairs(s), slot = m.slot(), H = static_cast<int>(p.u.H), width = static_cast<int>(p.u.width);
  const int saved_stride = static_cast<int>(p.u.saved_stride);
  const Block here(s, p.steps.B, H, m.cluster(), m.rank());
  Walk walk(p.steps, slot, true);
  while (walk.step >= p.steps.begin && walk.rows() <= here.first_sample) walk.back();
  if (walk.step < p.steps.begin) return;

  const T* const w = p.w_hh + int64_t{slot} * G * H * H;  // its columns: dL/dh of a unit is of W[gate * H + k, unit]
  const Weights<Products, Shape, G, M> weights(m, s, at, layout.weights, [&](int gate, int row, int k) {
    return row < here.units && k < H ? w + ((gate * H + k) * H + here.first_unit + row) : nullptr;
  });

  // Elements of a row of the operand, and of one gate in it. Zeros wherever no gradient will be.
  const int row = row_vectors(s, G) * Products::kPerRegister * (kVectorBytes / 4);
  const int gate_row = s.parts * s.vectors * Products::kPerRegister * (kVectorBytes / 4);
  const auto operand = m.template shared<typename Products::Operand>(layout.operand);
  for (int i = m.thread(); i < 2 * kSamples * row; i += threads(s)) m.store(operand + i, Products::operand(0));

  const int64_t states = (slot * p.steps.B + here.first_sample) * H + here.first_unit;
  float dh[4], dc[4];
#pragma unroll
  for (int i = 0; i < pairs; ++i) {
    const int unit = at.unit(s, i), sample = at.sample(s, i);
    const bool there = unit < here.units && sample < here.samples;
    dh[i] = there ? p.u.dh[states + sample * H + unit] : 0;
    dc[i] = there && kTwoStates ? p.u.dc[states + sample * H + unit] : 0;
  }

  float w_unit[kParameters > 0 ? kParameters : 1][2];  // of a lane's units
#pragma unroll
  for (int i = 0; i < Place::units(s); ++i) {
    const int unit = at.unit_of(s, i);
#pragma unroll
    for (int k = 0; k < kParameters; ++k) {
      w_unit[k][i] = unit < here.units ? widen(p.u.w_unit[slot][k * H + here.first_unit + unit]) : 0;
    }
  }

  // What a step reads of each pair. The states before it: of the step before, or h0 and c0.
  float saved[4][kSaved > 0 ? kSaved : 1], h[4], h_before[4], c[4], c_before[4], dy[4], dc_given[4];
  const auto load = [&] {
    const int active = here.active(walk.rows()), carried = here.active(walk.carried());
    const int64_t first = walk.row + here.first_sample, before = walk.previous_row() + here.first_sample;
    const T *const y = p.u.y[slot] + first * width + here.first_unit,
                   *y_before = p.u.y[slot] + before * width + here.first_unit;
    const float *const kept = p.u.saved[slot] + first * saved_stride + here.first_unit, *const kept_before =
                                                                                            p.u.saved[slot] +
                                                                                            before * saved_stride +
                                                                                            here.first_unit;
    const int64_t begin = here.first_sample * H + here.first_unit;
    const auto given = [&](const RowView& from, int sample, int unit) {
      if (!from.data) return 0.0f;
      const int64_t at_row = from.time < 0
                                 ? (first + sample) * from.batch
                                 : walk.time(walk.step) * from.time + (here.first_sample + sample) * from.batch;
      return static_cast<float>(widen(static_cast<const T*>(from.data)[at_row + slot * H + here.first_unit + unit]));
    };
#pragma unroll
    for (int i = 0; i < pairs; ++i) {
      const int unit = at.unit(s, i), sample = at.sample(s, i);
      if (unit >= here.units || sample >= active) continue;
#pragma unroll
      for (int k = 0; k < kSaved; ++k) saved[i][k] = kept[sample * saved_stride + k * H + unit];
      dy[i] = given(p.dy, sample, unit);
      h[i] = widen(y[sample * width + unit]);
      h_before[i] = sample < carried ? widen(y_before[sample * width + unit])
                    : p.u.h0[slot]   ? widen(p.u.h0[slot][begin + sample * H + unit])
                                     : 0;
      if constexpr (kTwoStates) {
        dc_given[i] = given(p.dc, sample, unit);
        c[i] = kept[sample * saved_stride + kSaved * H + unit];
        c_before[i] = sample < carried ? kept_before[sample * saved_stride + kSaved * H + unit]
                      : p.u.c0[slot]   ? widen(p.u.c0[slot][begin + sample * H + unit])
                                       : 0;
      }
    }
  };
  load();
  m.cluster_arrive();
  m.cluster_wait();

  for (int buffer = 0;; buffer ^= 1) {
    const int active = here.active(walk.rows()), severed = walk.severs(p.bptt_steps) ? here.active(walk.carried()) : 0;
    const int64_t first = walk.row + here.first_sample;
    float drec[G][4], dx[kSplit > 0 ? kSplit : 1][4], operand_of_dw[4];
    float of_parameters[kParameters > 0 ? kParameters : 1][4];
#pragma unroll
    for (int i = 0; i < pairs; ++i) {
      const bool steps = at.sample(s, i) < active && at.unit(s, i) < here.units;
      Values<V, kSaved> of_forward;
      Values<V, Cell::kStates> previous, current, d;
      Values<V, G> of_x, of_h;
#pragma unroll
      for (int k = 0; k < kSaved; ++k) of_forward[k] = V(saved[i][k]);
      previous[0] = V(h_before[i]), current[0] = V(h[i]), d[0] = V(dh[i] + dy[i]);
      if constexpr (kTwoStates) previous[1] = V(c_before[i]), current[1] = V(c[i]), d[1] = V(dc[i] + dc_given[i]);
      auto parameters = UnitParameters<Cell, V>::of([&](int k) { return V(w_unit[k][Place::unit_index(s, i)]); });
      parameters.backward(of_forward, previous, current, d, of_x, of_h);
#pragma unroll
      for (int gate = 0; gate < G; ++gate) drec[gate][i] = steps ? of_h[gate].v : 0;
#pragma unroll
      for (int k = 0; k < kSplit; ++k) dx[k][i] = of_x[G - kSplit + k].v;
#pragma unroll
      for (int k = 0; k < kParameters; ++k) of_parameters[k][i] = parameters.gradient[k].v;
      dh[i] = steps ? d[0].v : dh[i];
      if constexpr (kTwoStates) dc[i] = steps ? d[1].v : dc[i];
      operand_of_dw[i] = h_before[i];
    }
#pragma unroll
    for (int gate = 0; gate < G; ++gate) {
      const auto to = operand + (buffer * kSamples * row + gate * gate_row + here.first_unit);
      publish<Products>(m, s, at, here.units, [&](int sample) { return to + sample * row; }, drec[gate]);
    }
    walk.back();
    const bool last = walk.step < p.steps.begin || walk.rows() <= here.first_sample;
    m.cluster_arrive();
    T* const dg = p.u.dg[slot] + first * kBlocks * H + here.first_unit;
    T* const before = p.u.before[slot] + first * H + here.first_unit;
#pragma unroll
    for (int i = 0; i < pairs; ++i) {
      const int unit = at.unit(s, i), sample = at.sample(s, i);
      if (unit >= here.units || sample >= active) continue;
#pragma unroll
      for (int gate = 0; gate < G; ++gate) dg[(sample * kBlocks + gate) * H + unit] = narrow<T>(drec[gate][i]);
#pragma unroll
      for (int k = 0; k < kSplit; ++k) dg[(sample * kBlocks + G + k) * H + unit] = narrow<T>(dx[k][i]);
#pragma unroll
      for (int k = 0; k < kParameters; ++k) {
        dg[(sample * kBlocks + G + kSplit + k) * H + unit] = narrow<T>(of_parameters[k][i]);
      }
      if (p.u.before[slot]) before[sample * H + unit] = narrow<T>(operand_of_dw[i]);
    }
    if (!last) load();
    m.cluster_wait();
    float sums[G][4] = {}, total[1][4], sent[1][4];
    weights.template multiply<true>(m, s, operand + buffer * kSamples * row, sums);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      total[0][i] = sums[0][i];
#pragma unroll
      for (int gate = 1; gate < G; ++gate) total[0][i] += sums[gate][i];
    }
    sum_parts<1>(m, s, at, layout.exchange, total, sent);
#pragma unroll
    for (int i = 0; i < pairs; ++i) {
      const int sample = at.sample(s, i);
      const bool sends = sample < active && at.unit(s, i) < here.units;
      const auto limited = [&](float v) { return sample < severed ? 0 : p.clip == 0 ? v : clipped(v, p.clip); };
      dh[i] = sends ? limited(dh[i] + sent[0][i]) : dh[i];
      if constexpr (kTwoStates) dc[i] = sends ? limited(dc[i]) : dc[i];
    }
    if (last) break;
  }
#pragma unroll
  for (int i = 0; i < pairs; ++i) {
    const int unit = at.unit(s, i), sample = at.sample(s, i);
    if (unit >= here.units || sample >= here.samples) continue;
    p.u.dh[states + sample * H + unit] = dh[i];
    if constexpr (kTwoStates) p.u.dc[states + sample * H + unit] = dc[i];
  }
}

}  // namespace fusedrnn::persistent
