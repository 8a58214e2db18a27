"""The CUDA code on a machine without a GPU: nvcc compiles every kernel, and none spills."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from many_steps import PERSISTENT

import fusedrnn
from benchmarks import ptxas
from fusedrnn.cells import CELLS

#: The ways of multiplying of each file of persistent kernels.
WAYS = {
    "device": set(),
    "persistent_float32": {"Tf32Products", "SplitProducts"},
    "persistent_bfloat16": {"HalfProducts"},
    "persistent_float16": {"HalfProducts"},
}
pytestmark = pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc here")


def test_every_file_of_kernels_is_known() -> None:
    assert {source.stem for source in ptxas.SOURCES} == set(WAYS)


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("source", ptxas.SOURCES, ids=lambda source: source.stem)
def test_kernels_compile_and_do_not_spill(source: Path) -> None:
    """And the time loop has the products that its plan says: each is unrolled, none is missing."""
    # Kernels of float16 are those of bfloat16 but for the types of their products: one architecture will do.
    architectures = ptxas.ARCHITECTURES[1:] if source.stem == "persistent_float16" else ptxas.ARCHITECTURES
    compiled = ptxas.compile_source(source, architectures)
    print(ptxas.table(compiled.kernels))
    assert {kernel.architecture for kernel in compiled.kernels} == set(architectures)
    for kernel in compiled.kernels:
        assert (kernel.stack, kernel.spills) == (0, 0), kernel
    ways = WAYS[source.stem]
    if not ways:
        a_step = [kernel for kernel in compiled.kernels if re.search("ForwardStep|ForwardRow", kernel.name)]
        assert len(a_step) >= len(CELLS) * 4 * len(architectures)
        for kernel in compiled.kernels:
            # So that an SM holds as many threads as it can; of rows and of many states at least four blocks.
            few = re.search("ForwardRow|BackwardRow|BackwardStep<Slstm", kernel.name)
            assert kernel.registers <= (128 if few else 64), kernel
        return
    # At least two sizes of each direction and way of multiplying, for each architecture.
    assert len(compiled.kernels) >= len(PERSISTENT) * 2 * len(ways) * 2 * len(architectures)
    assert all(kernel.name.startswith("persistent_loop") for kernel in compiled.kernels)

    gates = {"".join(map(str.capitalize, cell["name"].split("_"))): cell["gates"] for cell in fusedrnn._C.cells()}
    assert len(compiled.products) > 25 * len(ways) and {kernel.products for kernel in compiled.products} == ways
    for kernel in compiled.products:
        times = 3 if kernel.products == "SplitProducts" else 1
        assert kernel.count == 2 * kernel.vectors * gates[kernel.cell] * times, kernel
