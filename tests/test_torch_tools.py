"""Tools of torch that look at a model from outside: the flop counter, the profiler, TorchScript."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from loops import weight_shapes
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import fusedrnn
from fusedrnn.cells import CELLS
from fusedrnn.layer import differentiable
from fusedrnn.layer.autograd import recurrent_layer
from fusedrnn.layer.call import LayerCall


def flops(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def layer_call(cell: str, *, packed: bool, bidirectional: bool, bias: bool, proj: int) -> LayerCall:
    """Of a layer of random numbers."""
    directions, out = 2 if bidirectional else 1, proj or 5
    shapes = weight_shapes(cell, 4, 5, proj, bias) * directions
    x = torch.randn((7, 4) if packed else (3, 4, 4))
    h0 = torch.randn(directions, 4, out, requires_grad=True)
    others = [torch.randn(directions, 4, 5, requires_grad=True) for _ in range(CELLS[cell].beside)]
    batch_sizes = torch.tensor([4, 2, 1]) if packed else None
    weights = [torch.randn(shape) for shape in shapes]
    return LayerCall(cell, x, [h0, *others], weights, bidirectional, batch_sizes)


@pytest.mark.parametrize("cell", CELLS)
def test_flops_are_those_of_a_loop_of_products(cell: str) -> None:
    """Forward and backward, dense and packed; of a backward pass only what was asked for."""
    for packed, bidirectional in product((False, True), repeat=2):
        for proj in (0, 2)[: 1 + CELLS[cell].projectable]:
            call = layer_call(cell, packed=packed, bidirectional=bidirectional, bias=not packed, proj=proj)
            for need_x, need_weights in product((False, True), repeat=2):
                call.x.requires_grad_(need_x)
                for weight in call.weights:
                    weight.requires_grad_(need_weights)
                counts = []
                for layer in (differentiable.layer, recurrent_layer):
                    y, finals, c = layer(call)
                    total = sum(t.sum() for t in (y, *finals, *([] if c is None else [c])))
                    counts.append((flops(lambda: layer(call)), flops(total.backward)))
                assert counts[0] == counts[1] and counts[0][0] > 0
                assert counts[0][1] > 0 or not (CELLS[cell].product or need_x or need_weights)


def test_flops_of_modules() -> None:
    """Of a stack, of a cell, in inference, whose short way goes past the dispatcher, and without data."""
    for options in ({}, {"num_layers": 2, "bidirectional": True}):
        ours, theirs, x = fusedrnn.GRU(4, 5, **options), nn.GRU(4, 5, **options), torch.randn(3, 2, 4)
        expected = flops(lambda: theirs(x))
        assert flops(lambda: ours(x)) == expected > 0
        with torch.inference_mode():
            ours(x)
            assert flops(lambda: ours(x)) == expected
        assert flops(lambda: ours.to("meta")(x.to("meta"))) == expected
    ours, theirs, x = fusedrnn.LSTMCell(4, 5), nn.LSTMCell(4, 5), torch.randn(3, 4)
    assert flops(lambda: ours(x)) == flops(lambda: theirs(x)) == 2 * 3 * 20 * (4 + 5)


def test_flops_by_module() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent, self.head = fusedrnn.LSTM(4, 5), nn.Linear(5, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.recurrent(x)[0])

    with FlopCounterMode(display=False) as counter:
        Model()(torch.randn(3, 2, 4)).sum().backward()
    assert counter.get_flop_counts()["Model.recurrent"] == {
        torch.ops.fusedrnn.layer_forward: 2 * 6 * 20 * (4 + 5),
        torch.ops.fusedrnn.layer_backward: 2 * 6 * 20 * (5 + 4 + 5),  # x wants no gradient
    }


def test_profiler_names_and_shapes() -> None:
    layer, x = fusedrnn.LSTM(4, 5, bidirectional=True), torch.randn(3, 2, 4, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        layer(x)[0].sum().backward()
        with torch.no_grad():
            layer(x)
    seen = {event.name: event for event in profiler.events()}
    assert {"RecurrentLayer", "fusedrnn::layer_forward", "fusedrnn::layer_backward", "fusedrnn::infer"} <= set(seen)
    assert all(shape in seen["RecurrentLayer"].input_shapes for shape in ([3, 2, 4], [20, 5]))
    assert seen["fusedrnn::layer_forward"].input_shapes[0] == seen["fusedrnn::infer"].input_shapes[0] == [3, 2, 4]
    assert seen["fusedrnn::layer_backward"].input_shapes[0] == [3, 2, 10]  # dy


class Padded(nn.Module):
    """Ragged input through a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return pad_packed_sequence(self.layer(pack_padded_sequence(x, lengths, enforce_sorted=False))[0])[0]


CLASSES = ("RNN", "LSTM", "GRU", "ResidualRNN", "RNNCell", "LSTMCell", "GRUCell")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit
@pytest.mark.parametrize("name", CLASSES)
def test_scripting_is_an_error_that_names_the_ways_out(name: str) -> None:
    module = getattr(fusedrnn, name)(4, 5)
    for model in (module, nn.Sequential(module)):
        with pytest.raises(NotImplementedError, match=rf"fusedrnn.{name} cannot .* torch.export.export, or fused"):
            torch.jit.script(model)
    if hasattr(nn, name):
        model, x = nn.Sequential(module), torch.randn(*(3, 2, 4)[-2 if "Cell" in name else -3 :])
        expected = model(x)
        fusedrnn.revert(model)
        torch.testing.assert_close(torch.jit.script(model)(x), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_tracing() -> None:
    """With gradients an error; without, the op is in the trace, for any T and B, and can be saved."""
    x = torch.randn(3, 2, 4)
    with pytest.raises(NotImplementedError, match=r"TorchScript cannot .* torch.export.export, or, for inference"):
        torch.jit.trace(fusedrnn.LSTM(4, 5), (x,))
    stack = {"num_layers": 2, "bidirectional": True, "batch_first": True}
    lengths, longer = torch.tensor([1, 3]), torch.tensor([2, 5, 1])
    for model, example, other in (
        (fusedrnn.LSTM(4, 5), (x,), (torch.randn(7, 3, 4),)),
        (fusedrnn.GRU(4, 5, **stack), (x,), (torch.randn(7, 3, 4),)),
        (fusedrnn.LSTMCell(4, 5), (x[0],), (torch.randn(7, 4),)),
        (Padded(fusedrnn.GRU(4, 5, 2, bidirectional=True)), (x, lengths), (torch.randn(5, 3, 4), longer)),
    ):
        with torch.no_grad():
            traced = torch.jit.trace(model, example)
            file = io.BytesIO()
            torch.jit.save(traced, file)
            file.seek(0)
            for call in (traced, torch.jit.load(file), torch.jit.freeze(copy.deepcopy(traced).eval())):
                torch.testing.assert_close(call(*other), model(*other))
        y = traced(*other)
        with pytest.raises(RuntimeError, match="derivative for fusedrnn::layer_forward is not implemented"):
            (y if isinstance(y, torch.Tensor) else y[0]).sum().backward()


class Symbolic(nn.Module):
    """Every kind of call: with and without states, one state and two, stacked, single steps."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = fusedrnn.LSTM(4, 5, num_layers=2), fusedrnn.GRU(5, 3)
        self.lstm_cell, self.rnn_cell = fusedrnn.LSTMCell(3, 5), fusedrnn.RNNCell(5, 5)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        y, (h_n, c_n) = self.lstm(x, (h, c))
        z, last = self.gru(y)
        first, second = self.lstm_cell(z[0], (h[0], c[0]))
        return self.rnn_cell(first, second), self.gru(y, last)[0], self.lstm_cell(z[1])[1], h_n, c_n


def test_symbolic_traces_have_a_node_for_each_layer() -> None:
    """With its hooks, which run once."""
    model, states = Symbolic(), torch.randn(2, 2, 2, 5).unbind()
    model.gru.register_forward_hook(lambda module, args, outputs: (outputs[0] * 2, outputs[1]))
    model.gru.register_forward_pre_hook(lambda module, args: (args[0] * 3, *args[1:]))
    torch.nn.utils.prune.random_unstructured(model.lstm, "weight_hh_l0", 0.5)
    traced = torch.fx.symbolic_trace(model)
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert called == ["lstm", "gru", "lstm_cell", "rnn_cell", "gru", "lstm_cell"]
    x, found = torch.randn(6, 2, 4), []
    for call in (model, traced):
        leaf = x.clone().requires_grad_()
        outputs = call(leaf, *states)
        found.append([*outputs, *torch.autograd.grad(sum(t.sin().sum() for t in outputs), leaf)])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name, states", [("LSTM", 2), ("GRU", 1), ("LSTMCell", 2), ("GRUCell", 1)])
def test_symbolic_traces_with_states_from_outside(name: str, states: int) -> None:
    """A state, or the tuple of them, whose inside the trace does not see; an input that is no part of the graph."""
    x, hx = torch.randn(6, 2, 4), torch.randn(states, *((1, 2, 5) if "Cell" not in name else (2, 5))).unbind()
    own = x if "Cell" not in name else x[0]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = getattr(fusedrnn, name)(4, 5)

        def forward(self, hx: Tensor | tuple[Tensor, ...]) -> Tensor:
            return self.layer(own, hx)[0]

    model, given = Model(), hx if states > 1 else hx[0]
    assert torch.equal(torch.fx.symbolic_trace(model)(given), model(given))


def hook_of_opacus(module: nn.Module, inputs: object, output: object) -> None:
    """What Opacus hangs on every module, by its name."""


hook_of_opacus.__module__ = "opacus.grad_sample.grad_sample_module"


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"])
def test_opacus_is_refused_at_once(name: str) -> None:
    """It knows nothing of a layer's states, and would fail in the backward pass. (tests/clients has Opacus itself.)"""
    module, x = getattr(fusedrnn, name)(3, 4), torch.randn(2, 3)
    for hook in (hook_of_opacus, partial(partial(hook_of_opacus), output=None)):
        with pytest.raises(NotImplementedError, match=r"torch.vmap\(torch.func.grad\(loss\)\)"):
            module.register_forward_hook(hook)
    module(x)


def test_opacus_may_have_a_forward_without_states() -> None:
    class Outputs(fusedrnn.GRU):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[0]

    module = Outputs(3, 4)
    module.register_forward_hook(hook_of_opacus)
    assert module(torch.randn(2, 3)).shape == (2, 4)


def test_opacus_is_refused_where_a_forward_has_states() -> None:
    """Taken by a subclass's forward, by position or name, or returned by it: when it happens, before any backward."""

    class Some(fusedrnn.GRU):
        def forward(self, x: Tensor, hx: Tensor | None = None, both: bool = False) -> Any:
            found = super().forward(x, hx)
            return found if both else found[0]

    module, x, h = Some(3, 4), torch.randn(2, 3), torch.zeros(1, 4)
    heard: list[object] = []
    hook = lambda module, inputs, output: heard.append((module, inputs, output))  # noqa: E731
    hook.__module__ = hook_of_opacus.__module__
    handle = module.register_forward_hook(hook)
    y = module(x)
    assert heard == [(module, (x,), y)]
    for call in (lambda: module(x, h), lambda: module(x, hx=h), lambda: module(x, both=True)):
        with pytest.raises(NotImplementedError, match="use a subclass whose forward"):
            call()
    handle.remove()
    module(x, h)
    assert len(heard) == 1
    named = lambda module, inputs, named, output: heard.append(named)  # noqa: E731
    named.__module__ = hook_of_opacus.__module__
    module.register_forward_hook(named, with_kwargs=True)
    module(x)
    assert heard[1:] == [{}]
