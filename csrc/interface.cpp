// See interface.h.
#include "target.h"

#include "interface.h"

#include "cpu/added.h"
#include "stepwise/choice.h"
#include "stepwise/settings.h"

#define FUSEDRNN_TEXT(macro) FUSEDRNN_TEXT_OF(macro)
#define FUSEDRNN_TEXT_OF(value) #value

namespace {

using namespace fusedrnn;

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    result += static_cast<unsigned char>(c) < ' ' ? '?' : c;
  }
  return result + '"';
}

std::string names(bool on_this_cpu) {
  std::string list;
  for (const char* name : {"base", "avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx"}) {
    if (find_isa(name) && (!on_this_cpu || isa_supported(name))) list += (list.empty() ? "" : ", ") + quoted(name);
  }
  return '[' + list + ']';
}

std::string cell_list() {
  std::ostringstream list;
  for (int i = 0; i < cells(); ++i) {
    const CellConstants& c = cell_constants(i);
    list << (i ? ", " : "") << "{\"name\": " << quoted(c.name) << ", \"gates\": " << c.gates
         << ", \"states\": " << c.states << ", \"saved\": " << c.saved << ", \"first\": " << c.first
         << ", \"split\": " << c.split << ", \"parameters\": " << c.parameters << ", \"columns\": " << c.columns
         << ", \"row_values\": " << c.row_values << ", \"projectable\": " << (c.projectable ? "true" : "false") << '}';
  }
  return '[' + list.str() + ']';
}

std::string phase_names() {
  std::string list;
  for (const char* name : kPhaseNames) list += (list.empty() ? "" : ", ") + quoted(name);
  return '[' + list + ']';
}

std::string description() {
  std::ostringstream text;
  const char* error = isa_error();
  text << "{\"error\": " << (error ? quoted(error) : "null") << ", \"isa\": " << quoted(kernels().name)
       << ", \"vector_bytes\": " << kernels().vector_bytes << ", \"built_isas\": " << names(false)
       << ", \"supported_isas\": " << names(true) << ", \"cells\": " << cell_list() << ", \"phases\": " << phase_names()
       << ", \"choices\": " << quoted(choices_file()) << ", \"build\": {\"flags\": " << quoted(FUSEDRNN_FLAGS)
       << ", \"compiler\": "
#if defined(__clang__)
       << quoted("clang " __clang_version__)
#else
       << quoted("g++ " __VERSION__)
#endif
       << ", \"openmp\": "
#if defined(_OPENMP)
       << quoted("specification of " + std::to_string(_OPENMP / 100) + '-' +
                 std::to_string(_OPENMP % 100 + 100).substr(1))
#else
       << quoted("none: one thread")
#endif
       << ", \"cuda\": "
#if defined(FUSEDRNN_CUDA)
       << quoted(FUSEDRNN_TEXT(FUSEDRNN_CUDA))
#else
       << "null"
#endif
       << "}}";
  return text.str();
}

}  // namespace

const Interface* fusedrnn_interface() {
  static constexpr Interface kInterface = {
      interface_layout(),
      [](const ModuleCall& call) { return fits(call); },
      [](const ModuleCall& call, PackedWeights& kept, const Zoneout& zoneout) { return infer(call, kept, zoneout); },
      Stepper::make,
      [](const Stepper& stepper, const Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
         const Tensors& weights, const Tensors& scales) { return stepper.step(x, h0, c0, weights, scales); },
      [](const PackedWeights& kept) { return kept.bytes(); },
      [](std::string_view name) { return find_cell(name); },
      cell_constants,
      [](const ModuleCall& call) { return has_kernels(call.x) && !call.scales; },
      [](const ModuleCall& call) { return forward_pass(arguments_of(call), true); },
      [](const ModuleCall& call, const OptionalTensor& dh, const OptionalTensor& dc, const Tensor& h,
         const Tensor& saved, const Needs& need) {
        const auto with_time = [](const OptionalTensor& t) { return t ? OptionalTensor(with_one(*t)) : t; };
        return backward_pass(arguments_of(call), {with_time(dh), {}, with_time(dc), {}}, with_one(h), saved, need, {});
      },
      ask_settings,
  };
  return &kInterface;
}

const char* fusedrnn_description() {
  static const std::string text = description();
  return text.c_str();
}

int fusedrnn_phases(int64_t* nanoseconds) {
  if (kPhasesTimed) take_phases(nanoseconds);
  return kPhasesTimed;
}

const void* fusedrnn_services() { return &services(); }

const char* fusedrnn_add_cell(const void* cell) { return add_cell(static_cast<const AddedCell*>(cell)); }

void fusedrnn_ask_settings(void (*ask)(int*)) { ask_settings(ask); }
