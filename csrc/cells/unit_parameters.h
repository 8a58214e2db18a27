// The parameters of a unit as arguments of a cell's functions, which those of a cell without such parameters do not
// have (kParameters of cell.h).
#pragma once

#include "layer_norm.h"

namespace fusedrnn {

template <class Cell, class V>
struct UnitParameters {
  static constexpr bool kGiven = Cell::kParameters > 0 && !NormsOf<Cell>::kAny;  // gains are the driver's
  Values<V, Cell::kParameters> value;
  Values<V, Cell::kParameters> gradient;

  // at(k): parameter k.
  template <class At>
  FUSEDRNN_INLINE static UnitParameters of(const At& at) {
    UnitParameters parameters;
    for (int k = 0; k < Cell::kParameters; ++k) parameters.value[k] = at(k), parameters.gradient[k] = V(0);
    return parameters;
  }

  FUSEDRNN_INLINE void forward_first(const Values<V, Cell::kGates>& x, const Values<V, Cell::kGates>& rec,
                                     const Values<V, 1>& previous, Values<V, Cell::kSaved>& saved, V& q) const {
    if constexpr (kGiven) Cell::forward_first(x, rec, previous, saved, q, value);
    else Cell::forward_first(x, rec, previous, saved, q);
  }

  template <class... Late>  // Values<V, kLate> of a cell with kLate > 0
  FUSEDRNN_INLINE void forward(const Values<V, Cell::kGates>& x, const Values<V, Cell::kGates>& rec,
                               Values<V, Cell::kStates>& state, Values<V, Cell::kSaved>& saved, Late&... late) const {
    if constexpr (kGiven) Cell::forward(x, rec, state, saved, late..., value);
    else Cell::forward(x, rec, state, saved, late...);
  }

  FUSEDRNN_INLINE void dc_of(const Values<V, Cell::kSaved>& saved, const Values<V, Cell::kStates>& current,
                             const Values<V, Cell::kStates>& d, Values<V, Cell::kStates>& dc) const {
    if constexpr (Cell::kStates > 2) Cell::dc_of(saved, current, d, dc);
    else if constexpr (kGiven) dc[1] = Cell::dc_of(saved, current, d, value);
    else dc[1] = Cell::dc_of(saved, current, d);
  }

  FUSEDRNN_INLINE void backward(const Values<V, Cell::kSaved>& saved, const Values<V, Cell::kStates>& previous,
                                const Values<V, Cell::kStates>& current, Values<V, Cell::kStates>& d,
                                Values<V, Cell::kGates>& dx, Values<V, Cell::kGates>& drec) {
    if constexpr (kGiven) Cell::backward(saved, previous, current, d, dx, drec, value, gradient);
    else Cell::backward(saved, previous, current, d, dx, drec);
  }

  FUSEDRNN_INLINE void backward_first(const Values<V, Cell::kSaved>& saved, const Values<V, 1>& previous, const V& dq,
                                      Values<V, 1>& d, Values<V, Cell::kGates>& dx, Values<V, Cell::kGates>& drec) {
    if constexpr (kGiven) Cell::backward_first(saved, previous, dq, d, dx, drec, value, gradient);
    else Cell::backward_first(saved, previous, dq, d, dx, drec);
  }
};

}  // namespace fusedrnn
