"""The CUDA code on a machine without a GPU: nvcc compiles every kernel, and none spills."""

from __future__ import annotations

import shutil

import pytest

import fusedrnn
from benchmarks import ptxas
from fusedrnn.cells import CELLS

pytestmark = pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc here")


@pytest.mark.long
def test_kernels_compile_and_do_not_spill() -> None:
    kernels = ptxas.compile_kernels()
    print(ptxas.table(kernels))
    assert {kernel.architecture for kernel in kernels} == set(ptxas.ARCHITECTURES)
    assert sum("ForwardStep" in kernel.name for kernel in kernels) >= len(CELLS) * 4 * len(ptxas.ARCHITECTURES)
    persistent = [kernel for kernel in kernels if kernel.name.startswith("persistent_loop")]
    one_product = sum(cell["first"] == cell["gates"] for cell in fusedrnn._C.cells())
    # At least two sizes of each direction and way of multiplying, for each architecture.
    assert len(persistent) >= one_product * 2 * 4 * 2 * len(ptxas.ARCHITECTURES)
    for kernel in kernels:
        assert (kernel.stack, kernel.spills) == (0, 0), kernel
        if kernel not in persistent:
            assert kernel.registers <= 64, kernel  # so that an SM holds as many threads as it can


@pytest.mark.parametrize(
    ("source", "ways"),
    [("float32", {"Tf32Products", "SplitProducts"}), ("bfloat16", {"HalfProducts"}), ("float16", {"HalfProducts"})],
)
def test_the_time_loop_has_the_products_that_its_plan_says(source: str, ways: set[str]) -> None:
    """Each is unrolled, none is missing: mma.sync of the loop, in the compiler's intermediate code."""
    found = ptxas.products(f"persistent_{source}.cu")
    gates = {"".join(map(str.capitalize, cell["name"].split("_"))): cell["gates"] for cell in fusedrnn._C.cells()}
    assert len(found) > 25 * len(ways) and {kernel.products for kernel in found} == ways
    for kernel in found:
        times = 3 if kernel.products == "SplitProducts" else 1
        assert kernel.count == 2 * kernel.vectors * gates[kernel.cell] * times, kernel
