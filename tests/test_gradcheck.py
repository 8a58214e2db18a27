"""Every hand-derived backward against central differences in float64, for every cell and every kind of layer.

Small odd shapes. The whole product of options runs in gradcheck's fast mode (one random projection of the Jacobian);
one case of each kind runs in the slow mode, entry by entry. Second derivatives likewise, and a third.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from loops import SINGLES, TWINS, hx_of
from parity import DEVICE, Case, packer, ragged, twin
from torch import Tensor
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence

from fusedrnn.cells import CELLS
from fusedrnn.layer import differentiable
from fusedrnn.layer.autograd import recurrent_layer
from fusedrnn.layer.call import LayerCall, Options

PROJECTED = [name for name, cell in CELLS.items() if cell.projectable]


def test_every_cell_of_the_registry_has_a_twin() -> None:
    assert set(TWINS) == set(CELLS)


def problem(case: Case) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """The layer as a function of everything that has a gradient, and these values: x, states, parameters."""
    module = case.module().to(DEVICE)
    names = [name for name, _ in module.named_parameters()]
    tensors = {name: t.detach().to(DEVICE).requires_grad_() for name, t in case.tensors().items()}
    pack = packer(case)

    def outputs(*leaves: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip([*tensors, *names], leaves, strict=True))
        x = pack(values["x"]) if pack else values["x"]
        hx = hx_of(values)
        y, last = functional_call(module, {name: values[name] for name in names}, (x, hx))
        last = last if isinstance(last, tuple) else (last,)
        return y.data if isinstance(y, PackedSequence) else y, *last

    return outputs, [*tensors.values(), *(p.detach().requires_grad_() for p in module.parameters())]


def check(case: Case, *, fast: bool) -> None:
    assert torch.autograd.gradcheck(*problem(case), fast_mode=fast)


def kinds(cell: str) -> list[Case]:
    """The product of layers, directions, bias, projection, packing and given initial states."""
    cases = []
    projections = (0, 3) if CELLS[cell].projectable else (0,)
    options = product((1, 2), (False, True), (True, False), projections, (None, True, False), (True, False))
    for num_layers, bidirectional, bias, proj_size, packing, h0 in options:
        case = Case(cell, num_layers=num_layers, bidirectional=bidirectional, bias=bias, proj_size=proj_size, h0=h0)
        cases.append(case if packing is None else ragged(replace(case, B=3), sorted_lengths=packing))
    return cases


@pytest.mark.device
@pytest.mark.parametrize("cell", CELLS)
def test_every_kind_of_layer(cell: str) -> None:
    for case in kinds(cell):
        check(case, fast=True)


SHAPES = [(3, 2, 5), (1, 2, 5), (3, 1, 5), (1, 1, 1), (2, 3, 9), (2, 2, 17)]


@pytest.mark.isa
@pytest.mark.float64
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"T{s[0]}-B{s[1]}-H{s[2]}")
@pytest.mark.parametrize("cell", CELLS)
def test_odd_shapes(cell: str, shape: tuple[int, int, int]) -> None:
    T, B, H = shape
    check(Case(cell, T=T, B=B, I=3, H=H), fast=H > 5)


@pytest.mark.isa
@pytest.mark.float64
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "ragged"])
@pytest.mark.parametrize("cell", CELLS)
def test_entry_by_entry(cell: str, packed: bool) -> None:
    case = Case(cell, I=2, H=3, num_layers=2, bidirectional=True)
    check(ragged(replace(case, B=3)) if packed else case, fast=False)


@pytest.mark.isa
@pytest.mark.float64
@pytest.mark.parametrize("cell", PROJECTED)
def test_projection_entry_by_entry(cell: str) -> None:
    check(Case(cell, proj_size=3, num_layers=2), fast=False)
    check(ragged(Case(cell, B=3, proj_size=1, bidirectional=True)), fast=False)


@pytest.mark.parametrize("cell", SINGLES)
def test_single_step_modules(cell: str) -> None:
    for bias, B in product((True, False), (1, 3)):
        module = TWINS[cell].cell(4, 5, bias=bias, dtype=torch.float64)
        states = len(CELLS[cell].states)

        def step(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            hx = rest[:states] if states > 1 else rest[0]
            values = dict(zip([n for n, _ in module.named_parameters()], rest[states:], strict=True))
            out = functional_call(module, values, (x, hx))
            return out if isinstance(out, tuple) else (out,)

        leaves = [torch.randn(B, 4, dtype=torch.float64), *torch.randn(states, B, 5, dtype=torch.float64)]
        leaves += [p.detach() for p in module.parameters()]
        assert torch.autograd.gradcheck(step, [leaf.requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("cell", CELLS)
def test_batch_first_and_unbatched(cell: str) -> None:
    check(Case(cell, batch_first=True, num_layers=2), fast=True)
    module = Case(cell).module()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: module(x)[0], x)


SMOOTH = [name for name in CELLS if not TWINS[name].kink]  # relu has no second derivative to check at its corner


@pytest.mark.parametrize("cell", CELLS)
def test_second_derivatives_of_every_kind_of_layer(cell: str) -> None:
    for case in (case for case in kinds(cell) if case.num_layers == 1):
        assert torch.autograd.gradgradcheck(*problem(case), fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "ragged"])
@pytest.mark.parametrize("cell", SMOOTH)
def test_second_derivatives_entry_by_entry(cell: str, packed: bool) -> None:
    case = Case(cell, T=2, I=1, H=2, bidirectional=True)
    assert torch.autograd.gradgradcheck(*problem(ragged(replace(case, B=3)) if packed else case))


@pytest.mark.parametrize("cell", CELLS)
def test_a_gradient_penalty_and_a_third_derivative(cell: str) -> None:
    """As torch.nn's module, or the loop, gives them, through a layer above a layer."""
    case = Case(cell, T=4, B=3, I=4, H=4)
    lower, upper = case.module(), replace(case, seed=1).module()

    def penalties(call_lower: Callable, call_upper: Callable) -> list[Tensor]:
        x = case.tensors()["x"]
        y = call_upper(call_lower(x)[0])[0]
        (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        (ddx,) = torch.autograd.grad((dx.norm() - 1).pow(2), x, create_graph=True)
        parameters = [*lower.parameters(), *upper.parameters()]
        return [dx, ddx, *torch.autograd.grad(ddx.pow(2).sum() + dx.sum(), [x, *parameters])]

    found, expected = penalties(lower, upper), penalties(twin(cell, lower), twin(cell, upper))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cell", SMOOTH)
def test_second_derivatives_of_torch_func(cell: str) -> None:
    module, x = Case(cell).module(), Case(cell).tensors()["x"].detach()

    def penalty(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: module(x)[0].pow(3).sum())(x).pow(2).sum()

    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(module(leaf)[0].pow(3).sum(), leaf, create_graph=True)
    (expected,) = torch.autograd.grad(dx.pow(2).sum(), leaf)
    torch.testing.assert_close(torch.func.grad(penalty)(x), expected, rtol=1e-10, atol=1e-10)


def test_autocast_around_a_second_derivative_does_not_change_it() -> None:
    module, x = Case("lstm", dtype=torch.float32).module(), Case("lstm", dtype=torch.float32).tensors()["x"]
    (dx,) = torch.autograd.grad(module(x)[0].pow(3).sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(dx.pow(2).sum(), x, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = torch.autograd.grad(dx.pow(2).sum(), x)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("cell", CELLS)
def test_the_differentiable_layer_is_the_kernel_s(cell: str) -> None:
    for case in (replace(case, T=5, B=4) for case in kinds(cell) if case.num_layers == 1):
        x, *states = case.tensors().values()
        states = states or [None] * len(CELLS[cell].states)
        weights, sizes = list(case.module().parameters()), None
        if case.lengths:
            sizes = torch.tensor([4, 3, 3, 1, 1])
            x = x.reshape(20, -1)[: sizes.sum()]
        call = LayerCall(cell, x, states, weights, case.bidirectional, sizes, options=Options(states=True))
        with torch.no_grad():
            expected = recurrent_layer(call)
        found = differentiable.layer(call)
        for a, b in zip((found.y, *found.finals), (expected.y, *expected.finals), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        assert (found.c is None) == (expected.c is None) == (len(states) == 1)
        if found.c is not None:
            torch.testing.assert_close(found.c, expected.c, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cell", CELLS)
def test_what_is_not_wanted_has_no_second_derivative(cell: str) -> None:
    """Frozen weights, no input gradient, initial states alone; tensors of the caller are left as they are."""
    module, tensors = Case(cell).module(), Case(cell).tensors()
    module.weight_ih_l0.requires_grad_(False)
    x = tensors["x"].detach()
    hx = hx_of({name: t if name == "h0" else t.detach() for name, t in tensors.items()})
    (dh0,) = torch.autograd.grad(module(x, hx)[0].pow(2).sum(), tensors["h0"], create_graph=True)
    found = torch.autograd.grad(dh0.pow(2).sum(), [module.weight_hh_l0, tensors["h0"]])
    assert all(t.isfinite().all() and t.any() for t in found)
    assert not x.requires_grad and not module.weight_ih_l0.requires_grad
