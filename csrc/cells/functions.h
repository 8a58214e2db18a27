// What a cell may compute besides the activations of cell.h, a user's too, on plain scalars. Vector types bring their
// own (csrc/cpu/functions.h), as do those of the kernels for many steps (csrc/persistent/functions.h). Values and their
// limits are torch's.
#pragma once

#include "cell.h"

namespace fusedrnn {

FUSEDRNN_INLINE float exp(float v) { return std::exp(v); }
FUSEDRNN_INLINE double exp(double v) { return std::exp(v); }
FUSEDRNN_INLINE float log(float v) { return std::log(v); }
FUSEDRNN_INLINE double log(double v) { return std::log(v); }
FUSEDRNN_INLINE float sqrt(float v) { return std::sqrt(v); }
FUSEDRNN_INLINE double sqrt(double v) { return std::sqrt(v); }
FUSEDRNN_INLINE float abs(float v) { return std::fabs(v); }
FUSEDRNN_INLINE double abs(double v) { return std::fabs(v); }
// log(1 + e^v), of which no v gives an overflow
FUSEDRNN_INLINE float softplus(float v) { return relu(v) + std::log1p(std::exp(-std::fabs(v))); }
FUSEDRNN_INLINE double softplus(double v) { return relu(v) + std::log1p(std::exp(-std::fabs(v))); }
// NaN where either is
FUSEDRNN_INLINE float maximum(float a, float b) { return a < b || b != b ? b : a; }
FUSEDRNN_INLINE double maximum(double a, double b) { return a < b || b != b ? b : a; }
FUSEDRNN_INLINE float minimum(float a, float b) { return b < a || b != b ? b : a; }
FUSEDRNN_INLINE double minimum(double a, double b) { return b < a || b != b ? b : a; }
FUSEDRNN_INLINE float where(bool condition, float a, float b) { return condition ? a : b; }
FUSEDRNN_INLINE double where(bool condition, double a, double b) { return condition ? a : b; }

}  // namespace fusedrnn
