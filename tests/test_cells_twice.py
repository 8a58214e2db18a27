"""Second derivatives of single steps, by hand in C++ (csrc/second_order.h), against torch.nn's and the plain loop's:
of cells in a loop of Python, and of layers called with one step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from cell_loops import B, H, I, counted_steps, same
from torch import Tensor, nn

import fusedrnn
from fusedrnn import _C
from fusedrnn.cells import CELLS
from fusedrnn.layer import autograd, differentiable
from fusedrnn.layer.call import LayerCall

pytestmark = pytest.mark.skipif(_C.build()["fast"] is None, reason="no _fast for this torch and Python")
KINDS = [("RNNCell", {}), ("RNNCell", {"nonlinearity": "relu"}), ("LSTMCell", {}), ("GRUCell", {})]
kinds = pytest.mark.parametrize(("name", "options"), KINDS, ids=["tanh", "relu", "lstm", "gru"])


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    yield from counted_steps(monkeypatch)


def second(outputs: Sequence[Tensor], leaves: Sequence[Tensor], by: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients by ``by`` of a sum over the outputs, whose gradients by these are functions of them; then the products
    of the second derivatives, by ``by`` and ``leaves``, with a vector.
    """
    generator = torch.Generator().manual_seed(5)

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)

    found = torch.autograd.grad(sum((o.square() * draw(o)).sum() for o in outputs), by, create_graph=True)
    vectors = [draw(g) for g in found]
    return [*found, *torch.autograd.grad(found, leaves, vectors, allow_unused=True)]


@kinds
@pytest.mark.parametrize("steps", [1, 3])
def test_every_choice_of_arguments(name: str, options: dict[str, Any], steps: int, short: dict[str, int]) -> None:
    """With and without biases and states; gradients of all leaves and of some."""
    two = name == "LSTMCell"
    for bias, given, chosen in product([True, False], [True, False], ["all", "x", "weights", "states", "bias"]):
        if (chosen == "states" and not given) or (chosen == "bias" and not bias):
            continue
        found = []
        for library in (fusedrnn, nn):
            torch.manual_seed(2)
            cell = getattr(library, name)(I, H, bias=bias, dtype=torch.float64, **options)
            xs = [torch.randn(B, I, dtype=torch.float64).requires_grad_() for _ in range(steps)]
            start = [torch.randn(B, H, dtype=torch.float64).requires_grad_() for _ in range(1 + two)]
            state = (tuple(start) if two else start[0]) if given else None
            for x in xs:
                state = cell(x, state)
            outputs = list(state) if two else [state]
            leaves = [*xs, *(start if given else []), *cell.parameters()]
            biases = list(cell.parameters())[2:]
            by = {"all": leaves, "x": xs, "weights": [cell.weight_hh], "states": start, "bias": biases}
            found.append([torch.zeros(0) if t is None else t for t in second(outputs, leaves, by[chosen])])
        for ours, theirs in zip(*found, strict=True):  # what nothing depends on is None there or here, or zero
            whole = ours if ours.numel() else theirs
            same(*([t if t.numel() else torch.zeros_like(whole)] for t in (ours, theirs)))
    assert short["long"] == 0 and short["steps"] > 0


@kinds
def test_one_of_two_states_is_used(name: str, options: dict[str, Any], short: dict[str, int]) -> None:
    """So that the other's gradient is not there."""
    for index in range(1 + (name == "LSTMCell")):
        found = []
        for library in (fusedrnn, nn):
            torch.manual_seed(2)
            cell = getattr(library, name)(I, H, dtype=torch.float64, **options)
            x = torch.randn(B, I, dtype=torch.float64, requires_grad=True)
            state = cell(x)
            output = state[index] if isinstance(state, tuple) else state
            found.append(second([output], [x, *cell.parameters()], [x, cell.weight_ih]))
        for ours, theirs in zip(*found, strict=True):
            same([ours], [torch.zeros_like(ours) if theirs is None else theirs])
    assert short["long"] == 0


@kinds
@pytest.mark.parametrize("batch", [1, 70])
def test_float32_is_as_near_as_torch(name: str, options: dict[str, Any], batch: int, short: dict[str, int]) -> None:
    results = []
    for library, dtype in ((fusedrnn, torch.float32), (nn, torch.float32), (nn, torch.float64)):
        torch.manual_seed(2)
        cell = getattr(library, name)(40, 130, **options).to(dtype)
        xs = [torch.randn(batch, 40).to(dtype).requires_grad_() for _ in range(3)]
        state = None
        for x in xs:
            state = cell(x, state)
        outputs = list(state) if isinstance(state, tuple) else [state]
        leaves = [*xs, *cell.parameters()]
        results.append(second(outputs, leaves, leaves))
    for ours, theirs, exact in zip(*results, strict=True):
        error, allowed = ((t.double() - exact).norm() for t in (ours, theirs))
        assert error <= 2 * allowed + 1e-6 * exact.norm()
    assert short["long"] == 0


ONE_PRODUCT = [
    cell
    for cell, step in differentiable.STEPS.items()
    if step.operand is None and not CELLS[cell].parameters and CELLS[cell].beside < 2
]


@pytest.mark.parametrize("cell", ONE_PRODUCT)
@pytest.mark.parametrize("given", [True, False])
def test_layers_of_one_step(cell: str, given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of y and the final states, through every leaf; torch's operations take no part."""
    monkeypatch.setattr(autograd, "_one_step", lambda *_: pytest.fail("not by hand"))
    torch.manual_seed(4)
    gates, states = len(CELLS[cell].gates), len(CELLS[cell].states)
    x = torch.randn(1, B, I, dtype=torch.float64).requires_grad_()
    start = [torch.randn(1, B, H, dtype=torch.float64).requires_grad_() for _ in range(states)]
    shapes = (gates * H, I), (gates * H, H), (gates * H,), (gates * H,)
    weights = [torch.randn(*shape, dtype=torch.float64).div(2).requires_grad_() for shape in shapes]
    call = LayerCall(cell, x, start if given else [None] * states, weights)
    leaves = [x, *(start if given else []), *weights]
    found = []
    for way in (autograd.recurrent_layer, differentiable.layer):
        for chosen in (["y"], ["y", "finals"], ["finals"]):
            outputs = way(call)
            used = [outputs.y] * ("y" in chosen) + [*outputs.finals] * ("finals" in chosen)
            found.append(second(used, leaves, leaves))
    for ours, theirs in zip(found[:3], found[3:], strict=True):
        same(ours, [torch.zeros_like(o) if t is None else t for o, t in zip(ours, theirs, strict=True)])


def test_a_cell_that_has_none_by_hand(short: dict[str, int]) -> None:
    """Two products a step: torch's operations give it."""
    cell, x = fusedrnn.GRUCell(I, H, dtype=torch.float64, reset_after=False), torch.randn(B, I, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda x: cell(x), x.requires_grad_())
    assert short["long"] > 0


@kinds
def test_finite_differences(name: str, options: dict[str, Any], short: dict[str, int]) -> None:
    torch.manual_seed(2)
    cell = getattr(fusedrnn, name)(3, 4, dtype=torch.float64, **options)
    states = [torch.randn(2, 4, dtype=torch.float64, requires_grad=True) for _ in range(1 + (name == "LSTMCell"))]
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def step(x: Tensor, *given: Tensor) -> Any:
        states, weights = given[: len(given) - 4], given[-4:]
        own = dict(zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), weights, strict=True))
        return torch.func.functional_call(cell, own, (x, states if len(states) > 1 else states[0]))

    assert torch.autograd.gradgradcheck(step, [x, *states, *cell.parameters()])


@kinds
def test_what_is_written_in_between_is_noticed(name: str, options: dict[str, Any]) -> None:
    cell, x = getattr(fusedrnn, name)(I, H, **options), torch.randn(B, I, requires_grad=True)
    state = cell(x)
    (dx,) = torch.autograd.grad((state[0] if isinstance(state, tuple) else state).sum(), x, create_graph=True)
    with torch.no_grad():
        cell.weight_hh.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        dx.square().sum().backward()


@kinds
def test_autocast_around_it(name: str, options: dict[str, Any], short: dict[str, int]) -> None:
    cell, x = getattr(fusedrnn, name)(I, H, **options), torch.randn(B, I, requires_grad=True)
    found = []
    for enabled in (False, True):
        state = cell(x)
        (dx,) = torch.autograd.grad((state[0] if isinstance(state, tuple) else state).sum(), x, create_graph=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(torch.autograd.grad(dx, [x, *cell.parameters()], torch.ones_like(dx), allow_unused=True))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert short["long"] == 0


@kinds
def test_vectors_of_the_caller_are_not_written_to(name: str, options: dict[str, Any]) -> None:
    """One row, and no vector for the weights: a bias alone is where the tangents begin."""
    cell, x = getattr(fusedrnn, name)(I, H, **options), torch.randn(1, I)
    h0 = torch.randn(1, H, requires_grad=True)
    state = cell(x, (h0, torch.randn(1, H)) if name == "LSTMCell" else h0)
    y = state[0] if isinstance(state, tuple) else state
    first = torch.autograd.grad(y.square().sum(), [cell.bias_ih, cell.bias_hh, h0], create_graph=True)
    vectors = [torch.randn_like(g) for g in first]
    before = [v.clone() for v in vectors]
    torch.autograd.grad(first, [cell.weight_hh], vectors)
    assert all(map(torch.equal, vectors, before))


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_outputs_may_be_written_in_between(name: str) -> None:
    found = []
    for change in (False, True):
        torch.manual_seed(2)
        layer, x = getattr(fusedrnn, name)(I, H), torch.randn(1, B, I, requires_grad=True)
        y = layer(x)[0]
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        if change:
            y.mul_(2)
        found.append(torch.autograd.grad(dx.square().sum(), [x, layer.weight_hh_l0]))
    assert all(map(torch.equal, *found))


def test_wrong_counts_are_refused() -> None:
    x, h, saved, d = torch.randn(2, 3), torch.randn(2, 4), torch.randn(1, 2, 16), torch.randn(2, 4)
    weights = [torch.randn(*shape).requires_grad_() for shape in ((12, 3), (12, 4), (12,), (12,))]
    for states, own, given, wanted in (
        ([h], weights, [d] * 10, 6), ([h] * 3, weights, [d], 8), ([h], weights[:1], [d], 3), ([h], [], [d], 2),
        ([h], weights, [], 6), ([h], weights, [d], 5),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="all of its states or none"):
            _C.gradients_of_step("gru", x, states, own, h, saved, given, [True] * wanted)
    with pytest.raises(ValueError, match="unknown cell"):
        _C.gradients_of_step("elman", x, [h], weights, h, saved, [d], [True] * 6)


@kinds
def test_hooks_of_saved_tensors(name: str, options: dict[str, Any]) -> None:
    """They may give copies, of any strides; what has another shape or type is refused before it is read."""
    expected = None
    changes = [lambda t: t, lambda t: t.t().contiguous().t() if t.dim() == 2 else t.clone()]
    for change in changes:
        cell, x = getattr(fusedrnn, name)(I, H, **options), torch.ones(B, I, requires_grad=True)
        with torch.no_grad():
            for p in cell.parameters():
                p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, change):
            state = cell(x)
            y = state[0] if isinstance(state, tuple) else state
            (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            found = torch.autograd.grad(dx.square().sum(), [x, *cell.parameters()])
        expected = expected or found
        torch.testing.assert_close(found, expected)
    for wrong in (lambda t: t[..., :1], lambda t: t.half(), lambda t: t[:0], lambda t: t.double()):
        state = cell(x)
        y, dy = state[0] if isinstance(state, tuple) else state, torch.ones(B, H, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, wrong):
            (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        with pytest.raises(RuntimeError):
            torch.autograd.grad(dx, [dy, *cell.parameters()], torch.ones_like(dx), allow_unused=True)


@pytest.mark.parametrize("batch", [0, 1])
def test_no_samples_and_one(batch: int, short: dict[str, int]) -> None:
    for name in ("RNNCell", "LSTMCell", "GRUCell"):
        cell, x = getattr(fusedrnn, name)(I, H), torch.randn(batch, I, requires_grad=True)
        state = cell(x)
        (dx,) = torch.autograd.grad((state[0] if isinstance(state, tuple) else state).sum(), x, create_graph=True)
        found = torch.autograd.grad(dx.square().sum(), [x, *cell.parameters()])
        assert all(torch.isfinite(g).all() for g in found) and found[0].shape == x.shape
        assert batch or not any(g.any() for g in found)
