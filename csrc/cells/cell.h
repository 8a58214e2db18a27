// The cell contract: one time step of a recurrent cell, element by element, forward and backward.
//
// A cell is a struct of constants and pure functions, templated on a value type V (a scalar in CUDA, a vector
// of lanes on the CPU). It sees the values of one unit and one sample; it holds no pointer, index, thread or
// data-dependent branch. The drivers own products, memory and time. Each line names its equation in
// docs/derivations.md.
//
//   kName    registry name                       kGates   blocks of H rows in W_ih and W_hh, in torch.nn's order
//   kStates  h and the states besides it (below)      kSaved   values kept a unit for the backward pass
//   kFirst   gates [0, kFirst) multiply h_{t-1}. If kFirst < kGates, the other gates multiply q, a function of
//            the first gates and h_{t-1} (GRU with the reset gate applied before the product). 0: no gate multiplies
//            anything, there is no W_hh, and rec is b_hh alone.
//   kSplit   the last kSplit gates have drec != dx; for all others drec is dx and is not stored twice.
//   kParameters   parameters of a unit, vectors of H beside the weights: peepholes, a diagonal in the place of W_hh.
//   kLate    values that the second half of the forward step takes from the first, kLate <= kGates. 0: there is no
//            second half. The processor works on the halves of several units at once; a whole step is too long a chain
//            of activations for that.
//   kProjectable  whether h_t may be a projection of what the cell gives. Such a cell has two states.
//   kNorms, kGateSplit  may be left out: layer normalisation of what the cell gets (layer_norm.h)
//   kBound   how large an element of h_t can be (Bound below); of a cell with two products, of q too.
//
//   forward (x, rec, state, saved)              x[g] = (W_ih x_t + b_ih)_g, rec[g] = (W_hh h_{t-1} + b_hh)_g;
//                                               state: in t-1, out t
//   backward(saved, prev, cur, d, dx, drec)     prev, cur: states at t-1 and t. d: in dL/d(state t), all paths;
//                                               out the direct (product-free) path to dL/d(state t-1).
//                                               dx, drec: out, gradients of x and rec.
// A cell with kFirst < kGates adds
//   forward_first (x, rec, prev, saved, q)      the first gates into saved, and q
//   backward_first(saved, prev, dq, d, dx, drec) after dq = W_hh[rest]^T drec[rest]: gradients of the first gates
//   recurrent_operand(saved, prev)              q again, for the weight gradient
// A cell with kLate > 0: forward has one more argument, late, out, and leaves state[0] at h_{t-1}. It adds
//   kSavedLate                                  the last of the saved values, which the second half gives
//   finish(late, state, saved)                  h_t into state[0]. It reads no other state: c is after zoneout by
//                                               then, so what of the cell's own c it needs is in late. Of saved it
//                                               reads nothing and writes the last kSavedLate values
// A cell with more than one state has one product (kFirst = kGates) and saves something; h_{t-1} goes into its product
// alone: a path around it is that of the states besides h, which no product reads: c, or c, n and so on. All of them
// lie in one row, one after another, where the drivers, the ops and what is saved say c. It adds
//   dc_of(saved, cur, d)                        with two states: dL/dc_t by all ways, of d as it comes into backward
//   candidate(saved, prev)                      likewise: c_t again, where the state is another (zoneout)
//   dc_of(saved, cur, d, dc)                    with more: dL/d(state k at t) by all ways into dc[k], k from 1 on.
//                                               Such a cell has no parameters of its units, and no zoneout but of h.
// A cell with kParameters > 0: forward, forward_first and dc_of have one more argument, the last: unit, the parameters.
// backward and backward_first have two: unit, and dunit, what this sample and step adds to dL/d(unit); backward writes
// it, backward_first adds to it. Such a cell has no projection.
// A cell with kProjectable adds
//   output(saved, cur)                          the unprojected output again, for the weight gradient
// A cell with one product may add, for second derivatives of single steps (csrc/second_order.cpp),
//   tangent(saved, prev, cur, x, rec, dot, saved_dot)   the forward step's tangents: x, rec of its arguments; dot: in
//                                               of the states at t-1, out at t; saved_dot: out, of what it saves
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define FUSEDRNN_INLINE __host__ __device__ __forceinline__
#else
#define FUSEDRNN_INLINE inline __attribute__((always_inline))
#endif

namespace fusedrnn {

// How large an element of h_t can be, for kernels that round h to int8.
enum class Bound {
  kOne,       // 1
  kPrevious,  // 1, or the largest of h_{t-1} if that is more
  kNone       // anything
};

template <class V, int N>
using Values = V[N > 0 ? N : 1];  // N may be 0: a cell that saves nothing

// Activations of plain scalars; vector types bring their own, found by argument-dependent lookup.
FUSEDRNN_INLINE float sigmoid(float v) { return 1.0f / (1.0f + std::exp(-v)); }
FUSEDRNN_INLINE double sigmoid(double v) { return 1.0 / (1.0 + std::exp(-v)); }
FUSEDRNN_INLINE float tanh(float v) { return std::tanh(v); }
FUSEDRNN_INLINE double tanh(double v) { return std::tanh(v); }
FUSEDRNN_INLINE float relu(float v) { return v < 0.0f ? 0.0f : v; }  // NaN stays NaN
FUSEDRNN_INLINE double relu(double v) { return v < 0.0 ? 0.0 : v; }
// d * relu'(a), from h = relu(a): d, but 0 where h = 0 (also for infinite d). A NaN in h lets d pass, as in torch.
FUSEDRNN_INLINE float relu_gradient(float h, float d) { return h <= 0.0f ? 0.0f : d; }
FUSEDRNN_INLINE double relu_gradient(double h, double d) { return h <= 0.0 ? 0.0 : d; }

}  // namespace fusedrnn
