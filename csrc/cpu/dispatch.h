// The one door from the ops to the CPU kernels: an instruction set is chosen once, a table of functions follows.
#pragma once

#include <string_view>

#include "../problem.h"
#include "phases.h"

namespace fusedrnn {

using ForwardKernel = bool (*)(const ForwardProblem&);    // false: out of memory, nothing was computed
using BackwardKernel = bool (*)(const BackwardProblem&);  // likewise

constexpr int kMaxCells = 16;

// Forward kernels of float32 layers whose matrices are of a smaller type.
struct SmallWeightsTable {
  ForwardKernel forward[kMaxCells];
  int64_t (*panel_bytes[kMaxCells])(const LayerSizes&);
};

struct KernelTable {
  const char* name;
  int vector_bytes;
  bool even_rows;  // x must have one distance between all its rows (has_even_rows, problem.h)
  ForwardKernel forward[kMaxCells][kDTypes];  // null: not for this type
  BackwardKernel backward[kMaxCells][kDTypes];
  int64_t (*panel_bytes[kMaxCells][kDTypes])(const LayerSizes&);  // of the packed weights of a layer
  // A number for the contents of data: the same for others by a chance of about 2^-32 or less.
  uint64_t (*digest)(const void* data, int64_t bytes, uint64_t seed);
  const SmallWeightsTable *int8, *bfloat16;  // null: there are none
};

// The kernels of bfloat16 of an instruction set that has the other types of another.
struct PairedTable {
  ForwardKernel forward[kMaxCells];
  BackwardKernel backward[kMaxCells];
  int64_t (*panel_bytes[kMaxCells])(const LayerSizes&);
};

// Tables compiled into this build, one per isa_*.cpp.
extern const KernelTable kTableBase;
extern const SmallWeightsTable kInt8Base, kBFloat16Base;
#if defined(__x86_64__) && !defined(FUSEDRNN_BASE_ONLY)
extern const KernelTable kTableAvx2;
extern const KernelTable kTableAvx512;
extern const PairedTable kTableAvx512Bf16;
extern const PairedTable kTableAmx;
extern const SmallWeightsTable kInt8Avx2, kInt8AvxVnni, kInt8Avx512Vnni;
extern const SmallWeightsTable kBFloat16Avx2, kBFloat16Avx512;
#endif
// No instruction sets: the GPU's time loop on the CPU, step by step (csrc/stepwise/host.cpp) and as the kernel for many
// steps (csrc/persistent/host.cpp).
const KernelTable& table_stepwise();
const KernelTable& table_persistent();

bool isa_supported(const char* name);
const KernelTable* find_isa(std::string_view name);  // null: no such instruction set in this build
const KernelTable& kernels();                        // in use; FUSEDRNN_CPU_ISA forces one, else the best supported
// Read and check FUSEDRNN_CPU_ISA: null if fine, else what is wrong with it.
const char* isa_error();

// Whether this process was forked from one that had loaded this library. Its threads may have been lost in the fork,
// and OpenMP would wait for them for ever: such a process computes on the calling thread.
bool forked();

struct CellConstants {
  const char* name;
  int gates, states, saved, first, split, parameters;
  bool projectable;
  int columns;     // blocks of H of a row of dgates (problem.h)
  int row_values;  // saved of a row besides the units' values and the states
  int late;
  int norms, gate_split;  // cells/layer_norm.h
  int own_saved;          // of `saved`, what the cell gives; the rest the driver
  int first_argument;     // of `columns`, the gradient of the first gate's argument

  // States besides h, blocks of H where it says c; gates of the second product of a step; columns of dG that products
  // read. Always inlined: a copy compiled for one instruction set must serve no other.
  __attribute__((always_inline)) int beside() const { return states - 1; }
  __attribute__((always_inline)) int second_gates() const { return first > 0 ? gates - first : 0; }
  __attribute__((always_inline)) int factors() const { return gates + split; }
};
int find_cell(std::string_view name);  // -1: unknown
const CellConstants& cell_constants(int cell);
int cells();  // of this build: those added later (added.h) have higher numbers

// The kernels of a cell in the set in use: a table, and its place there.
struct CellKernels {
  const KernelTable* table;
  int place;
};
CellKernels kernels_of(int cell);

// Scratch memory of the calling thread, 4096-byte aligned, contents undefined; kept for the next call up to a limit.
// One lease a thread at a time. Null if there is no memory.
void* acquire_scratch(int64_t bytes);
void release_scratch();

}  // namespace fusedrnn
