#include "parameters.h"

#include <torch/csrc/autograd/python_variable.h>

namespace py = pybind11;

namespace fusedrnn {
namespace {

// An item of a dictionary, null if there is none. Held, as all that is looked at here: to compare a key may run code,
// which may change the dictionary or the list.
py::object item(const py::object& dict, const py::object& key) {
  PyObject* found = PyDict_GetItemWithError(dict.ptr(), key.ptr());
  if (!found && PyErr_Occurred()) throw py::error_already_set();
  return py::reinterpret_borrow<py::object>(found);
}

bool is_dict(const py::object& object) {
  return object && (PyDict_CheckExact(object.ptr()) || PyODict_CheckExact(object.ptr()));
}

// As the class of an object has it, by its own attributes and those of its bases; null if it has none.
py::object in_class(const py::object& object, const py::object& name) {
  return py::reinterpret_borrow<py::object>(_PyType_Lookup(Py_TYPE(object.ptr()), name.ptr()));
}

bool is_as(const py::object& module, const py::object& own, const py::handle& pair) {
  if (!PyTuple_CheckExact(pair.ptr()) || PyTuple_GET_SIZE(pair.ptr()) != 2) {
    throw py::type_error("as_torch must be a tuple of pairs (name, value)");
  }
  const auto name = py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(pair.ptr(), 0));
  const py::handle value = PyTuple_GET_ITEM(pair.ptr(), 1);
  if (!PyUnicode_CheckExact(name.ptr())) throw py::type_error("as_torch must have names");
  const py::object found = in_class(module, name);
  return value.is_none() ? !found : found.is(value) && !item(own, name);
}

}  // namespace

py::object kept_parameters(const py::object& module, const py::object& names, const py::object& as_torch,
                           const py::object& listed) {
  const auto own = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module.ptr(), nullptr));
  if (!own) throw py::error_already_set();
  if (!PyTuple_CheckExact(as_torch.ptr())) throw py::type_error("as_torch must be a tuple of pairs (name, value)");
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(as_torch.ptr()); ++i) {
    if (!is_as(module, own, PyTuple_GET_ITEM(as_torch.ptr(), i))) return py::none();
  }
  static PyObject* const key = PyUnicode_InternFromString("_parameters");
  const py::object parameters = item(own, py::reinterpret_borrow<py::object>(key));
  const bool a_list = PyList_Check(names.ptr());
  if (!is_dict(parameters) || !(a_list || PyTuple_Check(names.ptr()))) return py::none();
  if (!listed.is_none() && !PyList_Check(listed.ptr())) return py::none();
  const auto size = [](const py::object& list) { return PySequence_Fast_GET_SIZE(list.ptr()); };
  const auto at = [](const py::object& list, Py_ssize_t i) {
    return py::reinterpret_borrow<py::object>(PySequence_Fast_GET_ITEM(list.ptr(), i));
  };
  py::list found;
  for (Py_ssize_t i = 0; i < size(names); ++i) {
    const py::object name = at(names, i);
    if (!PyUnicode_CheckExact(name.ptr()) || in_class(module, name) || item(own, name)) return py::none();
    const py::object parameter = item(parameters, name);
    const bool none = parameter && parameter.is_none() && listed.is_none();
    if (!none && !(parameter && THPVariable_CheckExact(parameter.ptr()))) return py::none();
    if (!listed.is_none() && (i >= size(listed) || !at(listed, i).is(parameter))) return py::none();
    found.append(parameter);
  }
  return listed.is_none() || size(listed) == static_cast<Py_ssize_t>(found.size()) ? py::object(found) : py::none();
}

}  // namespace fusedrnn
