// Layer normalisation of rows: what a driver does between a product and a cell that needs all units of a row. Written
// once, for scalars and vectors, as the cells are. docs/derivations.md, section N.
//
// A cell asks for it by `kNorms` (none without that member):
//   1  W_ih x_t and W_hh h_{t-1}, each over the row of all its G*H values; the cell's x and rec are gain * these + bias
//   2  c_t as well, over its H values; what the cell's `finish` and `backward` read in the place of c_t is
//      gain * that + bias. The cell adds
//        normed_gradient(saved, current, d)   dL/d(gain * the normalised c_t + bias), of d as it comes into backward
//      and its backward gets in d[1] dL/dc_t by all ways.
// `kParameters` are these gains: of x by gate, of rec by gate, then c's gain and bias. The cell's functions do not get
// them. The last 2 * G of `kSaved` are the normalised x and rec, which the driver saves. dx and drec of a cell's
// backward are those of the gates' arguments; those of the products differ for all gates (`kSplit` = G), and
// `kGateSplit` says for how many of the last gates those of the arguments do.
#pragma once

#include <type_traits>

#include "rules.h"

namespace fusedrnn {

template <class Cell, class = void>
constexpr int kNormsOf = 0;
template <class Cell>
constexpr int kNormsOf<Cell, std::void_t<decltype(Cell::kNorms)>> = Cell::kNorms;

// The numbers of a row that are saved behind the states: which is which.
struct RowNumbers {
  static constexpr int kScaleOfX = 0, kScaleOfRec = 1, kMeanOfState = 2, kScaleOfState = 3;
};

template <class Cell>
struct NormsOf : RowNumbers {
  static constexpr int kCount = kNormsOf<Cell>;
  static constexpr bool kAny = kCount > 0, kOfState = kCount > 1;
  static constexpr int gate_split() {
    if constexpr (kAny) return Cell::kGateSplit;
    else return Cell::kSplit;
  }
  static constexpr int kGates = Cell::kGates;
  // Of the saved values, those that the cell gives; how many RowNumbers there are.
  static constexpr int kOwnSaved = Cell::kSaved - (kAny ? 2 * kGates : 0), kRowValues = 2 * kCount;
  // Parameters of a unit.
  static constexpr int kGainOfX = 0, kGainOfRec = kGates, kGainOfState = 2 * kGates, kBiasOfState = 2 * kGates + 1;
  // Columns of a row of dG: those that products read, the units' parameters, and with norms the gradients of the
  // gates' arguments, which are otherwise those that products read: of rec for all gates, of x for the last kGateSplit.
  static constexpr int kGateSplit = gate_split();
  static constexpr int kFactors = kGates + Cell::kSplit;
  static constexpr int kFirstArgument = kAny ? kFactors + Cell::kParameters : 0;
  static constexpr int kColumns = kFactors + Cell::kParameters + (kAny ? kGates + kGateSplit : 0);
  static_assert(!kAny || (Cell::kSplit == kGates && Cell::kFirst == kGates), "each product of a gate is normalised");
  static_assert(!kAny || Cell::kParameters == 2 * kGates + (kOfState ? 2 : 0), "the parameters are the gains");
  // The column of the gradient of a gate's argument, its part of x.
  FUSEDRNN_INLINE static constexpr int argument(int gate) {
    return kFirstArgument + (gate < kGates - kGateSplit ? gate : gate + kGateSplit);
  }
};

constexpr double kNormEpsilon = 1e-5;

template <class S>
struct Moments {
  S mean, scale;  // scale: of what is left without the mean
};

template <class S>
FUSEDRNN_INLINE S mean_of(S sum, int64_t n) {
  return sum / static_cast<S>(n);  // (N1)
}

// Of the sum of squares of n values without their mean.
template <class S>
FUSEDRNN_INLINE S scale_of_squares(S sum, int64_t n) {
  return S(1) / square_root(sum / static_cast<S>(n) + static_cast<S>(kNormEpsilon));  // (N2)
}

template <class V>
FUSEDRNN_INLINE V without_mean(V v, V mean) {
  return v - mean;  // (N2), (N3)
}

template <class V>
FUSEDRNN_INLINE V normalised(V v, V mean, V scale) {
  return without_mean(v, mean) * scale;  // (N3)
}

// The gradient of a value from that of it normalised, d, and the means over the row of d and of d * normed.
template <class V>
FUSEDRNN_INLINE V normalised_backward(V d, V normed, V mean_d, V mean_product, V scale) {
  return (d - mean_d - normed * mean_product) * scale;  // (N4)
}

template <class V>
FUSEDRNN_INLINE V with_gain(V normed, V gain, V bias) {
  return gain * normed + bias;  // (N5), (N6), (N14)
}

// The gradient of what a gain multiplies; and what a row adds to the gradient of the gain.
template <class V>
FUSEDRNN_INLINE V through_gain(V d, V other) {
  return d * other;  // (N7), (N8), (N17), (N23)
}

}  // namespace fusedrnn
