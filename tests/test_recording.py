"""The norms that a backward pass records on its way, against those of a loop that keeps every gradient."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loops import two_states
from parity import DEVICE, Case
from test_through_time import B, T, given, gradients, kinds, loop
from tolerances import assert_close
from torch import Tensor, nn

import fusedrnn
from fusedrnn.cells import CELLS


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
            assert (layer.c is None) == (not two_states(cell))
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


WORDS = ((0.5, "vanishing"), (0.9, "falling"), (0.999, "steady"), (1.1, "growing"), (1.5, "exploding"))


@pytest.mark.parametrize("enters", ["at the last step", "at 20 of 78 steps"])
@pytest.mark.parametrize("factor, verdict", WORDS)
def test_factor_memory_and_verdict(factor: float, verdict: str, enters: str) -> None:
    """Over the steps back from the earliest one that the loss reads."""
    module, T = multiple_of_identity(factor, nonlinearity="relu"), 39
    y, _ = module(torch.rand(T, 2, 3).double() + 0.1)
    last = {"at the last step": 1, "at 20 of 78 steps": 10}[enters]
    with fusedrnn.record_gradients(module) as rec:
        y[-last:].sum().backward()
    (layer,) = rec.layers
    assert layer.enters == enters and layer.steps == T - last
    assert layer.decay == pytest.approx(factor) and layer.verdict == verdict
    assert layer.change == pytest.approx(factor**layer.steps)
    assert layer.memory == pytest.approx(-1 / math.log(factor) if factor < 1 else math.nan, nan_ok=True)
    at_last, farthest = layer.ends
    assert at_last == pytest.approx(math.sqrt(3))
    assert farthest == pytest.approx(at_last * sum(factor**k for k in range(T - last, T)))
    text = rec.summary()
    assert "inf" not in text and all(
        word in text for word in (verdict, f"{factor:.4f}", enters, f"{layer.change:.3g}", f"{farthest:.3g}")
    )
    assert "beyond it exploding" in text  # how the verdict is made
    assert ("grad_clip=, bptt_steps=" in text) == (verdict in ("growing", "exploding"))


def layer_with_a_slow_direction() -> nn.Module:
    """99 units that keep a tenth a step and one that keeps all: of a step's gradient a tenth is left for ever."""
    module = fusedrnn.RNN(100, 100, bias=False, nonlinearity="relu").double()
    with torch.no_grad():
        module.weight_hh_l0.copy_(torch.diag(torch.tensor([1.0] + [0.1] * 99)))
        module.weight_ih_l0.copy_(torch.eye(100))
    return module


@pytest.mark.parametrize("cell", ["slow direction", "vanishing", "lstm"])
def test_no_verdict_where_the_loss_enters_at_every_step(cell: str) -> None:
    """What has just entered falls, or does not, otherwise than what comes from far: their sum does not tell."""
    torch.manual_seed(3)
    expected = {"slow direction": "falling", "vanishing": "vanishing", "lstm": "steady"}[cell]
    made = {"slow direction": layer_with_a_slow_direction, "lstm": lambda: fusedrnn.LSTM(3, 16)}
    module = made.get(cell, lambda: fusedrnn.RNN(3, 8).double())()
    if cell == "vanishing":
        module.weight_hh_l0.detach().mul_(0.7)
    if cell == "lstm":
        fusedrnn.init.forget_bias_(module, 5.0)
    x = torch.rand(100, 4, module.input_size).to(module.weight_hh_l0)
    losses = {
        "at the last step": lambda y: y[-1].sum(),
        "at every step": lambda y: (y * torch.randn_like(y)).sum(),
        "at 40 of 400 steps": lambda y: y[9::10].sum(),
    }
    for enters, loss in losses.items():
        with fusedrnn.record_gradients(module) as rec:
            loss(module(x)[0]).backward()
        (layer,) = rec.layers
        assert layer.enters == enters
        if enters == "at the last step":
            assert layer.verdict == expected and layer.steps == 99
            assert layer.change == pytest.approx(layer.ends[1] / layer.ends[0])
        else:
            assert layer.verdict == "unknown" and "it cannot be told" in rec.summary()
            assert layer.steps == {"at every step": 0}.get(enters, 9)


def test_a_layer_of_a_stack_alone() -> None:
    """As the summary advises where a verdict is withheld: the final state of one layer and direction."""
    module, x = fusedrnn.GRU(3, 4, num_layers=2, bidirectional=True), torch.randn(60, 2, 3)
    with fusedrnn.record_gradients(module) as rec:
        module(x)[0].sum().backward()
    assert {layer.verdict for layer in rec.layers} == {"unknown"}
    assert "h_n[k].sum().backward()" in rec.summary()
    for k in range(4):
        with fusedrnn.record_gradients(module) as rec:
            module(x)[1][k].sum().backward()
        wanted = k // 2, ("forward", "reverse")[k % 2]
        (layer,) = [r for r in rec.layers if (r.layer, r.direction) == wanted]
        assert (layer.enters, layer.steps, layer.verdict) == ("at the last step", 59, "vanishing")


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


def layouts(x: Tensor) -> dict[str, tuple[Any, dict[str, Any]]]:
    """What to call a layer of 7 steps and 3 samples with."""
    reset = torch.zeros(7, 3, dtype=torch.bool)
    reset[3, 0] = reset[0, 1] = reset[5, 1] = True
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 7, 5]), enforce_sorted=False)
    lengths = {"lengths": [3, 7, 0]}
    return {"plain": (x, {}), "lengths": (x, lengths), "reset": (x, {"reset": reset}), "packed": (packed, {})}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["plain", "lengths", "reset", "packed"])
def test_what_enters_is_the_gradient_of_the_output(layout: str, dtype: torch.dtype) -> None:
    """Of a layer above too: two modules, so that autograd holds the gradient of what goes from one to the other."""
    for options in ({}, {"bidirectional": True}, {"proj_size": 2, "bidirectional": True}):
        lower = fusedrnn.LSTM(3, 4, dtype=dtype, **options)
        H, D = lower.proj_size or 4, lower.bidirectional + 1
        upper = fusedrnn.LSTM(D * H, 4, dtype=dtype, **options)
        given, arguments = layouts(torch.randn(7, 3, 3, dtype=dtype))[layout]
        y0 = lower(given, **arguments)[0]
        y1 = upper(y0, **arguments)[0]
        ys = [y.data if layout == "packed" else y for y in (y0, y1)]
        for y in ys:
            y.retain_grad()
        with fusedrnn.record_gradients(nn.ModuleList([lower, upper])) as rec:
            (ys[1] * torch.randn_like(ys[1])).sum().backward()
        for d, name, y in [(d, str(n), ys[n]) for n in (1, 0) for d in range(D)]:
            layer = next(r for r in rec.layers if r.name == name and r.direction == ("forward", "reverse")[d])
            grad = y.grad
            if layout == "packed":
                grad, _ = nn.utils.rnn.pad_packed_sequence(y0._replace(data=grad))
            expected = grad.unflatten(2, (D, H))[:, :, d].norm(dim=2).where(~layer.h.isnan(), torch.nan)
            assert layer.h.isnan().sum() == {"plain": 0, "reset": 0, "lengths": 11, "packed": 6}[layout]
            assert_close("from_y", layer.from_y, expected.to(layer.from_y), dtype)


def test_what_enters_by_c() -> None:
    module, x, weight = fusedrnn.LSTM(3, 4, bidirectional=True), torch.randn(6, 2, 3), torch.randn(6, 2, 8)
    for batch_first in (False, True):
        module.batch_first = batch_first
        with fusedrnn.record_gradients(module) as rec:
            _, _, states = module(x.transpose(0, 1) if batch_first else x, return_states=True)
            (states[0][1] * (weight.transpose(0, 1) if batch_first else weight)).sum().backward()
        for d, layer in enumerate(rec.layers):
            assert layer.enters == "at every step" and not layer.from_y.any()
            torch.testing.assert_close(layer.from_c, weight[..., 4 * d : 4 * d + 4].norm(dim=2))
    with fusedrnn.record_gradients(module) as rec:
        module(x.transpose(0, 1))[1][1].sum().backward()
    for layer in rec.layers:
        assert (layer.enters, layer.steps, len(layer.by_lag())) == ("at the last step", 5, 6)
        assert layer.ends[0] == pytest.approx(2) and layer.change == pytest.approx(layer.ends[1] / layer.ends[0])


def test_the_state_of_an_lstm_is_both() -> None:
    """Without weights c alone goes on, by the forget gate."""
    module, f = fusedrnn.LSTM(3, 4).double(), torch.tensor(0.9, dtype=torch.float64)
    for p in module.parameters():
        p.detach().zero_()
    module.bias_ih_l0.detach()[4:8] = f.logit()
    with fusedrnn.record_gradients(module) as rec:
        module(torch.zeros(40, 2, 3).double())[0][-1].sum().backward()
    (layer,) = rec.layers
    dh, dc = 2.0, 1.0  # o (1 - tanh(c)^2) = 1/2
    assert layer.ends == pytest.approx((math.hypot(dh, dc), dc * 0.9**39))
    assert layer.change == pytest.approx(dc * 0.9**39 / math.hypot(dh, dc))


def test_growth_is_named() -> None:
    """A residual RNN, whose gradient grows without a factor above the limit of exploding."""
    module = multiple_of_identity(0.0, fusedrnn.ResidualRNN)
    with torch.no_grad():
        module.weight_hh_l0.copy_(0.1 * torch.eye(3))
    with fusedrnn.record_gradients(module) as rec:
        module(torch.zeros(60, 2, 3).double())[0][-1].sum().backward()
    (layer,) = rec.layers
    assert layer.change == pytest.approx(1.1**59) and layer.verdict == "growing"
    assert layer.ends == pytest.approx((math.sqrt(3), math.sqrt(3) * 1.1**59))
    assert layer.steps == 59 and f"{layer.change:.3g}" in rec.summary() and f"{layer.ends[1]:.3g}" in rec.summary()
    assert math.isnan(layer.memory) and "grad_clip=, bptt_steps=" in rec.summary()


def test_verdicts_at_the_edge() -> None:
    module = fusedrnn.LSTM(3, 4, bidirectional=True)
    with fusedrnn.record_gradients(module) as rec:
        module(torch.randn(5, 2, 3))[0][-1].sum().backward()
    forward, reverse = rec.layers
    assert forward.verdict in ("vanishing", "falling") and forward.enters == "at the last step"
    # The reverse direction's last output is its first step: nothing goes further back.
    assert (reverse.verdict, reverse.enters) == ("unknown", "at 2 of 10 steps")
    assert "it cannot be told" in rec.summary()
    with torch.no_grad():
        module.weight_hh_l0.fill_(math.nan)
    with fusedrnn.record_gradients(module) as rec:
        module(torch.randn(5, 2, 3))[0].sum().backward()
    assert rec.layers[0].verdict == "not finite"
    one = fusedrnn.GRU(3, 4)
    with fusedrnn.record_gradients(one) as rec:
        one(torch.randn(1, 2, 3))[0].sum().backward()
        one(torch.randn(3, 2, 3))[0].mul(0).sum().backward()
    assert [(r.verdict, r.enters) for r in rec.layers] == [("unknown", "at the last step"), ("none", "nowhere")]
    assert "is it a part of the loss" in rec.summary() and "nan" not in rec.summary()


@pytest.mark.parametrize("samples, lengths", [(0, None), (2, [0, 0])])
def test_nothing_to_record(samples: int, lengths: list[int] | None) -> None:
    module = fusedrnn.LSTM(3, 4)
    with fusedrnn.record_gradients(module) as rec:
        module(torch.randn(5, samples, 3), lengths=lengths)[0].sum().backward()
    (layer,) = rec.layers
    assert (layer.enters, layer.steps, layer.verdict) == ("nowhere", 0, "none")
    assert "none" in rec.summary() and "nan" not in rec.summary()


def test_cuts_are_no_decay() -> None:
    """Steps that send nothing by design, before a reset or where back-propagation is truncated, do not count."""
    reset = torch.zeros(39, 2, dtype=torch.bool)
    reset[[5, 20], 0] = reset[30, 1] = True
    for options, arguments, steps in (
        ({"bptt_steps": 7}, {}, 3),
        ({}, {"reset": reset}, 18),
        ({}, {"lengths": [39, 11]}, 38),
    ):
        module = multiple_of_identity(0.9, nonlinearity="relu", **options)
        with fusedrnn.record_gradients(module) as rec:
            module(torch.rand(39, 2, 3).double() + 0.1, **arguments)[1].sum().backward()
        (layer,) = rec.layers
        assert layer.decay == pytest.approx(0.9) and layer.steps == steps
        assert layer.verdict == ("unknown" if steps < 10 else "falling" if steps > 30 else "steady")
    alone = multiple_of_identity(0.9, nonlinearity="relu", bptt_steps=1)
    with fusedrnn.record_gradients(alone) as rec:
        alone(torch.rand(39, 2, 3).double() + 0.1)[0][-1].sum().backward()
    assert rec.layers[0].verdict == "unknown"


@pytest.mark.parametrize("factor", [0.0, 0.5])
def test_zero_without_a_cut_has_vanished(factor: float) -> None:
    """Far beyond the least float32, where the norms are zero."""
    module = multiple_of_identity(factor, nonlinearity="relu").float()
    with fusedrnn.record_gradients(module) as rec:
        module(torch.rand(1000, 2, 3) + 0.1)[0][-1].sum().backward()
    (layer,) = rec.layers
    assert layer.verdict == "vanishing" and layer.decay == pytest.approx(factor, abs=0.02)
    assert layer.ends == pytest.approx((math.sqrt(3), 0.0)) and "e-38" not in rec.summary()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["norm", "value"])
def test_what_grad_clip_cuts_is_no_decay(mode: str, dtype: torch.dtype) -> None:
    """Where the limit holds what steps send, nothing is said of how far a gradient reaches; elsewhere all is."""

    def read(factor: float, clip: float) -> tuple[fusedrnn.LayerGradients, str]:
        module = multiple_of_identity(factor, nonlinearity="relu", grad_clip=clip, grad_clip_mode=mode).to(dtype)
        with fusedrnn.record_gradients(module) as rec:
            module(torch.rand(39, 2, 3).to(dtype) + 0.1)[1].sum().backward()
        return rec.layers[0], rec.summary()

    for factor in (1.5, 1.0):
        layer, text = read(factor, 0.3)
        assert (layer.verdict, layer.steps) == ("clipped", 0) and "a larger limit, or none, shows" in text
    layer, text = read(0.5, 0.3)  # only the first steps are cut
    assert layer.verdict == "vanishing" and layer.steps >= 36
    assert layer.decay == pytest.approx(0.5, rel=1e-2) and "clipped:" not in text
    for factor, verdict in ((0.5, "vanishing"), (1.0, "steady"), (1.125, "growing")):
        layer, _ = read(factor, 1e6)  # nothing is
        assert (layer.verdict, layer.steps) == (verdict, 38)


def test_grad_clip_of_an_lstm_is_of_both_states() -> None:
    """c's alone is cut: h has no part in it."""
    module = fusedrnn.LSTM(2, 3, grad_clip=0.1, grad_clip_mode="norm").double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.bias_hh_l0[3:6] = 30.0  # the forget gate
    _, (_, c) = module(torch.rand(39, 2, 2).double())
    with fusedrnn.record_gradients(module) as rec:
        c.sum().backward()
    assert rec.layers[0].verdict == "clipped" and float(rec.layers[0].sent_h[:-1].max()) == 0


def falls(factor: float, steps: int) -> str:
    change = factor**steps
    return "vanishing" if change <= 1e-3 else "falling" if change <= 0.1 else "unknown"


@pytest.mark.parametrize("factor", [0.01, 0.296, 0.99, 3.0])
def test_few_steps_say_what_they_measured(factor: float) -> None:
    """And what has changed little over few steps may change much over more."""
    for steps in (2, 3, 4):
        module = multiple_of_identity(factor, nonlinearity="relu")
        with fusedrnn.record_gradients(module) as rec:
            module(torch.rand(steps, 2, 3).double() + 0.1)[1].sum().backward()
        (layer,) = rec.layers
        assert layer.change == pytest.approx(factor ** (steps - 1))
        assert layer.verdict == ("growing" if factor ** (steps - 1) > 10 else falls(factor, steps - 1))
    module = fusedrnn.LSTM(8, 32)
    fusedrnn.init.chrono_(module, 1000)
    for steps, verdict in ((2, "unknown"), (3, "unknown"), (100, "steady")):
        with fusedrnn.record_gradients(module) as rec:
            module(torch.randn(steps, 4, 8))[0][-1].sum().backward()
        assert rec.layers[0].verdict == verdict


def test_a_step_that_grows_between_two_that_enter_explodes_nothing() -> None:
    """W_hh has the square 0."""
    module = fusedrnn.RNN(2, 2, bias=False, nonlinearity="relu")
    with torch.no_grad():
        module.weight_hh_l0.copy_(torch.tensor([[0.0, 3.0], [0.0, 0.0]]))
        module.weight_ih_l0.copy_(torch.eye(2))
    with fusedrnn.record_gradients(module) as rec:
        module(torch.ones(100, 2, 2))[0][1::2].sum().backward()
    assert (rec.layers[0].verdict, rec.layers[0].steps) == ("unknown", 1)


@pytest.mark.parametrize("short", [63, 1])
def test_short_sequences_say_nothing_of_a_long_one(short: int) -> None:
    """Everything in a row is of one sample, and measured."""
    module = fusedrnn.LSTM(8, 32)
    fusedrnn.init.chrono_(module, 1000)
    lengths, x = torch.tensor([100] + [2] * short), torch.randn(100, 1 + short, 8)
    with fusedrnn.record_gradients(module) as rec:
        module(x, lengths=lengths)[0][lengths - 1, torch.arange(1 + short)].sum().backward()
        module(x[:, :1])[0][-1].sum().backward()
    ragged, alone = rec.layers
    assert ragged.verdict == alone.verdict == "steady" and ragged.steps == alone.steps == 99
    assert ragged.change == pytest.approx(alone.change, rel=1e-4) and ragged.ends == pytest.approx(alone.ends, rel=1e-4)
    assert ragged.change == pytest.approx(ragged.ends[1] / ragged.ends[0], rel=1e-4)


@pytest.mark.parametrize("vanishing", [1, 7])
def test_a_sample_that_explodes_is_not_averaged_away(vanishing: int) -> None:
    module = fusedrnn.RNN(2, 2, bias=False, nonlinearity="relu").double()
    with torch.no_grad():
        module.weight_hh_l0.copy_(torch.diag(torch.tensor([0.5, 2.0])))
        module.weight_ih_l0.copy_(torch.eye(2))
    with fusedrnn.record_gradients(module) as rec:
        y, _ = module(torch.ones(40, vanishing + 1, 2).double())
        (y[-1, :-1, 0].sum() + y[-1, -1, 1]).backward()
    (layer,) = rec.layers
    assert layer.verdict == "exploding" and layer.change == pytest.approx(2.0**39)
    assert layer.ends == pytest.approx((1.0, 2.0**39))


@pytest.mark.parametrize("factors, median", [((0.5, 0.9, 1.0), 0.9), ((1.0, 0.9, 0.5, 0.4), 0.5)])
def test_without_growth_a_row_is_of_the_median_sample(factors: tuple[float, ...], median: float) -> None:
    n = len(factors)
    module = fusedrnn.RNN(n, n, bias=False, nonlinearity="relu").double()
    with torch.no_grad():
        module.weight_hh_l0.copy_(torch.diag(torch.tensor(factors, dtype=torch.float64)))
        module.weight_ih_l0.copy_(torch.eye(n))
    with fusedrnn.record_gradients(module) as rec:
        module(torch.ones(40, n, n).double())[0][-1].diagonal().sum().backward()  # of sample i, unit i
    (layer,) = rec.layers
    assert layer.decay == pytest.approx(median, rel=1e-6) and layer.ends == pytest.approx((1.0, median**39), rel=1e-6)


def test_a_loss_at_every_step_of_very_many() -> None:
    """In the balance of what enters and what is lost, no step seems to change anything."""
    module = fusedrnn.RNN(1, 1, bias=False, nonlinearity="relu").double()
    with torch.no_grad():
        module.weight_hh_l0.fill_(0.9992)
        module.weight_ih_l0.fill_(1.0)
    x = torch.rand(12000, 1, 1).double()
    with fusedrnn.record_gradients(module) as rec:
        module(x)[0].sum().backward()
        module(x)[0][-1].sum().backward()
    every, last = rec.layers
    assert (every.verdict, every.steps, every.enters) == ("unknown", 0, "at every step")
    assert last.verdict == "vanishing" and last.change == pytest.approx(0.9992**11999)


def test_one_step_of_many_is_named() -> None:
    module = multiple_of_identity(0.9, nonlinearity="relu")
    with fusedrnn.record_gradients(module) as rec:
        module(torch.rand(1000, 1, 3).double())[0][500].sum().backward()
    assert rec.layers[0].enters == "at 1 of 1000 steps"


def test_what_is_not_finite_is_told_from_what_explodes() -> None:
    module, x = multiple_of_identity(0.9, nonlinearity="relu").float(), torch.rand(39, 2, 3) + 0.1
    everywhere, at_last = (slice(None), math.nan, "at every step"), (slice(-1, None), math.inf, "at the last step")
    for part, bad, enters in (everywhere, at_last):
        with fusedrnn.record_gradients(module) as rec:
            (module(x)[0][part] * bad).sum().backward()
        (layer,) = rec.layers
        assert (layer.verdict, layer.enters) == ("not finite", enters)
        assert "set_detect_anomaly" in rec.summary() and "grad_clip=" not in rec.summary()
        assert layer.h.isinf().any() and not layer.h.isnan().any()
    wild = multiple_of_identity(1e5, nonlinearity="relu").float()
    with fusedrnn.record_gradients(wild) as rec:
        wild(x)[0][-1].sum().backward()
    assert rec.layers[0].verdict == "exploding" and rec.layers[0].h.isinf().any() and "grad_clip=" in rec.summary()


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
    elsewhere = torch.device("meta")
    with elsewhere:
        with fusedrnn.record_gradients(module) as other:
            module(x, lengths=[5, 2])[0].sum().backward()
        assert other.summary() == rec.summary()
        pytest.importorskip("matplotlib")
        other.plot()


def test_pictures(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    module = fusedrnn.GRU(3, 4, num_layers=2)
    with fusedrnn.record_gradients(module) as rec:
        module(torch.randn(9, 3, 3), lengths=[9, 4, 0])[0].sum().backward()
    figure = rec.plot(tmp_path / "flow.png")
    assert (tmp_path / "flow.png").read_bytes().startswith(b"\x89PNG")
    lines, gates, heat = figure.axes[:3]
    assert [line.get_label().split(":")[0] for line in lines.lines[::3]] == ["model.l1", "model.l0"]
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


def test_the_meta_device_has_no_norms() -> None:
    module = fusedrnn.GRU(3, 4, device="meta")
    y, _ = module(torch.randn(5, 2, 3, device="meta"))
    with fusedrnn.record_gradients(module), pytest.raises(RuntimeError, match="on the meta device have no norms"):
        y.sum().backward()
