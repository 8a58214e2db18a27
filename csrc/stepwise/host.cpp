// FUSEDRNN_CPU_ISA=stepwise puts the stepwise driver in the place of the CPU's own kernels.
#include "host.h"

namespace fusedrnn {

const KernelTable& table_stepwise() {
  static const KernelTable table = host_table<Host>("stepwise", Registry{});
  return table;
}

}  // namespace fusedrnn
