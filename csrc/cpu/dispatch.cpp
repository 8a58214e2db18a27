// See dispatch.h.
#include "dispatch.h"

#include <pthread.h>

#include <cstdlib>
#include <cstring>
#include <string>

#include "../cells/registry.h"

namespace fusedrnn {
namespace {

constexpr const KernelTable* kTables[] = {
#if defined(__x86_64__) && !defined(FUSEDRNN_BASE_ONLY)
    &kTableAvx512, &kTableAvx2,
#endif
    &kTableBase};

template <class... Cells>
constexpr int count(CellList<Cells...>) {
  return sizeof...(Cells);
}
constexpr int kCells = count(Registry{});
static_assert(kCells <= kMaxCells);

template <class... Cells>
const CellConstants* constants(CellList<Cells...>) {
  static constexpr CellConstants table[] = {{Cells::kName, Cells::kGates, Cells::kStates, Cells::kSaved, Cells::kFirst,
                                             Cells::kSplit, Cells::kProjectable}...};
  static_assert(((!Cells::kProjectable || Cells::kStates == 2) && ...), "the drivers project cells with two states");
  static_assert(((Cells::kStates == 1 || (Cells::kFirst == Cells::kGates && Cells::kSaved > 0)) && ...),
                "of a cell with two states the drivers make one product, and save something");
  return table;
}

const KernelTable* choose() {
  if (const char* forced = std::getenv("FUSEDRNN_CPU_ISA"); forced && *forced) {
    return isa_error() ? &kTableBase : find_isa(forced);
  }
  for (const KernelTable* table : kTables) {
    if (isa_supported(table->name)) return table;
  }
  return &kTableBase;
}

struct Scratch {
  static constexpr int64_t kKeep = int64_t{256} << 20;  // a larger one is given back after the call
  void* data = nullptr;
  int64_t bytes = 0;
  void drop() {
    std::free(data);
    data = nullptr;
    bytes = 0;
  }
  ~Scratch() { drop(); }
};
thread_local Scratch scratch;

bool is_fork = false;
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { is_fork = true; });

}  // namespace

bool isa_supported(const char* name) {
#if defined(__x86_64__)
  if (!std::strcmp(name, "avx512")) {
#ifdef FUSEDRNN_AVX2_AS_AVX512
    return isa_supported("avx2");
#endif
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  if (!std::strcmp(name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return !std::strcmp(name, "base") || !std::strcmp(name, table_stepwise().name);
}

const KernelTable* find_isa(std::string_view name) {
  for (const KernelTable* table : kTables) {
    if (name == table->name) return table;
  }
  return name == table_stepwise().name ? &table_stepwise() : nullptr;
}

const char* isa_error() {
  static const std::string error = [] {
    const char* forced = std::getenv("FUSEDRNN_CPU_ISA");
    if (!forced || !*forced) return std::string();
    if (!find_isa(forced)) {
      std::string known;
      for (const KernelTable* table : kTables) known += std::string(table->name) + ", ";
      known += table_stepwise().name;
      return "FUSEDRNN_CPU_ISA must be one of " + known + ", got '" + forced + "'";
    }
    if (!isa_supported(forced)) return "FUSEDRNN_CPU_ISA=" + std::string(forced) + ": this CPU does not have it";
    return std::string();
  }();
  return error.empty() ? nullptr : error.c_str();
}

const KernelTable& kernels() {
  static const KernelTable* const table = choose();
  return *table;
}

bool forked() { return is_fork; }

int cells() { return kCells; }

const CellConstants& cell_constants(int cell) { return constants(Registry{})[cell]; }

int find_cell(std::string_view name) {
  for (int cell = 0; cell < kCells; ++cell) {
    if (name == cell_constants(cell).name) return cell;
  }
  return -1;
}

void* acquire_scratch(int64_t bytes) {
  if (bytes > scratch.bytes) {
    scratch.drop();
    const int64_t rounded = (bytes + 4095) / 4096 * 4096;
    scratch.data = std::aligned_alloc(4096, rounded);
    if (scratch.data) scratch.bytes = rounded;
  }
  return bytes <= scratch.bytes ? scratch.data : nullptr;
}

void release_scratch() {
  if (scratch.bytes > Scratch::kKeep) scratch.drop();
}

}  // namespace fusedrnn
