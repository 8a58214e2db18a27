// See probes.h.
#include "probes.h"

#include <omp.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <new>
#include <numeric>

#include "cpu/dispatch.h"
#include "cpu/plan.h"
#include "stepwise/slots.h"

namespace py = pybind11;

namespace fusedrnn {
namespace {

#include "cpu/region.h"

constexpr int64_t kMostSteps = 1 << 16, kMostSamples = 1 << 12, kMostUnits = 1 << 12, kMostGates = 16;

void check_size(const char* name, int64_t value, int64_t most) {
  if (value >= 1 && value <= most) return;
  throw py::value_error(std::string(name) + " must be from 1 to " + std::to_string(most) + ", got " +
                        std::to_string(value));
}

void check_seconds(double seconds) {
  if (seconds >= 0 && seconds <= 60) return;
  throw py::value_error("seconds must be from 0 to 60, got " + std::to_string(seconds));
}

// Sizes of a layer of given lengths, for the plan's tests. No product of them overflows.
struct Lengths {
  std::vector<int64_t> active, offset;
  LayerSizes size{};
  Lengths(const std::vector<int64_t>& batch_sizes, int64_t I, int64_t H, int directions)
      : active(batch_sizes), offset(batch_sizes.size()) {
    check_size("the number of steps", active.size(), kMostSteps);
    check_size("I", I, kMostUnits);
    check_size("H", H, kMostUnits);
    check_size("directions", directions, 2);
    for (size_t t = 0; t < active.size(); ++t) check_size("batch_sizes", active[t], t ? active[t - 1] : kMostSamples);
    for (size_t t = 0; t < active.size(); ++t) {
      offset[t] = size.N;
      size.N += active[t];
    }
    size.T = active.size();
    size.B = active.empty() ? 0 : active[0];
    size.I = I;
    size.H = size.R = H;
    size.D = directions;
    size.active = active.data();
    size.offset = offset.data();
  }
};

py::dict plan(const std::vector<int64_t>& batch_sizes, int64_t I, int64_t H, int directions, int gates, int lanes,
              int threads) {
  check_size("gates", gates, kMostGates);
  check_size("lanes", lanes, 64);
  check_size("threads", threads, kMostSteps);
  const Lengths lengths(batch_sizes, I, H, directions);
  const Plan p = make_plan(lengths.size, gates, lanes, threads);
  std::vector<int64_t> bounds(p.slices + 1);
  slice_batch(lengths.size, p.slices, bounds.data());
  py::dict result;
  result["teams"] = p.teams;
  result["members"] = p.members;
  result["slices"] = p.slices;
  result["bounds"] = bounds;
  return result;
}

int64_t steps_of_pipeline(int64_t T, int64_t B, int64_t H, int gates, int lanes, int64_t layers, int threads) {
  check_size("T", T, kMostSteps);
  check_size("gates", gates, kMostGates);
  check_size("lanes", lanes, 64);
  check_size("layers", layers, kMostUnits);
  check_size("threads", threads, kMostSteps);
  return pipeline_steps(Lengths(std::vector<int64_t>(T, B), H, H, 1).size, gates, lanes, layers, threads);
}

// The spans of steps whose input products the stepwise road makes at once, of at most `limit` rows or one step: begin
// and end in a direction's own order, and for the forward and the reverse direction their first row and number of rows.
std::vector<std::vector<int64_t>> projection_spans(const std::vector<int64_t>& batch_sizes, int64_t limit) {
  check_size("limit", limit, int64_t{1} << 40);
  const Lengths lengths(batch_sizes, 1, 1, 2);
  const LayerSizes& z = lengths.size;
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

// Seconds of all threads in each phase since the last call, in a build with FUSEDRNN_PHASES; None in any other.
py::object phases() {
  if (!kPhasesTimed) return py::none();
  int64_t nanoseconds[kPhases];
  take_phases(nanoseconds);
  py::dict result;
  for (int i = 0; i < kPhases; ++i) result[kPhaseNames[i]] = 1e-9 * nanoseconds[i];
  return result;
}

// What `threads` threads do a second, together: each repeats work(thread), which returns how much it did, for about
// `seconds` by its own clock. setup(thread) comes before.
template <class Setup, class Work>
double rate(int threads, double seconds, const Setup& setup, const Work& work) {
  check_size("threads", threads, kMaxThreads);
  check_seconds(seconds);
  using Clock = std::chrono::steady_clock;
  std::vector<double> rates(threads);
  on_threads(threads, [&](int thread) {
    auto own = setup(thread);
    int64_t done = 0;
    double elapsed = 0;
#pragma omp barrier
    const auto start = Clock::now();
    do {
      done += work(own);
      elapsed = std::chrono::duration<double>(Clock::now() - start).count();
    } while (elapsed < seconds);
    rates[thread] = done / elapsed;
  });
  return std::accumulate(rates.begin(), rates.end(), 0.0);
}

double peak_flops(int threads, double seconds) {
  return rate(threads, seconds, [](int) { return 0; }, [](int) { return kernels().multiply_adds(10000); });
}

// Each thread reads `kilobytes` of its own again and again.
double read_bandwidth(int threads, int64_t kilobytes, double seconds) {
  check_size("kilobytes", kilobytes, int64_t{1} << 22);
  const int64_t n = kilobytes * 1024 / sizeof(float);
  std::atomic<bool> enough{true};
  const auto setup = [&](int) {  // no exception leaves a parallel region
    std::unique_ptr<float[]> data(new (std::nothrow) float[n]);
    if (!data) enough = false;
    else std::fill_n(data.get(), n, 1.0f);  // into the cache
    return data;
  };
  const double bytes_a_second = rate(threads, seconds, setup, [n](const std::unique_ptr<float[]>& data) {
    int64_t bytes = 0;
    for (float sum = 0; data && bytes < 1 << 20; bytes += n * sizeof(float)) {
      sum += kernels().read_all(data.get(), n);
      if (sum < 0) return int64_t{0};  // used
    }
    return bytes;
  });
  if (!enough) throw std::bad_alloc();
  return bytes_a_second;
}

// Seconds a meeting of a team of `threads` that has nothing else to do.
double meeting_seconds(int threads) {
  check_size("threads", threads, kMaxThreads);
  struct alignas(64) Line {
    char bytes[64];
  };
  constexpr int64_t kTimes = 20000;
  std::vector<Line> flags(threads, Line{});
  double seconds = 0;
  on_threads(threads, [&](int thread) {
    const auto start = std::chrono::steady_clock::now();
    kernels().meet(flags.data(), thread, omp_get_num_threads(), kTimes);
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    if (thread == 0) seconds = elapsed.count() / kTimes;
  });
  return seconds;
}

template <class S>
py::array_t<S> activation(const std::string& isa, const std::string& function, py::array_t<S, py::array::c_style> x) {
  const KernelTable* table = find_isa(isa);
  if (!table || !isa_supported(table->name)) throw py::value_error("instruction set not available: " + isa);
  if (x.ndim() != 1) throw py::value_error("x must have one dimension, got " + std::to_string(x.ndim()));
  if (reinterpret_cast<uintptr_t>(x.data()) % sizeof(S)) throw py::value_error("x must be aligned");
  if (function != "sigmoid" && function != "tanh") throw py::value_error("function must be 'sigmoid' or 'tanh'");
  py::array_t<S> y(x.size());
  const int which = function == "sigmoid" ? 0 : 1;
  if constexpr (sizeof(S) == 4) table->activation_f32(which, x.data(), y.mutable_data(), x.size());
  else table->activation_f64(which, x.data(), y.mutable_data(), x.size());
  return y;
}

}  // namespace

void define_probes(py::module_& m) {
  m.def("plan", plan, py::arg("batch_sizes"), py::arg("I"), py::arg("H"), py::arg("directions"), py::arg("gates"),
        py::arg("lanes"), py::arg("threads"), "How a layer would be shared among threads.");
  m.def("pipeline_steps", steps_of_pipeline, py::arg("T"), py::arg("B"), py::arg("H"), py::arg("gates"),
        py::arg("lanes"), py::arg("layers"), py::arg("threads"),
        "Steps of a chunk in which stacked layers run side by side; 0: they do not.");
  m.def("projection_spans", projection_spans, py::arg("batch_sizes"), py::arg("limit"),
        "Steps whose input products are made at once on a GPU, and their rows in both directions.");
  m.def("peak_flops", peak_flops, py::arg("threads"), py::arg("seconds") = 0.02,
        py::call_guard<py::gil_scoped_release>(), "float32 operations a second, multiplying and adding in registers.");
  m.def("phases", phases, "Seconds of all threads in each phase since the last call; None if the build has no timers.");
  m.def("read_bandwidth", read_bandwidth, py::arg("threads"), py::arg("kilobytes"), py::arg("seconds") = 0.02,
        py::call_guard<py::gil_scoped_release>(), "Bytes a second that threads read, each `kilobytes` of its own.");
  m.def("meeting_seconds", meeting_seconds, py::arg("threads"), py::call_guard<py::gil_scoped_release>(),
        "Seconds of a meeting of a team with nothing else to do.");
  m.def("activation", activation<float>, py::arg("isa"), py::arg("function"), py::arg("x").noconvert());
  m.def("activation", activation<double>, py::arg("isa"), py::arg("function"), py::arg("x").noconvert());
}

}  // namespace fusedrnn
