// The recurrent product of a warp, weights stationary: c [gates][16, 8] = a b, with mma.sync's fragments (PTX ISA,
// "Matrix Fragments for mma.m16n8k16" and "... m16n8k8", lane = 4g + t):
//
//   m16n8k16, 16-bit pairs   a: (g, 2t..), (g+8, 2t..), (g, 2t+8..), (g+8, 2t+8..)   b: (2t.., g), (2t+8.., g)
//   m16n8k8, tf32            a: (g, t), (g+8, t), (g, t+4), (g+8, t+4)               b: (t, g), (t+4, g)
//
// Which k of the layer each of these places stands for is ours to say, as long as a and b agree. Here lane t's four
// registers of a vector, two products' worth of b, are 16 bytes that lie together in a sample's row: one load.
#pragma once

#include <cmath>
#include <cstring>
#include <utility>

#include "../problem.h"
#include "../stepwise/element.h"
#include "plan.h"
#include "value.h"

namespace fusedrnn::persistent {

// Four registers.
struct Quad {
  uint32_t r[4];
};

FUSEDRNN_INLINE uint32_t bits_of(float v) {
  uint32_t bits;
  memcpy(&bits, &v, sizeof bits);
  return bits;
}
FUSEDRNN_INLINE float float_of(uint32_t bits) {
  float v;
  memcpy(&v, &bits, sizeof v);
  return v;
}

// bfloat16 and float16: the products are exact, the sums float32.
template <class Type>
struct HalfProducts {
  using T = Type;        // of the layer
  using Operand = Type;  // in shared memory
  using Value = Approximate;
  static constexpr Multiplier kMultiplier = Multiplier::kHalves;
  static constexpr int kPerRegister = 2;

  FUSEDRNN_KERNEL static Operand operand(float v) { return narrow<T>(v); }
  template <class Place>  // the register that begins with element k of a row of weights
  FUSEDRNN_KERNEL static uint32_t weights(const Place& place, int k) {
    return half(place(k)) | half(place(k + 1)) << 16;
  }
  FUSEDRNN_KERNEL static uint32_t half(const T* place) {
    uint16_t bits = 0;
    if (place) memcpy(&bits, place, sizeof bits);
    return bits;
  }
  template <class M>
  FUSEDRNN_KERNEL static void multiply(M& m, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    m.multiply_halves(c, a, b0, b1, T());
  }
};

struct Float32Products {
  using T = float;
  using Operand = float;
  using Value = Exact;
  static constexpr int kPerRegister = 1;
};

// float32, rounded to TF32's 11 bits, where the caller permits it.
struct Tf32Products : Float32Products {
  static constexpr Multiplier kMultiplier = Multiplier::kTf32;

  // To nearest, ties away from zero (cvt.rna.tf32.f32): infinities stay, and NaN.
  FUSEDRNN_INLINE static float rounded(float v) {
    const uint32_t bits = bits_of(v);
    if ((bits & 0x7f800000u) == 0x7f800000u) return v;
    return float_of((bits + 0x1000u) & 0xffffe000u);
  }
  FUSEDRNN_KERNEL static Operand operand(float v) { return rounded(v); }
  template <class Place>
  FUSEDRNN_KERNEL static uint32_t weights(const Place& place, int k) {
    return place(k) ? bits_of(rounded(*place(k))) : 0;
  }
  template <class M>
  FUSEDRNN_KERNEL static void multiply(M& m, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    m.multiply_tf32(c, a, b0, b1);
  }
};

// float32 as it is: each factor is the sum of two of TF32, both cut off, and the product of the small parts is left
// out: a product is too small by 2^-22 of itself in the mean, 2^-19 at most. The small parts first, so that they are
// not lost in the sum. They have the sign of the whole, and are 0 or infinite only where it is (2^-30 of it at least):
// so the three products of an infinity are one.
struct SplitProducts : Float32Products {
  static constexpr Multiplier kMultiplier = Multiplier::kSplit;

  FUSEDRNN_KERNEL static Operand operand(float v) { return v; }
  template <class Place>
  FUSEDRNN_KERNEL static uint32_t weights(const Place& place, int k) {
    return place(k) ? bits_of(*place(k)) : 0;
  }
  FUSEDRNN_KERNEL static uint32_t high(uint32_t v) {
#if defined(__CUDA_ARCH__)
    uint32_t result;  // volatile: else the compiler splits the weights before the loop, in twice the registers
    asm volatile("and.b32 %0, %1, 0xffffe000;" : "=r"(result) : "r"(v));
    return result;
#else
    return v & 0xffffe000u;
#endif
  }
  FUSEDRNN_KERNEL static uint32_t low(uint32_t v, uint32_t high) {
    const float whole = std::fabs(float_of(v)), rest = whole - std::fabs(float_of(high));  // inf - inf: NaN, not taken
    return bits_of(std::copysign(std::fmax(rest, whole * 0x1p-30f), float_of(v)));
  }
  template <class M>
  FUSEDRNN_KERNEL static void multiply(M& m, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const uint32_t a_high[4] = {high(a[0]), high(a[1]), high(a[2]), high(a[3])}, b_high[2] = {high(b0), high(b1)};
    const uint32_t a_low[4] = {low(a[0], a_high[0]), low(a[1], a_high[1]), low(a[2], a_high[2]), low(a[3], a_high[3])};
    m.multiply_tf32(c, a_low, b_high[0], b_high[1]);
    m.multiply_tf32(c, a_high, low(b0, b_high[0]), low(b1, b_high[1]));
    m.multiply_tf32(c, a_high, b_high[0], b_high[1]);
  }
};

// A warp's share of the recurrent weights: of each gate 16 rows, and the columns of its part of k. A lane's registers
// of product j of vector v are the elements 2j and 2j + 1 (each of kPerRegister) of its 16 bytes.
template <class Products, class Shape, int kGates, class M>
class Weights {
 public:
  static constexpr int kPer = Products::kPerRegister, kLaneElements = 4 * kPer, kVector = 4 * kLaneElements;

  // where(gate, row, k): the element of the gate's matrix at the block's row and the layer's k; null outside: 0.
  template <class Where>
  FUSEDRNN_KERNEL Weights(M& m, const Shape& s, const Place& at, int shared, const Where& where) : at_(at) {
    rest_ = m.template shared<uint32_t>(shared) + at.warp * kGates * (s.vectors - s.held) * kProductWords;
    // The gates innermost: what the compiler finds out of a place once, it need not keep for long.
#pragma unroll
    for (int v = 0; v < s.held; ++v) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate) load(s, where, gate, v, j, held_[gate][v][j]);
      }
    }
#pragma unroll 1
    for (int v = s.held; v < s.vectors; ++v) {
#pragma unroll 1
      for (int gate = 0; gate < kGates; ++gate) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          Quad quad;
          load(s, where, gate, v, j, quad.r);
          m.store_quad(rest_ + rest(s, gate, v, j), quad);
        }
      }
    }
  }

  // c[gate] += the gate's weights times the operand whose 8 rows, a sample each, begin at `operand` in shared memory.
  // Each gate has its own part of a row (kEach, side by side, for dG), or all have the same (h).
  template <bool kEach, class Operand>
  FUSEDRNN_KERNEL void multiply(M& m, const Shape& s, Operand operand, float (&c)[kGates][4]) const {
    m.converge();
    const int k = s.parts * s.vectors, first = at_.part * s.vectors;
    const auto row = m.template as<uint32_t>(operand) +
                     (at_.g * row_vectors(s, kEach ? kGates : 1) + first) * (kVectorBytes / 4) + at_.t * 4;
#pragma unroll
    for (int v = 0; v < s.vectors; ++v) {
      Quad b;
      if (!kEach) b = m.load_quad(row + v * (kVectorBytes / 4));
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) {
        if (kEach) b = m.load_quad(row + (gate * k + v) * (kVectorBytes / 4));
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          if (v < s.held) {
            Products::multiply(m, c[gate], held_[gate][v][j], b.r[2 * j], b.r[2 * j + 1]);
          } else {
            const Quad a = m.load_quad(rest_ + rest(s, gate, v, j));
            Products::multiply(m, c[gate], a.r, b.r[2 * j], b.r[2 * j + 1]);
          }
        }
      }
    }
  }

 private:
  static constexpr int kProductWords = 2 * kLanes * 4;

  FUSEDRNN_KERNEL int rest(const Shape& s, int gate, int v, int j) const {
    return (gate * (s.vectors - s.held) + v - s.held) * kProductWords + (j * kLanes + at_.lane) * 4;
  }
  template <class Where>
  FUSEDRNN_KERNEL void load(const Shape& s, const Where& where, int gate, int v, int j, uint32_t (&a)[4]) const {
    const int k = (at_.part * s.vectors + v) * kVector + at_.t * kLaneElements + 2 * j * kPer;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int row = at_.tile * kTileUnits + at_.g + 8 * (r & 1);
      a[r] = Products::weights([&](int i) { return where(gate, row, i); }, k + (r >> 1) * kPer);
    }
  }

  const Place at_;
  decltype(std::declval<M&>().template shared<uint32_t>(0)) rest_;
  uint32_t held_[kGates][Shape::kMostHeld > 0 ? Shape::kMostHeld : 1][2][4];
};

// What the parts of a tile have summed, put together: of each gate's four sums a part keeps those of its own pairs, in
// the order of the parts.
template <int kSums, class Shape, class M>
FUSEDRNN_KERNEL void sum_parts(M& m, const Shape& s, const Place& at, int exchange, const float (&c)[kSums][4],
                               float (&own)[kSums][4]) {
  const int pairs = Place::pairs(s);
#pragma unroll
  for (int p = 0; p < pairs; ++p) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      own[i][p] = c[i][p];
#pragma unroll
      for (int part = 1; part < s.parts; ++part) own[i][p] = part == at.part ? c[i][part * pairs + p] : own[i][p];
    }
  }
  if (s.parts == 1) return;
  const auto place = [&](int to, int from, int i, int p) {
    return (((to * s.parts + from) * s.tiles + at.tile) * kSums * pairs + i * pairs + p) * kLanes + at.lane;
  };
  const auto sums = m.template shared<float>(exchange);
#pragma unroll
  for (int to = 0; to < s.parts; ++to) {
    if (to == at.part) continue;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
#pragma unroll
      for (int p = 0; p < pairs; ++p) m.store(sums + place(to, at.part, i, p), c[i][to * pairs + p]);
    }
  }
  m.group_sync(at.tile, s.parts * kLanes);
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
#pragma unroll
    for (int p = 0; p < pairs; ++p) {
      float sum = 0;
#pragma unroll
      for (int from = 0; from < s.parts; ++from) {
        sum += from == at.part ? own[i][p] : m.load(sums + place(at.part, from, i, p));
      }
      own[i][p] = sum;
    }
  }
}

// A value for each of the part's pairs, stored as operands of the units in every block of the cluster: row(sample) is
// the place of a sample's first unit of this block. Two units' 16-bit values go together. `units`: how many the block
// has.
template <class Products, class Shape, class M, class At>
FUSEDRNN_KERNEL void publish(M& m, const Shape& s, const Place& at, int units, const At& row,
                             const float (&values)[4]) {
  const int pairs = Place::pairs(s);
  if constexpr (Products::kPerRegister == 1) {
#pragma unroll
    for (int p = 0; p < pairs; ++p) {
      if (at.unit(s, p) >= units) continue;
      m.store_everywhere(row(at.sample(s, p)) + at.unit(s, p), Products::operand(values[p]));
    }
  } else {
    // Lanes of units g and g ^ 1 change places: the even one gets both units of the even sample, the odd one of the
    // odd.
    const bool odd = at.g & 1;
#pragma unroll
    for (int p = 0; p < pairs; p += 2) {
      const bool one = pairs == 1;  // the other part has the other sample
      const float give = one ? values[p] : odd ? values[p] : values[p + 1];
      const float keep = one ? values[p] : odd ? values[p + 1] : values[p];
      const float got = m.shuffle_xor(give, 4);
      const float low = odd ? got : keep, high = odd ? keep : got;
      const int sample = one ? at.sample(s, p) : 2 * at.t + odd;
      const typename Products::Operand pair[2] = {Products::operand(low), Products::operand(high)};
      uint32_t bits;
      memcpy(&bits, pair, sizeof bits);
      const int unit = at.unit(s, p) - odd;
      if (unit < units && !(one && odd)) m.store_everywhere(m.template as<uint32_t>(row(sample) + unit), bits);
    }
  }
}

}  // namespace fusedrnn::persistent
