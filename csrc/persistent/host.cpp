// FUSEDRNN_CPU_ISA=persistent: the stepwise driver with its time loops run by the persistent kernels on an emulated GPU
// (emulator.h), for every layer that they can do. FUSEDRNN_EMULATOR_SEED draws another order of threads.
#pragma GCC optimize("O1")  // it is for tests: compiled in half the time
#if !defined(FUSEDRNN_BASE_ONLY)
#include "../stepwise/host.h"

#include <chrono>
#include <cstdlib>
#include <memory>
#include <random>

#include "../stepwise/settings.h"
#include "../stepwise/trial.h"
#include "backward.h"
#include "emulator.h"
#include "forward.h"
#include "plan.h"

namespace fusedrnn {
namespace {

using namespace persistent;

uint64_t seed() {
  static const uint64_t value = [] {
    const char* text = std::getenv("FUSEDRNN_EMULATOR_SEED");
    return text && *text ? std::strtoull(text, nullptr, 10) : 1;
  }();
  return value;
}

// A cluster for H units: which of all that there are depends on the sizes, so that tests meet each; among them the one
// that the plan chooses.
template <class Cell, class Products, bool backward>
Geometry some_geometry(const Steps& steps, int64_t H) {
  const uint64_t drawn = std::minstd_rand(H * 1009 + steps.B * 31 + steps.T + seed())();
  const Geometry planned = choose(loop_of<Cell>(Products::kMultiplier, units_for(H), backward), 8);
  if (drawn % 5 == 0 && planned.tiles > 0) return planned;
  Geometry s = {};
  s.blocks = 1 << drawn % 3;
  s.parts = 1 << drawn / 3 % 3;
  const auto parts_of = [](int64_t n, int64_t of) { return static_cast<int>((n + of - 1) / of); };
  s.tiles = parts_of(H, kTileUnits * s.blocks);
  s.vectors = parts_of(H, 16 * Products::kPerRegister * s.parts);
  s.held = drawn / 9 % 2 ? s.vectors : s.vectors / 2;
  return s;
}

// Step by step, as stepwise/host.cpp computes it.
template <class Pass>
bool by_steps(const typename Pass::Problem& p) {
  static const int cell = find_cell(Pass::Cell::kName), type = static_cast<int>(Pass::kDType);
  if constexpr (std::is_same_v<typename Pass::Problem, BackwardProblem>)
    return table_stepwise().backward[cell][type](p);
  else return table_stepwise().forward[cell][type](p);
}

// Values that nobody can take for results.
template <class E>
void poison(E* memory, int64_t count) {
  std::memset(static_cast<void*>(memory), 0xff, count * sizeof(E));
}

// Both ways of computing a call, as trial.h measures them.
template <class Pass, class Device>
struct HostWays {
  using Problem = typename Pass::Problem;
  Device device;
  std::vector<std::unique_ptr<char[]>> held = {};

  bool can_persist(const Problem& p) const { return Pass::can_persist(p); }
  std::string run(const Problem& p, Way way) const {
    const bool done = way == Way::kPersistent ? run_on_host<Pass>(p, device) : by_steps<Pass>(p);
    return done ? "" : "not enough memory for the layer's working space";
  }
  double seconds(const Problem& p, Way way) const {
    using Clock = std::chrono::steady_clock;
    const Clock::time_point start = Clock::now();
    run(p, way);
    return std::chrono::duration<double>(Clock::now() - start).count();
  }
  void* memory(int64_t bytes) {
    held.emplace_back(new (std::nothrow) char[bytes]);
    return held.back().get();
  }
  Largest compare(const Output& output, const void* other) const {
    switch (output.dtype) {
      case DType::kFloat32: return largest<float>(output, other);
      case DType::kFloat64: return largest<double>(output, other);
      case DType::kBFloat16: return largest<c10::BFloat16>(output, other);
      default: return largest<c10::Half>(output, other);
    }
  }
  template <class E>
  static Largest largest(const Output& output, const void* other) {
    Largest found;
    const auto raise = [](float& to, float value) {  // one that is no number is above them all
      if (!(value <= to) && !std::isnan(to)) to = value;
    };
    const E *a = static_cast<const E*>(*output.at), *b = static_cast<const E*>(other);
    for (int64_t row = 0; row < output.rows; ++row) {
      for (int64_t at = row * output.stride; at < row * output.stride + output.columns; ++at) {
        const auto value = static_cast<float>(widen(a[at]));
        raise(found.value, std::abs(value));
        raise(found.difference, std::abs(value - static_cast<float>(widen(b[at]))));
      }
    }
    return found;
  }
};

struct Emulated : Host {
  static constexpr int64_t kMostUnits = 512;  // beyond this the fibers take too long

  bool tf32;

  template <class Pass>
  static bool compute(const typename Pass::Problem& p) {
    if constexpr (!Pass::kPersistent) return by_steps<Pass>(p);
    else return by_either_way<Pass>(p);
  }

  template <class Pass>
  static bool by_either_way(const typename Pass::Problem& p) {
    const auto [tf32, may_measure] = settings();
    const Emulated device{{}, tf32};
    if (plan() != Plan::kAuto) return run_on_host<Pass>(p, device);
    static Choices choices(choices_file(), "emulated");
    HostWays<Pass, Emulated> ways = {device};
    const bool backward = std::is_same_v<typename Pass::Problem, BackwardProblem>;
    const std::string kind = kind_of(Pass::Cell::kName, Pass::kDType, tf32, p.size, backward ? "backward" : "forward");
    static const CellConstants& cell = cell_constants(find_cell(Pass::Cell::kName));
    const Way way = way_for(choices, kind, p, cell, Pass::kDType, tf32, may_measure, ways);
    return way == Way::kPersistent ? run_on_host<Pass>(p, device) : by_steps<Pass>(p);
  }

  template <class Pass>
  bool persists(const typename Pass::Problem& p) const {
    return p.size.H <= kMostUnits;
  }

  template <class Cell, template <class> class Span, class T>
  void run_steps(const Span<T>& p) {
    if constexpr (!std::is_same_v<T, float>) {
      run_loop<Cell, HalfProducts<T>>(p);
    } else if (tf32) {
      run_loop<Cell, Tf32Products>(p);
    } else {
      run_loop<Cell, SplitProducts>(p);
    }
  }

 private:
  template <class Cell, class Products, class T>
  static void run_loop(const ForwardSpan<T>& p) {
    const Geometry s = some_geometry<Cell, Products, false>(p.steps, p.u.H);
    each_row(p, false, [&](int slot, int64_t n) {
      poison(p.u.y[slot] + n * p.u.width, p.u.H);
      if (p.u.saved[slot]) poison(p.u.saved[slot] + n * p.u.saved_stride, (Cell::kSaved + Cell::kStates - 1) * p.u.H);
    });
    run(s, p, forward_layout<Cell, Products>(s).bytes,
        [&](EmulatedThread& m) { forward_loop<Cell, Products>(m, s, p); });
  }
  template <class Cell, class Products, class T>
  static void run_loop(const BackwardSpan<T>& p) {
    const Geometry s = some_geometry<Cell, Products, true>(p.steps, p.u.H);
    each_row(p, true, [&](int slot, int64_t n) {
      constexpr int kBlocks = Cell::kGates + Cell::kSplit + Cell::kParameters;
      poison(p.u.dg[slot] + n * kBlocks * p.u.H, kBlocks * p.u.H);
      if (p.u.before[slot]) poison(p.u.before[slot] + n * p.u.H, p.u.H);
    });
    run(s, p, backward_layout<Cell, Products>(s).bytes,
        [&](EmulatedThread& m) { backward_loop<Cell, Products>(m, s, p); });
  }
  template <class Span>
  static int slots(const Span& p) {
    return static_cast<int>(p.u.width / p.u.H);
  }
  template <class Span, class Visit>
  static void each_row(const Span& p, bool from_the_end, const Visit& visit) {
    for (int slot = 0; slot < slots(p); ++slot) {
      Walk walk(p.steps, slot, from_the_end);
      for (int64_t i = p.steps.begin; i < p.steps.end; ++i) {
        for (int64_t b = 0; b < walk.rows(); ++b) visit(slot, walk.row + b);
        from_the_end ? walk.back() : walk.forward();
      }
    }
  }
  template <class Span, class Kernel>
  static void run(const Geometry& s, const Span& p, int64_t shared_bytes, const Kernel& kernel) {
    const int clusters = static_cast<int>((p.steps.B + kSamples - 1) / kSamples);
    emulate({clusters, slots(p), s.blocks, threads(s), shared_bytes, seed()}, kernel);
  }
};

}  // namespace

const KernelTable& table_persistent() {
  static const KernelTable table = host_table<Emulated>("persistent", Registry{});
  return table;
}

}  // namespace fusedrnn
#endif
