"""Cells in a loop of Python, ours beside torch.nn's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedrnn
from fusedrnn import _C
from fusedrnn.inference import plain_call

NAMES = ("RNNCell", "LSTMCell", "GRUCell")
WEIGHTS = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
T, B, I, H = 5, 3, 4, 6


def counted_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """How many steps went the short way, and how many backward passes of one the long way."""
    count = {"steps": 0, "long": 0}

    def counted(*args: Any) -> Any:
        found = _C.train_cell(*args)
        count["steps"] += found is not None
        return found

    def backward(*args: Any) -> Any:
        count["long"] += 1
        return autograd.backward_of_step(*args)

    autograd = fusedrnn.layer.autograd
    monkeypatch.setattr(plain_call, "train_cell", counted)
    _C.set_long_way(backward)
    yield count
    _C.set_long_way(autograd.backward_of_step)


def pair(name: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Our cell and torch.nn's with the same weights."""
    torch.manual_seed(0)
    ours = getattr(fusedrnn, name)(I, H, dtype=torch.float64, **options)
    theirs = getattr(nn, name)(I, H, dtype=torch.float64, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def inputs(steps: int = T, batch: int = B) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(steps, batch, I, dtype=torch.float64)


def first(state: Any) -> Tensor:
    return state[0] if isinstance(state, tuple) else state


def detached(state: Any) -> Any:
    return tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()


def run(cell: nn.Module, x: Sequence[Tensor], state: Any = None) -> list[Tensor]:
    """h of every step."""
    outputs = []
    for x_t in x:
        state = cell(x_t, state)
        outputs.append(first(state))
    return outputs


def loss(cell: nn.Module, x: Sequence[Tensor], state: Any = None) -> Tensor:
    return torch.stack(run(cell, x, state)).square().sum()


def gradients(cell: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in cell.parameters()]


def same(found: Sequence[Any], expected: Sequence[Any]) -> None:
    torch.testing.assert_close(list(found), list(expected), rtol=1e-10, atol=1e-12)
