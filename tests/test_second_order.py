"""The second backward pass against torch.autograd's of torch.nn or of the plain loop, name by name.

Hessian-vector products of a loss <w, outputs> by everything that the layer takes, and by w, which leads through the
gradients of the outputs. tests/test_gradcheck.py has the finite differences.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from loops import TWINS, hx_of, weight_shapes
from parity import DEVICE, Case, Results, packer, ragged, twin
from tolerances import assert_all_close
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import PackedSequence
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fusedrnn
from fusedrnn.cells import CELLS
from fusedrnn.layer import autograd, differentiable
from fusedrnn.layer.call import Needs

OUTPUTS = ("y", "h_n", "c_n")


def products(
    case: Case,
    call: Callable[..., Any],
    module: nn.Module,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
    use: Sequence[str] = OUTPUTS,
    by: Sequence[str] | None = None,
    higher: bool = False,
) -> Results:
    """H v, by name. ``use``: outputs in the loss; ``by``: leaves that require a gradient, None: all; ``higher``: with a
    graph for further derivatives.
    """
    draw = torch.Generator().manual_seed(5)

    def some(shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(device, dtype)

    tensors = {name: t.detach().to(device, dtype) for name, t in case.tensors().items()}
    leaves = tensors | dict(module.named_parameters())
    for name, leaf in leaves.items():
        leaf.requires_grad_(by is None or name in by)
    hx = None if "h0" not in tensors else hx_of(tensors)
    pack = packer(case)
    y, last = call(pack(tensors["x"]) if pack else tensors["x"], hx)
    outputs = y.data if isinstance(y, PackedSequence) else y, *(last if isinstance(last, tuple) else (last,))
    found = {name: o for name, o in zip(OUTPUTS, outputs, strict=False)}
    weights = {f"w_{name}": some(o.shape).requires_grad_() for name, o in found.items()}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    loss = sum((weights[f"w_{name}"] * found[name]).sum() for name in use if name in found)
    options = {"allow_unused": True, "materialize_grads": True}
    first = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, **options)
    along = [some(g.shape) for g in first]
    curved = [(g, v) for g, v in zip(first, along, strict=True) if g.requires_grad]
    leaves |= {f"w_{name}": weights[f"w_{name}"] for name in use if name in found}
    outputs, vectors = zip(*curved, strict=True)
    second = torch.autograd.grad(outputs, list(leaves.values()), vectors, create_graph=higher, **options)
    return {name: t.detach().cpu() for name, t in zip(leaves, second, strict=True)}


def ours(case: Case, **options: Any) -> Results:
    module = case.module().to(DEVICE, options.get("dtype", torch.float64))
    return products(case, module, module, device=DEVICE, **options)


def expected(case: Case, **options: Any) -> Results:
    module = case.module().double()
    return products(case, twin(case.cell, module), module, **options)


def kinds(cell: str) -> list[Case]:
    """Every kind of single layer, padded, ragged and sorted ragged, with five steps and four samples."""
    cases = []
    projections = (0, 3) if CELLS[cell].projectable else (0,)
    for bidirectional, bias, proj_size, h0 in product((False, True), (True, False), projections, (True, False)):
        case = Case(cell, T=5, B=4, bidirectional=bidirectional, bias=bias, proj_size=proj_size, h0=h0)
        cases += [case, ragged(case), ragged(case, sorted_lengths=True)]
    return cases


@pytest.mark.isa
@pytest.mark.float64
@pytest.mark.parametrize("cell", CELLS)
def test_every_kind_of_layer(cell: str) -> None:
    for case in kinds(cell):
        assert_all_close(ours(case), expected(case))


@pytest.mark.device
@pytest.mark.parametrize("cell", CELLS)
def test_stacks_and_other_shapes(cell: str) -> None:
    for changes in ({"num_layers": 3, "bidirectional": True}, {"T": 1}, {"B": 1}, {"T": 1, "B": 1, "H": 1, "I": 1}):
        assert_all_close(ours(Case(cell, **changes)), expected(Case(cell, **changes)))
    long = Case(cell, T=31, B=9, I=7, H=33)
    assert_all_close(ours(long), expected(long))


@pytest.mark.parametrize("cell", CELLS)
def test_an_input_of_no_features(cell: str) -> None:
    """torch.nn's modules refuse it, functions do not."""
    states, (of_x, *shapes) = len(CELLS[cell].states), weight_shapes(cell, 0, 2)
    own = [torch.randn(1, 3, 2, dtype=torch.float64) for _ in range(states)]
    own += [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    for T in (1, 4):
        x, w_ih = torch.zeros(T, 3, 0, dtype=torch.float64), torch.zeros(of_x, dtype=torch.float64)

        def layer(*own: Tensor, x: Tensor = x, w_ih: Tensor = w_ih) -> Tensor:
            return fusedrnn.functional.recurrent(cell, x, own[:states], [w_ih, *own[states:]])[0]

        assert torch.autograd.gradgradcheck(layer, [t.requires_grad_() for t in own])
        torch.func.jvp(layer, tuple(t.detach() for t in own), tuple(map(torch.ones_like, own)))


@pytest.mark.parametrize("cell", CELLS)
def test_what_is_missing_is_zero(cell: str) -> None:
    """Losses of one output alone, and gradients of a few leaves."""
    case = Case(cell, T=4, B=3, proj_size=2 if CELLS[cell].projectable else 0)
    for use in OUTPUTS[: 1 + len(CELLS[cell].states)]:
        assert_all_close(ours(case, use=(use,)), expected(case, use=(use,)))
    for by in (("x",), ("h0",), ("x", "h0"), ("weight_hh_l0",), ("bias_ih_l0", "x"), ("weight_ih_l0", "weight_hh_l0")):
        assert_all_close(ours(case, by=by), expected(case, by=by))


@pytest.mark.device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_dtypes(cell: str, dtype: torch.dtype) -> None:
    """Twice the error of a gradient: H v is a gradient of what was rounded to 16 bits once before."""
    case = Case(cell, T=4, B=3, dtype=dtype)
    if TWINS[cell].kink and CELLS[cell].beside == 0:  # of a relu: no argument near its kink
        case = replace(case, seed=next(seed for seed in range(10000) if far_from_zero(replace(case, seed=seed))))
    found = ours(case, dtype=dtype)
    assert {t.dtype for t in found.values()} == {dtype}
    assert_all_close(found, expected(case), dtype, margin=4.0 if cell == "residual_rnn" else 2.0 * TWINS[cell].rounding)


def far_from_zero(case: Case) -> bool:
    """Whether no argument of the relu of a layer of one direction changes its sign in 16 bits."""
    module, tensors = case.module().double(), {name: t.detach().double() for name, t in case.tensors().items()}
    h = tensors["h0"][0]
    for x in tensors["x"]:
        w_hh = module.weight_hh_l0 if CELLS[case.cell].product else module.weight_hh_l0.diag()
        a = x @ module.weight_ih_l0.T + module.bias_ih_l0 + h @ w_hh.T + module.bias_hh_l0
        if a.abs().min() < 0.03:
            return False
        h = a.relu()
    return True


def test_vectors_of_the_caller_are_not_written_to() -> None:
    """One row, no vector for the weight: a bias alone is the start of a scan."""
    for name in ("LSTM", "GRU", "RNN"):
        module, x = getattr(fusedrnn, name)(3, 4), torch.randn(1, 1, 3)
        h0 = torch.randn(1, 1, 4, requires_grad=True)
        y = module(x, (h0, torch.randn(1, 1, 4)) if name == "LSTM" else h0)[0]
        first = torch.autograd.grad(y.square().sum(), [module.bias_hh_l0, h0], create_graph=True)
        vectors = [torch.randn_like(g) for g in first]
        before = [v.clone() for v in vectors]
        torch.autograd.grad(first, [module.weight_hh_l0], vectors)
        for a, b in zip(vectors, before, strict=True):
            assert torch.equal(a, b)


def test_products_are_counted_as_those_of_a_loop() -> None:
    """In the scans too: every product of the second backward pass, in operations of torch."""
    module, x = fusedrnn.GRU(4, 5), torch.randn(6, 3, 4, requires_grad=True)
    (dx,) = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
    with FlopCounterMode(display=False) as counter:
        dx.square().sum().backward()
    rows, w_ih, w_hh = 18, 15 * 4, 15 * 5
    inputs = 2 * rows * w_ih * (1 + 1 + 2)  # the gates' tangents; dx; dW_ih of two terms
    recurrent = 2 * rows * w_hh * (1 + 1 + 1 + 2)  # both scans, the first adjoints; dW_hh
    assert counter.get_total_flops() == inputs + recurrent


def test_a_traced_graph_runs() -> None:
    module, x = fusedrnn.GRU(4, 5), torch.randn(6, 3, 4)

    def penalty(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (dx,) = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    graph = make_fx(penalty)(x)
    for mode in (torch.enable_grad(), torch.no_grad()):
        with mode:
            found = graph(x)
        torch.testing.assert_close(found, penalty(x))


def test_on_the_meta_device() -> None:
    module = fusedrnn.GRU(4, 5, device="meta")
    x = torch.randn(6, 3, 4, device="meta", requires_grad=True)
    (dx,) = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.square().sum(), x)
    assert ddx.shape == x.shape and ddx.is_meta


@pytest.mark.parametrize("around", ["checkpoint", "save_on_cpu", "anomaly", "autocast", "dropout"])
def test_under_other_parts_of_torch(around: str) -> None:
    module = fusedrnn.LSTM(4, 5, num_layers=2, dropout=0.5 if around == "dropout" else 0.0).double()
    reference = twin("lstm", copy.deepcopy(module))
    x = torch.randn(6, 3, 4, dtype=torch.float64)

    def penalty(module: nn.Module, around: str) -> list[Tensor]:
        torch.manual_seed(0)
        leaf, context = x.clone().requires_grad_(), nullcontext()
        if around == "save_on_cpu":
            context = torch.autograd.graph.save_on_cpu()
        elif around == "anomaly":
            context = torch.autograd.detect_anomaly(check_nan=True)
        with context:
            call = partial(checkpoint, module, use_reentrant=False) if around == "checkpoint" else module
            (dx,) = torch.autograd.grad(call(leaf)[0].pow(2).sum(), leaf, create_graph=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=around == "autocast"):
                return list(torch.autograd.grad(dx.pow(2).sum(), [leaf, *module.parameters()]))

    if around == "dropout":  # masks are drawn alike by both
        reference.train()
    for a, b in zip(penalty(module, around), penalty(reference, "dropout" if around == "dropout" else ""), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cell", CELLS)
def test_an_empty_batch(cell: str) -> None:
    for name, t in ours(Case(cell, B=0, bidirectional=True)).items():
        assert not t.any(), name


@pytest.mark.parametrize("cell", [name for name, info in CELLS.items() if not info.parameters and info.beside < 2])
def test_the_loop_in_plain_operations_is_for_higher_derivatives_alone(cell: str, monkeypatch) -> None:
    case = ragged(Case(cell, T=4, B=3, bidirectional=True))
    found, calls = ours(case, higher=True), []
    layer = differentiable.layer
    monkeypatch.setattr(differentiable, "layer", lambda *args: calls.append(1) or layer(*args))
    assert_all_close(ours(case), found)
    assert not calls
    ours(case, higher=True)
    assert calls


def test_the_graph_may_be_kept_and_used_again() -> None:
    module, x = fusedrnn.LSTM(4, 5), torch.randn(6, 3, 4, requires_grad=True)
    (dx,) = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
    first = torch.autograd.grad(dx.square().sum(), module.weight_hh_l0, retain_graph=True)
    assert torch.equal(*first, *torch.autograd.grad(dx.square().sum(), module.weight_hh_l0))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(dx.square().sum(), module.weight_hh_l0)


def test_what_was_changed_in_place_is_refused() -> None:
    module, x = fusedrnn.GRU(4, 5), torch.randn(6, 3, 4, requires_grad=True)
    (dx,) = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
    with torch.no_grad():
        module.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        dx.square().sum().backward()


def test_threads_and_memory_layouts_do_not_matter(threads: Callable[[int], None]) -> None:
    """Two threads, an input that is a view, gradients that are not contiguous."""
    module = fusedrnn.GRU(6, 8, bidirectional=True, batch_first=True)
    x = torch.randn(3, 9, 12)[..., ::2].requires_grad_()

    def penalty(module: nn.Module) -> list[Tensor]:
        (dx,) = torch.autograd.grad(module(x)[0].transpose(0, 1)[:, :, 1::2].square().sum(), x, create_graph=True)
        return list(torch.autograd.grad((dx.norm(dim=2) - 1).square().sum(), [x, *module.parameters()]))

    reference = twin("gru", copy.deepcopy(module))
    for count in (1, 2):
        threads(count)
        for found, wanted in zip(penalty(module), penalty(reference), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_many_products_at_once(cell: str) -> None:
    """``is_grads_batched`` and torch.autograd.functional, vectorised, give what one product after the other does."""
    case = replace(Case(cell), h0=False)
    module, x = case.module(), case.tensors()["x"].detach()

    def loss(x: Tensor) -> Tensor:
        return module(x)[0].pow(3).sum()

    hessian = torch.autograd.functional.hessian(loss, x)
    torch.testing.assert_close(torch.autograd.functional.hessian(loss, x, vectorize=True), hessian)
    torch.testing.assert_close(torch.func.hessian(loss)(x), hessian)
    along = torch.randn_like(x)
    (_, found), (_, same) = (f(loss, x, along) for f in (torch.autograd.functional.hvp, torch.autograd.functional.vhp))
    torch.testing.assert_close(found, torch.tensordot(hessian, along, dims=3))
    torch.testing.assert_close(same, found)


@pytest.mark.skipif(fusedrnn._C.build()["fast"] is None, reason="the ops alone do not know what is asked for")
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_what_nobody_asks_for_is_not_computed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.autograd.grad by the input alone, of a layer whose weights have gradients too; and its own derivative."""
    asked: list[Needs] = []

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: asked.append(args[-1]) or function(*args)

    monkeypatch.setattr(autograd, "_backward", watched(autograd._backward))
    monkeypatch.setattr(autograd, "hessian_vector_product", watched(autograd.hessian_vector_product))
    module, x = getattr(fusedrnn, name)(3, 4), torch.randn(5, 2, 3, requires_grad=True)
    whole = torch.autograd.grad(module(x)[0].square().sum(), [x, *module.parameters()])
    assert asked.pop()[:2] == (True, True)
    for wanted in ([x], [module.weight_ih_l0], [module.bias_hh_l0, x]):
        found = torch.autograd.grad(module(x)[0].square().sum(), wanted, create_graph=True)
        by_x = wanted[-1] is x
        assert asked.pop()[:2] == (by_x, len(wanted) > 1 or not by_x)
        for tensor, gradient in zip(wanted, found, strict=True):
            index = next(i for i, t in enumerate([x, *module.parameters()]) if t is tensor)
            assert torch.equal(gradient, whole[index])
        torch.autograd.grad(found[0].square().sum(), [module.weight_hh_l0])
        assert asked == [Needs(False, True)] * 2  # the second pass; the first, from what that gives dy
        asked.clear()
    module(x)[0].sum().backward()
    assert asked.pop()[:2] == (True, True) and x.grad is not None and module.weight_hh_l0.grad is not None
    assert not asked
