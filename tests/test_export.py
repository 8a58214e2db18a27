"""torch.export with dynamic sizes: exported, saved, loaded and run, a layer is one op that keeps nothing for backward.

Strict tracing is Dynamo's; ``torch.export`` sets ``allow_rnn`` itself.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import pytest
import torch
from loops import SINGLES, TWINS, states_like
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves

import fusedrnn
from fusedrnn.cells import CELLS

T, B, N = Dim("T"), Dim("B"), Dim("N")
STRICT = pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])


def states(cell: str, *shape: int) -> Tensor | tuple[Tensor, ...]:
    hx = tuple(torch.randn(shape) for _ in CELLS[cell].states)
    return hx if len(hx) > 1 else hx[0]


def sizes(cell: str, dims: dict) -> dict | tuple:
    return states_like(cell, dims)


def assert_exported(
    model: nn.Module, make: Callable[..., tuple], dynamic: Sequence, inputs: Sequence[tuple], strict: bool, layers: int
) -> None:
    """The program, saved and loaded, computes what the model does; it has one forward op a layer, without ``saved``."""
    program = torch.export.export(model, make(*inputs[0]), dynamic_shapes=dynamic, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    program = torch.export.load(file)
    ours = [node for node in program.graph.nodes if "fusedrnn" in str(node.target)]
    assert [node.target for node in ours] == [fusedrnn.ops.layer_forward] * layers
    assert not any(node.args[-1] for node in ours)
    for sizes in inputs:
        args = make(*sizes)
        found, expected = tree_leaves(program.module()(*args)), tree_leaves(model(*args))
        for actual, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, wanted)


@STRICT
@pytest.mark.parametrize("cell", CELLS)
def test_layers(cell: str, strict: bool) -> None:
    layers = 1 if strict else 2
    model = TWINS[cell].layer(4, 5, num_layers=layers, bidirectional=True)

    def make(steps: int, batch: int) -> tuple:
        return torch.randn(steps, batch, 4), states(cell, 2 * layers, batch, 5)

    dynamic = ({0: T, 1: B}, sizes(cell, {1: B}))
    assert_exported(model, make, dynamic, [(3, 2), (7, 5), (1, 1)], strict, layers)


@pytest.mark.parametrize("cell", SINGLES)
def test_cells(cell: str) -> None:
    model = TWINS[cell].cell(4, 5)

    def make(batch: int) -> tuple:
        return torch.randn(batch, 4), states(cell, batch, 5)

    assert_exported(model, make, ({0: B}, sizes(cell, {0: B})), [(3,), (1,), (7,)], False, 1)


@STRICT
def test_projected_and_batch_first(strict: bool) -> None:
    model = fusedrnn.LSTM(4, 5, proj_size=3, bidirectional=True, batch_first=True)

    def make(batch: int, steps: int) -> tuple:
        return (torch.randn(batch, steps, 4),)

    assert_exported(model, make, ({0: B, 1: T},), [(3, 2), (5, 7), (1, 1)], strict, 1)


@STRICT
def test_a_converted_model(strict: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GRU(4, 5, 2))
    fusedrnn.convert(model)
    assert_exported(model, lambda t, b: (torch.randn(t, b, 4),), ({0: T, 1: B},), [(3, 2), (7, 5)], strict, 2)


class Packed(nn.Module):
    """A layer on the parts of a PackedSequence."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = fusedrnn.LSTM(4, 5, bidirectional=True)

    def forward(self, data: Tensor, batch_sizes: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple:
        y, last = self.layer(PackedSequence(data, batch_sizes), hx)
        return y.data, last


@STRICT
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "states"])
def test_packed(given: bool, strict: bool) -> None:
    if strict and torch.__version__.startswith("2.12."):
        pytest.skip("Dynamo of torch 2.12 fails at a PackedSequence made from its first two parts")

    def make(*batch_sizes: int) -> tuple:
        hx = (states("lstm", 2, batch_sizes[0], 5),) if given else ()
        return torch.randn(sum(batch_sizes), 4), torch.tensor(batch_sizes), *hx

    inputs = [(3, 2, 1), (4, 4, 2, 1), (1, 1)]
    dynamic = ({0: N}, {0: T}, *[({1: B}, {1: B})] * given)
    assert_exported(Packed(), make, dynamic, inputs, strict, 1)


class Last(nn.Module):
    """The final states of padded sequences with their lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = fusedrnn.GRU(4, 5)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.layer(pack_padded_sequence(x, lengths, enforce_sorted=False))[1]


def test_packed_inside() -> None:
    """Non-strict alone: Dynamo leaves pack_padded_sequence to Python."""

    def make(*lengths: int) -> tuple:
        return torch.randn(max(lengths), len(lengths), 4), torch.tensor(lengths)

    assert_exported(Last(), make, ({0: T, 1: B}, {0: B}), [(2, 3), (4, 1, 7)], False, 1)
