// What tests and benchmarks ask of the compiled part: its plans, its yardsticks, its activations.
#pragma once

#include <pybind11/pybind11.h>

namespace fusedrnn {

void define_probes(pybind11::module_& m);

}  // namespace fusedrnn
