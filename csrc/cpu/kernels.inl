// The CPU kernels of one instruction set: everything an isa_*.cpp holds, and the table that leads to it.
// The file that includes this has set FUSEDRNN_VECTOR_BYTES, FUSEDRNN_TABLE, FUSEDRNN_ISA_NAME and the target.
// All of it has internal linkage: a symbol the linker could share between instruction sets would let a function
// compiled for a newer CPU run on an older one. So no STL containers, no torch headers here.

namespace fusedrnn {
namespace {

#include "vec.h"
//
#include "gemm.h"
//
#include "outer.h"
//
#include "team.h"
//
#include "noise.h"
//
#include "forward.inl"
//
#include "forward_step.inl"
//
#include "backward.inl"
//
#include "backward_step.inl"
//
#include "weight_gradients.inl"

template <class S>
void activation(int function, const S* x, S* y, int64_t n) {
  constexpr int L = Vec<S>::kLanes;
  for (int64_t i = 0; i < n; i += L) {
    const Vec<S> v = load<S>(x + i, n - i);
    store(y + i, function == 0 ? sigmoid(v) : tanh(v), n - i);
  }
}

int64_t multiply_adds(int64_t turns) {
  using V = Vec<float>;
  constexpr int kSums = 12;  // two units with a latency of four or five
  Raw<float>::Type sum[kSums];
#pragma GCC unroll 12
  for (int i = 0; i < kSums; ++i) sum[i] = V(static_cast<float>(i)).v;
  const Raw<float>::Type factor = V(0.5f).v;
  for (int64_t turn = 0; turn < turns; ++turn) {
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) sum[i] = sum[i] * factor + factor;
  }
#pragma GCC unroll 12
  for (int i = 1; i < kSums; ++i) sum[0] += sum[i];
  volatile float used = sum[0][0];
  (void)used;
  return turns * kSums * V::kLanes * 2;
}

float read_all(const float* p, int64_t n) {
  using V = Vec<float>;
  constexpr int kSums = 8, L = V::kLanes;
  Raw<float>::Type sum[kSums] = {};
  for (int64_t i = 0; i + kSums * L <= n; i += kSums * L) {
#pragma GCC unroll 8
    for (int j = 0; j < kSums; ++j) sum[j] += load(p + i + j * L).v;
  }
#pragma GCC unroll 8
  for (int j = 1; j < kSums; ++j) sum[0] += sum[j];
  float total = 0;
  for (int lane = 0; lane < L; ++lane) total += sum[0][lane];
  return total;
}

void meet(void* flags, int me, int members, int64_t times) {
  Team team(static_cast<Flag*>(flags), me, members);
  for (int64_t i = 0; i < times; ++i) team.meet();
}

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
          activation<float>,
          activation<double>,
          multiply_adds,
          read_all,
          meet,
          digest};
}

}  // namespace

extern const KernelTable FUSEDRNN_TABLE = make_table(Registry{});

}  // namespace fusedrnn
