"""What every test shares: hypothesis profiles, the marker of the tests run under each instruction set, threads.

Tests run on one thread unless they ask for more; ``threads`` sets the number and the old one comes back afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import hypothesis
import pytest
import torch
from many_steps import STEP_BY_STEP

import fusedrnn
from fusedrnn.cells import CELLS

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=80, print_blob=True)
hypothesis.settings.register_profile("explore", derandomize=False, deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_configure(config: pytest.Config) -> None:
    torch.backends.cudnn.allow_tf32 = False  # as tests hold float32 against float64; test_float32_switch has it on
    config.addinivalue_line("markers", "isa: run once more under each instruction set that the processor has")
    config.addinivalue_line("markers", "int8: of int8 weights, for sets that have kernels of their own for them alone")
    config.addinivalue_line("markers", "float64: computes in float64 alone, which has no kernels for many steps")
    config.addinivalue_line("markers", "device: computes on FUSEDRNN_TEST_DEVICE, as those marked isa do")
    config.addinivalue_line("markers", "long: takes a minute or more, and begins before the others")
    config.addinivalue_line("markers", "cuda: needs a GPU; python -m benchmarks.gpu tests runs all three there")


def by_steps(item: pytest.Item) -> bool:
    """Whether a test is of a cell or of a type that has no kernels for many steps."""
    values = item.callspec.params if hasattr(item, "callspec") else {}
    cell, float64 = values.get("cell"), values.get("dtype") is torch.float64 or item.get_closest_marker("float64")
    return bool(float64) or (isinstance(cell, str) and cell in STEP_BY_STEP)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if fusedrnn._C.isa() == "persistent":  # those compute what they do under "stepwise", by the same functions
        config.hook.pytest_deselected(items=[item for item in items if by_steps(item)])
        items[:] = [item for item in items if not by_steps(item)]
    items.sort(key=lambda item: item.get_closest_marker("long") is None)  # so that no core is left with one at the end


def pytest_report_header() -> str:
    sets = ", ".join(fusedrnn._C.supported_isas())
    return f"fusedrnn: instruction set {fusedrnn._C.isa()} of {sets}; torch {torch.__version__}"


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """A function that sets the number of threads for the rest of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _one_thread_fixed_seed(threads: Callable[[int], None]) -> None:
    threads(1)
    torch.manual_seed(0)


_OF_THE_PACKAGE = frozenset(CELLS)


def _forget_added_cells() -> None:
    for name in CELLS.keys() - _OF_THE_PACKAGE:
        del CELLS[name]


@pytest.fixture
def added_cells_go() -> Iterator[None]:
    """The cells that a test adds go with it."""
    yield
    _forget_added_cells()


@pytest.fixture(scope="module", autouse=True)
def _added_cells_go_with_the_file() -> Iterator[None]:
    """Tests of other files go through the registry."""
    yield
    _forget_added_cells()


@pytest.fixture
def no_gradients() -> Iterator[None]:
    """The test runs with gradients off."""
    with torch.no_grad():
        yield
