"""Every hand-derived backward against central differences in float64, for every cell and every kind of layer.

Small odd shapes. The whole product of options runs in gradcheck's fast mode (one random projection of the Jacobian);
one case of each kind runs in the slow mode, entry by entry. A second derivative must raise, never be wrong.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence

from fusedrnn.cells import CELLS
from loops import SINGLES, TWINS
from parity import DEVICE, Case, packer, ragged

PROJECTED = [name for name, cell in CELLS.items() if cell.projectable]


def test_every_cell_of_the_registry_has_a_twin() -> None:
    assert set(TWINS) == set(CELLS)


def check(case: Case, *, fast: bool) -> None:
    module = case.module().to(DEVICE)
    names = [name for name, _ in module.named_parameters()]
    tensors = {name: t.detach().to(DEVICE).requires_grad_() for name, t in case.tensors().items()}
    pack = packer(case)

    def outputs(*leaves: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip([*tensors, *names], leaves, strict=True))
        x = pack(values["x"]) if pack else values["x"]
        hx = None if "h0" not in values else (values["h0"], values["c0"]) if "c0" in values else values["h0"]
        y, last = functional_call(module, {name: values[name] for name in names}, (x, hx))
        last = last if isinstance(last, tuple) else (last,)
        return y.data if isinstance(y, PackedSequence) else y, *last

    leaves = [*tensors.values(), *(p.detach().requires_grad_() for p in module.parameters())]
    assert torch.autograd.gradcheck(outputs, leaves, fast_mode=fast)


def kinds(cell: str) -> list[Case]:
    """The product of layers, directions, bias, projection, packing and given initial states."""
    cases = []
    projections = (0, 3) if CELLS[cell].projectable else (0,)
    options = product((1, 2), (False, True), (True, False), projections, (None, True, False), (True, False))
    for num_layers, bidirectional, bias, proj_size, packing, h0 in options:
        case = Case(cell, num_layers=num_layers, bidirectional=bidirectional, bias=bias, proj_size=proj_size, h0=h0)
        cases.append(case if packing is None else ragged(replace(case, B=3), sorted_lengths=packing))
    return cases


@pytest.mark.parametrize("cell", CELLS)
def test_every_kind_of_layer(cell: str) -> None:
    for case in kinds(cell):
        check(case, fast=True)


SHAPES = [(3, 2, 5), (1, 2, 5), (3, 1, 5), (1, 1, 1), (2, 3, 9), (2, 2, 17)]


@pytest.mark.isa
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"T{s[0]}-B{s[1]}-H{s[2]}")
@pytest.mark.parametrize("cell", CELLS)
def test_odd_shapes(cell: str, shape: tuple[int, int, int]) -> None:
    T, B, H = shape
    check(Case(cell, T=T, B=B, I=3, H=H), fast=H > 5)


@pytest.mark.isa
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "ragged"])
@pytest.mark.parametrize("cell", CELLS)
def test_entry_by_entry(cell: str, packed: bool) -> None:
    case = Case(cell, I=2, H=3, num_layers=2, bidirectional=True)
    check(ragged(replace(case, B=3)) if packed else case, fast=False)


@pytest.mark.isa
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


@pytest.mark.parametrize("cell", CELLS)
def test_second_derivative_raises(cell: str) -> None:
    """Even where another path to x would give the graph a second derivative of its own."""
    module, x = Case(cell).module(), Case(cell).tensors()["x"]
    (dx,) = torch.autograd.grad(module(x)[0].pow(2).sum() + x.pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="twice|once_differentiable|[Ss]econd derivative|[Dd]ouble backward"):
        torch.autograd.grad(dx.sum(), x)


@pytest.mark.parametrize("cell", CELLS)
def test_forward_mode_raises(cell: str) -> None:
    module, x = Case(cell).module(), Case(cell).tensors()["x"].detach()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward.mode|jvp|forward AD"):
        module(forward_ad.make_dual(x, torch.ones_like(x)))
