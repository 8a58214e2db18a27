"""The norms that a backward pass records on its way, against those of a loop that keeps every gradient."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedrnn
from fusedrnn.cells import CELLS
from parity import DEVICE, Case
from test_through_time import B, T, given, gradients, kinds, loop


def recorded(case: Case) -> list[fusedrnn.LayerGradients]:
    module, tensors = given(case, 1.0)
    module = module.to(DEVICE)
    tensors = {name: t.detach().to(DEVICE).requires_grad_() for name, t in tensors.items()}
    states = tuple(tensors[name] for name in ("h0", "c0") if name in tensors)
    y, last = module(tensors["x"], states if len(states) > 1 else states[0], lengths=case.lengths)
    with fusedrnn.record_gradients(module) as rec:
        gradients(case, module, tensors, (y, *(last if isinstance(last, tuple) else (last,))))
    return rec.layers


@pytest.mark.isa
@pytest.mark.parametrize("cell", CELLS)
def test_recorded_norms(cell: str) -> None:
    for case in kinds(cell):
        module, tensors = given(case, 1.0)
        states = tuple(tensors[name] for name in ("h0", "c0") if name in tensors)
        lengths = list(case.lengths or [T] * B)
        y, last, seen = loop(cell, module, tensors["x"], states, lengths)
        draw = torch.Generator().manual_seed(7)
        loss = sum((torch.randn(r.shape, generator=draw, dtype=torch.float64) * r).sum() for r in (y, *last))
        loss.backward()
        inside = torch.arange(T).unsqueeze(1) < torch.tensor(lengths)

        def norms(steps: list[Tensor], inside: Tensor = inside) -> Tensor:
            found = torch.stack([(torch.zeros_like(s) if s.grad is None else s.grad).norm(dim=1) for s in steps])
            return found.where(inside, torch.nan)

        found = recorded(case)
        assert [r.direction for r in found] == ["forward", "reverse"][: len(seen["h"])]
        for d, layer in enumerate(found):
            torch.testing.assert_close(layer.h, norms(seen["h"][d]), equal_nan=True, rtol=1e-9, atol=1e-12)
            assert (layer.c is None) == (cell != "lstm")
            if layer.c is not None:
                torch.testing.assert_close(layer.c, norms(seen["c"][d]), equal_nan=True, rtol=1e-9, atol=1e-12)
            assert list(layer.gates) == list(CELLS[cell].gates)
            for g, name in enumerate(layer.gates):
                own = torch.stack([s.grad.chunk(len(layer.gates), 1)[g].norm(dim=1) for s in seen["inputs"][d]])
                torch.testing.assert_close(
                    layer.gates[name], own.where(inside, torch.nan), equal_nan=True, rtol=1e-9, atol=1e-12
                )


def test_recording_changes_nothing_and_takes_every_layout() -> None:
    module, x = fusedrnn.LSTM(4, 5, num_layers=2, bidirectional=True), torch.randn(T, B, 4)
    lengths = torch.tensor([5, 2, 7, 3])

    def backward(call: Callable[[], Tensor]) -> tuple[list[Tensor], list[fusedrnn.LayerGradients]]:
        module.zero_grad()
        with fusedrnn.record_gradients(nn.ModuleDict({"rnn": module})) as rec:
            call().sum().backward()
        return [p.grad.clone() for p in module.parameters()], rec.layers

    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    first, by_lengths = backward(lambda: module(x, lengths=lengths)[0])
    second, by_packing = backward(lambda: module(packed)[0].data)
    plain = torch.autograd.grad(module(x, lengths=lengths)[0].sum(), list(module.parameters()))
    for a, b, c in zip(first, second, plain, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert [r.label for r in by_lengths] == ["rnn.l1", "rnn.l1 reverse", "rnn.l0", "rnn.l0 reverse"]
    for a, b in zip(by_lengths, by_packing, strict=True):
        torch.testing.assert_close(a.h, b.h, equal_nan=True)
        assert a.h.isnan().sum() == T * B - lengths.sum()
    with torch.autocast("cpu", torch.bfloat16):
        _, cast = backward(lambda: module(x)[0])
    assert len(cast) == 4 and cast[0].h.dtype == torch.float32
    create = fusedrnn.record_gradients(module)
    with create:
        torch.autograd.grad(module(x)[0].sum(), module.weight_hh_l0, create_graph=True)
    assert len(create.layers) == 4


def multiple_of_identity(factor: float, cls: type = fusedrnn.RNN, **options: Any) -> nn.Module:
    """A linear layer of float64 whose every step back is this factor, and nothing else."""
    module = cls(3, 3, bias=False, **options).double()
    with torch.no_grad():
        module.weight_hh_l0.copy_(factor * torch.eye(3, dtype=torch.float64))
        module.weight_ih_l0.copy_(torch.eye(3))
    return module


WORDS = ((0.5, "vanishing"), (0.93, "falling"), (0.999, "steady"), (1.1, "growing"), (1.5, "exploding"))


@pytest.mark.parametrize("enters", ["at the last step", "at every step", "at 26% of the steps"])
@pytest.mark.parametrize("factor, verdict", WORDS)
def test_factor_memory_and_verdict(factor: float, verdict: str, enters: str) -> None:
    """The same wherever the loss is."""
    module, T = multiple_of_identity(factor, nonlinearity="relu"), 39
    y, _ = module(torch.rand(T, 2, 3).double() + 0.1)
    at = {"at the last step": y[-1], "at every step": y, "at 26% of the steps": y[::4]}[enters]
    with fusedrnn.record_gradients(module) as rec:
        at.sum().backward()
    (layer,) = rec.layers
    assert layer.enters == enters and layer.steps == T - 1
    assert layer.decay == pytest.approx(factor) and layer.verdict == verdict
    assert layer.change == pytest.approx(factor ** (T - 1))
    assert layer.memory == pytest.approx(-1 / math.log(factor) if factor < 1 else math.nan, nan_ok=True)
    if enters == "at the last step":
        last, farthest = layer.ends
        assert last == pytest.approx(math.sqrt(3)) and farthest == pytest.approx(last * layer.change)
    text = rec.summary()
    assert "inf" not in text and all(word in text for word in (verdict, f"{factor:.4f}", enters, f"{layer.change:.3g}"))
    assert "beyond it or not finite exploding" in text  # how the verdict is made
    assert ("grad_clip=, bptt_steps=" in text) == (verdict in ("growing", "exploding"))


def test_what_is_sent_and_what_comes_from_outside() -> None:
    """Each against a loop of single steps, for two states too."""
    for cls in (fusedrnn.LSTM, fusedrnn.GRU, fusedrnn.RNN, fusedrnn.ResidualRNN):
        module, x, weight = cls(3, 4).double(), torch.randn(6, 2, 3).double(), torch.randn(6, 2, 4).double()
        states = 2 if cls is fusedrnn.LSTM else 1
        carried = [torch.zeros(1, 2, 4).double() for _ in range(states)]
        loss, before = torch.zeros(()).double(), []
        for t in range(6):
            y, last = module(x[t : t + 1], tuple(carried) if states == 2 else carried[0])
            given = list(last) if states == 2 else [last]
            carried = [s.clone() for s in given]  # what later steps read
            before.append(carried)
            loss = loss + (weight[t] * y[0]).sum()
        sent = torch.autograd.grad(loss, [s for step in before for s in step], allow_unused=True, retain_graph=True)
        expected = [torch.zeros(2) if s is None else s[0].norm(dim=1) for s in sent]
        with fusedrnn.record_gradients(module) as rec:
            (weight * module(x)[0]).sum().backward()
        (layer,) = rec.layers
        torch.testing.assert_close(layer.sent_h, torch.stack(expected[::states]).double())
        if states == 2:
            torch.testing.assert_close(layer.sent_c, torch.stack(expected[1::2]).double())
        torch.testing.assert_close(layer.from_y, weight.norm(dim=2))
        assert layer.enters == "at every step"


def test_a_layer_that_vanishes_does_so_with_a_loss_at_every_step() -> None:
    torch.manual_seed(3)
    module, x = fusedrnn.RNN(3, 8), torch.randn(100, 4, 3)
    with torch.no_grad():
        module.weight_hh_l0.mul_(0.7)
    found = []
    for loss in (lambda y: y[-1].sum(), lambda y: y.sum()):
        with fusedrnn.record_gradients(module) as rec:
            loss(module(x)[0]).backward()
        found.append(rec.layers[0])
    assert [layer.verdict for layer in found] == ["vanishing", "vanishing"]


def test_growth_is_named() -> None:
    """A residual RNN, whose gradient grows without a factor above the limit of exploding."""
    module = multiple_of_identity(0.0, fusedrnn.ResidualRNN)
    with torch.no_grad():
        module.weight_hh_l0.copy_(0.1 * torch.eye(3))
    with fusedrnn.record_gradients(module) as rec:
        module(torch.zeros(60, 2, 3).double())[0][-1].sum().backward()
    (layer,) = rec.layers
    assert layer.change == pytest.approx(1.1**59) and layer.verdict == "growing"
    assert math.isnan(layer.memory) and "grad_clip=, bptt_steps=" in rec.summary()


def test_verdicts_at_the_edge() -> None:
    module = fusedrnn.LSTM(3, 4, bidirectional=True)
    with fusedrnn.record_gradients(module) as rec:
        module(torch.randn(5, 2, 3))[0][-1].sum().backward()
    forward, reverse = rec.layers
    assert forward.verdict in ("steady", "falling") and forward.enters == "at the last step"
    # The reverse direction's last output is its first step: nothing goes further back.
    assert (reverse.verdict, reverse.enters) == ("unknown", "at 20% of the steps")
    assert "shows what would" in rec.summary()
    with torch.no_grad():
        module.weight_hh_l0.fill_(math.nan)
    with fusedrnn.record_gradients(module) as rec:
        module(torch.randn(5, 2, 3))[0].sum().backward()
    assert rec.layers[0].verdict == "exploding"
    one = fusedrnn.GRU(3, 4)
    with fusedrnn.record_gradients(one) as rec:
        one(torch.randn(1, 2, 3))[0].sum().backward()
        one(torch.randn(3, 2, 3))[0].mul(0).sum().backward()
    assert [(r.verdict, r.enters) for r in rec.layers] == [("unknown", "at the last step"), ("unknown", "nowhere")]


def test_cuts_are_no_decay() -> None:
    """Steps that send nothing by design, before a reset or where back-propagation is truncated, do not count."""
    reset = torch.zeros(39, 2, dtype=torch.bool)
    reset[[5, 20], 0] = reset[30, 1] = True
    for options, arguments in (({"bptt_steps": 7}, {}), ({}, {"reset": reset}), ({}, {"lengths": [39, 11]})):
        module = multiple_of_identity(0.9, nonlinearity="relu", **options)
        with fusedrnn.record_gradients(module) as rec:
            module(torch.rand(39, 2, 3).double() + 0.1, **arguments)[0].sum().backward()
        assert rec.layers[0].decay == pytest.approx(0.9)


def test_passes_and_calls_are_told_apart() -> None:
    module, x = fusedrnn.GRU(3, 4, num_layers=2), torch.randn(5, 2, 3)
    with fusedrnn.record_gradients(module) as rec:
        module(x)[0].sum().backward()
        assert [layer.label for layer in rec.layers] == ["model.l1", "model.l0"]
        module(x)[0].sum().backward()
    assert [layer.label for layer in rec.layers] == [f"model.l{n} pass {p}" for p in (0, 1) for n in (1, 0)]
    assert len({line.split("  ")[0] for line in rec.summary().splitlines()[1:5]}) == 4
    again = fusedrnn.RNN(4, 4)
    with fusedrnn.record_gradients(again) as rec:
        again(again(torch.randn(5, 2, 4))[0])[0].sum().backward()
    assert [layer.label for layer in rec.layers] == ["model.l0 call 0", "model.l0 call 1"]
    assert rec.layers[0].enters == "at every step"


def test_another_default_device() -> None:
    module, x = fusedrnn.LSTM(3, 4), torch.randn(5, 2, 3)
    with fusedrnn.record_gradients(module) as rec:
        module(x, lengths=[5, 2])[0].sum().backward()
    try_device = torch.device("meta")
    with try_device:
        with fusedrnn.record_gradients(module) as other:
            module(x, lengths=[5, 2])[0].sum().backward()
        assert other.summary() == rec.summary()


def test_pictures(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    module = fusedrnn.GRU(3, 4, num_layers=2)
    with fusedrnn.record_gradients(module) as rec:
        module(torch.randn(9, 3, 3), lengths=[9, 4, 0])[0].sum().backward()
    figure = rec.plot(tmp_path / "flow.png")
    assert (tmp_path / "flow.png").read_bytes().startswith(b"\x89PNG")
    lines, gates, heat = figure.axes[:3]
    assert [line.get_label().split(":")[0] for line in lines.lines[::2]] == ["model.l1", "model.l0"]
    assert [line.get_label() for line in gates.lines] == ["r", "z", "n"]
    assert heat.get_images()[0].get_array().shape == (3, 9)


def test_what_cannot_be_recorded() -> None:
    with pytest.raises(ValueError, match="the model has no fusedrnn.RNN"):
        fusedrnn.record_gradients(nn.Linear(2, 2))
    module, x = fusedrnn.GRU(3, 4), torch.randn(5, 2, 3)
    other = copy.deepcopy(module)
    with fusedrnn.record_gradients(module) as rec:
        other(x)[0].sum().backward()
    module(x)[0].sum().backward()
    for call in (rec.summary, rec.plot):
        with pytest.raises(RuntimeError, match="no backward pass of the model's recurrent layers ran"):
            call()
    with fusedrnn.record_gradients(module), pytest.raises(RuntimeError, match="cannot look into torch.func"):
        torch.vmap(torch.func.grad(lambda x: module(x)[0].sum()))(x.unsqueeze(0))
