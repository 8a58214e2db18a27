"""What of torch looks into the backward pass of cells that train in a loop of Python, or steers it: hooks, optimizers,
checkpoints, derivatives of gradients, transforms, compiled autograd (``csrc/training.h``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cell_loops import NAMES, B, H, I, T, counted_steps, first, gradients, inputs, loss, pair, run, same
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fusedrnn
from fusedrnn import _C

pytestmark = pytest.mark.skipif(_C.build()["fast"] is None, reason="no _fast for this torch and Python")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    yield from counted_steps(monkeypatch)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_in_which_gradients_come(name: str) -> None:
    """Those of a cell before those of what came before it, whatever graphs there still are."""
    order: list[list[str]] = []
    for cell in pair(name):
        encoder = nn.Linear(I, I, dtype=torch.float64)
        order.append([])
        for what, module in (("cell", cell), ("encoder", encoder)):
            module.get_parameter("weight_hh" if what == "cell" else "weight").register_post_accumulate_grad_hook(
                lambda _, what=what, to=order[-1]: to.append(what)
            )
        for _ in range(3):
            total = loss(cell, encoder(inputs()))  # the one before is still there
            total.backward()
    assert order[0] == order[1] == ["cell", "encoder"] * 3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("by_data", [False, True])
def test_inputs_and_states_that_are_parameters(name: str, by_data: bool) -> None:
    """An optimizer writes them in the backward pass, before the gradients of the weights are there."""
    finals = []
    for cell in pair(name):
        torch.manual_seed(3)
        token, begin = (nn.Parameter(torch.randn(1, size, dtype=torch.float64)) for size in (I, H))

        def update(p: nn.Parameter, by_data: bool = by_data) -> None:
            with torch.no_grad():
                (p.data if by_data else p).sub_(0.1 * p.grad)
            p.grad = None

        for p in (token, begin, *cell.parameters()):
            p.register_post_accumulate_grad_hook(update)
        for _ in range(3):
            state = None
            for i, x_t in enumerate(inputs(6)):
                if i == 4:  # begins anew, by a learned state
                    h = begin.expand(B, H)
                    state = (h, h) if name == "LSTMCell" else h
                state = cell(token.expand(B, I) if i in (3, 5) else x_t, state)
            total = first(state).square().sum() + torch.stack(run(cell, [x_t for x_t in inputs(2)])).sum()
            total.backward()
        finals.append([token, begin, *cell.parameters()])
    same([p.detach() for p in finals[0]], [p.detach() for p in finals[1]])


@pytest.mark.parametrize("name", NAMES)
def test_hooks_of_a_weight_see_one_gradient(name: str) -> None:
    ours, theirs = pair(name)
    seen: list[list[Tensor]] = [[], []]
    for cell, to in zip((ours, theirs), seen, strict=True):
        cell.weight_hh.register_hook(lambda g, to=to: to.append(g) or 2 * g)
        cell.weight_hh.register_post_accumulate_grad_hook(lambda p, to=to: to.append(p.grad.clone()))
        loss(cell, inputs()).backward()
    assert len(seen[0]) == 2
    same(seen[0], seen[1])
    same(gradients(ours), gradients(theirs))


@pytest.mark.parametrize("name", NAMES)
def test_an_optimizer_inside_the_backward_pass(name: str) -> None:
    ours, theirs = pair(name)
    for cell in (ours, theirs):
        optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in cell.parameters()}

        def update(p: nn.Parameter, optimizers: dict[nn.Parameter, torch.optim.SGD] = optimizers) -> None:
            optimizers[p].step()
            optimizers[p].zero_grad()

        for p in cell.parameters():
            p.register_post_accumulate_grad_hook(update)
        for _ in range(2):
            loss(cell, inputs()).backward()
    same(list(ours.parameters()), list(theirs.parameters()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(name: str, reentrant: bool) -> None:
    ours, theirs = pair(name)
    found = []
    for cell in (ours, theirs):
        x = inputs().requires_grad_()
        h = torch.zeros(B, H, dtype=x.dtype)
        state = (h, h) if name == "LSTMCell" else h

        def steps(x: Tensor, state: Any, cell: nn.Module = cell) -> Any:
            for x_t in x:
                state = cell(x_t, state)
            return state

        for part in (x[:2], x[2:]):
            state = checkpoint(steps, part, state, use_reentrant=reentrant)
        first(state).square().sum().backward()
        found.append([x.grad, *gradients(cell)])
    same(*found)


@pytest.mark.parametrize("name", NAMES)
def test_hooks_of_saved_tensors(name: str) -> None:
    ours, theirs = pair(name)
    packed = []
    for cell in (ours, theirs):
        with saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t):
            total = loss(cell, inputs())
        total.backward()
    same(gradients(ours), gradients(theirs))
    assert packed


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_of_gradients(name: str, short: dict[str, int]) -> None:
    """To the third order; and gradients mapped over, which the kernels alone do not give."""
    ours, theirs = pair(name)
    found = []
    for cell in (ours, theirs):
        x = inputs(2).requires_grad_()
        leaves = [x, *cell.parameters()]
        y = torch.stack(run(cell, x))
        dy = torch.stack([y.detach(), 2 * y.detach()])
        results = list(torch.autograd.grad(y, leaves, dy, is_grads_batched=True, retain_graph=True))
        for _ in range(3):
            gradient = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
            y = torch.cat([g.flatten() for g in gradient])
            results += gradient
        found.append(results)
    same(*found)
    assert short["steps"] == 2 and short["long"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_mixed_orders(name: str) -> None:
    """Of one graph a gradient that is differentiated, and one that is not."""
    ours, theirs = pair(name)
    found = []
    for cell in (ours, theirs):
        x = inputs().requires_grad_()
        y = torch.stack(run(cell, x))
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (dx.square().sum() + y.square().sum()).backward()
        found.append([x.grad, *gradients(cell)])
    same(*found)


@pytest.mark.parametrize("name", NAMES)
def test_steps_of_both_ways_in_one_pass(name: str, short: dict[str, int]) -> None:
    """One has saved tensors that the kernels do not take: views to be negated."""
    found = []
    for cell in pair(name):
        x, state, outputs = inputs().requires_grad_(), None, []
        for i, x_t in enumerate(x):
            with saved_tensors_hooks(lambda t: t, (lambda t: torch._neg_view(-t)) if i == 2 else lambda t: t):
                state = cell(x_t, state)
            outputs.append(first(state))
        found.append(torch.autograd.grad(torch.stack(outputs).square().sum(), [x, *cell.parameters()]))
    same(*found)
    assert short == {"steps": T, "long": 1}


def test_who_looks_on_sees_the_ops(short: dict[str, int]) -> None:
    cell = pair("LSTMCell")[0]
    with FlopCounterMode(display=False) as counter:
        total = loss(cell, inputs())
        total.backward()
    assert short["steps"] == 0 and counter.get_total_flops() > 0
    total = loss(cell, inputs())
    assert short["steps"] == T
    with FlopCounterMode(display=False) as backward:
        total.backward()
    assert short["long"] == T and backward.get_total_flops() > 0
    with profile() as seen:
        loss(cell, inputs())
    assert sum(e.count for e in seen.key_averages() if e.key == "fusedrnn::cell") == T


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_inside_backward(name: str) -> None:
    """Cotangents with tangents of their own."""
    ours, theirs = pair(name)
    found = []
    for cell in (ours, theirs):
        x = inputs(2).requires_grad_()
        y = torch.stack(run(cell, x))
        with torch.autograd.forward_ad.dual_level():
            dy = torch.autograd.forward_ad.make_dual(torch.ones_like(y), y.detach())
            (dx,) = torch.autograd.grad(y, x, dy)
            found.append(list(torch.autograd.forward_ad.unpack_dual(dx)))
    same(*found)


@pytest.mark.parametrize("name", NAMES)
def test_transforms(name: str, short: dict[str, int]) -> None:
    """Gradients of each sample; torch.nn's cells cannot be mapped over."""
    ours, theirs = pair(name)
    loop = Loop(ours)
    parameters = {key: p.detach() for key, p in loop.named_parameters()}

    def total(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(loop, parameters, (x,))

    mapped = torch.func.vmap(torch.func.grad(total), in_dims=(None, 1))(parameters, inputs().unsqueeze(2))
    assert short["steps"] == 0
    for i in range(B):
        expected = torch.autograd.grad(loss(theirs, inputs()[:, i : i + 1]), list(theirs.parameters()))
        same([g[i] for g in mapped.values()], expected)


class Loop(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        return loss(self.cell, x)


@pytest.mark.parametrize("name", NAMES)
def test_patched(name: str, short: dict[str, int]) -> None:
    _, theirs = pair(name)
    expected = torch.autograd.grad(loss(theirs, inputs()), list(theirs.parameters()))
    with fusedrnn.patch_torch():
        with torch.no_grad():
            run(theirs, inputs(batch=200))
        found = torch.autograd.grad(loss(theirs, inputs()), list(theirs.parameters()))
    same(found, expected)
    assert short["steps"] == T


def test_compiled_autograd(short: dict[str, int]) -> None:
    """It calls the nodes from a program of its own, which has no room for rows that wait."""
    from torch._dynamo import compiled_autograd

    ours, theirs = pair("LSTMCell")
    found = []
    for cell in (ours, theirs):
        x = inputs(3).requires_grad_()
        for _ in range(2):
            total = loss(cell, x)  # the one before is still there
            with compiled_autograd._enable(torch.compile(backend="eager")):
                total.backward()
        found.append([x.grad, *gradients(cell)])
    same(*found)
    assert short["steps"] == 6
