// The values that the persistent kernels compute a cell on (cells/cell.h), with activations short enough for a loop
// whose time they are: a float, where tanh takes one instruction of the GPU, or a dozen that are right to a few units
// in the last place.
#pragma once

#include <cmath>
#include <type_traits>

#include "../cells/rules.h"

namespace fusedrnn {

#if defined(__CUDA_ARCH__)
FUSEDRNN_INLINE float fast_exp2(float v) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
}
FUSEDRNN_INLINE float fast_tanh(float v) {
  float result;
  asm("tanh.approx.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
}
FUSEDRNN_INLINE float fast_reciprocal(float v) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
}
#else
FUSEDRNN_INLINE float fast_exp2(float v) { return std::exp2(v); }
FUSEDRNN_INLINE float fast_tanh(float v) { return std::tanh(v); }
FUSEDRNN_INLINE float fast_reciprocal(float v) { return 1.0f / v; }
#endif

template <class Self>
struct Real {
  float v;
  Real() = default;
  FUSEDRNN_INLINE explicit Real(float value) : v(value) {}
  FUSEDRNN_INLINE friend Self operator+(Self a, Self b) { return Self(a.v + b.v); }
  FUSEDRNN_INLINE friend Self operator-(Self a, Self b) { return Self(a.v - b.v); }
  FUSEDRNN_INLINE friend Self operator*(Self a, Self b) { return Self(a.v * b.v); }
  FUSEDRNN_INLINE friend Self relu(Self a) { return Self(relu(a.v)); }
  FUSEDRNN_INLINE friend Self relu_gradient(Self h, Self d) { return Self(relu_gradient(h.v, d.v)); }
};

// Of layers of 16 bits: tanh to 2^-11 of its value, sigmoid to 2^-12 absolutely.
struct Approximate : Real<Approximate> {
  using Real::Real;
};
FUSEDRNN_INLINE Approximate tanh(Approximate a) { return Approximate(fast_tanh(a.v)); }
FUSEDRNN_INLINE Approximate sigmoid(Approximate a) { return Approximate(0.5f * fast_tanh(0.5f * a.v) + 0.5f); }

// Of float32: within 4 units in the last place.
struct Exact : Real<Exact> {
  using Real::Real;
};
FUSEDRNN_INLINE Exact sigmoid(Exact a) {
  constexpr float kLog2e = 1.44269504f, kLog2eRest = 1.92596299e-8f, kLn2 = 0.693147181f;
  // e^-v = 2^n 2^rest, the rest what rounding takes from n = -v log2(e): 2^rest is 1 + rest ln(2).
  const float n = -kLog2e * a.v;
  const float rest = std::fma(-kLog2e, a.v, -n) - kLog2eRest * a.v;
  const float power = fast_exp2(n);
  return Exact(fast_reciprocal(1.0f + power + (std::fabs(n) < 128.0f ? power * (rest * kLn2) : 0.0f)));
}
FUSEDRNN_INLINE Exact tanh(Exact a) {
  constexpr float kLog2e = 1.44269504f, kSmall = 0.55f;
  // v + v^3 q(v^2) with the least relative error, 2^-24.7, on |v| <= kSmall.
  const float u = a.v * a.v;
  const float q = ((1.643757e-2f * u - 5.267181e-2f) * u + 1.3320725e-1f) * u - 3.3332947e-1f;
  const float small = a.v + a.v * u * q;
  // 1 - 2 / (e^(2|v|) + 1); e^(2|v|) may be infinite.
  const float large = 1.0f - 2.0f * fast_reciprocal(fast_exp2(2.0f * kLog2e * std::fabs(a.v)) + 1.0f);
  return Exact(std::fabs(a.v) <= kSmall ? small : std::copysign(large, a.v));
}

}  // namespace fusedrnn

#if defined(FUSEDRNN_ADDED_CELL)
#include "functions.h"
#endif
