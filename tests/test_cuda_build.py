"""The CUDA code on a machine without a GPU: nvcc compiles every kernel, and none spills."""

from __future__ import annotations

import shutil

import pytest

from benchmarks import ptxas
from fusedrnn.cells import CELLS

pytestmark = pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc here")


@pytest.mark.long
def test_kernels_compile_and_do_not_spill() -> None:
    kernels = ptxas.compile_kernels()
    print(ptxas.table(kernels))
    assert {kernel.architecture for kernel in kernels} == set(ptxas.ARCHITECTURES)
    assert sum("ForwardStep" in kernel.name for kernel in kernels) >= len(CELLS) * 4 * len(ptxas.ARCHITECTURES)
    for kernel in kernels:
        assert (kernel.stack, kernel.spills) == (0, 0), kernel
        assert kernel.registers <= 64, kernel  # so that an SM holds as many threads as it can
