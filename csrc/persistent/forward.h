// The forward time loop of a span of steps as one kernel: what step_forward.h does between the input product and y, for
// cells with one product a step, without projection, masks and zoneout. The same source runs on a GPU and, thread by
// thread, on the host (machine.h).
//
// A step: h_{t-1} of the tile is in each block's shared memory; the product; the parts' sums; the cell, its states in
// registers; h_t into the other buffer of every block; y and what is saved, on the way to the barrier that ends the
// step. Two buffers are enough: who writes one in step t+1 has passed the barrier of step t, before which all have read
// it.
#pragma once

#include "../stepwise/step_forward.h"
#include "products.h"
#include "span.h"

namespace fusedrnn::persistent {

template <class Cell, class Products, class Shape>
FUSEDRNN_INLINE constexpr Layout<Shape> forward_layout(const Shape& s) {
  return Layout<Shape>(s, Cell::kGates, 1, Cell::kGates * Place::pairs(s));
}

template <class Cell, class Products, class Shape, class M>
FUSEDRNN_KERNEL void forward_loop(M& m, const Shape& s, const ForwardSpan<typename Products::T>& p) {
  using T = typename Products::T;
  using V = typename Products::Value;
  constexpr int G = Cell::kGates, kSplit = Cell::kSplit, kSaved = Cell::kSaved;
  constexpr bool kTwoStates = Cell::kStates == 2;
  const auto layout = forward_layout<Cell, Products>(s);
  const Place at(s, m.thread());
  const int pairs = Place::pairs(s), slot = m.slot(), H = static_cast<int>(p.u.H), width = static_cast<int>(p.u.width);
  const int saved_stride = static_cast<int>(p.u.saved_stride);
  const Block here(s, p.steps.B, H, m.cluster(), m.rank());
  Walk walk(p.steps, slot);
  while (walk.step < p.steps.end && walk.rows() <= here.first_sample) walk.forward();
  if (walk.step == p.steps.end) return;

  const T* const w = p.w_hh + int64_t{slot} * G * H * H;
  const Weights<Products, Shape, G, M> weights(m, s, at, layout.weights, [&](int gate, int row, int k) {
    return row < here.units && k < H ? w + ((gate * H + here.first_unit + row) * H + k) : nullptr;
  });

  // h_{t-1} of all units into the first buffer; zeros after it, and into the second.
  const int row = row_vectors(s, 1) * Products::kPerRegister * (kVectorBytes / 4);
  const int64_t states = (slot * p.steps.B + here.first_sample) * H;
  const auto operand = m.template shared<typename Products::Operand>(layout.operand);
  for (int i = m.thread(); i < 2 * kSamples * row; i += threads(s)) {
    const bool is_state = i / row < here.samples && i % row < H;
    const float value = is_state ? widen(p.u.operand[states + i / row * H + i % row]) : 0;
    m.store(operand + i, Products::operand(value));
  }

  // Biases of a lane's units: of W_ih x and W_hh h together, where the cell knows but their sum. h and c of its pairs.
  float bias[G][2], split_bias[kSplit > 0 ? kSplit : 1][2], h[4], c[4];
#pragma unroll
  for (int i = 0; i < Place::units(s); ++i) {
#pragma unroll
    for (int gate = 0; gate < G; ++gate) {
      const int unit = gate * H + here.first_unit + at.unit_of(s, i);
      const bool there = at.unit_of(s, i) < here.units;
      const float of_x = there && p.u.b_ih[slot] ? widen(p.u.b_ih[slot][unit]) : 0;
      const float of_h = there && p.u.b_hh[slot] ? widen(p.u.b_hh[slot][unit]) : 0;
      bias[gate][i] = gate < G - kSplit ? of_x + of_h : of_x;
      if (gate >= G - kSplit) split_bias[gate - (G - kSplit)][i] = of_h;
    }
  }
#pragma unroll
  for (int i = 0; i < pairs; ++i) {
    const int unit = at.unit(s, i), sample = at.sample(s, i);
    const int64_t from = states + sample * H + here.first_unit + unit;
    const bool there = unit < here.units && sample < here.samples;
    h[i] = !there ? 0 : p.u.h ? p.u.h[from] : widen(p.u.operand[from]);
    c[i] = there && kTwoStates ? p.u.c[from] : 0;
  }

  float w_unit[Cell::kParameters > 0 ? Cell::kParameters : 1][2];  // of a lane's units
#pragma unroll
  for (int i = 0; i < Place::units(s); ++i) {
    const int unit = at.unit_of(s, i);
#pragma unroll
    for (int k = 0; k < Cell::kParameters; ++k) {
      w_unit[k][i] = unit < here.units ? widen(p.u.w_unit[slot][k * H + here.first_unit + unit]) : 0;
    }
  }

  float x[G][4];
  const auto load_x = [&] {
    const float* const rows =
        p.x + slot * p.x_stride + (walk.row + here.first_sample - p.first_x[slot]) * G * H + here.first_unit;
    const int active = here.active(walk.rows());
#pragma unroll
    for (int i = 0; i < pairs; ++i) {
      const int unit = at.unit(s, i), sample = at.sample(s, i);
      const bool reads = unit < here.units && sample < active;
#pragma unroll
      for (int gate = 0; gate < G; ++gate) x[gate][i] = reads ? rows[sample * G * H + gate * H + unit] : 0;
    }
  };
  load_x();
  m.cluster_arrive();
  m.cluster_wait();

  for (int buffer = 0;; buffer ^= 1) {
    float sums[G][4] = {}, rec[G][4], saved[4][kSaved > 0 ? kSaved : 1];
    weights.template multiply<false>(m, s, operand + buffer * kSamples * row, sums);
    sum_parts<G>(m, s, at, layout.exchange, sums, rec);
    const int active = here.active(walk.rows());
#pragma unroll
    for (int i = 0; i < pairs; ++i) {
      const int unit = Place::unit_index(s, i);
      Values<V, G> of_x, of_h;
#pragma unroll
      for (int gate = 0; gate < G; ++gate) {
        of_x[gate] = V(x[gate][i] + bias[gate][unit]);
        of_h[gate] = V(gate < G - kSplit ? rec[gate][i] : rec[gate][i] + split_bias[gate - (G - kSplit)][unit]);
      }
      Values<V, Cell::kStates> state;
      state[0] = V(h[i]);
      if constexpr (kTwoStates) state[1] = V(c[i]);
      Values<V, kSaved> values;
      const auto parameters = UnitParameters<Cell, V>::of([&](int k) { return V(w_unit[k][unit]); });
      forward_step<Cell>(of_x, of_h, parameters, state, values);
      const bool steps = at.sample(s, i) < active && at.unit(s, i) < here.units;
      h[i] = steps ? state[0].v : h[i];
      if constexpr (kTwoStates) c[i] = steps ? state[1].v : c[i];
#pragma unroll
      for (int k = 0; k < kSaved; ++k) saved[i][k] = values[k].v;
    }
    const int64_t first = walk.row + here.first_sample;
    walk.forward();
    const bool last = walk.step == p.steps.end || walk.rows() <= here.first_sample;
    if (!last) {
      const auto next = operand + ((buffer ^ 1) * kSamples * row + here.first_unit);
      publish<Products>(m, s, at, here.units, [&](int sample) { return next + sample * row; }, h);
      load_x();
      m.cluster_arrive();
    }
    T* const y = p.u.y[slot] + first * width + here.first_unit;
    float* const kept = p.u.saved[slot] + first * saved_stride + here.first_unit;
#pragma unroll
    for (int i = 0; i < pairs; ++i) {
      const int unit = at.unit(s, i), sample = at.sample(s, i);
      if (unit >= here.units || sample >= active) continue;
      y[sample * width + unit] = narrow<T>(h[i]);
      if (!p.u.saved[slot]) continue;
#pragma unroll
      for (int k = 0; k < kSaved; ++k) kept[sample * saved_stride + k * H + unit] = saved[i][k];
      if constexpr (kTwoStates) kept[sample * saved_stride + kSaved * H + unit] = c[i];
    }
    if (last) break;
    m.cluster_wait();
  }
#pragma unroll
  for (int i = 0; i < pairs; ++i) {
    const int unit = at.unit(s, i), sample = at.sample(s, i);
    if (unit >= here.units || sample >= here.samples) continue;
    const int64_t to = states + sample * H + here.first_unit + unit;
    p.u.operand[to] = narrow<T>(h[i]);
    if (p.u.h) p.u.h[to] = h[i];
    if constexpr (kTwoStates) p.u.c[to] = c[i];
  }
}

}  // namespace fusedrnn::persistent
