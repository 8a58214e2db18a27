"""Threads: results do not depend on their number beyond rounding, and repeat bit for bit.

That torch.set_num_threads is honoured at all, test_build.py tests.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fusedrnn.cells import CELLS
from parity import Case, Results, ragged, results, run_ours, run_twin
from tolerances import assert_all_close

ROOT = Path(__file__).parent.parent
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
CASES = {
    "small": {"T": 3, "B": 2, "H": 5},
    "one_sample": {"T": 7, "B": 1, "H": 65},
    "wide": {"T": 5, "B": 33, "I": 30, "H": 70, "num_layers": 2, "bidirectional": True},
}


def large(cell: str, dtype: torch.dtype, *, packed: bool = False) -> Case:
    case = Case(cell, T=12, B=35, I=33, H=70, num_layers=2, bidirectional=True, dtype=dtype)
    return ragged(case) if packed else case


@pytest.mark.isa
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cell", CELLS)
def test_two_threads_against_the_reference(cell: str, case: str, threads: Callable[[int], None]) -> None:
    for dtype in DTYPES[:2]:
        for config in (Case(cell, dtype=dtype, **CASES[case]), ragged(Case(cell, dtype=dtype, **CASES[case]))):
            threads(1)
            expected = run_twin(config, torch.float64)
            threads(2)
            assert_all_close(run_ours(config), expected, dtype)


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_the_same_bits_again(cell: str, dtype: torch.dtype, number: int, threads: Callable[[int], None]) -> None:
    threads(number)
    for packed in (False, True):
        case = large(cell, dtype, packed=packed)
        first, again = run_ours(case), run_ours(case)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("cell", CELLS)
def test_more_threads_than_rows(cell: str, threads: Callable[[int], None]) -> None:
    threads(7)
    small = Case(cell, T=3, B=2, H=5, num_layers=2)
    for case in (small, replace(small, B=1, H=1), replace(small, B=0), ragged(replace(small, B=3))):
        assert_all_close(run_ours(case), run_twin(case))


@pytest.mark.parametrize("cell", CELLS)
def test_called_from_several_python_threads_at_once(cell: str, threads: Callable[[int], None]) -> None:
    threads(2)
    case = Case(cell, T=8, B=35, I=9, H=33, dtype=torch.float32)
    module = case.module()
    expected = run_ours(case)

    def train(index: int) -> Results:
        torch.set_num_threads(2)
        return results(module, case.tensors(), dict(module.named_parameters()))

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(train, range(12)))
    for each in found:
        assert all(torch.equal(each[name], expected[name]) for name in expected)


def test_little_work_wakes_no_other_thread() -> None:
    """One step of a small cell runs where it was called: waking a team would cost a hundred times its arithmetic."""
    code = (
        "import os, torch, fusedrnn; torch.set_num_threads(2); cell = fusedrnn.GRUCell(16, 16); x = torch.randn(1, 16)\n"
        "before = len(os.listdir('/proc/self/task')); cell(x).sum().backward()\n"
        "print(len(os.listdir('/proc/self/task')) - before)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert int(out) == 0
