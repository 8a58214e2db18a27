"""Inference of a dense batch by the shortest way: stacked layers side by side, the ops for whoever listens to them or
wants derivatives, and errors that lose nothing. What is kept from call to call: test_kept_weights.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from inference import FLOATS, by_the_ops, same, tensors
from loops import FINALS, STATES, TWINS
from parity import EMULATED, Case, run_twin
from tolerances import assert_all_close
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fusedrnn
from benchmarks import probes

pytestmark = pytest.mark.usefixtures("no_gradients")


def test_a_deep_stack_holds_two_layers_at_a_time() -> None:
    """Its memory does not grow with the number of layers."""
    module, x = fusedrnn.LSTM(32, 32, num_layers=8), torch.randn(200, 64, 32)
    with torch.profiler.profile(profile_memory=True) as profile:
        module(x)
    sizes = [event.cpu_memory_usage for event in profile.events() if event.name == "[memory]"]
    held = peak = 0
    for size in sizes:
        held += size
        peak = max(peak, held)
    assert peak < 3 * 4 * x.numel()


@pytest.mark.isa
@pytest.mark.parametrize("T, B, layers", [(16, 1, 2), (17, 3, 3), (100, 1, 5), (333, 2, 2)])
@pytest.mark.parametrize("cell", TWINS)
def test_stacked_layers_side_by_side(cell: str, T: int, B: int, layers: int, threads: Callable) -> None:
    threads(2)
    assert probes.pipeline_steps(T, B, 9, 4, 8, layers, 2) > 0
    T = min(T, 20) if EMULATED else T
    for dtype in FLOATS:
        for h0 in (True, False):
            case = Case(cell, T=T, B=B, I=4, H=9, num_layers=layers, h0=h0, dtype=dtype)
            module, given_ = case.module(), case.tensors()
            hx = tuple(given_[name] for name in STATES if name in given_)
            expected = run_twin(case, torch.float64)
            for _ in range(3):
                found = tensors(module(given_["x"].detach(), None if not hx else hx if len(hx) > 1 else hx[0]))
                names = ("y", *FINALS)[: len(found)]
                margin = TWINS[cell].rounding if dtype.itemsize == 2 else 1.0
                wanted = {name: expected[name] for name in names}
                assert_all_close(dict(zip(names, found, strict=True)), wanted, dtype, margin)


def test_side_by_side_the_same_bits_again(threads: Callable) -> None:
    threads(2)
    module, x = fusedrnn.GRU(4, 30, num_layers=4), torch.randn(200, 1, 4)
    first = tensors(module(x))
    assert all(same(tensors(module(x)), first) for _ in range(200))


def test_dropout_between_layers_is_for_training() -> None:
    module, x = fusedrnn.LSTM(4, 5, num_layers=2, dropout=0.5), torch.randn(20, 2, 4)
    assert not same(tensors(module(x)), tensors(module(x)))
    module.eval()
    assert same(tensors(module(x)), by_the_ops(module, x))


class Seen:
    """The names of what went by a mode."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def _call(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class SeenOps(Seen, TorchDispatchMode):
    __torch_dispatch__ = Seen._call


class SeenFunctions(Seen, TorchFunctionMode):
    __torch_function__ = Seen._call


@pytest.mark.parametrize("layers", [1, 3])
def test_who_listens_hears_the_ops(layers: int) -> None:
    module, x = fusedrnn.LSTM(4, 5, num_layers=layers), torch.randn(20, 2, 4)
    expected = tensors(module(x))
    with SeenOps() as seen:
        assert same(tensors(module(x)), expected)
    assert seen.names.count("fusedrnn.layer_forward.default") == layers
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert module(mode.from_tensor(x))[0].shape == (20, 2, 5)
    with torch.profiler.profile() as profile:
        module(x)
    assert "fusedrnn::infer" in {event.key for event in profile.key_averages()}


class Loud(nn.Parameter):
    """A Parameter that hears of every function it is given to."""

    heard: list[str] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.heard.append(str(function))
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


def test_functions_that_are_overridden_are_called() -> None:
    module, cell, x = fusedrnn.LSTM(4, 5), fusedrnn.LSTMCell(4, 5), torch.randn(20, 2, 4)
    expected = tensors(module(x))
    with SeenFunctions() as seen:
        assert same(tensors(module(x)), expected)
        cell(x[0])
    assert seen.names.count("fusedrnn.layer_forward.default") == 2
    module.weight_hh_l0 = Loud(module.weight_hh_l0)
    assert same(tensors(module(x)), expected) and "fusedrnn.layer_forward.default" in Loud.heard


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="a sanitizer ends a process that has no memory")
def test_no_memory_for_the_working_space() -> None:
    """The error is torch's, and the results' memory is free again."""
    code = """
import resource, torch, fusedrnn
module, small, x = fusedrnn.LSTM(1, 64), torch.zeros(1, 400, 1), torch.zeros(1, 1 << 16, 1)
with torch.no_grad():
    module(small)
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (96 << 20),) * 2)
    for _ in range(3):
        try:
            module(x)
        except RuntimeError as error:
            print(error)
    print(module(small)[0].shape)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    *errors, shape = result.stdout.splitlines()
    assert len(errors) == 3 and all("not enough memory for the layer's working space" in e for e in errors), result
    assert shape == "torch.Size([1, 400, 64])"


def test_a_state_of_another_stack_is_refused() -> None:
    module, x = fusedrnn.LSTM(4, 5, num_layers=3), torch.randn(20, 2, 4)
    wrong = (torch.zeros(2, 2, 5), torch.zeros(2, 2, 5))
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size \(3, 2, 5\)"):
        module(x, wrong)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layers, bidirectional", [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_parts_of_something_larger(name: str, layers: int, bidirectional: bool, dtype: torch.dtype) -> None:
    """Inputs and states with strides and an offset of their own, as their contiguous copies."""
    torch.manual_seed(0)
    module = getattr(fusedrnn, name)(4, 6, layers, bidirectional=bidirectional, dtype=dtype)
    x = torch.randn(5, 3, 4, 9).to(dtype)[..., 7]
    states = torch.randn(2, layers * (1 + bidirectional), 3, 6, 4).to(dtype)
    both = (states[..., 2], states[..., 2].contiguous())
    hx, dense = ((s[0], s[1]) if name == "LSTM" else s[0] for s in both)
    calls = [module] if bidirectional else [module, module.step]
    for mode in (torch.no_grad, torch.enable_grad):
        for call in calls:
            with mode():
                given = x if call is module else x[0]
                found, expected = tree_leaves(call(given, hx)), tree_leaves(call(given.contiguous(), dense))
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.isa
@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells_of_parts_of_something_larger(name: str) -> None:
    cell, twin = getattr(fusedrnn, name)(4, 6), getattr(torch.nn, name)(4, 6)
    twin.load_state_dict(cell.state_dict())
    x, both = torch.randn(3, 4, 9)[..., 7], torch.randn(3, 12)
    with torch.no_grad():
        hx = both.chunk(2, 1) if name == "LSTMCell" else both[:, 6:]
        for a, b in zip(tree_leaves(cell(x, hx)), tree_leaves(twin(x, hx)), strict=True):
            torch.testing.assert_close(a, b)
