// What the library gives to others than torch: a description for Python, as text, and a table of functions for the
// module that looks into Python's objects. It depends on no version of torch or Python.
#pragma once

#include <string_view>

#include "inference.h"
#include "passes.h"

#define FUSEDRNN_SHARED __attribute__((visibility("default")))

namespace fusedrnn {

// The two sides are built together: C++ types may cross. `layout`, the first member for ever, tells them apart if not.
struct Interface {
  uint64_t layout;
  bool (*fits)(const ModuleCall& call);
  std::optional<Inferred> (*infer)(const ModuleCall& call, PackedWeights& kept, const Zoneout& zoneout);
  std::unique_ptr<Stepper> (*make_stepper)(const ModuleCall& call, const Zoneout& zoneout);
  std::optional<Inferred> (*step)(const Stepper& stepper, const Tensor& x, const OptionalTensor& h0,
                                  const OptionalTensor& c0, const Tensors& weights, const Tensors& scales);
  int64_t (*packed_bytes)(const PackedWeights& kept);
  int (*find_cell)(std::string_view name);  // -1: unknown
  const CellConstants& (*constants)(int cell);
  // A single step whose backward pass is to come, on the CPU.
  bool (*trains)(const ModuleCall& call);
  LayerOutputs (*forward)(const ModuleCall& call);
  LayerGradients (*backward)(const ModuleCall& call, const OptionalTensor& dh, const OptionalTensor& dc,
                             const Tensor& h, const Tensor& saved, const Needs& need);
  void (*ask_settings)(void (*ask)(int*));  // stepwise/settings.h
};

// Of the types that cross, by their sizes.
constexpr uint64_t interface_layout() {
  uint64_t all = 0;
  for (const uint64_t size : {sizeof(Interface), sizeof(ModuleCall), sizeof(PackedWeights), sizeof(Zoneout),
                              sizeof(Stepper), sizeof(Tensor), sizeof(Facts), sizeof(Inferred), sizeof(CellConstants),
                              sizeof(LayerOutputs), sizeof(LayerGradients), sizeof(Needs)}) {
    all = all * 1000003 + size;
  }
  return all;
}

}  // namespace fusedrnn

extern "C" {
FUSEDRNN_SHARED const fusedrnn::Interface* fusedrnn_interface();
FUSEDRNN_SHARED const char* fusedrnn_description();             // JSON, the same for ever
FUSEDRNN_SHARED int fusedrnn_phases(int64_t* nanoseconds);      // of each phase since the last call; 0: no timers
FUSEDRNN_SHARED void fusedrnn_ask_settings(void (*ask)(int*));  // the same, where there is no such module
// Cells compiled later (cpu/added.h): what they are given; null, or why one is not added.
FUSEDRNN_SHARED const void* fusedrnn_services();
FUSEDRNN_SHARED const char* fusedrnn_add_cell(const void* cell);
}
