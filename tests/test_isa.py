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


@pytest.mark.parametrize("name", [name for name in ALL + EMULATED if name != fusedrnn._C.isa()])
def test_marked_tests_pass(name: str) -> None:
    """Under every set but the one in use, which runs them in this session."""
    if name not in (*fusedrnn._C.supported_isas(), *EMULATED):
        pytest.skip(f"this processor lacks {name}")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "isa", "-p", "no:cacheprovider", "tests"],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"FUSEDRNN_CPU_ISA": name},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) > 200, done.stdout
