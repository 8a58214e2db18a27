// The types that tensors hold, on the host and on the device: their place in problem.h's list, and the way to the type
// they are computed in and back. Each side adds its own 16-bit types.
#pragma once

#include <type_traits>

#include "../cells/rules.h"
#include "../problem.h"

namespace fusedrnn {

// The type of sums, states and saved values: wider than 16 bits.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
struct Element;

template <>
struct Element<float> {
  static constexpr DType kDType = DType::kFloat32;
  FUSEDRNN_INLINE static float widen(float v) { return v; }
  FUSEDRNN_INLINE static float narrow(float v) { return v; }
};
template <>
struct Element<double> {
  static constexpr DType kDType = DType::kFloat64;
  FUSEDRNN_INLINE static double widen(double v) { return v; }
  FUSEDRNN_INLINE static double narrow(double v) { return v; }
};

template <class T>
FUSEDRNN_INLINE Compute<T> widen(T v) {
  return Element<T>::widen(v);
}
template <class T>
FUSEDRNN_INLINE T narrow(Compute<T> v) {
  return Element<T>::narrow(v);
}

}  // namespace fusedrnn
