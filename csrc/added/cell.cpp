// The library of one added cell (csrc/cpu/added.h), compiled where the cell is used, not with the package.
// fusedrnn/user_cells/library.py defines FUSEDRNN_ADDED_CELL, the struct, FUSEDRNN_ADDED_HEADER, the file that has it,
// and the table of its kernels: FUSEDRNN_ADDED_TABLE, with FUSEDRNN_ADDED_PAIRS for those of bfloat16. With
// FUSEDRNN_ADDED_CUDA it has those of csrc/cuda, too.
#include "../cells/registry.h"
#include "../cpu/added.h"
#include "../cpu/constants.h"
#if defined(FUSEDRNN_ADDED_CUDA)
#include "../cuda/device.h"
#endif

namespace fusedrnn {
namespace {

const Services* given_services = nullptr;

const KernelTable& table() {
#if defined(FUSEDRNN_ADDED_PAIRS)
  static const KernelTable paired = with_pairs(FUSEDRNN_ADDED_ISA, FUSEDRNN_ADDED_TABLE, FUSEDRNN_ADDED_PAIRS);
  return paired;
#else
  return FUSEDRNN_ADDED_TABLE;
#endif
}

}  // namespace

void* acquire_scratch(int64_t bytes) { return given_services->acquire_scratch(bytes); }
void release_scratch() { given_services->release_scratch(); }
bool forked() { return given_services->forked(); }

}  // namespace fusedrnn

// Null: `given` is of other headers.
extern "C" __attribute__((visibility("default"))) const void* fusedrnn_added_cell(const void* given) {
  using namespace fusedrnn;
  const auto* const offered = static_cast<const Services*>(given);
  if (offered->layout != added_layout()) return nullptr;
  given_services = offered;
#if defined(FUSEDRNN_ADDED_CUDA)
  constexpr const CudaTable* kCuda = &kCudaTable;
#else
  constexpr const CudaTable* kCuda = nullptr;
#endif
  static const AddedCell cell = {added_layout(), constants_of<FUSEDRNN_ADDED_CELL>(), &table(), kCuda};
  return &cell;
}
