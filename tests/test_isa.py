"""Each instruction set, forced by FUSEDRNN_CPU_ISA in a process of its own, runs the tests marked ``isa``.

So does ``stepwise``, which is none: the GPU's time loop and element-wise kernels, run on the CPU.
Those are gradcheck on odd shapes, every output and gradient by name in float32, float64 and bfloat16, padded and
ragged, on 1 and 2 threads.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fusedrnn

ALL = ("base", "avx2", "avx512")
EMULATED = ("stepwise",)


@pytest.mark.isa
def test_the_set_in_use_is_the_forced_one() -> None:
    assert fusedrnn._C.isa() == os.environ.get("FUSEDRNN_CPU_ISA", fusedrnn._C.supported_isas()[-1])


def test_the_names_are_known() -> None:
    assert set(fusedrnn._C.supported_isas()) <= set(ALL)
    assert "base" in fusedrnn._C.supported_isas()


OTHERS = [name for name in ALL + EMULATED if name != fusedrnn._C.isa()]
THERE = [name for name in OTHERS if name in (*fusedrnn._C.supported_isas(), *EMULATED)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[subprocess.Popen, Path]]]:
    """A process for each set, side by side, and the file of what it prints."""
    started, folder = {}, tmp_path_factory.mktemp("isa")
    for name in THERE:
        with open(folder / name, "w") as printed:
            started[name] = subprocess.Popen(
                [sys.executable, "-m", "pytest", "-q", "-m", "isa", "-p", "no:cacheprovider", "tests"],
                cwd=Path(__file__).parent.parent,
                env={"OMP_WAIT_POLICY": "passive"} | os.environ | {"FUSEDRNN_CPU_ISA": name},
                stdout=printed,
                stderr=subprocess.STDOUT,
            ), folder / name  # fmt: skip
    yield started
    for process, _ in started.values():
        process.kill()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", OTHERS)
def test_marked_tests_pass(name: str, runs: dict[str, tuple[subprocess.Popen, Path]]) -> None:
    """Under every set but the one in use, which runs them in this session."""
    if name not in THERE:
        pytest.skip(f"this processor lacks {name}")
    process, printed = runs[name]
    code = process.wait()
    assert code == 0, printed.read_text()
    assert int(re.search(r"(\d+) passed", printed.read_text()).group(1)) > 200, printed.read_text()
