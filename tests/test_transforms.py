"""The transforms of torch.func: vmap, per-sample gradients, forward mode, Hessians, each against what it stands for.

A mapped call is held equal to a Python loop of plain calls; a derivative in forward mode to gradcheck's differences.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from loops import SINGLES, TWINS, states_like
from parity import DEVICE, Case, twin
from test_gradcheck import SMOOTH, kinds, problem
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.nn.utils.rnn import PackedSequence
from torch.utils.checkpoint import checkpoint

import fusedrnn
from fusedrnn.cells import CELLS

V = 3


def close(found: object, expected: object) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def one_layer(cell: str) -> list[Case]:
    """Every kind of one layer: directions, bias, projection, packed or not, with initial states and without."""
    return [case for case in kinds(cell) if case.num_layers == 1]


def mapped(case: Case) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor], int]:
    """The layer as a function, V values of each argument, and the number of those that are not parameters."""
    call, leaves = problem(case)
    draw = torch.Generator().manual_seed(3)
    values = [torch.stack([t.detach() * (1 + torch.rand(1, generator=draw)) for _ in range(V)]) for t in leaves]
    data = len(case.tensors())
    if case.lengths:  # packing is not torch's to map: the rows of the packed batch are the argument
        packed = Packed(case)
        values[0] = torch.randn(V, packed.rows, case.I, generator=draw, dtype=case.dtype).to(DEVICE)
        return packed, values, data
    return call, values, data


class Packed:
    """A layer on a packed batch, as a function of its rows, initial states and parameters."""

    def __init__(self, case: Case) -> None:
        self.module, self.case = case.module().to(DEVICE), case
        sizes = [sum(length > t for length in case.lengths) for t in range(case.T)]
        self.sizes, self.rows = torch.tensor(sizes), sum(sizes)
        self.names = [name for name, _ in self.module.named_parameters()]

    def __call__(self, data: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        states, weights = rest[: len(rest) - len(self.names)], rest[len(rest) - len(self.names) :]
        hx = None if not states else states[0] if len(states) == 1 else states
        args = PackedSequence(data, self.sizes), hx
        y, last = functional_call(self.module, dict(zip(self.names, weights, strict=True)), args)
        return y.data, *(last if isinstance(last, tuple) else (last,))


def loop(call: Callable, in_dims: tuple[int | None, ...], arguments: list[Tensor]) -> tuple[Tensor, ...]:
    """vmap, in Python."""
    each = [call(*(a if d is None else a[v] for a, d in zip(arguments, in_dims, strict=True))) for v in range(V)]
    return tuple(torch.stack(parts) for parts in zip(*each, strict=True))


@pytest.mark.parametrize("cell", CELLS)
def test_vmap_over_inputs_and_over_weights(cell: str) -> None:
    for case in one_layer(cell):
        call, values, data = mapped(case)
        first = [v[0] for v in values]
        inputs = (0,) + (None,) * (len(values) - 1)
        everything = (0,) * len(values)
        for dims in (inputs, (0,) * data + (None,) * (len(values) - data), everything, (None, *everything[1:])):
            arguments = [first[i] if d is None else values[i] for i, d in enumerate(dims)]
            close(vmap(call, dims)(*arguments), loop(call, dims, arguments))


@pytest.mark.isa
@pytest.mark.float64
@pytest.mark.parametrize("cell", CELLS)
def test_per_sample_gradients(cell: str) -> None:
    """Of every argument, over inputs and states, over inputs alone, and over weights."""
    for case in one_layer(cell):
        call, values, data = mapped(case)
        first, count = [v[0] for v in values], len(values)

        def loss(*leaves: Tensor, call: Callable = call) -> Tensor:
            return sum((t.sin() * (i + 1)).sum() for i, t in enumerate(call(*leaves)))

        gradients = grad(loss, tuple(range(count)))
        for dims in ((0,) * data + (None,) * (count - data), (0,) + (None,) * (count - 1), (0,) * count):
            arguments = [first[i] if d is None else values[i] for i, d in enumerate(dims)]
            close(vmap(gradients, dims)(*arguments), loop(gradients, dims, arguments))


@pytest.mark.parametrize("in_dim", [0, 1, 2])
def test_any_dimension_can_be_mapped(in_dim: int) -> None:
    module = Case("gru").module()
    x = torch.randn(3, 2, V, 4, dtype=torch.float64).movedim(2, in_dim)
    close(vmap(module, in_dim)(x), loop(lambda x: module(x), (0,), [x.movedim(in_dim, 0)]))


@pytest.mark.parametrize("cell", CELLS)
def test_a_map_over_nothing(cell: str) -> None:
    module = Case(cell, num_layers=2).module()
    y, last = vmap(module, 1)(torch.zeros(3, 0, 2, 4, dtype=torch.float64))
    last = last if isinstance(last, tuple) else (last,)
    assert y.shape == (0, 3, 2, 5) and all(state.shape == (0, 2, 2, 5) for state in last)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, parameters, (x,))[0].sum()

    found = vmap(grad(loss), (None, 0))(parameters, torch.zeros(0, 3, 2, 4, dtype=torch.float64))
    assert all(found[name].shape == (0, *p.shape) for name, p in parameters.items())


@pytest.mark.parametrize("cell", CELLS)
def test_a_map_over_one(cell: str) -> None:
    case = Case(cell, num_layers=2, bidirectional=True)
    call, leaves = problem(case)

    def gradients(*leaves: Tensor) -> tuple[Tensor, ...]:
        return grad(lambda *leaves: sum(t.sin().sum() for t in call(*leaves)), tuple(range(len(leaves))))(*leaves)

    leaves = [t.detach() for t in leaves]
    for function in (call, gradients):
        found = vmap(function)(*(t.unsqueeze(0) for t in leaves))
        close(found, tuple(t.unsqueeze(0) for t in function(*leaves)))


def test_a_map_inside_a_checkpoint() -> None:
    """(A checkpoint inside a map computes again outside of it: torch fails there, whatever the module.)"""
    module, x = Case("lstm").module(), torch.randn(V, 3, 2, 4, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    checkpoint(lambda x: vmap(module)(x)[0], leaf, use_reentrant=False).pow(2).sum().backward()
    close(leaf.grad, vmap(grad(lambda x: module(x)[0].pow(2).sum()))(x))


@pytest.mark.parametrize("cell", CELLS)
def test_maps_inside_maps(cell: str) -> None:
    """Per-sample gradients of each member of an ensemble."""
    call, values, data = mapped(Case(cell, bidirectional=True))
    weights, inputs = values[data:], [v[:2] for v in values[:data]]

    def loss(weights: list[Tensor], inputs: list[Tensor]) -> Tensor:
        return call(*inputs, *weights)[0].sin().sum()

    found = vmap(vmap(grad(loss), (None, 0)), (0, None))(weights, inputs)
    other_way = vmap(vmap(grad(loss), (0, None)), (None, 0))(weights, inputs)
    for v in range(V):
        for k in range(2):
            expected = grad(loss)([w[v] for w in weights], [i[k] for i in inputs])
            close([f[v, k] for f in found], expected)
            close([f[k, v] for f in other_way], expected)


@pytest.mark.parametrize("cell", CELLS)
def test_stacked_layers(cell: str) -> None:
    case = Case(cell, num_layers=2, bidirectional=True)
    module, x = case.module(), torch.randn(V, 3, 2, 4, dtype=torch.float64)
    found, expected = vmap(module)(x), [module(one) for one in x]
    close(found[0], torch.stack([y for y, _ in expected]))
    with torch.no_grad():
        close(vmap(module)(x)[0], found[0])


@pytest.mark.parametrize("cell", CELLS)
def test_an_ensemble_of_modules(cell: str) -> None:
    modules = [replace(Case(cell), seed=seed).module() for seed in range(V)]
    parameters, buffers = stack_module_state(modules)
    base, x = copy.deepcopy(modules[0]).to("meta"), torch.randn(3, 2, 4, dtype=torch.float64)

    def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(base, (parameters, buffers), (x,))[0]

    found = vmap(call)(parameters, buffers)
    close(found, torch.stack([module(x)[0] for module in modules]))
    found.sin().sum().backward()  # through the map, to the stacked parameters
    for name, stacked in parameters.items():
        for v, module in enumerate(modules):
            (expected,) = torch.autograd.grad(module(x)[0].sin().sum(), dict(module.named_parameters())[name])
            close(stacked.grad[v], expected)


@pytest.mark.parametrize("cell", SINGLES)
def test_single_steps(cell: str) -> None:
    module = TWINS[cell].cell(4, 5, dtype=torch.float64)
    x = torch.randn(V, 2, 4, dtype=torch.float64)
    states = torch.randn(V, len(CELLS[cell].states), 2, 5, dtype=torch.float64).unbind(1)

    def step(x: Tensor, *states: Tensor) -> Tensor:
        out = module(x, states if len(states) > 1 else states[0])
        return torch.cat(out) if isinstance(out, tuple) else out

    close(vmap(step)(x, *states), torch.stack([step(x[v], *(s[v] for s in states)) for v in range(V)]))
    close(vmap(jacrev(step))(x, *states), vmap(jacfwd(step))(x, *states))


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_mapped_by_autograd(cell: str) -> None:
    """is_grads_batched: many output gradients in one backward pass."""
    call, leaves = problem(Case(cell, bidirectional=True))
    y = call(*leaves)[0]
    dy = torch.randn(V, *y.shape, dtype=y.dtype)
    found = torch.autograd.grad(y, leaves, dy, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, leaves, d, retain_graph=True) for d in dy]
    close(found, tuple(torch.stack(parts) for parts in zip(*each, strict=True)))


@pytest.mark.parametrize("cell", CELLS)
def test_forward_mode_of_every_kind_of_layer(cell: str) -> None:
    for case in one_layer(cell):
        call, values, _ = mapped(case)
        leaves = [v[0].clone().requires_grad_() for v in values]
        assert torch.autograd.gradcheck(call, leaves, fast_mode=True, check_forward_ad=True, check_backward_ad=False)


@pytest.mark.parametrize("cell", SMOOTH)
def test_forward_mode_entry_by_entry_and_mapped(cell: str) -> None:
    case = Case(cell, T=2, B=1, I=1, H=2, num_layers=2, bidirectional=True)
    assert torch.autograd.gradcheck(
        *problem(case), check_forward_ad=True, check_batched_forward_grad=True, check_batched_grad=True
    )
    assert torch.autograd.gradgradcheck(*problem(replace(case, num_layers=1)), fast_mode=True, check_fwd_over_rev=True)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("cell", CELLS)
def test_dual_tensors_through_modules(cell: str, mode: Callable) -> None:
    """Also where no graph is recorded; torch.nn's LSTM has no such derivative."""
    case = Case(cell, num_layers=2)
    module, x = case.module(), case.tensors()["x"].detach()
    t = torch.randn(x.shape, dtype=x.dtype)
    _, expected = jvp(lambda x: twin(cell, module)(x)[0], (x,), (t,)) if cell != "lstm" else (None, None)
    with mode(), forward_ad.dual_level():
        found = forward_ad.unpack_dual(module(forward_ad.make_dual(x, t))[0]).tangent
    if expected is None:
        step = 1e-6
        expected = (module(x + step * t)[0] - module(x - step * t)[0]) / (2 * step)
        torch.testing.assert_close(found, expected.detach(), rtol=1e-7, atol=1e-7)
    else:
        close(found, expected.detach())


@pytest.mark.parametrize("cell", SINGLES)
def test_dual_states_of_single_steps(cell: str) -> None:
    module, x = TWINS[cell].cell(4, 5, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    h, c, t = torch.randn(3, 2, 5, dtype=torch.float64)

    def step(h: Tensor) -> Tensor:
        out = module(x, states_like(cell, h, c))
        return out[0] if isinstance(out, tuple) else out

    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), forward_ad.dual_level():
            found = forward_ad.unpack_dual(step(forward_ad.make_dual(h, t))).tangent
        close(found, torch.einsum("abcd,cd->ab", jacrev(step)(h), t))


ORDERS = {
    "jvp(jvp)": lambda f, x, t: jvp(lambda x: jvp(f, (x,), (t,))[1], (x,), (t,))[1],
    "jvp(grad)": lambda f, x, t: (jvp(grad(f), (x,), (t,))[1] * t).sum(),
    "grad(jvp)": lambda f, x, t: (grad(lambda x: jvp(f, (x,), (t,))[1])(x) * t).sum(),
    "grad(grad)": lambda f, x, t: (grad(lambda x: (grad(f)(x) * t).sum())(x) * t).sum(),
    "jacfwd(jacfwd)": lambda f, x, t: torch.tensordot(torch.tensordot(jacfwd(jacfwd(f))(x), t, 3), t, 3),
    "jacfwd(jacrev)": lambda f, x, t: torch.tensordot(torch.tensordot(jacfwd(jacrev(f))(x), t, 3), t, 3),
    "jacrev(jacfwd)": lambda f, x, t: torch.tensordot(torch.tensordot(jacrev(jacfwd(f))(x), t, 3), t, 3),
}


@pytest.mark.parametrize("cell", SMOOTH)
def test_the_order_of_transforms_does_not_matter(cell: str) -> None:
    """A second derivative along a direction; and the same through a map outside, inside and between."""
    module = Case(cell).module()
    x, t = torch.randn(2, V, 3, 2, 4, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return module(x)[0].sin().sum()

    def mapped(x: Tensor) -> Tensor:
        return vmap(loss)(x).sum()

    for order in ORDERS.values():
        found = torch.stack([order(loss, x[v], t[v]) for v in range(V)])
        if order is ORDERS["jvp(jvp)"]:
            expected = found
            step = 1e-4
            around = [loss(x[0] + s * t[0]) for s in (-step, 0, step)]
            differences = (around[0] - 2 * around[1] + around[2]) / step**2
            torch.testing.assert_close(found[0], differences, rtol=1e-5, atol=1e-5)
        close(found, expected)
        close(vmap(lambda x, t, order=order: order(loss, x, t))(x, t), expected)
    for name in ("jvp(jvp)", "jvp(grad)", "grad(jvp)", "grad(grad)"):
        close(ORDERS[name](mapped, x, t), expected.sum())
    tangents = jvp(vmap(lambda x: module(x)[0]), (x,), (t,))[1]
    close(tangents, torch.stack([jvp(lambda x: module(x)[0], (x[v],), (t[v],))[1] for v in range(V)]))


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("cell", SMOOTH)
def test_backward_inside_a_dual_level(cell: str, create_graph: bool) -> None:
    """The tangent of the gradient is the Hessian times the tangent; gradients of what came before the level, too."""
    module, x = Case(cell).module(), Case(cell).tensors()["x"].detach()
    t, before = torch.randn(x.shape, dtype=x.dtype), x.clone().requires_grad_()
    _, expected = jvp(grad(lambda x: module(x)[0].sin().sum()), (x,), (t,))
    y = module(before)[0]
    with forward_ad.dual_level():
        leaf = x.clone().requires_grad_()
        dual = forward_ad.make_dual(leaf, t)
        (found,) = torch.autograd.grad(module(dual)[0].sin().sum(), dual, create_graph=create_graph)
        close(forward_ad.unpack_dual(found).tangent.detach(), expected)
        dy = forward_ad.make_dual(torch.ones_like(y), torch.full_like(y, 2.0))
        (linear,) = torch.autograd.grad(y, before, dy)
        close(forward_ad.unpack_dual(linear).tangent, 2 * forward_ad.unpack_dual(linear).primal)


@pytest.mark.parametrize("cell", CELLS)
def test_functionalize(cell: str) -> None:
    module, x = Case(cell).module(), Case(cell).tensors()["x"].detach()
    close(torch.func.functionalize(lambda x: module(x)[0])(x), module(x)[0].detach())
    loss = lambda x: module(x)[0].sin().sum()  # noqa: E731
    close(torch.func.functionalize(grad(loss))(x), grad(loss)(x))


@pytest.mark.parametrize("cell", SMOOTH)
def test_hessian(cell: str) -> None:
    """Forward over reverse; against reverse over reverse, and one entry against differences."""
    case = Case(cell, T=2, B=1, I=2, H=2)
    call, leaves = problem(case)
    leaves = [leaf.detach() for leaf in leaves]

    def loss(*leaves: Tensor) -> Tensor:
        return call(*leaves)[0].pow(3).sum()

    weight = len(case.tensors())  # w_ih
    found = hessian(loss, argnums=(0, weight))(*leaves)
    expected = jacrev(jacrev(loss, argnums=(0, weight)), argnums=(0, weight))(*leaves)
    close(found, expected)
    assert found[0][1].abs().max() > 1e-3

    def gradient(w: Tensor) -> Tensor:
        return grad(loss)(leaves[0], *leaves[1:weight], w, *leaves[weight + 1 :])

    step = torch.zeros_like(leaves[weight])
    step[0, 0] = 1e-5
    differences = (gradient(leaves[weight] + step) - gradient(leaves[weight] - step)) / 2e-5
    torch.testing.assert_close(found[0][1][..., 0, 0], differences, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_per_sample_gradients_of_all_cell_states(bidirectional: bool) -> None:
    """Of a loss that reads c_t of every step, whose gradients are mapped as those of y are."""
    module = fusedrnn.LSTM(3, 5, bidirectional=bidirectional).double()
    x, weights = torch.randn(V, 4, 2, 3).double(), dict(module.named_parameters())

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        y, _, ((_, c),) = functional_call(module, weights, (x,), {"return_states": True})
        steps = torch.arange(1.0, 5.0).view(4, 1, 1)
        return y.square().sum() + (steps * c.pow(3)).sum()

    for argument in (0, 1):
        found = vmap(grad(loss, argument), (None, 0))(weights, x)
        each = [grad(loss, argument)(weights, x[v]) for v in range(V)]
        found, expected = (found, torch.stack(each)) if argument else (
            list(found.values()), [torch.stack(parts) for parts in zip(*(e.values() for e in each), strict=True)]
        )  # fmt: skip
        close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_per_sample_gradients_in_other_types(dtype: torch.dtype) -> None:
    module = Case("gru", T=6, H=9, bidirectional=True, dtype=dtype).module()
    x = torch.randn(V, 6, 1, 4).to(dtype)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, parameters, (x,))[0].float().sin().sum()

    parameters = {name: p.detach() for name, p in module.named_parameters()}
    found = vmap(grad(loss), (None, 0))(parameters, x)
    for v in range(V):
        for name, expected in grad(loss)(parameters, x[v]).items():
            assert found[name].dtype == dtype
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(found[name][v], expected, rtol=tolerance, atol=tolerance)


def test_a_loop_of_calls_is_not_what_happens() -> None:
    """One call of each kernel for the whole map."""
    module, x = Case("lstm").module().float(), torch.randn(50, 3, 1, 4)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, parameters, (x,))[0].sum()

    with torch.profiler.profile() as profile:
        vmap(grad(loss), (None, 0))(parameters, x)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["fusedrnn::layer_forward"] == calls["fusedrnn::layer_backward"] == 2  # mapped, and below the map


def test_mapped_batch_sizes_have_no_meaning() -> None:
    module = Case("gru").module()
    sizes = torch.tensor([[2, 1], [1, 1]])
    with pytest.raises(RuntimeError):
        vmap(lambda s: module(PackedSequence(torch.zeros(3, 4, dtype=torch.float64), s))[0].data)(sizes)
