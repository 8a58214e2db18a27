"""Functional cells, whose weights are no module's: by the same short ways as the modules'."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cell_loops import B, H, I, counted_steps, same
from torch import Tensor, nn

from fusedrnn import _C
from fusedrnn.functional import gru_cell, lstm_cell, rnn_cell
from fusedrnn.inference import cache

pytestmark = pytest.mark.skipif(_C.build()["fast"] is None, reason="no _fast for this torch and Python")
CELLS = {"LSTMCell": lstm_cell, "GRUCell": gru_cell, "RNNCell": rnn_cell}
names = pytest.mark.parametrize("name", CELLS)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    yield from counted_steps(monkeypatch)


def given(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, list[Tensor], Tensor]:
    torch.manual_seed(0)
    cell = getattr(nn, name)(I, H, dtype=dtype)
    return cell, [p.detach().clone().requires_grad_() for p in cell.parameters()], torch.randn(4, B, I, dtype=dtype)


def loss(step: Any, x: Tensor) -> Tensor:
    state, total = None, 0.0
    for x_t in x:
        state = step(x_t, state)
        total = total + (state[0] if isinstance(state, tuple) else state).square().sum()
    return total


@names
def test_training(name: str, short: dict[str, int]) -> None:
    theirs, weights, x = given(name)
    for _ in range(2):  # the second: with what the first has left
        found = torch.autograd.grad(loss(lambda x, s: CELLS[name](x, s, *weights), x), weights)
        same(found, torch.autograd.grad(loss(theirs, x), list(theirs.parameters())))
    assert short == {"steps": 8, "long": 0}


@names
def test_weights_that_are_computed(name: str, short: dict[str, int]) -> None:
    """As in meta-learning: each step of an optimizer makes new ones, and the last loss goes back through all."""
    theirs, weights, x = given(name)

    def by_module(x_t: Tensor, state: Any, *fast: Tensor) -> Any:
        own = dict(zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), fast, strict=True))
        return torch.func.functional_call(theirs, own, (x_t, state))

    found = []
    for parameters, cell in ((weights, CELLS[name]), (list(theirs.parameters()), by_module)):
        fast = parameters
        for _ in range(2):
            total = loss(lambda x_t, state, cell=cell, fast=fast: cell(x_t, state, *fast), x)
            gradients = torch.autograd.grad(total, fast, create_graph=True)
            fast = [p - 0.1 * g for p, g in zip(fast, gradients, strict=True)]
        found.append(torch.autograd.grad(sum(p.square().sum() for p in fast), parameters))
    same(*found)
    assert short["steps"] > 0 and short["long"] == 0


@names
def test_inference(name: str) -> None:
    theirs, weights, x = given(name)
    with torch.no_grad():
        same([loss(lambda x, s: CELLS[name](x, s, *weights), x)], [loss(theirs, x)])


@names
def test_what_is_wrong_is_said(name: str) -> None:
    _, weights, x = given(name)
    cell = CELLS[name]
    for arguments, message in (
        ((x[0][:, 1:], None, *weights), "inconsistent input_size"),
        ((x, None, *weights), "Expected 2D input"),
        ((x[0].float(), None, *weights), "one dtype"),
        ((x[0], None, weights[0], weights[1][0]), "w_hh must have 2 dimensions"),
        ((x[0], None, torch.tensor(1.0), weights[1]), "w_ih must have 2 dimensions"),
    ):
        with pytest.raises(RuntimeError, match=message):
            cell(*arguments)


def test_nothing_is_kept_of_weights_that_are_gone() -> None:
    before = len(cache._of_weights)

    def train() -> None:
        _, weights, x = given("GRUCell")
        for own in (weights, [w * 1 for w in weights]):  # leaves, and what is computed
            loss(lambda x, s, own=own: gru_cell(x, s, *own), x).backward()
            assert len(cache._of_weights) == before + 1

    train()
    assert len(cache._of_weights) == before
