// A measurement of both ways on a call's own data (choice.h), for any device that can compute it by either:
//
//   device.can_persist(problem)       whether there is a kernel for many steps
//   device.run(problem, way)          the whole call, waited for; empty, or why it failed
//   device.seconds(problem, way)      of a call
//   device.memory(bytes)              on the device, until the measurement ends; null: there is none
//   device.compare(output, other)     outputs.h's Largest of an output and of the same in another place
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "choice.h"
#include "outputs.h"

namespace fusedrnn {

// By how much the results of both ways may differ, in an array whose largest value this is. A wrong term differs by far
// more. The least numbers of float16 are far apart: a difference of a few of them is none.
inline double allowed_difference(double largest, DType dtype, bool tf32) {
  const double least = std::numeric_limits<float>::min();
  switch (dtype) {
    case DType::kFloat64: return 1e-9 * largest + least;
    case DType::kFloat32: return (tf32 ? 3e-2 : 1e-3) * largest + least;
    case DType::kFloat16: return 3e-2 * largest + 4 * 0x1p-24;
    default: return 1e-1 * largest + least;
  }
}

// The first steps of a problem, which both ways are compared over: where a network is chaotic, two right results drift
// apart with time. What a backward pass finds of later steps is of no sequence then, and the same for both ways.
template <class Problem>
Problem first_steps(Problem p) {
  constexpr int64_t kSteps = 8;
  if (p.size.T <= kSteps) return p;
  p.size.N = p.size.offset[kSteps];
  p.size.T = kSteps;
  return p;
}

// The way for p. may_wait: whether there may be a trial; p's own outputs then hold the stepwise results.
template <class Problem, class Device>
Way way_for(Choices& choices, const std::string& kind, const Problem& p, const CellConstants& cell, DType dtype,
            bool tf32, bool may_wait, Device& device) {
  if (!device.can_persist(p)) return Way::kStepwise;
  if (!may_wait) return choices.choose(kind, nullptr);
  Problem own = p, aside = p;
  Outputs results(own, cell, dtype), others(aside, cell, dtype);
  const auto problem_of = [&](Way way) -> const Problem& { return way == Way::kStepwise ? own : aside; };
  Trial trial;
  trial.begin = [&] {
    void* const memory = device.memory(others.bytes());
    if (memory) others.move_to(memory);
    return memory != nullptr;
  };
  trial.run = [&](Way way) { return device.run(problem_of(way), way); };
  trial.seconds = [&](Way way) { return device.seconds(problem_of(way), way); };
  // The largest difference of two results, over the one that is allowed; none where the first are not finite.
  const auto differ = [&](const Outputs& first, const Outputs& second) -> std::optional<double> {
    double worst = 0;
    for (size_t i = 0; i < first.all().size(); ++i) {
      const Largest found = device.compare(first.all()[i], *second.all()[i].at);
      if (!std::isfinite(found.value)) return std::nullopt;
      const double deviation = found.difference / allowed_difference(found.value, dtype, tf32);
      if (!std::isnan(worst) && !(deviation <= worst)) worst = deviation;
    }
    return worst;
  };
  trial.deviation = [&]() -> std::optional<double> {
    const std::optional<double> whole = differ(results, others);
    if (!whole || !std::isfinite(*whole)) return whole;
    Problem few = first_steps(own), few_aside = first_steps(aside);
    const Outputs of_few(few, cell, dtype), of_few_aside(few_aside, cell, dtype);
    for (const auto& [problem, way] : {std::pair(&few, Way::kStepwise), std::pair(&few_aside, Way::kPersistent)}) {
      if (!device.run(*problem, way).empty()) return std::nullopt;
    }
    return differ(of_few, of_few_aside);
  };
  return choices.choose(kind, &trial);
}

// What FUSEDRNN_CUDA_PLAN says; throws std::runtime_error where it says nothing that there is.
enum class Plan { kStepwise, kPersistent, kAuto };
inline Plan plan() {
  const char* text = std::getenv("FUSEDRNN_CUDA_PLAN");
  const std::string wish = text && *text ? text : "stepwise";
  if (wish == "stepwise") return Plan::kStepwise;
  if (wish == "persistent") return Plan::kPersistent;
  if (wish == "auto") return Plan::kAuto;
  throw std::runtime_error("FUSEDRNN_CUDA_PLAN must be stepwise, persistent or auto, got '" + wish + "'");
}

}  // namespace fusedrnn
