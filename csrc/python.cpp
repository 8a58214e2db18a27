// The module fusedrnn._fast: inference and steps for Python, past the dispatcher. It looks into Python's objects and
// torch's, so it is of one version of both; without it the same calls go by the ops.
#include <ATen/Context.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/record_function.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <deque>
#include <memory>
#include <stdexcept>

#include "borrowed.h"
#include "interface.h"
#include "parameters.h"
#include "second_order.h"
#include "training.h"

namespace py = pybind11;
using namespace fusedrnn;

namespace {

const Interface* library = nullptr;  // csrc/interface.h, in the shared library of the ops

// An object of C++ as Python holds it: a capsule, which cannot be made, copied or pickled but by this module.
template <class T>
constexpr const char* kCapsule = nullptr;
template <>
constexpr const char* kCapsule<PackedWeights> = "fusedrnn.PackedWeights";
template <>
constexpr const char* kCapsule<Stepper> = "fusedrnn.Stepper";
template <>
constexpr const char* kCapsule<KeptSums> = "fusedrnn.KeptSums";

template <class T>
py::capsule capsule_of(std::shared_ptr<T> object) {
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

// The tensors of a call, held until it ends: a list may lose them meanwhile.
using Held = std::deque<at::Tensor>;

// An object that is a tensor or a parameter, a plain one: a subclass may change what torch's functions do.
bool read_tensor(PyObject* object, Tensor& into, Held& held) {
  if (!THPVariable_CheckExact(object) || !plain(THPVariable_Unpack(object))) return false;
  held.push_back(THPVariable_Unpack(object));
  into = borrowed(held.back());
  return true;
}

bool read_tensor(PyObject* object, OptionalTensor& into, Held& held) {
  return read_tensor(object, into.emplace(), held);
}

// A list or tuple of `count` tensors; of any number if it is negative.
bool read_tensors(PyObject* list, Py_ssize_t count, Tensors& into, Held& held) {
  if (!PyList_CheckExact(list) && !PyTuple_CheckExact(list)) return false;
  const Py_ssize_t size = PySequence_Fast_GET_SIZE(list);
  if (count >= 0 && size != count) return false;
  into.resize(size);
  for (Py_ssize_t i = 0; i < size; ++i) {
    if (!read_tensor(PySequence_Fast_GET_ITEM(list, i), into[i], held)) return false;
  }
  return true;
}

py::object wrapped(const at::Tensor& t) { return py::reinterpret_steal<py::object>(THPVariable_Wrap(t)); }
py::object wrapped(const Tensor& t) { return wrapped(as_torch(t)); }

bool read_size(PyObject* object, int64_t& into) {
  if (!PyLong_Check(object)) return false;
  int overflow = 0;
  into = PyLong_AsLongLongAndOverflow(object, &overflow);
  return overflow == 0;
}

// A call as a module makes it: states, a tuple of all that the cell has, or None; form: the dimensions of x, layers,
// directions, I, H, R; scales: of matrices of a smaller type. False where the kernels do not take it (fits), or
// something other than torch's own tensors is at work: a subclass, a mode, autocast.
bool read_call(const py::object& x, const py::object& states, const py::object& weights, const py::object& cell,
               const py::object& form, ModuleCall& call, Held& held, const py::object& scales = py::none()) {
  call.cell = library->find_cell(argument<std::string>(cell, "cell"));
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
    const int count = library->constants(call.cell).states;
    if (count > 2 || !PyTuple_CheckExact(states.ptr()) || PyTuple_GET_SIZE(states.ptr()) != count) return false;
    for (int s = 0; s < count; ++s) {
      if (!read_tensor(PyTuple_GET_ITEM(states.ptr(), s), *into[s], held)) return false;
    }
  }
  return read_tensor(x.ptr(), call.x, held) && read_tensors(weights.ptr(), -1, call.weights, held) &&
         (scales.is_none() || read_tensors(scales.ptr(), -1, call.scales.emplace(), held)) &&
         !at::impl::torch_function_mode_enabled() && library->fits(call) &&
         !at::autocast::is_autocast_enabled(THPVariable_Unpack(x.ptr()).device().type());
}

bool fits_kernels(const py::object& x, const py::object& states, const py::object& weights, const py::object& cell,
                  const py::object& form) {
  ModuleCall call;
  Held held;
  return read_call(x, states, weights, cell, form, call, held);
}

// y and the cell's final states, or None: see inference.h.
py::object infer_layers(const py::object& x, const py::object& states, const py::object& weights,
                        const py::object& cell, const py::object& form, const py::object& kept,
                        const py::object& given_zoneout, const py::object& scales) {
  const auto packed = object_in<PackedWeights>(kept);
  const auto zoneout = argument<Zoneout>(given_zoneout, "zoneout");
  ModuleCall call;
  Held held;
  if (!read_call(x, states, weights, cell, form, call, held, scales) || watched()) return py::none();
  std::optional<Inferred> results;
  {
    const py::gil_scoped_release release;
    RECORD_FUNCTION("fusedrnn::infer", std::vector<c10::IValue>({held.front()}));
    results = library->infer(call, *packed, zoneout);
  }
  if (!results) return py::none();
  const auto& [y, h_n, c_n] = *results;
  if (library->constants(call.cell).states == 2) return py::make_tuple(wrapped(y), wrapped(h_n), wrapped(c_n));
  return py::make_tuple(wrapped(y), wrapped(h_n));
}

// What a GPU's kernels follow (stepwise/settings.h), without Python's lock.
void settings_of_torch(int* settings) {
  const at::Context& torch = at::globalContext();
  const bool tf32 = torch.float32Precision(at::Float32Backend::CUDA, at::Float32Op::RNN) == at::Float32Precision::TF32;
  *settings = static_cast<int>(tf32) | static_cast<int>(!torch.deterministicAlgorithms()) << 1;
}

// For each tensor that a Function of Python was given, whether the backward pass at work asks for its gradient: not all
// that could have one are asked for. None where `ctx` is not of the node at work.
py::object wanted_edges(const py::object& ctx) {
  const auto node = torch::autograd::get_current_node();
  if (!node || torch::autograd::get_current_graph_task_id() < 0) return py::none();
  if (!py::reinterpret_steal<py::object>(torch::autograd::functionToPyObject(node)).is(ctx)) return py::none();
  py::list wanted;
  for (size_t i = 0; i < node->num_outputs(); ++i) wanted.append(node->task_should_compute_output(i));
  return wanted;
}

PyObject* backward_of_step = nullptr;  // of fusedrnn.layer.autograd

std::vector<at::Tensor> by_python(const StepGradients& of) {
  const py::gil_scoped_acquire gil;
  const auto list = [](const std::vector<at::Tensor>& tensors) {
    py::list result;
    for (const at::Tensor& t : tensors) result.append(wrapped(t));
    return result;
  };
  const py::object found = py::reinterpret_borrow<py::object>(backward_of_step)(
      library->constants(of.step.cell).name, wrapped(of.step.x), list(of.step.states), list(of.step.weights),
      wrapped(of.h), wrapped(of.saved), list(of.from), of.wanted);
  std::vector<at::Tensor> result;
  for (const py::handle t : found) {
    if (!t.is_none() && !THPVariable_Check(t.ptr())) throw py::type_error("a gradient must be a tensor or None");
    result.push_back(t.is_none() ? at::Tensor() : THPVariable_Unpack(t.ptr()));
  }
  return result;
}

// The gradients of a step of a cell, with their graph, or None: see second_order.h. from: those of the next states, or
// None; wanted: of x, the states and the weights.
py::object gradients_of_step(const std::string& cell, const at::Tensor& x, std::vector<at::Tensor> states,
                             std::vector<at::Tensor> weights, const at::Tensor& h, const at::Tensor& saved,
                             const std::vector<std::optional<at::Tensor>>& from, const std::vector<bool>& wanted) {
  CellStep step{library->find_cell(cell), x, std::move(states), std::move(weights)};
  std::vector<at::Tensor> given;
  for (const auto& t : from) given.push_back(t.value_or(at::Tensor()));
  if (step.cell < 0) throw py::value_error("unknown cell '" + cell + "'");
  const size_t count = library->constants(step.cell).states, weights_given = step.weights.size();
  if ((weights_given != 2 && weights_given != 4) || (step.states.size() != 0 && step.states.size() != count) ||
      given.size() != count || wanted.size() != 1 + step.states.size() + weights_given) {
    throw py::value_error("a step takes all of its states or none, two weights or four, and a gradient of each state");
  }
  if (count > 2 || x.dim() != 2 || step.weights[1].dim() != 2 || watched()) return py::none();
  std::vector<at::Tensor> all = step.weights, held = step.states;
  all.insert(all.end(), held.begin(), held.end());
  all.insert(all.end(), {x, h, saved});
  for (const at::Tensor& t : given) {
    if (t.defined()) all.push_back(t);
  }
  if (!std::all_of(all.begin(), all.end(), plain) || !library->fits(call_of(step)) || !differentiates_twice(step)) {
    return py::none();
  }
  std::vector<at::Tensor> found;
  {
    const py::gil_scoped_release release;
    found = gradients_with_graph({step, h, saved, given, wanted});
  }
  py::list result;
  for (const at::Tensor& t : found) result.append(t.defined() ? wrapped(t) : py::none());
  return result;
}

// The next states of a cell, with their graph, or None: see training.h.
py::object train_cell(const py::object& x, const py::object& states, const py::object& weights, const py::object& cell,
                      const py::object& form, const py::object& kept) {
  const auto sums = object_in<KeptSums>(kept);
  ModuleCall call;
  Held held;
  const bool fit = at::GradMode::is_enabled() && read_call(x, states, weights, cell, form, call, held) &&
                   call.one_step && call.parts() == 1 && library->trains(call) && !watched();
  if (!fit || std::none_of(held.begin(), held.end(), [](const at::Tensor& t) { return t.requires_grad(); })) {
    return py::none();
  }
  const auto first_weight = held.end() - static_cast<int64_t>(call.weights.size());
  CellStep step{call.cell, *(first_weight - 1), {held.begin(), first_weight - 1}, {first_weight, held.end()}};
  std::vector<at::Tensor> next;
  {
    const py::gil_scoped_release release;
    next = train(std::move(step), *sums);
  }
  if (next.size() == 2) return py::make_tuple(wrapped(next[0]), wrapped(next[1]));
  return py::make_tuple(wrapped(next[0]));
}

py::object prepare_step(const py::object& x, const py::object& weights, const py::object& cell, const py::object& form,
                        const py::object& zoneout, const py::object& scales) {
  ModuleCall call;
  Held held;
  if (!read_call(x, py::none(), weights, cell, form, call, held, scales) || watched()) return py::none();
  std::shared_ptr<Stepper> stepper = library->make_stepper(call, argument<Zoneout>(zoneout, "zoneout"));
  return stepper ? py::object(capsule_of(std::move(stepper))) : py::none();
}

// The states of a step as a caller of a module gives them: nothing, a tensor, or a tuple of two where the cell has two.
bool read_states(const py::object& hx, bool two, OptionalTensor& h0, OptionalTensor& c0, Held& held) {
  if (hx.is_none()) return true;
  if (!two) return read_tensor(hx.ptr(), h0, held);
  return PyTuple_CheckExact(hx.ptr()) && PyTuple_GET_SIZE(hx.ptr()) == 2 &&
         read_tensor(PyTuple_GET_ITEM(hx.ptr(), 0), h0, held) && read_tensor(PyTuple_GET_ITEM(hx.ptr(), 1), c0, held);
}

// No other thread of Python runs meanwhile: a step is shorter than handing over would take.
py::object step(const py::object& prepared, const py::object& given_x, const py::object& hx,
                const py::object& given_weights, const py::object& given_scales) {
  const Stepper& stepper = *object_in<Stepper>(prepared);
  Tensor x;
  OptionalTensor h0, c0;
  Tensors weights, scales;
  Held held;
  const bool fit = !watched() && read_tensor(given_x.ptr(), x, held) &&
                   read_states(hx, stepper.two_states(), h0, c0, held) &&
                   read_tensors(given_weights.ptr(), stepper.weights(), weights, held) &&
                   (given_scales.is_none() ? stepper.scales() == 0
                                           : read_tensors(given_scales.ptr(), stepper.scales(), scales, held));
  if (!fit) return py::none();
  const auto results = library->step(stepper, x, h0, c0, weights, scales);
  if (!results) return py::none();
  const auto& [y, h_n, c_n] = *results;
  if (stepper.two_states()) return py::make_tuple(wrapped(y), py::make_tuple(wrapped(h_n), wrapped(c_n)));
  return py::make_tuple(wrapped(y), wrapped(h_n));
}

}  // namespace

PYBIND11_MODULE(_fast, m) {
  m.doc() = "Inference and steps past the dispatcher, for one version of torch and Python.";
  m.def(
      "connect",
      [](uintptr_t address) {
        const auto* given = reinterpret_cast<const Interface*>(address);
        if (given->layout != interface_layout()) return false;
        library = given;
        library->ask_settings(settings_of_torch);
        connect_training(given, by_python);
        return true;
      },
      "The address that fusedrnn_interface() of the library gives: before anything else. False if it is of another "
      "build.");
  m.def(
      "packed_weights", [] { return capsule_of(std::make_shared<PackedWeights>()); },
      "A capsule for the packed weights of a module's layers, kept between calls of infer.");
  m.def("packed_bytes", [](const py::object& kept) { return library->packed_bytes(*object_in<PackedWeights>(kept)); });
  m.def(
      "packed_uses", [](const py::object& kept) { return object_in<PackedWeights>(kept)->uses.load(); },
      "How often panels were used that an earlier call had packed.");
  m.def("fits", fits_kernels, py::arg("x"), py::arg("states"), py::arg("weights"), py::arg("cell"), py::arg("form"),
        "Whether the kernels take a module's call as it is. form: the dimensions of x, layers, directions, I, H, R.");
  m.def("infer", infer_layers, py::arg("x"), py::arg("states"), py::arg("weights"), py::arg("cell"), py::arg("form"),
        py::arg("kept"), py::arg("zoneout") = Zoneout(0, 0), py::arg("scales") = py::none(),
        "Stacked layers on a dense batch, without gradients: y and the final states; None where only the ops will do.");
  m.def(
      "kept_sums", [] { return capsule_of(std::make_shared<KeptSums>()); },
      "A capsule for what the steps of a cell with the same weights share when they train.");
  m.def("train_cell", train_cell, py::arg("x"), py::arg("states"), py::arg("weights"), py::arg("cell"), py::arg("form"),
        py::arg("kept"), "One step of a cell with its graph: the next states; None where only the ops will do.");
  m.def(
      "set_long_way",
      [](const py::object& function) {
        PyObject* const before = backward_of_step;
        backward_of_step = py::object(function).release().ptr();
        Py_XDECREF(before);
      },
      "What computes the gradients of a step where the kernels alone will not do.");
  m.def("gradients_of_step", gradients_of_step, py::arg("cell"), py::arg("x"), py::arg("states"), py::arg("weights"),
        py::arg("h"), py::arg("saved"), py::arg("given"), py::arg("wanted"),
        "The gradients of one step of a cell, to be differentiated again; None where only the ops will do.");
  m.def("wanted_edges", wanted_edges, py::arg("ctx"),
        "For each tensor of a Function at work, whether its gradient is asked for; None where it is not known.");
  m.def("prepare_step", prepare_step, py::arg("x"), py::arg("weights"), py::arg("cell"), py::arg("form"),
        py::arg("zoneout") = Zoneout(0, 0), py::arg("scales") = py::none(),
        "A capsule with stacked layers of one direction, prepared for one batch size; None where there can be none.");
  m.def("step", step, py::arg("prepared"), py::arg("x"), py::arg("hx"), py::arg("weights"),
        py::arg("scales") = py::none(),
        "One step: y and the states as a module returns them; None where it is not prepared for what it gets.");
  m.def("kept_parameters", kept_parameters, py::arg("module"), py::arg("names"), py::arg("as_torch"),
        py::arg("listed") = py::none(),
        "A module's parameters of these names, if that is what torch.nn would read by them; else None.");
}
