// The element-wise kernels of the stepwise driver, as bodies: body(s, row, column) does one element of slot s (a
// direction of the layer), or nothing where the slot has no such row. A device runs a body over all elements, in any
// order: on the GPU one thread each (device.cu), in the tests a loop on the CPU (host.cpp). The equations are the
// cells'.
//
// T is the type of x, weights and results, S the one they are computed in (element.h). Buffers of the driver
// (loop.h) have a slot's rows together: h [slots][B][R].
#pragma once

#include "element.h"
#include "slots.h"

namespace fusedrnn {

template <class T>
using PerSlot = T[kMaxSlots];

// Rows of [T, B, *] or [N, *] as in problem.h: sample b of step t at data[t * time + b * batch].
template <class T>
struct StepView {
  using Element = T;
  const T* data;  // of this step and slot, or null
  int64_t batch;
};

// What regularizes the states at a step (StateNoise of problem.h), from the direction's first column on.
template <class S, class T>
struct StepNoise {
  struct Keep : StepView<T> {  // the part of a state that is kept; false: there is none
    FUSEDRNN_INLINE explicit operator bool() const { return this->data; }
    FUSEDRNN_INLINE S operator()(int64_t b, int64_t j) const { return widen(this->data[b * this->batch + j]); }
  };
  PerSlot<Keep> h, c;  // [rows, R], [rows, H]
};

// Rows of step i, a slot's columns [slot * width, ...).
template <class View>
void view_step(const RowView& from, const LayerSizes& z, const Slots& slots, int64_t i, int64_t width,
               PerSlot<View>& to) {
  using T = typename View::Element;
  for (int s = 0; from.data && s < slots.count; ++s) {
    const int64_t t = slots.time(z, s, i);
    const int64_t row = from.time < 0 ? z.offset[t] * from.batch : t * from.time;
    to[s].data = static_cast<const T*>(from.data) + row + s * width;
    to[s].batch = from.batch;
  }
}

template <class S, class T>
StepNoise<S, T> noise_of_step(const StateNoise& from, const LayerSizes& z, const Slots& slots, int64_t i) {
  StepNoise<S, T> noise = {};
  view_step(from.keep_h, z, slots, i, z.R, noise.h);
  view_step(from.keep_c, z, slots, i, z.H, noise.c);
  return noise;
}

// One matrix of each slot, [rows][columns], side by side.
template <class T>
struct SideBySide {
  int64_t rows, columns;
  PerSlot<const T*> from;
  T* to;  // [slots][rows][columns]

  FUSEDRNN_INLINE void operator()(int s, int64_t row, int64_t j) const {
    to[(s * rows + row) * columns + j] = from[s][row * columns + j];
  }
};

// The matrices of all slots in another type: the one that they are computed in, or back.
template <class From, class To>
struct Cast {
  int64_t rows, columns;
  const From* from;  // [slots][rows][columns]
  To* to;            // [slots][rows][columns]

  FUSEDRNN_INLINE void operator()(int s, int64_t row, int64_t j) const {
    const int64_t at = (s * rows + row) * columns + j;
    if constexpr (std::is_same_v<From, Compute<To>>) to[at] = narrow<To>(from[at]);
    else to[at] = widen(from[at]);
  }
};

// Some numbers into the device's memory.
struct Numbers {
  static constexpr int kMost = 768;  // a kernel's arguments take 4 KiB
  int32_t values[kMost];
  int32_t* to;

  FUSEDRNN_INLINE void operator()(int, int64_t, int64_t j) const { to[j] = values[j]; }
};

// ---- states, or their gradients ---------------------------------------------------------------------------------

// From the tensors of a call into the driver's buffers; zeros where there are none.
template <class S, class T>
struct LoadStates {
  int64_t B, R, C;           // C: of a row of the states besides h
  T* operand;                // [slots][B][R]: h as a product reads it, or null
  S* h;                      // [slots][B][R], or null
  S* c;                      // [slots][B][C], or null
  PerSlot<const T*> from_h;  // [B, R] or null
  PerSlot<const T*> from_c;  // [B, C] or null
  PerSlot<const T*> mask;    // [B, R] or null: of the operand

  FUSEDRNN_INLINE void operator()(int s, int64_t b, int64_t j) const {
    if (j < R) {
      const T value = from_h[s] ? from_h[s][b * R + j] : narrow<T>(0);
      if (operand) {
        operand[(s * B + b) * R + j] = mask[s] ? narrow<T>(masked(widen(value), widen(mask[s][b * R + j]))) : value;
      }
      if (h) h[(s * B + b) * R + j] = widen(value);
    }
    if (c && j < C) c[(s * B + b) * C + j] = from_c[s] ? widen(from_c[s][b * C + j]) : S(0);
  }
};

// From the driver's buffers into the tensors of a call.
template <class S, class T>
struct StoreStates {
  int64_t B, R, C;   // as in LoadStates
  const T* operand;  // [slots][B][R]: of h if there is no `h`
  const S* h;        // [slots][B][R], or null
  const S* c;        // [slots][B][C], or null
  PerSlot<T*> to_h;  // [B, R]
  PerSlot<T*> to_c;  // [B, C]

  FUSEDRNN_INLINE void operator()(int s, int64_t b, int64_t j) const {
    const int64_t i = (s * B + b) * R + j;
    if (j < R) to_h[s][b * R + j] = h ? narrow<T>(h[i]) : operand[i];
    if (c && j < C) to_c[s][b * C + j] = narrow<T>(c[(s * B + b) * C + j]);
  }
};

}  // namespace fusedrnn
