// See dispatch.h.
#include "dispatch.h"

#include <pthread.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../cells/registry.h"
#include "added.h"
#include "constants.h"

namespace fusedrnn {
namespace {

[[maybe_unused]] KernelTable with_int8(const char* name, KernelTable table, const SmallWeightsTable& int8) {
  table.name = name;
  table.int8 = &int8;
  return table;
}

// The best first.
const std::vector<const KernelTable*>& tables() {
#if defined(__x86_64__) && !defined(FUSEDRNN_BASE_ONLY)
  static const KernelTable avx_vnni = with_int8("avx_vnni", kTableAvx2, kInt8AvxVnni);
  static const KernelTable avx512_vnni = with_int8("avx512_vnni", kTableAvx512, kInt8Avx512Vnni);
  static const KernelTable avx512_bf16 = with_pairs("avx512_bf16", avx512_vnni, kTableAvx512Bf16);
  static const KernelTable amx = with_pairs("amx", avx512_vnni, kTableAmx);
  static const std::vector<const KernelTable*> all = {&amx,      &avx512_bf16, &avx512_vnni, &kTableAvx512,
                                                      &avx_vnni, &kTableAvx2,  &kTableBase};
#else
  static const std::vector<const KernelTable*> all = {&kTableBase};
#endif
  return all;
}

// Never chosen but by name.
#if defined(FUSEDRNN_BASE_ONLY)
constexpr std::array<const KernelTable& (*)(), 0> kEmulated = {};
#else
constexpr std::array kEmulated = {table_stepwise, table_persistent};
#endif

template <class... Cells>
constexpr int count(CellList<Cells...>) {
  return sizeof...(Cells);
}
constexpr int kCells = count(Registry{});
static_assert(kCells <= kMaxCells);

template <class... Cells>
const CellConstants* constants(CellList<Cells...>) {
  static constexpr CellConstants table[] = {constants_of<Cells>()...};
  return table;
}

// On the Intel processor that was measured, the kernels with the instruction for bfloat16 products are slower than
// those of float32 (docs/performance.md).
bool pays(const KernelTable* table) {
#if defined(__x86_64__)
  return std::strcmp(table->name, "avx512_bf16") || __builtin_cpu_is("amd");
#else
  return true;
#endif
}

const KernelTable* choose() {
  if (const char* forced = std::getenv("FUSEDRNN_CPU_ISA"); forced && *forced) {
    return isa_error() ? &kTableBase : find_isa(forced);
  }
  for (const KernelTable* table : tables()) {
    if (isa_supported(table->name) && pays(table)) return table;
  }
  return &kTableBase;
}

#if defined(__x86_64__)
// Whether the processor multiplies tiles of bfloat16, and the system lets this process: their registers are large, so
// Linux gives them to those who ask.
bool amx_allowed() {
#if defined(FUSEDRNN_AVX2_AS_AVX512)
  return true;
#elif defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;  // of edx, leaf 7
  constexpr int kAskPermission = 0x1023, kTileData = 18;   // of arch_prctl
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBf16 | kTiles)) != (kBf16 | kTiles)) return false;
  static const bool allowed = syscall(SYS_arch_prctl, kAskPermission, kTileData) == 0;
  return allowed;
#else
  return false;
#endif
}
#endif

#if defined(__x86_64__)
bool has_avx_vnni() {  // no compiler's name for it is known to all
#ifdef FUSEDRNN_AVX2_AS_AVX512
  return true;
#endif
  constexpr unsigned kBit = 1u << 4;  // of eax, leaf 7, subleaf 1
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kBit);
}
#endif

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
  if (!std::strcmp(name, "avx512_vnni")) {
#ifdef FUSEDRNN_AVX2_AS_AVX512
    return isa_supported("avx2");
#endif
    return isa_supported("avx512") && __builtin_cpu_supports("avx512vnni");
  }
  if (!std::strcmp(name, "avx_vnni")) return isa_supported("avx2") && has_avx_vnni();
  if (!std::strcmp(name, "avx512_bf16")) {
#ifdef FUSEDRNN_AVX2_AS_AVX512
    return isa_supported("avx2");
#endif
    return isa_supported("avx512_vnni") && __builtin_cpu_supports("avx512bf16");
  }
  if (!std::strcmp(name, "amx")) return isa_supported("avx512_bf16") && amx_allowed();
  if (!std::strcmp(name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return !std::strcmp(name, "base") || std::any_of(std::begin(kEmulated), std::end(kEmulated),
                                                   [&](const auto& table) { return !std::strcmp(name, table().name); });
}

const KernelTable* find_isa(std::string_view name) {
  for (const KernelTable* table : tables()) {
    if (name == table->name) return table;
  }
  for (const auto& table : kEmulated) {
    if (name == table().name) return &table();
  }
  return nullptr;
}

const char* isa_error() {
  static const std::string error = [] {
    const char* forced = std::getenv("FUSEDRNN_CPU_ISA");
    if (!forced || !*forced) return std::string();
    if (!find_isa(forced)) {
      std::string known;
      for (const KernelTable* table : tables()) known += std::string(table->name) + ", ";
      for (const auto& table : kEmulated) known += std::string(table().name) + ", ";
      return "FUSEDRNN_CPU_ISA must be one of " + known + "got '" + forced + "'";
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

const CellConstants& cell_constants(int cell) {
  return cell < kCells ? constants(Registry{})[cell] : added_cell(cell - kCells).constants;
}

int find_cell(std::string_view name) {
  const int all = kCells + added_cells();
  for (int cell = 0; cell < all; ++cell) {
    if (name == cell_constants(cell).name) return cell;
  }
  return -1;
}

CellKernels kernels_of(int cell) {
  return cell < kCells ? CellKernels{&kernels(), cell} : CellKernels{added_cell(cell - kCells).kernels, 0};
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
