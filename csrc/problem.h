// One recurrent layer as the backends see it: sizes, strides and raw pointers. No torch, no allocation.
// T time, B batch, I input, H hidden, R = P with a projection and H without, D directions, N = rows of all steps.
// Ragged input: step t holds active[t] samples, not increasing with t; its rows begin at offset[t].
// All checks were made before a problem is filled in (csrc/layer.cpp).
#pragma once

#include <cstdint>

namespace fusedrnn {

struct BFloat16 {
  uint16_t bits;
};

enum class DType : int { kFloat32, kFloat64, kBFloat16, kFloat16 };
constexpr int kDTypes = 4;

// Elements between rows of n elements of `bytes` each: an odd number of cache lines, so that a column of rows
// spreads over all cache sets. Short rows, which do not collide, stay as they are. (Static: no set's own copy serves
// all.)
static constexpr int64_t spread_stride(int64_t n, int64_t bytes) {
  const int64_t line = 64 / bytes;
  return n < 4 * line ? n : ((n + line - 1) / line | 1) * line;
}

struct LayerSizes {
  int64_t T, B, I, H, R, N;
  int D;
  bool projected;
  const int64_t* active;  // [T]
  const int64_t* offset;  // [T]
};

// Rows of a [T, B, *] (dense) or [N, *] (packed) tensor whose last dimension has stride 1.
struct RowView {
  const void* data;
  int64_t time;   // elements between steps; < 0: packed, step t begins at offset[t] * batch
  int64_t batch;  // elements between samples
};

// The distance between the rows of x, if there is but one (has_even_rows), as products want it.
inline int64_t row_stride(const RowView& x, const LayerSizes& z) {
  return z.N == 1 ? z.I : x.time < 0 || z.B > 1 ? x.batch : x.time;
}
inline bool has_even_rows(const RowView& x, const LayerSizes& z) {
  const bool even = x.time < 0 || z.B == 1 || z.T == 1 || x.time == z.B * x.batch;
  return even && row_stride(x, z) >= z.I;
}

// Something for each weight of one direction; null or empty for one that the layer does not have.
template <class P>
struct PerWeight {
  P w_ih;    // of [G*H, I]
  P w_hh;    // of [G*H, R]
  P b_ih;    // of [G*H]
  P b_hh;    // of [G*H]
  P w_hr;    // of [R, H]
  P w_unit;  // of [U*H]: parameters of each unit (kParameters of cells/cell.h)

  template <class F>
  auto map(const F& f) const {
    return PerWeight<decltype(f(w_ih))>{f(w_ih), f(w_hh), f(b_ih), f(b_hh), f(w_hr), f(w_unit)};
  }
};
using LayerWeights = PerWeight<const void*>;  // contiguous
using WeightGradients = PerWeight<void*>;     // contiguous, written in full

// Of int8 matrices, a factor for each row.
struct WeightScales {
  const float* ih;  // [G*H]
  const float* hh;  // [G*H]
  const float* hr;  // [R], null without a projection
};

// Packed weights of a layer that outlive a call: memory of the kernel's panel_bytes, 64-byte aligned. `members`: of the
// teams that they were packed for; 0 until a call has packed them, which the first one does. A call whose teams have
// another number leaves them alone. `used`: whether the last call used them.
struct Panels {
  void* data;
  int members;
  bool used;
};

// What regularizes the states, in the type of x. Data null: nothing.
struct StateNoise {
  const void* mask_h = nullptr;      // [D, B, R]: the products of all steps read mask_h * h_{t-1}
  RowView keep_h = {nullptr, 0, 0};  // rows of D*R: h_t = keep_h * h_{t-1} + (1 - keep_h) * what the cell gives
  RowView keep_c = {nullptr, 0, 0};  // rows of D*H, cells with two states: c_t likewise; h_t is of the cell's c

  bool changes_h() const { return keep_h.data; }  // whether h_t differs from what the cell gives
};

struct ForwardProblem {
  LayerSizes size;
  LayerWeights weights[2];
  WeightScales scales[2] = {};  // of int8 matrices
  StateNoise noise;
  RowView x;       // [T, B, I] or [N, I]
  const void* h0;  // [D, B, R] or null: zeros
  const void* c0;  // [D, B, C] or null: zeros; C = (kStates - 1)*H, the states besides h one after another
  void* y;         // [N, D*R]
  void* h_n;       // [D, B, R]
  void* c_n;       // [D, B, C], cells with more states than h
  void* saved;     // [D, N, saved_stride] in the compute type, or null: nothing is kept
  // >= (kSaved + kStates - 1) * H + kRowValues (cells/layer_norm.h), and >= H with keep_h: a cell that saves nothing
  // saves its h
  int64_t saved_stride;
  Panels* panels = nullptr;
  int threads;
};

struct BackwardProblem {
  LayerSizes size;
  LayerWeights weights[2];
  StateNoise noise;
  RowView x;          // [T, B, I] or [N, I]
  RowView dy;         // [T, B, D*R] or [N, D*R]; data null: zeros
  RowView dc;         // [T, B, D*C] or [N, D*C], cells with more states than h; data null: zeros
  const void* h0;     // [D, B, R] or null
  const void* c0;     // [D, B, C] or null
  const void* y;      // [N, D*R]
  const void* saved;  // as written by forward
  int64_t saved_stride;
  const void* dh_n;  // [D, B, R] or null: zeros
  const void* dc_n;  // [D, B, C] or null: zeros
  void* dx;          // [N, I], or null: not wanted
  void* dx_part[2];  // [N, I], of each direction, in the compute type; with one of the same type: dx itself
  void* dh0;         // [D, B, R]
  void* dc0;         // [D, B, C], cells with more states than h
  // In the compute type, or null: not wanted. A row of dgates: dL/d(W_hh h + b_hh) of all gates, then
  // dL/d(W_ih x + b_ih) of the last kSplit; that of the others is the same. Then what the row adds to dL/d(w_unit). Of
  // a cell whose products are normalised the first are dL/d(W_hh h) and dL/d(W_ih x), and behind w_unit's come those of
  // the gates' arguments, as the biases have them (cells/layer_norm.h).
  void* dgates;  // [D, N, kColumns*H]
  void* dh;      // [D, N, R]: dL/dh_t of a projected layer, by all ways (with keep_h, of what the cell gives)
  // In the compute type, or null: not wanted. Of each row the norms of what the later steps, dh_n and dc_n send to h_t
  // and to each state besides it; of the gradients of these by all ways; of each gate, that of W_ih x + b_ih (of a
  // normalised W_ih x, its argument).
  void* norms;  // [D, N, 2*kStates + G] (NormColumns of cells/rules.h)
  // What a step sends to the states before it. Nothing from a time t that is a multiple of bptt_steps to t - 1, or the
  // other way in the reverse direction (0: everything); the rest with no element beyond `clip`, or no longer than
  // `clip` for each sample and state (0: as it is).
  int64_t bptt_steps;
  double clip;
  bool clip_by_norm;
  WeightGradients dw[2];
  bool weight_gradients;
  int threads;
};

}  // namespace fusedrnn
