// FUSEDRNN_CPU_ISA=stepwise puts the stepwise driver in the place of the CPU's own kernels.
#pragma GCC optimize("O1")  // it is for tests: compiled in half the time
#if !defined(FUSEDRNN_BASE_ONLY)
#include "host.h"

namespace fusedrnn {

const KernelTable& table_stepwise() {
  static const KernelTable table = host_table<Host>("stepwise", Registry{});
  return table;
}

}  // namespace fusedrnn
#endif
