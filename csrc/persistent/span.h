// What a persistent kernel gets: a run of steps of all directions, between the states in the driver's buffers before
// and after it.
#pragma once

#include "../stepwise/step_backward.h"
#include "../stepwise/step_forward.h"
#include "geometry.h"

namespace fusedrnn::persistent {

// The steps [begin, end) of each direction, in its own order (Slots of slots.h).
struct Steps {
  int64_t begin, end;
  int64_t T, B;
  const int32_t* active;         // [T], where the kernel can read it; null: B samples in every step
  int64_t first_row[kMaxSlots];  // of step `begin`, or of end - 1 if the loop goes back
};

// The rows of a step, found from those of its neighbour.
struct Walk {
  const Steps& steps;
  const bool reverse;
  int64_t step, row;

  FUSEDRNN_KERNEL Walk(const Steps& all, int slot, bool from_the_end = false)
      : steps(all), reverse(slot == 1), step(from_the_end ? all.end - 1 : all.begin), row(all.first_row[slot]) {}
  FUSEDRNN_KERNEL int64_t time(int64_t i) const { return reverse ? steps.T - 1 - i : i; }
  FUSEDRNN_KERNEL int64_t rows_of(int64_t i) const { return steps.active ? steps.active[time(i)] : steps.B; }
  FUSEDRNN_KERNEL int64_t rows() const { return rows_of(step); }
  // Of the step before this one, if there is one: its first row; how many of this step's samples it has.
  FUSEDRNN_KERNEL int64_t previous_row() const {
    return step == 0 ? row : reverse ? row + rows() : row - rows_of(step - 1);
  }
  FUSEDRNN_KERNEL int64_t carried() const { return step == 0 ? 0 : reverse ? rows_of(step - 1) : rows(); }
  // Whether this step sends no gradient to the one before (bptt_steps of problem.h).
  FUSEDRNN_KERNEL bool severs(int64_t bptt_steps) const {
    return bptt_steps > 0 && step > 0 && time(reverse ? step - 1 : step) % bptt_steps == 0;
  }
  FUSEDRNN_KERNEL void forward() {
    const int64_t own = rows();
    if (++step < steps.T) row += reverse ? -rows() : own;
  }
  FUSEDRNN_KERNEL void back() {
    if (step > 0) row = previous_row();
    --step;
  }
};

template <class T>
struct ForwardSpan {
  using S = Compute<T>;
  Steps steps;
  ForwardBuffers<S, T> u;
  const S* x;  // [slots][x_stride]: rows [G*H] of W_ih x, from row first_x on
  int64_t x_stride;
  int64_t first_x[kMaxSlots];
  const T* w_hh;  // [slots][G*H][H]
};

template <class T>
struct BackwardSpan {
  using S = Compute<T>;
  Steps steps;
  BackwardBuffers<S, T> u;
  RowView dy, dc;      // as in problem.h
  const T* w_hh;       // [slots][G*H][H]
  S clip;              // of what a step sends, element by element; 0: as it is
  int64_t bptt_steps;  // 0: everything is sent
};

}  // namespace fusedrnn::persistent
