"""Threads: results do not depend on their number beyond rounding, and repeat bit for bit; several Python threads, a
number that changes between forward and backward, calls from a parallel region, from a forked process and from the
workers of a DataLoader.

That torch.set_num_threads is honoured at all, test_build.py tests.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loops import TWINS
from parity import Case, Results, assert_parity, ragged, results, run_ours, run_twin
from tolerances import assert_all_close, assert_close
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fusedrnn
from benchmarks import probes
from fusedrnn.cells import CELLS

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


@pytest.mark.isa
@pytest.mark.parametrize("cell", CELLS)
def test_slices_of_the_batch_each_with_a_team(cell: str, threads: Callable[[int], None]) -> None:
    """As the plan has it for more threads than fit the batch or the units alone."""
    for case in (Case(cell, T=24, B=20, I=40, H=70), Case(cell, T=24, B=20, I=40, H=70, bidirectional=True)):
        for config in (case, ragged(case), replace(case, dtype=torch.bfloat16)):
            number = 8 * (1 + case.bidirectional)
            lengths = config.lengths or (config.T,) * config.B
            sizes = [sum(length > t for length in lengths) for t in range(max(lengths))]
            gates, lanes = len(CELLS[cell].gates), fusedrnn._C.vector_bytes() // 8
            plan = probes.plan(sizes, 40, 70, 1 + case.bidirectional, gates, lanes, number)
            assert plan["slices"] > 1 and plan["members"] > 1
            threads(number)
            assert_parity(config)


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
def test_one_thread_and_two_give_the_same_bits(cell: str, threads: Callable[[int], None]) -> None:
    """Where a row meets tiles of several rows either way: everything if units are shared, all but the weight gradients,
    which are then a sum over slices, if the batch is.
    """
    sums = {"dweight_ih_l0", "dweight_hh_l0", "dbias_ih_l0", "dbias_hh_l0"}
    sums |= {"dweight_unit_l0"} if CELLS[cell].has_unit_weight else set()
    gates = len(CELLS[cell].gates)
    for case, shared in (
        (Case(cell, T=20, B=32, I=288, H=288, dtype=torch.float32), "members"),
        (Case(cell, T=60, B=8, I=64, H=64, dtype=torch.float32), "slices"),
        (Case(cell, T=30, B=32, I=128, H=128, dtype=torch.float32), "slices"),
    ):
        assert probes.plan([case.B] * case.T, case.I, case.H, 1, gates, 8, 2)[shared] == 2
        threads(1)
        one = run_ours(case)
        threads(2)
        two = run_ours(case)
        assert sums < set(one)
        for name in one:
            assert torch.equal(one[name], two[name]) or (shared == "slices" and name in sums), name


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


def test_other_python_threads_run_meanwhile(threads: Callable[[int], None]) -> None:
    """The interpreter's lock is free while a kernel works: inference, an op without gradients, forward and backward.

    With the lock held another thread would run for one switch interval, 5 ms, before a call and one after.
    """
    threads(1)
    layer, x = fusedrnn.LSTM(256, 256), torch.randn(300, 64, 256)
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.full((64,), 300))
    ticks, done = [], threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    def ticks_during(call: Callable[[], object]) -> int:
        start = time.perf_counter()
        call()
        end = time.perf_counter()
        return sum(start + 0.01 < at < end - 0.01 for at in ticks)

    thread = threading.Thread(target=tick)
    thread.start()
    with torch.no_grad():
        found = [ticks_during(lambda: layer(x)), ticks_during(lambda: layer(packed))]
    outputs = []
    found.append(ticks_during(lambda: outputs.append(layer(x)[0])))
    found.append(ticks_during(outputs[0].sum().backward))
    done.set()
    thread.join()
    assert min(found) >= 10, found


@pytest.mark.parametrize("forward, backward", [(1, 2), (2, 1), (4, 3)])
@pytest.mark.parametrize("cell", CELLS)
def test_the_number_changes_before_backward(
    cell: str, forward: int, backward: int, threads: Callable[[int], None]
) -> None:
    case = Case(cell, T=9, B=35, I=33, H=70, bidirectional=True)
    module = case.module()

    def call(x: torch.Tensor, hx):
        threads(forward)
        output = module(x, hx)
        threads(backward)
        return output

    found = results(call, case.tensors(), dict(module.named_parameters()))
    assert_all_close(found, run_twin(case))


def test_called_in_a_parallel_region() -> None:
    """Two threads of an OpenMP region call a layer each: it computes on the caller, and finds what it finds outside."""
    code = """
        import ctypes, torch, fusedrnn
        torch.set_num_threads(2)
        layer, x = fusedrnn.LSTM(64, 70), torch.randn(12, 35, 64)
        def train():
            leaf = x.clone().requires_grad_()
            return torch.autograd.grad(layer(leaf)[0].sum(), [leaf, *layer.parameters()])
        results = []
        runtime = ctypes.CDLL(next(line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line))
        body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: results.append(train()))
        runtime.GOMP_parallel(body, None, 2, 0)
        torch.set_num_threads(1)
        assert len(results) == 2 and all(torch.equal(a, b) for r in results for a, b in zip(r, train(), strict=True))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=ROOT, timeout=60)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_forked_process_computes(dtype: str) -> None:
    """After threads have worked, here and in torch: a fork has none of them, and OpenMP would wait for them."""
    code = f"""
        import os, torch, fusedrnn
        torch.set_num_threads(2)
        layer = fusedrnn.LSTM(64, 128, bidirectional=True, dtype=torch.{dtype})
        x = torch.randn(30, 40, 64, dtype=torch.{dtype}, requires_grad=True)
        dy = torch.randn(30, 40, 256, dtype=torch.{dtype})
        def train():  # without large operations of torch's own, which do not come back
            return torch.autograd.grad(layer(x)[0], [x, *layer.parameters()], dy)
        torch.randn(1000, 1000).relu_()
        before = train()
        if child := os.fork():
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            assert all(torch.equal(a, b) for a, b in zip(train(), before, strict=True))  # the parent goes on
        else:
            after = train()
            torch.set_num_threads(1)
            os._exit(not all(torch.allclose(a, b, rtol=0.02, atol=0.02) for a, b in zip(after, before, strict=True)))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=ROOT, timeout=60)


class Computed(Dataset):
    """Each item is what every layer makes of a batch: its output, in inference and in training, and a gradient."""

    def __init__(self) -> None:
        self.layers = nn.ModuleList(TWINS[cell].layer(33, 70) for cell in CELLS)
        self.x = torch.randn(3, 12, 35, 33)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> list[Tensor]:
        found = []
        for layer in self.layers:
            with torch.no_grad():
                found.append(layer(self.x[index])[0])
            y, _ = layer(self.x[index])
            found += [y.detach(), *torch.autograd.grad(y.sum(), list(layer.parameters()))]
        return found


@pytest.mark.parametrize("method, workers", [("fork", 2), ("spawn", 1)])
def test_workers_of_a_data_loader_compute(method: str, workers: int) -> None:
    """In a process whose autograd has no threads yet: torch refuses gradients in a fork of one that has."""
    code = "import sys; sys.path.append('tests'); from test_threads import compute_in_workers as work"
    code += f"; work({method!r}, {workers})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=250)


def compute_in_workers(method: str, workers: int) -> None:
    """After threads have worked in the parent. Spawned workers get the layers, and what they kept, by pickle."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    items = Computed()
    torch.randn(1000, 1000).relu_()
    for _ in range(2):  # the second time with kept weights
        expected = [items[i] for i in range(len(items))]
    loader = DataLoader(items, batch_size=None, num_workers=workers, multiprocessing_context=method, timeout=200)
    for found, known in zip(loader, expected, strict=True):
        for ours, parents in zip(found, known, strict=True):
            assert_close("worker", ours, parents)
    again = items[0]
    assert all(torch.equal(a, b) for a, b in zip(again, expected[0], strict=True))  # the parent goes on


def test_little_work_wakes_no_other_thread() -> None:
    """One step of a small cell runs where it was called: waking a team would cost a hundred times its arithmetic."""
    code = (
        "import os, torch, fusedrnn; torch.set_num_threads(2)\n"
        "cell = fusedrnn.GRUCell(16, 16); x = torch.randn(1, 16)\n"
        "before = len(os.listdir('/proc/self/task')); cell(x).sum().backward()\n"
        "print(len(os.listdir('/proc/self/task')) - before)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert int(out) == 0
