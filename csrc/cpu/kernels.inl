// The CPU kernels of one instruction set: everything an isa_*.cpp holds, and the table that leads to it.
// The file that includes this has set FUSEDRNN_VECTOR_BYTES, the target, and FUSEDRNN_TABLE and FUSEDRNN_ISA_NAME; or
// FUSEDRNN_PAIRED_TABLE: then bfloat16 is multiplied in pairs (operand.h), and there is no other type.
// FUSEDRNN_INT8_TABLE, with either or alone: layers with int8 weights. All of it has internal linkage: a symbol the
// linker could share between instruction sets would let a function compiled for a newer CPU run on an older one. So no
// STL containers, no torch headers here.

namespace fusedrnn {
namespace {

#include "vec.h"
//
#include "functions.h"
//
#include "operand.h"
//
#if defined(FUSEDRNN_AMX)
#include "amx.h"
#else
struct TileUse {};  // there are none
#endif
//
#include "gemm.h"
//
#include "product.h"
//
#include "pack.h"
//
#include "outer.h"
//
#include "team.h"
//
#include "noise.h"
//
#include "quantize.h"
//
#include "row_norm.h"
//
#include "forward.inl"
//
#include "forward_step.inl"
//
#include "backward.inl"
//
#include "backward_step.inl"
//
#include "row_stage.inl"
//
#include "weight_gradients.inl"

#if defined(FUSEDRNN_INT8_TABLE) && !defined(FUSEDRNN_ADDED_CELL)
template <class... Cells>
constexpr SmallWeightsTable int8_table(CellList<Cells...>) {
  return {{ForwardPass<Cells, Int8Weights>::run...}, {ForwardPass<Cells, Int8Weights>::panel_bytes...}};
}
#endif

#if defined(FUSEDRNN_PAIRED_TABLE)

template <class... Cells>
constexpr PairedTable make_table(CellList<Cells...>) {
  return {{ForwardPass<Cells, BFloat16>::run...},
          {BackwardPass<Cells, BFloat16>::run...},
          {ForwardPass<Cells, BFloat16>::panel_bytes...}};
}

}  // namespace

extern const PairedTable FUSEDRNN_PAIRED_TABLE = make_table(Registry{});

#elif defined(FUSEDRNN_TABLE)

// Each lane of several chains holds two hashes of its own words, of different making: what one does not tell apart by
// its structure, such as the top bit of a word against a lower one of the next, the other does.
uint64_t digest(const void* data, int64_t bytes, uint64_t seed) {
  constexpr int kChains = 4;
  constexpr uint32_t kFactor = 0x9e3779b1, kOther = 0x85ebca77;  // odd
  constexpr int64_t kStride = kChains * sizeof(Words);
  Words chain[2 * kChains];
  for (int i = 0; i < 2 * kChains; ++i) chain[i] = Words{} + static_cast<uint32_t>(seed + i);
  const auto absorb = [&](const char* from) FUSEDRNN_INLINE_LAMBDA {
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) {
      Words words, &a = chain[i], &b = chain[kChains + i];
      __builtin_memcpy(&words, from + i * sizeof(Words), sizeof words);
      a = (((a << 13) | (a >> 19)) ^ words) * kFactor;
      b = b + words;
      b = ((b << 7) | (b >> 25)) * kOther;
    }
  };
  const char* from = static_cast<const char*>(data);
  int64_t left = bytes;
  for (; left >= kStride; left -= kStride, from += kStride) absorb(from);
  char rest[kStride] = {};
  if (left > 0) __builtin_memcpy(rest, from, left);
  absorb(rest);
  uint64_t result = static_cast<uint64_t>(bytes) ^ (seed >> 32);
  for (int i = 0; i < 2 * kChains; ++i) {
    for (size_t lane = 0; lane < sizeof(Words) / 4; ++lane) {
      result = ((result << 29 | result >> 35) ^ chain[i][lane]) * 0x9e3779b97f4a7c15;
    }
  }
  return result;
}

template <class... Cells>
constexpr KernelTable make_table(CellList<Cells...>) {
  return {FUSEDRNN_ISA_NAME,
          FUSEDRNN_VECTOR_BYTES,
          false,
          {{ForwardPass<Cells, float>::run, ForwardPass<Cells, double>::run, ForwardPass<Cells, BFloat16>::run}...},
          {{BackwardPass<Cells, float>::run, BackwardPass<Cells, double>::run, BackwardPass<Cells, BFloat16>::run}...},
          {{ForwardPass<Cells, float>::panel_bytes, ForwardPass<Cells, double>::panel_bytes,
            ForwardPass<Cells, BFloat16>::panel_bytes}...},
          digest,
#if defined(FUSEDRNN_ADDED_CELL)
          nullptr,
          nullptr};
#else
          &FUSEDRNN_INT8_OF_TABLE,
          &FUSEDRNN_BFLOAT16_TABLE};
#endif
}

template <class... Cells>
constexpr SmallWeightsTable bfloat16_table(CellList<Cells...>) {
  return {{ForwardPass<Cells, BFloat16Weights>::run...}, {ForwardPass<Cells, BFloat16Weights>::panel_bytes...}};
}

}  // namespace

extern const KernelTable FUSEDRNN_TABLE = make_table(Registry{});
#if !defined(FUSEDRNN_ADDED_CELL)
extern const SmallWeightsTable FUSEDRNN_BFLOAT16_TABLE = bfloat16_table(Registry{});
#endif

#else

}  // namespace

#endif

#if defined(FUSEDRNN_INT8_TABLE) && !defined(FUSEDRNN_ADDED_CELL)
extern const SmallWeightsTable FUSEDRNN_INT8_TABLE = int8_table(Registry{});
#endif

}  // namespace fusedrnn
