"""Methods in place on what a module returns: what torch.nn's results allow, ours allow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves

import fusedrnn

T, B, I, H = 5, 2, 3, 4
METHODS: dict[str, Callable[[Tensor], Any]] = {
    "detach_": lambda t: t.detach_(),
    "mul_": lambda t: t.mul_(2),
    "squeeze_": lambda t: t.squeeze_(0),
}
OPTIONS = [{}, {"num_layers": 2}, {"bidirectional": True}, {"batch_first": True}]
OPTIONS += [{"batch_first": True, "num_layers": 2, "bidirectional": True}]
MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


def called(module: nn.Module, kind: str, states: bool) -> list[Tensor]:
    """Every tensor of the results."""
    if isinstance(module, nn.RNNCellBase):
        x = torch.randn(B, I) if kind == "batched" else torch.randn(I)
        hx = torch.zeros(*x.shape[:-1], H) if states else None
        two = isinstance(module, nn.LSTMCell)
    else:
        x = torch.randn(B, T, I) if module.batch_first else torch.randn(T, B, I)
        x = x if kind != "unbatched" else torch.randn(T, I)
        rows = module.num_layers * (2 if module.bidirectional else 1)
        hx = torch.zeros(rows, *([B] if kind != "unbatched" else []), H) if states else None
        two = isinstance(module, nn.LSTM)
        x = pack_padded_sequence(x, [5, 3], batch_first=module.batch_first) if kind == "packed" else x
    found = module(x, (hx, hx.clone()) if two and states else hx)
    leaves = tree_leaves(found, is_leaf=lambda leaf: isinstance(leaf, PackedSequence))
    return [leaf.data if isinstance(leaf, PackedSequence) else leaf for leaf in leaves]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"])
def test_what_torchs_results_allow(name: str, method: str, mode: str) -> None:
    cell = name.endswith("Cell")
    for options in [{}] if cell else OPTIONS:
        for kind in ("batched", "unbatched", *(() if cell else ("packed",))):
            for states in (False, True):
                with MODES[mode]():
                    theirs = called(getattr(nn, name)(I, H, **options), kind, states)
                    ours = called(getattr(fusedrnn, name)(I, H, **options), kind, states)
                    for a, b in zip(theirs, ours, strict=True):
                        if allowed(METHODS[method], a):
                            METHODS[method](b)
                            assert b.shape == a.shape, (options, kind, states)


def allowed(method: Callable[[Tensor], Any], t: Tensor) -> bool:
    if t._is_view() and method is METHODS["detach_"]:
        return False
    method(t)
    return True


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_a_turned_output_is_differentiated(name: str) -> None:
    """Of batch_first modules, once and twice, against torch.nn; the memory of torch.nn's output."""
    ours, theirs = (getattr(lib, name)(I, H, batch_first=True).double() for lib in (fusedrnn, nn))
    theirs.load_state_dict(ours.state_dict())
    x, found = torch.randn(B, T, I).double(), []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y, last = module(leaf)
        weight = torch.arange(y.numel()).view_as(y).double()
        loss = (weight * y.sin()).sum()
        (dx,) = torch.autograd.grad(loss, leaf, create_graph=True)
        found.append([y, dx, *torch.autograd.grad(dx.square().sum(), [leaf, *module.parameters()], allow_unused=True)])
        assert y.stride() == (H, B * H, 1)
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        torch.testing.assert_close(a, b) if a is not None else None
