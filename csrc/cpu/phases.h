// Where the time of a layer goes: each thread charges its time to the innermost phase it is in. Only in a build with
// FUSEDRNN_PHASES defined (`make phases`); in any other a Timed is empty and costs nothing.
#pragma once

#include <cstdint>

namespace fusedrnn {

enum class Phase : int {
  kOther,             // lists of rows, states, the parallel region itself
  kPack,              // weights into panels
  kInputProduct,      // x W_ih^T
  kRecurrentProduct,  // h W_hh^T and, on the way back, dG W_hh; projections
  kCell,              // what follows a product: gates, cells, their loads and stores
  kWait,              // for the other members of the team
  kGather,            // the operands of the weight gradients
  kWeightGradient,    // dG^T x, dG^T h
  kBiasGradient,      // sums of dG
  kInputGradient,     // dG W_ih
  kAddSlices,         // the weight gradients of the slices of the batch
};
constexpr const char* kPhaseNames[] = {"other",         "pack",           "input product", "recurrent product",
                                       "cell",          "wait",           "gather",        "weight gradient",
                                       "bias gradient", "input gradient", "add slices"};
constexpr int kPhases = sizeof(kPhaseNames) / sizeof(*kPhaseNames);
static_assert(kPhases == static_cast<int>(Phase::kAddSlices) + 1, "a name for every phase");

#if defined(FUSEDRNN_PHASES)
constexpr bool kPhasesTimed = true;
// The phase that begins now on the calling thread; returns the one it ends. kPhases: none.
int enter_phase(int phase);
#else
constexpr bool kPhasesTimed = false;
inline int enter_phase(int phase) { return phase; }
#endif

// Nanoseconds in each phase since the last call, [kPhases], all threads together.
void take_phases(int64_t* nanoseconds);

class Timed {
 public:
  explicit __attribute__((always_inline)) Timed(Phase phase) : outer_(enter_phase(static_cast<int>(phase))) {}
  __attribute__((always_inline)) ~Timed() { enter_phase(outer_); }
  Timed(const Timed&) = delete;
  Timed& operator=(const Timed&) = delete;

 private:
  const int outer_;
};

}  // namespace fusedrnn
