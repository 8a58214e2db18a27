"""Each instruction set, forced by FUSEDRNN_CPU_ISA in a process of its own, runs the tests marked ``isa``.

So do ``stepwise`` and ``persistent``, which are none: the GPU's time loop run on the CPU, by its element-wise kernels
and by the kernels for many steps. Those tests are gradcheck on odd shapes, every output and gradient by name in
float32, float64 and bfloat16, padded and ragged, on 1 and 2 threads. Under a set that differs from another in its
kernels of int8 weights alone, the tests marked ``int8`` run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import fusedrnn

ALL = ("base", "avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx")
OF_INT8 = ("avx_vnni", "avx512_vnni")  # their other kernels are those of another set
EMULATED = ("stepwise", "persistent")


def mark(name: str) -> str:
    """Of the tests that run under a set."""
    return "int8" if name in OF_INT8 else "isa"


@pytest.mark.isa
@pytest.mark.int8
def test_the_set_in_use_is_the_forced_one() -> None:
    best = fusedrnn._C.supported_isas()
    if best[-1] == "avx512_bf16" and fusedrnn._C.isa() == "avx512_vnni":
        best.pop()  # an Intel processor without AMX: it does not pay
    assert fusedrnn._C.isa() == os.environ.get("FUSEDRNN_CPU_ISA", best[-1])


def test_the_names_are_known() -> None:
    assert set(fusedrnn._C.supported_isas()) <= set(ALL)
    assert "base" in fusedrnn._C.supported_isas()


OTHERS = [name for name in ALL + EMULATED if name != fusedrnn._C.isa()]
THERE = [name for name in OTHERS if name in (*fusedrnn._C.supported_isas(), *EMULATED)]


@pytest.fixture(scope="module")
def printed_by(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], tuple[int, str]]]:
    """The exit status of the marked tests under a set, and what they print: a process for each set, side by side."""
    started: dict[str, subprocess.Popen] = {}
    folder = tmp_path_factory.mktemp("isa")

    def start(name: str) -> None:
        with open(folder / name, "w") as printed:
            started[name] = subprocess.Popen(
                [sys.executable, "-m", "pytest", "-q", "-m", mark(name), "-p", "no:cacheprovider", "tests"],
                cwd=Path(__file__).parent.parent,
                env={"OMP_WAIT_POLICY": "passive"} | os.environ | {"FUSEDRNN_CPU_ISA": name},
                stdout=printed,
                stderr=subprocess.STDOUT,
            )

    def finished(name: str) -> tuple[int, str]:
        side_by_side = [name] if "PYTEST_XDIST_WORKER" in os.environ else THERE  # other workers have the others
        for each in side_by_side:
            if each not in started:
                start(each)
        return started[name].wait(), (folder / name).read_text()

    yield finished
    for process in started.values():
        process.kill()


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", OTHERS)
def test_marked_tests_pass(name: str, printed_by: Callable[[str], tuple[int, str]]) -> None:
    """Under every set but the one in use, which runs them in this session."""
    if name not in THERE:
        pytest.skip(f"this processor lacks {name}")
    code, printed = printed_by(name)
    assert code == 0, printed
    assert int(re.search(r"(\d+) passed", printed).group(1)) > (100 if name in OF_INT8 else 200), printed
