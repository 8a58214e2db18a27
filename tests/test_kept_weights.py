"""Inference keeps packed weights from call to call, and it does not show but in the time: whatever changes a weight is
seen by the next call, and nothing outlives the module.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inference import KEPT, by_the_ops, same, tensors
from loops import TWINS
from parity import EMULATED
from torch import Tensor, nn

import fusedrnn
from benchmarks import probes
from fusedrnn import _C
from fusedrnn.cells import CELLS
from fusedrnn.inference.cache import cached

pytestmark = pytest.mark.usefixtures("no_gradients")


def kept(module: nn.Module) -> Any:
    """What the module keeps for inference; new and empty if nothing."""
    return cached[module].packed if module in cached else _C.packed_weights()


@pytest.mark.isa
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"proj_size": 3}, {"bias": False}], ids=str)
@pytest.mark.parametrize("cell", [cell for cell in TWINS if CELLS[cell].beside < 2])
def test_kept_weights_give_the_same_bits(cell: str, options: dict, number: int, threads: Callable) -> None:
    if "proj_size" in options and not CELLS[cell].projectable:
        pytest.skip("only the LSTM is projected")
    threads(number)
    for dtype, H in zip(KEPT * 2, (5, 9, 17) * 2 if EMULATED else (5, 9, 17, 70, 96, 150), strict=True):
        module = TWINS[cell].layer(7, H, dtype=dtype, **options)
        x = torch.randn(9 if EMULATED else 20, 2, 7, dtype=dtype)
        expected = by_the_ops(module, x)
        sizes = []
        for _ in range(3):
            assert same(tensors(module(x)), expected)
            sizes.append(_C.packed_bytes(kept(module)))
        assert sizes[0] == 0 and sizes[1] == sizes[2] > 0  # once the same weights have come a second time


def negate(module: nn.Module) -> None:
    module.weight_hh_l0.data.neg_()


def swap_rows(module: nn.Module) -> None:
    rows = module.weight_hh_l0.data
    rows[[0, 1]] = rows[[1, 0]]


def through_numpy(module: nn.Module) -> None:
    module.weight_ih_l0.detach().numpy()[3, 2] += 1


def next_number(module: nn.Module) -> None:
    weight = module.weight_hh_l0.data
    weight[-1, -1] = torch.nextafter(weight[-1, -1], torch.tensor(9.0))


def new_parameter(module: nn.Module) -> None:
    module.weight_ih_l0 = nn.Parameter(torch.randn(20, 4))


CHANGES = {
    "in place": lambda module: module.weight_hh_l0.mul_(3),
    "bias": lambda module: module.bias_hh_l0.data.add_(1),
    "data": lambda module: module.weight_ih_l0.data.add_(1),
    "negated": negate,
    "rows swapped": swap_rows,
    "numpy": through_numpy,
    "one bit": next_number,
    "new Parameter": new_parameter,
    "load_state_dict": lambda module: module.load_state_dict(fusedrnn.LSTM(4, 5).state_dict()),
    "to another dtype": lambda module: module.double(),
    "set_": lambda module: module.weight_hh_l0.set_(torch.randn(20, 5)),
    "optimizer": lambda module: torch.optim.SGD(module.parameters(), lr=0.1).step(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_the_weights_is_seen(change: str) -> None:
    module, x = fusedrnn.LSTM(4, 5), torch.randn(30, 2, 4)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    for _ in range(2):  # once more with what the first change left
        for _ in range(3):
            before = tensors(module(x))
        CHANGES[change](module)
        x = x.to(module.weight_ih_l0.dtype)
        after = tensors(module(x))
        assert same(after, by_the_ops(module, x))
        if change not in ("to another dtype", "one bit", "new Parameter", "set_", "load_state_dict"):
            assert not same(after, before)


@given(st.data())
def test_no_bit_of_a_weight_may_change_unseen(data) -> None:
    H = data.draw(st.integers(1, 40), "H")
    with torch.no_grad():
        module, x = fusedrnn.GRU(3, H), torch.zeros(17, 1, 3)
        module(x), module(x)
        assert _C.packed_bytes(kept(module)) > 0
        weight = data.draw(st.sampled_from([module.weight_ih_l0, module.weight_hh_l0])).data.view(torch.int32).view(-1)
        place = data.draw(st.integers(0, weight.numel() - 1), "place")
        weight[place] ^= 1 << data.draw(st.integers(0, 30), "bit")
        module(x)
        assert _C.packed_bytes(kept(module)) == 0


@pytest.mark.isa
@pytest.mark.skipif(EMULATED, reason="the digest is that of the base set")
@given(st.data())
def test_nor_may_two_bits(data) -> None:
    """Also a word's top bit with any of a word as far away as a lane of the digest reads the next one."""
    with torch.no_grad():
        module, x = fusedrnn.GRU(3, 40), torch.zeros(17, 1, 3)
        module(x), module(x)
        weight = module.weight_hh_l0.data.view(torch.int32).view(-1)
        first = data.draw(st.integers(0, 1000), "first")
        second = first + data.draw(st.sampled_from([1, 8, 16, 32, 64, 128, 256]), "distance")
        weight[first] ^= data.draw(st.sampled_from([-(2**31), 1 << 30, 1]), "one bit")
        weight[second] ^= 1 << data.draw(st.integers(0, 30), "another")
        module(x)
        assert _C.packed_bytes(kept(module)) == 0


def test_weights_written_during_a_call_spoil_no_later_one() -> None:
    module, x = fusedrnn.LSTM(128, 256), torch.randn(6, 2, 128)
    values = [p.detach().clone() for p in module.parameters()]
    expected = by_the_ops(module, x)

    def write() -> None:
        with torch.no_grad():
            for sign in (-1, 1) * 3:
                for parameter, value in zip(module.parameters(), values, strict=True):
                    parameter.copy_(sign * value)

    with ThreadPoolExecutor(1) as pool:
        for _ in range(40):
            writing = pool.submit(write)
            for _ in range(6):
                module(x)
            writing.result()
            for _ in range(3):
                assert same(tensors(module(x)), expected)


def test_calls_of_different_shapes_in_turn_use_what_is_kept(threads: Callable) -> None:
    threads(2)
    module = fusedrnn.LSTM(32, 32, num_layers=2)
    for _ in range(3):
        module(torch.randn(100, 1, 32)), module(torch.randn(10, 4, 32)), module(torch.randn(1, 17, 32))
    # The first call takes the digest, the second packs, seven use it, in two layers.
    assert _C.packed_bytes(kept(module)) > 0 and _C.packed_uses(kept(module)) == 14


def test_panels_of_a_sharing_that_is_no_more_are_replaced(threads: Callable) -> None:
    module, x = fusedrnn.GRU(128, 128), torch.randn(20, 1, 128)
    for number in (1, 2, 1):
        threads(number)
        assert probes.plan([1] * 20, 128, 128, 1, 3, 8, number)["members"] == number
        expected, before = by_the_ops(module, x), _C.packed_uses(kept(module))
        used = []
        for _ in range(8):
            assert same(tensors(module(x)), expected)
            used.append(_C.packed_uses(kept(module)) - before)
        # At first: digest, packing, use. Later: three calls that pack for themselves, packing, use.
        assert used[-1] == (6 if before == 0 else 4)


@pytest.mark.parametrize("T, B, keeps", [(1, 1, False), (2, 8, False), (17, 1, True), (1, 512, True), (27, 19, False)])
def test_only_batches_that_gain_keep_anything(T: int, B: int, keeps: bool) -> None:
    """Up to 16 rows are multiplied without packing; for more than 512 packing is a small part."""
    module = fusedrnn.LSTM(4, 5)
    for _ in range(3):
        module(torch.randn(T, B, 4))
    assert (_C.packed_bytes(kept(module)) > 0) == keeps


class Equal(fusedrnn.GRU):
    """A user's class, whose equality says nothing about the weights."""

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    __hash__ = nn.Module.__hash__


@pytest.mark.parametrize("cls", [fusedrnn.GRU, fusedrnn.GRUCell, Equal])
def test_copies_of_a_module_keep_for_themselves(cls: type[nn.Module]) -> None:
    module, x = cls(4, 5), torch.randn(*((20,) if cls is fusedrnn.GRUCell else (20, 2)), 4)
    for _ in range(3):
        expected = module(x)[0]
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert _C.packed_bytes(kept(twin)) == 0 and torch.equal(twin(x)[0], expected)
    assert _C.packed_bytes(kept(module)) > 0 and _C.packed_uses(kept(module)) == 1


FREED = {
    "to": lambda module: module.to(torch.float64),
    "share_memory": lambda module: module.share_memory(),
    "train": lambda module: module.train(),
    "train of the model": lambda module: nn.Sequential(module).train(),
    "revert": fusedrnn.revert,
}


@pytest.mark.parametrize("cls", [fusedrnn.LSTM, fusedrnn.LSTMCell])
@pytest.mark.parametrize("how", FREED)
def test_what_is_kept_goes_when_it_will_not_be_used(how: str, cls: type[nn.Module]) -> None:
    module, x = cls(4, 5), torch.randn(*((20, 2) if cls is fusedrnn.LSTM else (20,)), 4)
    for _ in range(3):
        module(x)
    module.eval()
    assert _C.packed_bytes(kept(module)) > 0
    FREED[how](module)
    assert module not in cached


def test_shapes_and_threads_may_change_from_call_to_call(threads: Callable) -> None:
    module = fusedrnn.LSTM(30, 70, num_layers=2)
    xs = [torch.randn(T, B, 30) for T, B in ((20, 1), (3, 8), (40, 12), (1, 400), (2, 1))]
    expected = [by_the_ops(module, x) for x in xs]
    for _ in range(3):
        for number in (1, 2, 3):
            threads(number)
            for x, values in zip(xs, expected, strict=True):
                for _ in range(2):
                    for a, b in zip(tensors(module(x)), values, strict=True):
                        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_threads_of_python_share_a_module(threads: Callable) -> None:
    """Also while its weights are first packed, and packed anew."""
    module = fusedrnn.LSTM(16, 40, num_layers=2)
    xs = [torch.randn(T, 1, 16) for T in (12, 30, 100, 12)]

    def calls(x: Tensor) -> list[list[Tensor]]:
        torch.set_num_threads(1)
        with torch.no_grad():
            return [tensors(module(x)) for _ in range(20)]

    for _ in range(5):
        module.weight_hh_l0.data.mul_(-1.01)
        expected = [by_the_ops(module, x) for x in xs]
        with ThreadPoolExecutor(len(xs)) as pool:
            for found, values in zip(pool.map(calls, xs), expected, strict=True):
                assert all(same(each, values) for each in found)
