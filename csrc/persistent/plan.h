// Which cluster a layer gets, or that it gets none. Pure functions, at compile time for the kernels that are compiled
// (cuda/persistent.cu), at run time for the layer that is called.
#pragma once

#include <algorithm>

#include "../problem.h"
#include "geometry.h"

namespace fusedrnn::persistent {

// How a product is made (products.h).
enum class Multiplier { kHalves, kTf32, kSplit };

// A loop to be compiled: sizes that its registers and shared memory depend on.
struct Loop {
  int gates, split;  // of the cell; split: with the parameters of its units
  int states, saved;
  Multiplier multiplier;
  int units;  // the most that it is for: of kUnits
  bool backward;
};

// H is rounded up to one of these: what a kernel is compiled for.
constexpr int kUnits[] = {64, 128, 256, 512, 1024};
constexpr int units_for(int64_t H) {
  for (const int units : kUnits) {
    if (H <= units) return units;
  }
  return 0;
}

// That of a cell, alike for the kernel that is compiled and for the call that asks whether there is one.
template <class Cell>
constexpr Loop loop_of(Multiplier multiplier, int units, bool backward) {
  return {Cell::kGates, Cell::kSplit + Cell::kParameters, Cell::kStates, Cell::kSaved, multiplier, units, backward};
}

constexpr int kMostWarps = 16, kMostRegisters = 255, kRegisters = 65536, kMostShared = 227 * 1024;

constexpr int per_register(Multiplier multiplier) { return multiplier == Multiplier::kHalves ? 2 : 1; }

constexpr int shared_bytes(const Loop& loop, const Geometry& s) {
  const int pairs = 4 / s.parts;
  return loop.backward ? Layout<Geometry>(s, loop.gates, loop.gates, pairs).bytes
                       : Layout<Geometry>(s, loop.gates, 1, loop.gates * pairs).bytes;
}

// Registers a thread needs beside its weights. Found with ptxas (python -m benchmarks.ptxas), which spills with fewer;
// for GPUs without clusters, sm_80, it needs more.
constexpr int other_registers(const Loop& loop, int pairs, bool clusters) {
  const int of_pair = loop.gates + loop.saved + loop.split + 2 * loop.states;
  const int split = loop.multiplier == Multiplier::kSplit ? 16 : 0;
  return 72 + split + pairs * of_pair + (loop.backward ? 12 + 2 * pairs : 0) + (clusters ? 0 : 20);
}

// The cluster of so many blocks, with its sum over k in so many parts; no tiles: there is none.
constexpr Geometry geometry_of(const Loop& loop, int blocks, int parts, bool clusters) {
  const int vector = 16 * per_register(loop.multiplier);
  Geometry s = {blocks, loop.units / kTileUnits / blocks, parts, loop.units / vector / parts, 0};
  const int warps = s.tiles * s.parts;
  const bool divides = s.tiles * blocks * kTileUnits == loop.units && s.vectors * parts * vector == loop.units;
  if (!divides || s.tiles == 0 || s.vectors == 0 || warps > kMostWarps) return {};
  const int registers = std::min(kMostRegisters, kRegisters / (warps * kLanes) / 8 * 8);
  const int loading = loop.backward ? 12 : 24;  // more, where weights are loaded in each step
  const int room = registers - other_registers(loop, 4 / parts, clusters), vector_registers = 8 * loop.gates;
  s.held = room >= s.vectors * vector_registers ? s.vectors : std::max(0, (room - loading) / vector_registers);
  return shared_bytes(loop, s) <= kMostShared ? s : Geometry{};
}

// The smallest cluster that keeps three quarters of the weights in registers, for the fewest blocks serve a batch most
// cheaply; if none does, the one that keeps the most. Of two cuts of k the one with fewer parts, which has less to add
// up, as long as four warps are at work.
constexpr Geometry choose(const Loop& loop, int most_blocks) {
  Geometry best = {};
  for (int blocks = 1; blocks <= most_blocks; blocks *= 2) {
    for (int parts = 1; parts <= 4; parts *= 2) {
      const Geometry s = geometry_of(loop, blocks, parts, most_blocks > 1);
      if (s.tiles == 0) continue;
      if (4 * s.held >= 3 * s.vectors && (s.tiles * s.parts >= 4 || parts == 4)) return s;
      if (best.tiles == 0 || s.held * best.vectors > best.held * s.vectors) best = s;
    }
  }
  return best;
}

// What a GPU has that matters here.
struct Gpu {
  int major, minor;  // of the compute capability that its kernels were compiled for
  int shared_bytes;  // a block may have at most
};
constexpr int most_blocks(const Gpu& gpu) { return gpu.major >= 9 ? 8 : 1; }

// Why a loop cannot be run on a GPU; null: it can.
constexpr const char* refusal(const Loop& loop, const Gpu& gpu) {
  if (gpu.major < 8) return "the GPU has no products of bfloat16 and TF32 (compute capability 8.0)";
  if (loop.units == 0) return "too many units";
  const Geometry s = choose(loop, most_blocks(gpu));
  if (s.tiles == 0)
    return gpu.major < 9 ? "too many units for one block, and the GPU has no clusters" : "too many units";
  if (shared_bytes(loop, s) > gpu.shared_bytes) return "too little shared memory";
  return nullptr;
}

// ---- an estimate -------------------------------------------------------------------------------------------------
// Cycles of a step by a count of what an SM does in it. Not measured: every constant is marked.

constexpr double estimated_cycles(const Loop& loop, const Geometry& s) {
  constexpr double kProduct = 8;            // [estimate] of an mma.sync m16n8k16, or m16n8k8 in TF32, for a quarter SM
  constexpr double kQuad = 4;               // 512 bytes a warp at 128 bytes a cycle
  constexpr double kFixed = 150;            // [ptxas] instructions of a warp and step that depend on no pair
  constexpr double kPair = 25, kGate = 15;  // [ptxas] of a pair, and of each of its gates
  constexpr double kBarrier = 40;           // [estimate] of a block
  constexpr double kClusterBarrier = 400;   // [estimate] with the latency of distributed shared memory
  constexpr double kRemoteBytes = 16;       // [estimate] a cycle that a block sends to others
  const int warps = s.tiles * s.parts, pairs = 4 / s.parts, operand_gates = loop.backward ? loop.gates : 1;
  const double share = std::max(1.0, warps / 4.0);  // warps of a quarter SM
  const int times = loop.multiplier == Multiplier::kSplit ? 3 : 1;
  const double products = share * 2 * s.vectors * loop.gates * times * kProduct;
  const double loads = warps * kQuad * (s.vectors * operand_gates + 2 * loop.gates * (s.vectors - s.held));
  const double cell = share * (kFixed + pairs * (kPair + kGate * loop.gates));
  const double sums =
      s.parts == 1 ? 0 : kBarrier + warps * (loop.backward ? 1 : loop.gates) * pairs * (s.parts - 1) * 2;
  const double sent = s.blocks == 1 ? 0
                                    : operand_gates * block_units(s) * kSamples * (4 / per_register(loop.multiplier)) *
                                          (s.blocks - 1) / kRemoteBytes;
  return std::max(products, loads) + cell + sums + sent + (s.blocks == 1 ? kBarrier : kClusterBarrier);
}

}  // namespace fusedrnn::persistent
