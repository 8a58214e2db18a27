"""Nothing of ours keeps a module, a model or a graph alive: what torch.nn's modules let go, ours let go."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from loops import SINGLES, TWINS
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves

import fusedrnn

T, B, I, H = 5, 3, 4, 6


@pytest.fixture(autouse=True, scope="module")
def what_was_there_before_is_not_collected() -> Iterator[None]:
    """A collection looks at the objects of these tests alone, not at all of torch's."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def tensors(results: Any) -> list[Tensor]:
    return [t for t in tree_leaves(results) if isinstance(t, Tensor) and t.requires_grad]


def penalty(module: nn.Module, x: Tensor) -> Any:
    """A graph of the backward pass too."""
    leaf = x.clone().requires_grad_()
    results = module(leaf)
    return results, torch.autograd.grad(tensors(results)[0].sum(), leaf, create_graph=True)


def recorded(module: nn.Module, x: Tensor) -> Any:
    results = module(x)
    with fusedrnn.record_gradients(module) as rec:
        tensors(results)[0].sum().backward(retain_graph=True)
    assert rec.layers
    return results


CALLS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "plain": lambda m, x: m(x),
    "packed": lambda m, x: m(pack_padded_sequence(x, [5, 4, 2]))[0].data,
    "lengths": lambda m, x: m(x, lengths=[5, 0, 2]),
    "states": lambda m, x: m(x, return_states=True),
    "penalty": penalty,
    "recorded": recorded,
    "after a step": lambda m, x: (m.step(x[0]), m.step(x[0]), m(x))[2],
}


def gone(make: Callable[[], nn.Module], call: Callable[[nn.Module, Tensor], Any], x: Tensor) -> bool:
    """Whether a module that keeps its own output goes, and the graph with it; and a parent on which a hook keeps it."""
    module = make()
    module.last = call(module, x)
    refs = [weakref.ref(module), *(weakref.ref(p) for p in module.parameters()), weakref.ref(tensors(module.last)[0])]
    model = nn.Sequential(make())
    model[0].register_forward_hook(lambda child, given, results, model=model: vars(model).update(last=results))
    call(model[0], x)
    refs += [weakref.ref(model), weakref.ref(model[0])]
    del module, model
    gc.collect()
    return all(ref() is None for ref in refs)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("cell", TWINS)
def test_layers_go(cell: str, call: str, layers: int) -> None:
    assert gone(lambda: TWINS[cell].layer(I, H, num_layers=layers), CALLS[call], torch.randn(T, B, I))


@pytest.mark.parametrize("cell", SINGLES)
def test_cells_go(cell: str) -> None:
    for call in (CALLS["plain"], penalty):
        assert gone(lambda: TWINS[cell].cell(I, H), call, torch.randn(B, I))


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_patched_modules_go(name: str) -> None:
    with fusedrnn.patch_torch():
        assert gone(lambda: getattr(nn, name)(I, H), CALLS["plain"], torch.randn(T, B, I))
        with torch.no_grad():
            module = getattr(nn, name)(I, H)
            module(torch.randn(T, B, I))
    ref = weakref.ref(module)
    del module
    gc.collect()
    assert ref() is None
