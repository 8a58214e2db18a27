// The module fusedrnn._C: loading it registers the ops (ops.cpp); it tells what was built and what is in use.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <omp.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <new>
#include <numeric>
#include <stdexcept>

#include "cpu/dispatch.h"
#include "cpu/plan.h"
#include "stepwise/slots.h"
#include "inference.h"
#include "parameters.h"

namespace py = pybind11;
using namespace fusedrnn;

namespace {

#include "cpu/region.h"

const char* const kIsas[] = {"base", "avx2", "avx512"};

std::vector<std::string> isas(bool on_this_cpu) {
  std::vector<std::string> names;
  for (const char* name : kIsas) {
    if (find_isa(name) && (!on_this_cpu || isa_supported(name))) names.push_back(name);
  }
  return names;
}

std::vector<py::dict> cell_list() {
  std::vector<py::dict> list;
  for (int i = 0; i < cells(); ++i) {
    const CellConstants& c = cell_constants(i);
    py::dict entry;
    entry["name"] = c.name;
    entry["gates"] = c.gates;
    entry["states"] = c.states;
    entry["saved"] = c.saved;
    entry["first"] = c.first;
    entry["split"] = c.split;
    list.push_back(entry);
  }
  return list;
}

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

// How this library was compiled.
py::dict build() {
  py::dict result;
#if defined(__clang__)
  result["compiler"] = "clang " __clang_version__;
#else
  result["compiler"] = "g++ " __VERSION__;
#endif
  result["flags"] = FUSEDRNN_FLAGS;  // setup.py
#if defined(_OPENMP)
  const std::string month = std::to_string(_OPENMP);  // yyyymm
  result["openmp"] = "specification of " + month.substr(0, 4) + "-" + month.substr(4);
#else
  result["openmp"] = "none: one thread";
#endif
  result["torch"] = TORCH_VERSION;
#if defined(FUSEDRNN_CUDA)
  result["cuda"] = true;
#else
  result["cuda"] = false;
#endif
  return result;
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

// An object of C++ as Python holds it: a capsule, which cannot be made, copied or pickled but by this module.
template <class T>
constexpr const char* kCapsule = nullptr;
template <>
constexpr const char* kCapsule<PackedWeights> = "fusedrnn.PackedWeights";
template <>
constexpr const char* kCapsule<Stepper> = "fusedrnn.Stepper";

template <class T>
py::capsule held(std::shared_ptr<T> object) {
  return {new std::shared_ptr<T>(std::move(object)), kCapsule<T>,
          [](void* holder) { delete static_cast<std::shared_ptr<T>*>(holder); }};
}

template <class T>
const std::shared_ptr<T>& object_in(const py::object& capsule) {
  if (!PyCapsule_IsValid(capsule.ptr(), kCapsule<T>)) {
    throw py::type_error(std::string("expected a capsule ") + kCapsule<T>);
  }
  return *static_cast<std::shared_ptr<T>*>(PyCapsule_GetPointer(capsule.ptr(), kCapsule<T>));
}

// An argument of Python in C++. (Pybind's own error prints every argument: torch would read the memory of a freed one.)
template <class T>
T argument(const py::object& object, const char* name) {
  py::detail::make_caster<T> caster;
  if (!caster.load(object, true)) {
    throw py::type_error(std::string(name) + " has the wrong type: " + Py_TYPE(object.ptr())->tp_name);
  }
  return py::detail::cast_op<T>(std::move(caster));
}

// An object that is a tensor or a parameter: a subclass may change what torch's functions do.
bool read_tensor(PyObject* object, at::Tensor& into) {
  if (!THPVariable_CheckExact(object)) return false;
  into = THPVariable_Unpack(object);
  return true;
}

bool read_tensor(PyObject* object, OptionalTensor& into) { return read_tensor(object, into.emplace()); }

// A list or tuple of `count` tensors; of any number if it is negative.
template <class Vector>
bool read_tensors(PyObject* list, Py_ssize_t count, Vector& into) {
  if (!PyList_CheckExact(list) && !PyTuple_CheckExact(list)) return false;
  const Py_ssize_t size = PySequence_Fast_GET_SIZE(list);
  if (count >= 0 && size != count) return false;
  into.resize(size);
  for (Py_ssize_t i = 0; i < size; ++i) {
    if (!read_tensor(PySequence_Fast_GET_ITEM(list, i), into[i])) return false;
  }
  return true;
}

bool read_size(PyObject* object, int64_t& into) {
  if (!PyLong_Check(object)) return false;
  int overflow = 0;
  into = PyLong_AsLongLongAndOverflow(object, &overflow);
  return overflow == 0;
}

// A call as a module makes it: states, a tuple of all that the cell has, or None; form: the dimensions of x, layers,
// directions, I, H, R. False where the kernels do not take it (fits), or something other than torch's own tensors is at
// work: a subclass, a mode, autocast.
bool read_call(const py::object& x, const py::object& states, const py::object& weights, const py::object& cell,
               const py::object& form, ModuleCall& call) {
  call.cell = find_cell(argument<std::string>(cell, "cell"));
  if (call.cell < 0) throw py::value_error("unknown cell '" + py::cast<std::string>(cell) + "'");
  int64_t dimensions = 0;
  if (!PyTuple_Check(form.ptr()) || PyTuple_GET_SIZE(form.ptr()) != 6) {
    throw py::type_error("form must be a tuple of 6 numbers");
  }
  Py_ssize_t i = 0;
  for (int64_t* size : {&dimensions, &call.layers, &call.directions, &call.I, &call.H, &call.R}) {
    if (!read_size(PyTuple_GET_ITEM(form.ptr(), i++), *size)) return false;
  }
  call.one_step = dimensions == 2;
  if (!call.one_step && dimensions != 3) return false;
  if (call.directions != 1 && call.directions != 2) return false;
  OptionalTensor* const into[] = {&call.h0, &call.c0};
  if (!states.is_none()) {
    const int count = cell_constants(call.cell).states;
    if (!PyTuple_CheckExact(states.ptr()) || PyTuple_GET_SIZE(states.ptr()) != count) return false;
    for (int s = 0; s < count; ++s) {
      if (!read_tensor(PyTuple_GET_ITEM(states.ptr(), s), *into[s])) return false;
    }
  }
  return read_tensor(x.ptr(), call.x) && read_tensors(weights.ptr(), -1, call.weights) &&
         !at::impl::torch_function_mode_enabled() && fits(call) &&
         !at::autocast::is_autocast_enabled(call.x.device().type());
}

bool fits_kernels(const py::object& x, const py::object& states, const py::object& weights, const py::object& cell,
                  const py::object& form) {
  ModuleCall call;
  return read_call(x, states, weights, cell, form, call);
}

// y and the cell's final states, or None: see inference.h.
py::object infer_layers(const py::object& x, const py::object& states, const py::object& weights,
                        const py::object& cell, const py::object& form, const py::object& kept,
                        const py::object& given_zoneout) {
  const auto packed = object_in<PackedWeights>(kept);
  const auto zoneout = argument<Zoneout>(given_zoneout, "zoneout");
  ModuleCall call;
  if (!read_call(x, states, weights, cell, form, call)) return py::none();
  std::optional<Inferred> results;
  {
    const py::gil_scoped_release release;
    results = infer(call, *packed, zoneout);
  }
  if (!results) return py::none();
  const auto& [y, h_n, c_n] = *results;
  if (cell_constants(call.cell).states == 2) return py::make_tuple(y, h_n, c_n);
  return py::make_tuple(y, h_n);
}

py::object prepare_step(const py::object& x, const py::object& weights, const py::object& cell, const py::object& form,
                        const py::object& zoneout) {
  ModuleCall call;
  if (!read_call(x, py::none(), weights, cell, form, call)) return py::none();
  std::shared_ptr<Stepper> stepper = Stepper::make(call, argument<Zoneout>(zoneout, "zoneout"));
  return stepper ? py::object(held(std::move(stepper))) : py::none();
}

// The states of a step as a caller of a module gives them: nothing, a tensor, or a tuple of two where the cell has two.
bool read_states(const py::object& hx, bool two, OptionalTensor& h0, OptionalTensor& c0) {
  if (hx.is_none()) return true;
  if (!two) return read_tensor(hx.ptr(), h0);
  return PyTuple_CheckExact(hx.ptr()) && PyTuple_GET_SIZE(hx.ptr()) == 2 &&
         read_tensor(PyTuple_GET_ITEM(hx.ptr(), 0), h0) && read_tensor(PyTuple_GET_ITEM(hx.ptr(), 1), c0);
}

// No other thread of Python runs meanwhile: a step is shorter than handing over would take.
py::object step(const py::object& prepared, const py::object& given_x, const py::object& hx,
                const py::object& given_weights) {
  const Stepper& stepper = *object_in<Stepper>(prepared);
  at::Tensor x;
  OptionalTensor h0, c0;
  c10::SmallVector<at::Tensor, 16> weights;
  const bool fit = read_tensor(given_x.ptr(), x) && !at::impl::torch_function_mode_enabled() &&
                   read_states(hx, stepper.two_states(), h0, c0) &&
                   read_tensors(given_weights.ptr(), stepper.weights(), weights);
  if (!fit) return py::none();
  const auto results = stepper.step(x, h0, c0, weights);
  if (!results) return py::none();
  const auto& [y, h_n, c_n] = *results;
  if (stepper.two_states()) return py::make_tuple(y, py::make_tuple(h_n, c_n));
  return py::make_tuple(y, h_n);
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

PYBIND11_MODULE(_C, m) {
  if (const char* error = isa_error()) throw py::import_error(error);
  m.doc() = "Compiled part of fusedrnn: registers torch.ops.fusedrnn, tells what was built.";
  m.def("isa", [] { return kernels().name; }, "Instruction set in use.");
  m.def("vector_bytes", [] { return kernels().vector_bytes; });
  m.def("built_isas", [] { return isas(false); }, "Instruction sets in this build.");
  m.def("supported_isas", [] { return isas(true); }, "Instruction sets of this build that this CPU has.");
  m.def("build", build, "Compiler, flags and versions this library was built with.");
  m.def("cells", cell_list, "Constants of the compiled cells, in registry order.");
  m.def("packed_weights", [] { return held(std::make_shared<PackedWeights>()); },
        "A capsule for the packed weights of a module's layers, kept between calls of infer.");
  m.def("packed_bytes", [](const py::object& kept) { return object_in<PackedWeights>(kept)->bytes(); });
  m.def("packed_uses", [](const py::object& kept) { return object_in<PackedWeights>(kept)->uses.load(); },
        "How often panels were used that an earlier call had packed.");
  m.def("fits", fits_kernels, py::arg("x"), py::arg("states"), py::arg("weights"), py::arg("cell"), py::arg("form"),
        "Whether the kernels take a module's call as it is. form: the dimensions of x, layers, directions, I, H, R.");
  m.def("infer", infer_layers, py::arg("x"), py::arg("states"), py::arg("weights"), py::arg("cell"), py::arg("form"),
        py::arg("kept"), py::arg("zoneout") = Zoneout(0, 0),
        "Stacked layers on a dense batch, without gradients: y and the final states; None where only the ops will do.");
  m.def("prepare_step", prepare_step, py::arg("x"), py::arg("weights"), py::arg("cell"), py::arg("form"),
        py::arg("zoneout") = Zoneout(0, 0),
        "A capsule with stacked layers of one direction, prepared for one batch size; None where there can be none.");
  m.def("step", step, py::arg("prepared"), py::arg("x"), py::arg("hx"), py::arg("weights"),
        "One step: y and the states as a module returns them; None where it is not prepared for what it gets.");
  m.def("kept_parameters", kept_parameters, py::arg("module"), py::arg("names"), py::arg("as_torch"),
        py::arg("listed") = py::none(),
        "A module's parameters of these names, if that is what torch.nn would read by them; else None.");
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
