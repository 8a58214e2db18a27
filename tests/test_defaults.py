"""Whatever device and dtype torch makes tensors on by default, layers compute where and in what their arguments are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from loops import TWINS, with_noise
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves

import fusedrnn
from fusedrnn import compare, gradflow
from fusedrnn.cells import CELLS

T, B, I, H = 5, 3, 4, 6
LENGTHS = [5, 2, 0]
NOISE = {"input_dropout": 0.3, "recurrent_dropout": 0.3, "zoneout": 0.3, "weight_dropout": 0.3}
RESET = torch.zeros(T, B, dtype=torch.bool)
RESET[2, 0] = RESET[0, 1] = True


def packed(module: nn.Module, x: Tensor, lengths: Tensor) -> Any:
    return module(pack_padded_sequence(x, lengths, enforce_sorted=False))


CALLS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "plain": lambda m, x: m(x),
    "packed": lambda m, x: packed(m, x, SORTED),
    "lengths in a list": lambda m, x: m(x, lengths=LENGTHS),
    "lengths": lambda m, x: m(x, lengths=GIVEN),
    "no step": lambda m, x: m(x, lengths=[0] * B),
    "reset": lambda m, x: m(x, reset=RESET),
    "both, with states": lambda m, x: m(x, lengths=LENGTHS, reset=RESET, return_states=True),
    "step": lambda m, x: [m.step(x_t) for x_t in x],
}
GIVEN, SORTED = torch.tensor(LENGTHS), torch.tensor([5, 1, 4])


def results(module: nn.Module, call: Callable[[nn.Module, Tensor], Any], x: Tensor) -> list[Tensor]:
    """Every output and gradient, with the same random masks at each call."""
    torch.manual_seed(7)
    x = x.clone().requires_grad_()
    outputs = [t for t in tree_leaves(call(module, x)) if isinstance(t, Tensor) and t.is_floating_point()]
    wanted = [t for t in outputs if t.requires_grad]
    if not wanted:
        return outputs
    loss = sum((t.square().sum() for t in wanted), start=wanted[0].sum())
    return [*outputs, *torch.autograd.grad(loss, [x, *module.parameters()], allow_unused=True)]


@pytest.fixture(params=["device", "context", "dtype"])
def other_default(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """A function that sets another default."""
    if request.param == "device":
        yield lambda: torch.set_default_device("meta")
        torch.set_default_device(None)
    elif request.param == "context":
        with ExitStack() as stack:
            yield lambda: stack.enter_context(torch.device("meta"))
    else:
        yield lambda: torch.set_default_dtype(torch.float64)
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("options", [{}, NOISE, {"grad_clip": 0.5, "bptt_steps": 2, "recompute": "gates"}], ids=str)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("cell", CELLS)
def test_the_same_numbers(cell: str, call: str, options: dict[str, Any], other_default: Callable[[], Any]) -> None:
    module = TWINS[cell].layer(I, H, num_layers=2, bidirectional=call != "step", **with_noise(cell, options))
    x = torch.randn(T, B, I)
    expected = results(module, CALLS[call], x)
    other_default()
    found = results(module, CALLS[call], x)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None) and (a is None or (a.dtype, a.device) == (b.dtype, b.device))
        assert a is None or torch.equal(a, b)


def penalty(module: nn.Module, x: Tensor, **kwargs: Any) -> Tensor:
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(module(leaf, **kwargs)[0].sum(), leaf, create_graph=True)
    return torch.autograd.grad(dx.square().sum(), list(module.parameters()), allow_unused=True)[0]


def penalty_of_segments(module: nn.Module, x: Tensor) -> Tensor:
    return penalty(module, x, lengths=LENGTHS, reset=RESET)


def per_sample(module: nn.Module, x: Tensor) -> Tensor:
    parameters = dict(module.named_parameters())
    loss = lambda p, x: torch.func.functional_call(module, p, (x,))[0].square().sum()  # noqa: E731
    return torch.vmap(torch.func.grad(loss), (None, 1))(parameters, x.unsqueeze(2))["weight_hh_l0"]


def hessian(module: nn.Module, x: Tensor) -> Tensor:
    loss = lambda w: torch.func.functional_call(module, {"bias_hh_l0": w}, (x,))[0].square().sum()  # noqa: E731
    return torch.func.hessian(loss)(module.bias_hh_l0.detach())


def tangent(module: nn.Module, x: Tensor) -> Tensor:
    return torch.func.jvp(lambda x: module(x)[0], (x,), (x,))[1]


def converted(module: nn.Module, x: Tensor) -> Tensor:
    fusedrnn.revert(module)
    with fusedrnn.patch_torch(), torch.no_grad():
        y = module(x)[0]
    fusedrnn.convert(module)
    return y


def initialised(module: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(1)
    fusedrnn.init.orthogonal_(module)
    return module(x)[0]


def autocast(module: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return module(x, lengths=LENGTHS)[0]


def compiled(module: nn.Module, x: Tensor) -> Tensor:
    torch.compiler.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        call = torch.compile(lambda x: module(x, lengths=GIVEN, reset=RESET)[0], backend="aot_eager", fullgraph=True)
        return call(x)


def exported(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        program = torch.export.export(module, (x,), {"lengths": GIVEN}, strict=False)
        return program.module()(x, lengths=GIVEN)[0]


def by_function(module: nn.Module, x: Tensor) -> Tensor:
    cell, weights = module.mode.lower(), list(module.parameters())
    h, *_ = fusedrnn.functional.recurrent_cell(cell, x[0], [None] * len(CELLS[cell].states), *weights)
    return torch.cat([h, *fusedrnn.functional.recurrent(cell, x, None, weights)[0]])


def steps_by_adam() -> None:
    parameter = nn.Parameter(torch.ones(2, device="cpu"))
    parameter.grad = torch.ones_like(parameter)
    torch.optim.Adam([parameter]).step()


def second_derivatives() -> None:
    torch.func.hessian(lambda x: x.square().sum())(torch.ones(2, device="cpu", dtype=torch.float32))


def skip_if_torch_cannot(do: Callable[[], None]) -> None:
    """torch 2.11 has faults of its own under another default device."""
    try:
        do()
    except RuntimeError as error:
        pytest.skip(f"torch's own {do.__name__} fails: {error}")


WAYS = [penalty, penalty_of_segments, per_sample, hessian, tangent, converted, initialised]
WAYS += [autocast, compiled, exported, by_function]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_by_every_other_way(name: str, way: Callable[[nn.Module, Tensor], Tensor], other_default: Callable) -> None:
    module, x = getattr(fusedrnn, name)(I, H), torch.randn(T, B, I)
    expected = way(module, x)
    other_default()
    if way is hessian:
        skip_if_torch_cannot(second_derivatives)
    found = way(module, x)
    assert (found.dtype, found.device) == (expected.dtype, expected.device)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cells(name: str, other_default: Callable[[], None]) -> None:
    module, x = getattr(fusedrnn, name)(I, H), torch.randn(B, I)
    expected = results(module, lambda m, x: m(x), x)
    other_default()
    for a, b in zip(results(module, lambda m, x: m(x), x), expected, strict=True):
        torch.testing.assert_close(a, b)  # a mode sees the op: other sums for the weights


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_comparison(name: str, other_default: Callable[[], None]) -> None:
    other_default()
    assert compare.main([name.lower()]) == 0


@pytest.mark.parametrize("task", gradflow.TASKS)
def test_gradients_over_a_lag(task: str, other_default: Callable[[], None]) -> None:
    def found() -> list[Any]:
        run = gradflow.train(gradflow.VARIANTS["rnn"], gradflow.TASKS[task], 6, steps=3, hidden=4, batch=2)
        x, _ = gradflow.TASKS[task].draw(6, 2, torch.Generator().manual_seed(0))
        norms, gamma, sigma = gradflow.products(run.layer, x)
        flow = gradflow.flow(run.layer, run.head, gradflow.TASKS[task], 6, batch=2)
        return [run.losses, norms, flow, gradflow.bound(run.layer, gamma, sigma, 3)]

    expected = found()
    other_default()
    skip_if_torch_cannot(steps_by_adam)
    torch.testing.assert_close(found(), expected)
