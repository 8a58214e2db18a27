// How one layer lies over a cluster of thread blocks, and where each thread's share of it is.
//
// A cluster owns a tile of 8 samples for all steps. Each of its `blocks` owns `tiles` times 16 units, whose recurrent
// weights stay in its registers and, where these are too few, its shared memory. A warp owns the 16 units of one tile,
// with all their gates, times one of `parts` of the sum over k. So after the product (and the sum of the parts) a lane
// holds every gate of its (unit, sample) pairs, and the cell needs nothing of another lane.
//
// The product is c [16 units, 8 samples] += a [16, k] b [k, 8], a the weights, in the fragments of mma.sync
// (products.h). k is cut in vectors, as many elements as 4 lanes hold in 4 registers each: 64 bytes of a sample's row.
#pragma once

#include <cstdint>

#include "../cells/cell.h"
#include "../cells/layer_norm.h"

#if defined(__CUDACC__)
#define FUSEDRNN_KERNEL __device__ __forceinline__
#else
#define FUSEDRNN_KERNEL inline
#endif

namespace fusedrnn::persistent {

// Whether a cell has kernels for many steps: one product makes all its gates, as they are, and one state at most is
// beside h.
template <class Cell>
constexpr bool is_persistent = Cell::kFirst == Cell::kGates && Cell::kStates <= 2 && !NormsOf<Cell>::kAny;

constexpr int kLanes = 32, kSamples = 8, kTileUnits = 16, kVectorBytes = 64;

// At run time, for the emulator and the plan.
struct Geometry {
  int blocks;   // 1, 2, 4, 8
  int tiles;    // of 16 units, in a block
  int parts;    // 1, 2, 4
  int vectors;  // of k, in a part, for each gate
  int held;     // of these, in registers

  static constexpr int kMostHeld = 32;  // what arrays must have room for
};

// The same at compile time: the compiler unrolls all that counts by it.
template <int kBlocks, int kTiles, int kParts, int kVectors, int kHeld>
struct FixedGeometry {
  static constexpr int blocks = kBlocks, tiles = kTiles, parts = kParts, vectors = kVectors, held = kHeld;
  static constexpr int kMostHeld = kHeld;
};

template <class Shape>
FUSEDRNN_INLINE constexpr int threads(const Shape& s) {
  return s.tiles * s.parts * kLanes;
}
template <class Shape>
FUSEDRNN_INLINE constexpr int block_units(const Shape& s) {
  return s.tiles * kTileUnits;
}

// Vectors from one sample's row to the next in shared memory, of `gates` rows of k side by side. Odd: then the 8 rows
// that lanes read 16 bytes of lie in different banks.
template <class Shape>
FUSEDRNN_INLINE constexpr int row_vectors(const Shape& s, int gates) {
  return (gates * s.parts * s.vectors) | 1;
}

// Places in a block's shared memory, in bytes. An operand row has one k (forward: h) or one for each gate (backward:
// dG).
template <class Shape>
struct Layout {
  int operand;   // [2][kSamples][row]: the buffer that a step reads, the buffer that it writes
  int exchange;  // float [to part][from part][tiles][sums][kLanes]: sums that another part finishes
  int weights;   // uint32 [tiles * parts][gates][vectors - held][2][kLanes][4]
  int bytes;

  // operand_gates: rows of k in the operand; sums: what a part hands to another, of each lane.
  FUSEDRNN_INLINE constexpr Layout(const Shape& s, int gates, int operand_gates, int sums)
      : operand(0), exchange(2 * kSamples * row_vectors(s, operand_gates) * kVectorBytes),
        weights(exchange + (s.parts > 1 ? s.parts * s.parts * s.tiles * sums * kLanes * 4 : 0)),
        bytes(weights + s.tiles * s.parts * gates * (s.vectors - s.held) * 2 * kLanes * 16) {}
};

// A thread's share: lane 4g + t of a warp holds of c the rows g and g + 8, the columns 2t and 2t + 1, as c[0] (g, 2t),
// c[1] (g, 2t + 1), c[2] (g + 8, 2t), c[3] (g + 8, 2t + 1). Of these 4 pairs each part keeps 4 / parts for the cell.
struct Place {
  int lane, g, t, warp, tile, part;

  template <class Shape>
  FUSEDRNN_KERNEL Place(const Shape& s, int thread)
      : lane(thread % kLanes), g(lane / 4), t(lane % 4), warp(thread / kLanes), tile(warp % s.tiles),
        part(warp / s.tiles) {}
  template <class Shape>
  FUSEDRNN_KERNEL static constexpr int pairs(const Shape& s) {
    return 4 / s.parts;
  }
  // Of the part's pair p: the sample of the tile, the unit of the block. Units are two if there is one part:
  // unit_index.
  template <class Shape>
  FUSEDRNN_KERNEL int sample(const Shape& s, int p) const {
    return 2 * t + (s.parts == 4 ? part & 1 : p & 1);
  }
  template <class Shape>
  FUSEDRNN_KERNEL static constexpr int units(const Shape& s) {
    return s.parts == 1 ? 2 : 1;
  }
  template <class Shape>
  FUSEDRNN_KERNEL static constexpr int unit_index(const Shape& s, int p) {
    return s.parts == 1 ? p >> 1 : 0;
  }
  template <class Shape>
  FUSEDRNN_KERNEL int unit_of(const Shape& s, int index) const {
    return tile * kTileUnits + g + 8 * (s.parts == 1 ? index : s.parts == 2 ? part : part >> 1);
  }
  template <class Shape>
  FUSEDRNN_KERNEL int unit(const Shape& s, int p) const {
    return unit_of(s, unit_index(s, p));
  }
};

// What a block has of the batch and the layer: its first sample and unit, and how many, none or fewer than its room.
struct Block {
  int64_t first_sample;
  int first_unit, samples, units;

  template <class Shape>
  FUSEDRNN_KERNEL Block(const Shape& s, int64_t B, int H, int cluster, int rank)
      : first_sample(int64_t{kSamples} * cluster), first_unit(rank * block_units(s)), samples(active(B)),
        units(H - first_unit < block_units(s) ? H - first_unit : block_units(s)) {}
  // Of its samples, those of a step of so many.
  FUSEDRNN_KERNEL int active(int64_t rows) const {
    return rows - first_sample < kSamples ? static_cast<int>(rows - first_sample) : kSamples;
  }
};

}  // namespace fusedrnn::persistent
