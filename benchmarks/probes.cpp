// What benchmarks and tests ask of the sources in csrc beside the package: plans of sharing, and yardsticks of the
// machine. probes.py compiles it for the instruction set in use.
#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../csrc/cells/registry.h"
#include "../csrc/cpu/dispatch.h"
#include "../csrc/cpu/plan.h"
#include "../csrc/persistent/plan.h"
#include "../csrc/stepwise/choice.h"
#include "../csrc/stepwise/slots.h"

namespace py = pybind11;
using Clock = std::chrono::steady_clock;

namespace fusedrnn {
namespace {

#include "../csrc/cpu/vec.h"
//
#include "../csrc/cpu/operand.h"
//
#include "../csrc/cpu/gemm.h"
//
#include "../csrc/cpu/team.h"

// Sizes of a layer whose steps have so many samples.
struct Steps {
  std::vector<int64_t> active, offset;
  LayerSizes size{};
  Steps(const std::vector<int64_t>& batch_sizes, int64_t I, int64_t H, int directions)
      : active(batch_sizes), offset(batch_sizes.size()) {
    if (directions < 1 || directions > 2 || I < 0 || H < 1) throw py::value_error("no layer has such sizes");
    if (active.empty() || active.back() < 1 || !std::is_sorted(active.rbegin(), active.rend())) {
      throw py::value_error("batch_sizes must be positive and not increase");
    }
    std::exclusive_scan(active.begin(), active.end(), offset.begin(), int64_t{0});
    size.T = active.size(), size.B = active[0], size.N = offset.back() + active.back();
    size.I = I, size.H = size.R = H, size.D = directions;
    size.active = active.data(), size.offset = offset.data();
  }
};

py::dict plan(const std::vector<int64_t>& batch_sizes, int64_t I, int64_t H, int directions, int gates, int lanes,
              int threads) {
  const Steps steps(batch_sizes, I, H, directions);
  const Plan p = make_plan(steps.size, gates, lanes, threads);
  std::vector<int64_t> bounds(p.slices + 1);
  slice_batch(steps.size, p.slices, bounds.data());
  py::dict result;
  result["teams"] = p.teams;
  result["members"] = p.members;
  result["slices"] = p.slices;
  result["bounds"] = bounds;
  return result;
}

int64_t steps_of_pipeline(int64_t T, int64_t B, int64_t H, int gates, int lanes, int64_t layers, int threads) {
  return pipeline_steps(Steps(std::vector<int64_t>(T, B), H, H, 1).size, gates, lanes, layers, threads);
}

// The spans of steps whose input products the stepwise driver makes at once, of at most `limit` rows or one step: begin
// and end in a direction's own order, and for the forward and the reverse direction their first row and number of rows.
std::vector<std::vector<int64_t>> projection_spans(const std::vector<int64_t>& batch_sizes, int64_t limit) {
  const Steps steps(batch_sizes, 1, 1, 2);
  const LayerSizes& z = steps.size;
  const Slots slots(z);
  std::vector<std::vector<int64_t>> spans;
  for (int64_t begin = 0; begin < z.T;) {
    const int64_t end = slots.span_end(z, begin, limit);
    const StepRows at = slots.span(z, begin, end);
    spans.push_back({begin, end, at.first[0], at.rows[0], at.first[1], at.rows[1]});
    begin = end;
  }
  return spans;
}

// A persistent loop of a cell on a GPU: why there is none, or its cluster, the shared memory of a block in bytes, and
// an estimate of a step's cycles.
py::dict persistent_plan(const std::string& cell, const std::string& multiplier, int64_t H, bool backward, int major,
                         int shared_bytes) {
  using namespace persistent;
  const Multiplier by = multiplier == "tf32"      ? Multiplier::kTf32
                        : multiplier == "float32" ? Multiplier::kSplit
                                                  : Multiplier::kHalves;
  const auto of_registry = [&]<class... Cells>(CellList<Cells...>) {
    Loop loop = {};
    ((cell == Cells::kName ? void(loop = loop_of<Cells>(by, units_for(H), backward)) : void()), ...);
    return loop;
  };
  const Loop loop = of_registry(Registry{});
  if (loop.gates == 0 || H < 1) throw py::value_error("no such layer");
  const Gpu gpu = {major, 0, shared_bytes};
  py::dict result;
  if (const char* why = refusal(loop, gpu)) {
    result["refusal"] = why;
    return result;
  }
  const Geometry s = choose(loop, most_blocks(gpu));
  result["refusal"] = py::none();
  result["blocks"] = s.blocks, result["tiles"] = s.tiles, result["parts"] = s.parts;
  result["vectors"] = s.vectors, result["held"] = s.held;
  result["shared_bytes"] = persistent::shared_bytes(loop, s);
  result["cycles"] = estimated_cycles(loop, s);
  return result;
}

// choose() of csrc/stepwise/choice.h, with a trial by functions of Python, or None.
std::string choose(Choices& choices, const std::string& kind, const py::object& trial) {
  const char* const names[] = {"stepwise", "persistent"};
  const auto name = [&](Way way) { return names[static_cast<int>(way)]; };
  Trial asked;
  if (!trial.is_none()) {
    asked.begin = [&] {
      const py::gil_scoped_acquire gil;
      return py::cast<bool>(trial.attr("begin")());
    };
    asked.run = [&](Way way) {
      const py::gil_scoped_acquire gil;
      return py::cast<std::string>(trial.attr("run")(name(way)));
    };
    asked.seconds = [&](Way way) {
      const py::gil_scoped_acquire gil;
      return py::cast<double>(trial.attr("seconds")(name(way)));
    };
    asked.deviation = [&] {
      const py::gil_scoped_acquire gil;
      return py::cast<std::optional<double>>(trial.attr("deviation")());
    };
  }
  const py::gil_scoped_release release;
  return name(choices.choose(kind, trial.is_none() ? nullptr : &asked));
}

std::string call_kind(const std::string& cell, int dtype, bool tf32, int64_t T, int64_t B, int64_t H, int64_t N, int D,
                      const std::string& what) {
  LayerSizes z = {};
  z.T = T, z.B = B, z.H = H, z.N = N, z.D = D;
  return kind_of(cell.c_str(), static_cast<DType>(dtype), tf32, z, what.c_str());
}

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// What `threads` threads do a second, together: each repeats work(own), which returns how much it did, for about
// `seconds` by its own clock; own = setup() comes before.
template <class Setup, class Work>
double rate(int threads, double seconds, const Setup& setup, const Work& work) {
  std::vector<double> rates(threads);
  in_parallel(
      threads, [](int) { return true; },
      [&](int thread) {
        auto own = setup();
        int64_t done = 0;
#pragma omp barrier
        const auto start = Clock::now();
        do done += work(own);
        while (seconds_since(start) < seconds);
        rates[thread] = done / seconds_since(start);
      });
  return std::accumulate(rates.begin(), rates.end(), 0.0);
}

template <int kSums>
float total(Raw<float>::Type (&sum)[kSums]) {
#pragma GCC unroll 12
  for (int i = 1; i < kSums; ++i) sum[0] += sum[i];
  float lanes = 0;
  for (int lane = 0; lane < Vec<float>::kLanes; ++lane) lanes += sum[0][lane];
  return lanes;
}

// Multiplies and adds in registers and nothing else.
double peak_flops(int threads, double seconds) {
  return rate(
      threads, seconds, [] { return 0; },
      [](int) {
        constexpr int kSums = 12, kTurns = 10000;  // two units with a latency of four or five
        Raw<float>::Type sum[kSums];
#pragma GCC unroll 12
        for (int i = 0; i < kSums; ++i) sum[i] = Vec<float>(static_cast<float>(i)).v;
        const Raw<float>::Type factor = Vec<float>(0.5f).v;
        for (int turn = 0; turn < kTurns; ++turn) {
#pragma GCC unroll 12
          for (int i = 0; i < kSums; ++i) sum[i] = sum[i] * factor + factor;
        }
        [[maybe_unused]] volatile float used = total(sum);
        return int64_t{kTurns} * kSums * Vec<float>::kLanes * 2;
      });
}

// Each thread reads `kilobytes` of its own again and again.
double read_bandwidth(int threads, int64_t kilobytes, double seconds) {
  constexpr int kSums = 8, L = Vec<float>::kLanes;
  if (kilobytes < 1) throw py::value_error("kilobytes must be positive");
  const int64_t n = kilobytes * 1024 / sizeof(float);
  return rate(
      threads, seconds, [n] { return std::vector<float>(n, 1.0f); },
      [n](const std::vector<float>& data) {
        int64_t bytes = 0;
        for (; bytes < 1 << 20; bytes += n * sizeof(float)) {
          Raw<float>::Type sum[kSums] = {};
          for (int64_t i = 0; i + kSums * L <= n; i += kSums * L) {
#pragma GCC unroll 8
            for (int j = 0; j < kSums; ++j) sum[j] += load(data.data() + i + j * L).v;
          }
          [[maybe_unused]] volatile float used = total(sum);
        }
        return bytes;
      });
}

// Seconds a meeting of a team that has nothing else to do.
double meeting_seconds(int threads) {
  constexpr int64_t kTimes = 20000;
  std::vector<Flag> flags(threads, Flag{0});
  double seconds = 0;
  in_parallel(
      threads, [](int) { return true; },
      [&](int thread) {
        Team team(flags.data(), thread, omp_get_num_threads());
        const auto start = Clock::now();
        for (int64_t i = 0; i < kTimes; ++i) team.meet();
        if (thread == 0) seconds = seconds_since(start) / kTimes;
      });
  return seconds;
}

}  // namespace
}  // namespace fusedrnn

PYBIND11_MODULE(probes, m) {
  using namespace fusedrnn;
  using Alone = py::call_guard<py::gil_scoped_release>;
  m.def("plan", plan, py::arg("batch_sizes"), py::arg("I"), py::arg("H"), py::arg("directions"), py::arg("gates"),
        py::arg("lanes"), py::arg("threads"), "How a layer would be shared among threads.");
  m.def("pipeline_steps", steps_of_pipeline, py::arg("T"), py::arg("B"), py::arg("H"), py::arg("gates"),
        py::arg("lanes"), py::arg("layers"), py::arg("threads"),
        "Steps of a chunk in which stacked layers run side by side; 0: they do not.");
  m.def("projection_spans", projection_spans, py::arg("batch_sizes"), py::arg("limit"),
        "Steps whose input products are made at once on a GPU, and their rows in both directions.");
  m.def("persistent_plan", persistent_plan, py::arg("cell"), py::arg("multiplier"), py::arg("H"), py::arg("backward"),
        py::arg("major"), py::arg("shared_bytes"), "The cluster that a layer gets on a GPU, or why it gets none.");
  py::class_<Choices>(m, "Choices", "The ways of a GPU that were measured (csrc/stepwise/choice.h).")
      .def(py::init<std::string, std::string>(), py::arg("file"), py::arg("machine"))
      .def("choose", choose, py::arg("kind"), py::arg("trial"))
      .def("known",
           [](const Choices& choices) {
             py::dict result;
             for (const auto& [kind, choice] : choices.known()) {
               result[py::str(kind)] = py::make_tuple(choice.way == Way::kPersistent ? "persistent" : "stepwise",
                                                      choice.seconds[0], choice.seconds[1], choice.failure);
             }
             return result;
           })
      .def("take_remarks", &Choices::take_remarks);
  m.def("choices_file", choices_file);
  m.def("call_kind", call_kind, py::arg("cell"), py::arg("dtype"), py::arg("tf32"), py::arg("T"), py::arg("B"),
        py::arg("H"), py::arg("N"), py::arg("D"), py::arg("what"), "The kind of a call; dtype by its number.");
  m.def("peak_flops", peak_flops, py::arg("threads"), py::arg("seconds") = 0.02, Alone(),
        "float32 operations a second, multiplying and adding in registers.");
  m.def("read_bandwidth", read_bandwidth, py::arg("threads"), py::arg("kilobytes"), py::arg("seconds") = 0.02, Alone(),
        "Bytes a second that threads read, each `kilobytes` of its own.");
  m.def("meeting_seconds", meeting_seconds, py::arg("threads"), Alone(),
        "Seconds of a meeting of a team with nothing else to do.");
}
