// What torch.nn would read as a module's weights, without running what it would run.
#pragma once

#include <pybind11/pybind11.h>

namespace fusedrnn {

// The parameters of these names, a list, if to read each of them as an attribute gives just that: no attribute of the
// module itself and none of its class has such a name. None otherwise.
//
// as_torch: a tuple of pairs (name, value): what the module's class must have by that name; None: nothing. What has a
// value may not be replaced in the module itself.
// listed: the list that must hold these parameters and no more; None: there is none, and a parameter may be None.
pybind11::object kept_parameters(const pybind11::object& module, const pybind11::object& names,
                                 const pybind11::object& as_torch, const pybind11::object& listed);

}  // namespace fusedrnn
